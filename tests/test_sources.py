import gzip
import os
import subprocess
import tracemalloc
from pathlib import Path

import pytest

from batchjob.data.sources import ImageIndex, index_images
from batchjob.errors import UserError
from tests.image_files import PNG, causes, png, write, write_tar


def test_a_folder_gives_its_images_at_any_depth_and_letter_case_in_the_order_of_their_paths(tmp_path):
    for name in (
        "b.JPG",
        "a/deep/er/x.Png",
        "a/deep.webp",
        "B.tiff",
        "a.jpeg",
        "notes.txt",
        ".hidden.jpg",
        ".git/y.png",
    ):
        write(tmp_path / name)
    assert index_images(str(tmp_path)).ids() == ["B.tiff", "a.jpeg", "a/deep.webp", "a/deep/er/x.Png", "b.JPG"]


@pytest.mark.parametrize("base", ["", "images/"])
def test_a_coco_root_gives_its_splits_and_their_annotations_in_both_layouts(tmp_path, base):
    write(tmp_path / base / "train2017" / "000000000009.jpg")
    write(tmp_path / base / "val2017" / "000000000139.jpg")
    write(tmp_path / "annotations" / "instances_val2017.json", b"{}")
    write(tmp_path / "annotations" / "panoptic_val2017" / "000000000139.png")
    both = index_images(str(tmp_path))
    assert both.ids() == [f"{base}train2017/000000000009.jpg", f"{base}val2017/000000000139.jpg"]
    one = index_images(str(tmp_path), split="val2017")
    assert one.ids() == [f"{base}val2017/000000000139.jpg"]
    assert one.annotations == both.annotations == str(tmp_path / "annotations" / "instances_val2017.json")
    with pytest.raises(UserError, match="did you mean 'val2017'"):
        index_images(str(tmp_path), split="val2071")
    with pytest.raises(UserError, match="it has no folders; leave --split out"):
        index_images(str(tmp_path / base / "val2017"), split="val2017")


def test_a_saved_index_reads_as_it_was(tmp_path):
    write(tmp_path / "data" / os.fsdecode(b"\xff.png"))
    write(tmp_path / "data" / "ünï\n.png")
    index = index_images(str(tmp_path / "data"))
    index.save(tmp_path / "index")
    again = ImageIndex.load(tmp_path / "index")
    assert again.ids() == index.ids() == ["ünï\n.png", "\\xff.png"]
    assert again.read(0) == again.read(1) == PNG


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.tar", b"<html>" * 200, "is asked for as a tar and is not one"),
        ("t.tar", gzip.compress(b"x" * 5000, mtime=0), "unzip it"),
        ("t.tgz", b"", "not compressed"),
        ("t.tar", bytes(10240), "has no image"),
        ("t.csv", b"a,b\n1,2\n", "has the columns a, b; one of them must be named path"),
        ("t.csv", b"id,path\n1\n", "line 2 .* has 1 of 2 columns"),
        ("t.txt", b"\n\n", "names no image"),
        ("t.doc", b"", "is a .doc file"),
    ],
)
def test_data_of_another_kind_is_an_error_that_says_what_to_give(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        index_images(str(tmp_path / name))


def test_data_that_is_not_there_or_holds_no_image_is_an_error(tmp_path):
    write(tmp_path / "sub" / "a.doc")
    for data, message in (
        (str(tmp_path / "none"), "is not a file or a folder"),
        (str(tmp_path), r"has no image; found: 1 \.doc; read are .*\.jpg"),
        (str(tmp_path / "{00..02}.tar"), "3 of 3 shards .* are not there"),
        (str(tmp_path / "{00..02}.zip"), "other than .tar"),
    ):
        with pytest.raises(UserError, match=message):
            index_images(data)
    write(tmp_path / "sub" / "b.tar")
    with pytest.raises(UserError, match="it has 1 tar: name each"):
        index_images(str(tmp_path))


def test_equal_names_in_other_folders_are_rows_of_their_own_and_equal_ids_are_refused_by_name(tmp_path):
    write(tmp_path / "a" / "x.png")
    write(tmp_path / "b" / "x.png")
    assert index_images(str(tmp_path)).ids() == ["a/x.png", "b/x.png"]
    (tmp_path / "l.csv").write_text("path,id\na/x.png,7\nb/x.png,8\nb/x.png,7\n")
    with pytest.raises(UserError, match=r"id '7' is given to two images, .*a/x\.png and .*b/x\.png"):
        index_images(str(tmp_path / "l.csv"))
    (tmp_path / "raw").mkdir()
    for name in (b"\xff.png", b"\\xff.png"):
        (tmp_path / "raw" / os.fsdecode(name)).write_bytes(png(1))
    with pytest.raises(UserError, match=r"in one of them .xNN are the characters, in the other a byte"):
        index_images(str(tmp_path / "raw"))
    (tmp_path / "l.txt").write_text("a/x.png\na/x.png\n")
    with pytest.raises(UserError, match="is named twice"):
        index_images(str(tmp_path / "l.txt"))


def test_links_to_folders_are_followed_but_not_in_a_loop(tmp_path):
    write(tmp_path / "data" / "a" / "x.png")
    write(tmp_path / "other" / "y.png")
    (tmp_path / "data" / "a" / "up").symlink_to("..")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "data" / "loop.png").symlink_to("loop.png")
    assert index_images(str(tmp_path / "data")).ids() == ["a/x.png", "link/y.png", "loop.png"]


def test_a_folder_named_like_an_image_is_a_row_or_a_folder_of_images(tmp_path):
    (tmp_path / "empty.jpg").mkdir()
    write(tmp_path / "full.jpg" / "x.png")
    os.mkfifo(tmp_path / "fifo.png")
    index = index_images(str(tmp_path))
    assert index.ids() == ["empty.jpg", "fifo.png", "full.jpg/x.png"]
    assert causes(index) == ["unreadable", "unreadable", "ok"]


def test_a_folder_that_can_t_be_listed_is_an_error_and_not_a_gap(tmp_path):
    write(tmp_path / "data" / "secret" / "x.png")
    (tmp_path / "data" / "secret").chmod(0)
    for above in (tmp_path, *list(tmp_path.parents)[:3]):
        above.chmod(0o755)
    me = os.geteuid()
    if me == 0:  # root may list everything, so list as the user nobody
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"secret' can't be \w+ \(Permission denied\)"):
            index_images(str(tmp_path / "data"))
    finally:
        os.seteuid(me)
        (tmp_path / "data" / "secret").chmod(0o755)


def test_very_deep_folders_are_walked(tmp_path):
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1100):
            os.mkdir("d")
            os.chdir("d")
        Path("x.png").write_bytes(PNG)
        index = index_images(str(tmp_path))
        assert len(index) == 1
        assert index.read(0) == PNG
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)  # pytest's own removal recurses too deep


def test_limit_takes_the_first_rows_of_every_source(tmp_path):
    for i in range(5):
        write(tmp_path / "f" / f"{i}.png")
    write_tar(tmp_path / "t.tar", [(f"{i}.png", PNG) for i in range(5)])
    (tmp_path / "l.txt").write_text("".join(f"f/{i}.png\n" for i in range(5)))
    for data in ("f", "t.tar", "l.txt"):
        assert len(index_images(str(tmp_path / data), limit=3)) == 3


def test_a_single_image_is_data(tmp_path):
    write(tmp_path / "x.png")
    assert index_images(str(tmp_path / "x.png")).ids() == ["x.png"]


def test_planning_shows_its_progress_and_its_memory(tmp_path, capfd):
    (tmp_path / "l.txt").write_text("".join(f"{i}.png\n" for i in range(20_000)))
    index_images(str(tmp_path / "l.txt"), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "images found: 20000" in err
    assert " MB" in err


def test_a_row_costs_its_name_and_a_few_dozen_bytes(tmp_path):
    count = 50_000
    (tmp_path / "l.txt").write_text("".join(f"train2017/{i:012}.jpg\n" for i in range(count)))
    tracemalloc.start()
    index = index_images(str(tmp_path / "l.txt"))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak / count < 150
    assert kept / count < 80  # 26 of them for the name
    index.save(tmp_path / "index")
    written = sum(p.stat().st_size for p in (tmp_path / "index").iterdir())
    assert written / count < 60  # 16 of them for the size and the time of change that `plan` saw


@pytest.mark.slow
def test_a_million_files_are_planned_in_little_memory(tmp_path):
    for i in range(1000):
        folder = tmp_path / f"{i:04}"
        folder.mkdir()
        for j in range(1000):
            os.symlink("x", folder / f"{j:012}.jpg")
    tracemalloc.start()
    index = index_images(str(tmp_path), progress=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == 1_000_000
    assert peak < 150e6
    assert index.id(999_999) == "0999/000000000999.jpg"

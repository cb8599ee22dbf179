import gzip
import io
import json
import os
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from batchjob.data.reading import ReadFailure
from batchjob.data.sources import ImageIndex, index_images
from batchjob.data.tars import expand
from batchjob.errors import UserError


def png(red: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


PNG = png()


def write(path, data=PNG):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


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


def test_tars_give_one_row_a_sample_named_by_tar_and_key_or_by_the_json_beside_it(tmp_path):
    write_tar(tmp_path / "s-00.tar", [("x/0001.jpg", png(1)), ("x/0001.txt", b"cat"), ("x/0002.jpg", png(2))])
    write_tar(tmp_path / "s-01.tar", [("7.json", json.dumps({"image_id": 139}).encode()), ("7.jpg", png(3))])
    index = index_images(str(tmp_path / "s-{00..01}.tar"))
    assert index.ids() == ["s-00.tar/x/0001", "s-00.tar/x/0002", "139"]
    assert [index.read(i) for i in range(3)] == [png(1), png(2), png(3)]
    index.close()


def test_lists_give_paths_as_they_are_written_below_the_list_s_folder(tmp_path):
    write(tmp_path / "a b.png")
    (tmp_path / "list.txt").write_text(f"a b.png\n\n{tmp_path / 'a b.png'}\r\nnone.png\n")
    index = index_images(str(tmp_path / "list.txt"))
    assert index.ids() == ["a b.png", str(tmp_path / "a b.png"), "none.png"]
    assert index.read(0) == index.read(1) == PNG
    with pytest.raises(ReadFailure) as failure:
        index.read(2)
    assert failure.value.cause == "missing"


def test_a_csv_gives_the_paths_of_its_column_and_ids_where_it_has_them(tmp_path):
    (tmp_path / "list.csv").write_text('Image_ID,file_name\n7,"a, b.png"\n8,"new\nline.png"\n')
    write(tmp_path / "a, b.png")
    write(tmp_path / "new\nline.png")
    index = index_images(str(tmp_path / "list.csv"))
    assert index.ids() == ["7", "8"]
    assert index.read(0) == index.read(1) == PNG


def test_a_saved_index_reads_as_it_was(tmp_path):
    write(tmp_path / "data" / os.fsdecode(b"\xff.png"))
    write(tmp_path / "data" / "ünï\n.png")
    index = index_images(str(tmp_path / "data"))
    index.save(tmp_path / "index")
    again = ImageIndex.load(tmp_path / "index")
    assert again.ids() == index.ids() == ["ünï\n.png", "\\xff.png"]
    assert again.read(0) == again.read(1) == PNG


def test_a_braced_range_is_expanded_as_a_shell_does_it():
    assert expand("s-{08..11}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]
    assert expand("{a,b}/{2..0}.tar") == ["a/2.tar", "a/1.tar", "a/0.tar", "b/2.tar", "b/1.tar", "b/0.tar"]
    assert expand("a{b}c.tar") == ["a{b}c.tar"]


def test_the_first_picture_of_a_sample_counts_and_dotted_names_are_samples_of_their_own(tmp_path):
    members = [("a.jpg", png(1)), ("a.png", png(2)), ("a.seg.png", png(3)), ("IMG.2020.jpg", png(4)), ("._a.jpg", PNG)]
    write_tar(tmp_path / "t.tar", members)
    index = index_images(str(tmp_path / "t.tar"))
    assert index.ids() == ["t.tar/a", "t.tar/IMG.2020"]
    assert [index.read(i) for i in (0, 1)] == [png(1), png(4)]
    assert "1 pictures left out" in index.remarks[0]


def test_long_and_strange_names_in_a_tar_are_read(tmp_path):
    names = ["d" * 90 + "/" + "e" * 150 + ".png", "ünï\n\"'.png", os.fsdecode(b"\xff.png")]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "t.tar", "w", format=format, errors="surrogateescape") as tar:
            for i, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size = len(png(i))
                tar.addfile(info, io.BytesIO(png(i)))
        index = index_images(str(tmp_path / "t.tar"))
        assert index.ids() == ["t.tar/" + names[0][:-4], "t.tar/ünï\n\"'", "t.tar/\\xff"]
        assert [index.read(i) for i in range(3)] == [png(i) for i in range(3)]
        index.close()


def cut_tar(path, at: int) -> ImageIndex:
    path.write_bytes(path.read_bytes()[:at])
    return index_images(str(path))


def causes(index) -> list[str]:
    found = []
    for i in range(len(index)):
        try:
            index.read(i)
            found.append("ok")
        except ReadFailure as failure:
            found.append(failure.cause)
    return found


@pytest.fixture
def four(tmp_path):
    """A tar of four pictures, each a header of 512 bytes and data of 512, and an end mark."""
    write_tar(tmp_path / "t.tar", [(f"{i}.png", PNG) for i in range(4)])
    assert len(PNG) < 512
    return tmp_path / "t.tar"


def test_a_tar_cut_inside_a_member_costs_that_member_by_name(four):
    index = cut_tar(four, 2 * 1024 + 512 + 20)
    assert index.ids() == ["t.tar/0", "t.tar/1", "t.tar/2"]
    assert causes(index) == ["ok", "ok", "truncated"]
    assert str(four) in index.remarks[0]
    with pytest.raises(ReadFailure, match=r"t\.tar is cut off inside it, after 20 of \d+ bytes"):
        index.read(2)


@pytest.mark.parametrize("at", [2 * 1024, 2 * 1024 + 200])
def test_a_tar_cut_between_members_or_in_a_header_gets_a_row_that_says_so(four, at):
    index = cut_tar(four, at)
    assert index.ids() == ["t.tar/0", "t.tar/1", "t.tar/(cut off)"]
    assert causes(index) == ["ok", "ok", "missing"]
    assert f"{four} is cut off after {at} bytes" in index.remarks[0]


def test_a_damaged_header_and_an_empty_tar_get_a_row_that_says_so(four):
    data = bytearray(four.read_bytes())
    data[1024 + 100] ^= 255
    four.write_bytes(data)
    index = index_images(str(four))
    assert causes(index) == ["ok", "missing"]
    assert index.remarks == [f"{four} is damaged at byte 1024"]
    four.write_bytes(b"")
    assert causes(index_images(str(four))) == ["missing"]


def test_links_in_a_tar_are_rows_that_say_so(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE), ("c", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x.png"
            tar.addfile(info)
    index = index_images(str(tmp_path / "t.tar"))
    assert causes(index) == ["unreadable", "unreadable"]


def test_a_tar_that_changed_since_it_was_planned_is_refused(four):
    index = index_images(str(four))
    index.check()
    os.utime(four, (1, 1))
    with pytest.raises(UserError, match="has changed since it was planned"):
        index.check()
    four.unlink()
    index.check()
    assert causes(index) == ["missing"] * 4


def test_more_tars_than_descriptors_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("batchjob.data.shards.OPEN_TARS", 2)
    for i in range(5):
        write_tar(tmp_path / f"{i}.tar", [("a.png", png(i))])
    index = index_images(str(tmp_path / "{0..4}.tar"))
    assert [index.read(i) for i in (0, 1, 2, 3, 4, 0, 4)] == [png(i) for i in (0, 1, 2, 3, 4, 0, 4)]
    assert len(index._reader._open) == 2
    index.close()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.tar", b"<html>" * 200, "is asked for as a tar and is not one"),
        ("t.tar", gzip.compress(b"x" * 5000), "unzip it"),
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
    with pytest.raises(UserError, match="it has 1 tars: name them"):
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
    if me == 0:  # root lists everything: ask as nobody
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"secret' can't be \w+ \(Permission denied\)"):
            index_images(str(tmp_path / "data"))
    finally:
        os.seteuid(me)
        (tmp_path / "data" / "secret").chmod(0o755)


def test_folders_deeper_than_a_stack_are_walked(tmp_path):
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


def test_one_image_is_data_too(tmp_path):
    write(tmp_path / "x.png")
    assert index_images(str(tmp_path / "x.png")).ids() == ["x.png"]


def test_planning_shows_its_progress_and_its_memory(tmp_path, capfd):
    (tmp_path / "l.txt").write_text("".join(f"{i}.png\n" for i in range(20_000)))
    index_images(str(tmp_path / "l.txt"), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "20000 images" in err
    assert " MB" in err


def test_a_row_costs_its_name_and_a_few_dozen_bytes(tmp_path):
    count = 50_000
    (tmp_path / "l.txt").write_text("".join(f"train2017/{i:012}.jpg\n" for i in range(count)))
    tracemalloc.start()
    index = index_images(str(tmp_path / "l.txt"))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak / count < 150
    assert kept / count < 80  # 26 of them are the name's
    index.save(tmp_path / "index")
    written = sum(p.stat().st_size for p in (tmp_path / "index").iterdir())
    assert written / count < 60  # 16 of them are the size and the time of change that `plan` saw


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


def write_list(folder: Path, name: str, text: str, encoding: str = "utf-8") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode(encoding))
    return str(folder / name)


def test_a_list_that_is_not_utf_8_text_is_one_line_with_the_place(tmp_path: Path) -> None:
    for name, encoding in (("utf16.txt", "utf-16"), ("utf16.csv", "utf-16-le")):
        with pytest.raises(UserError, match=r"line 1 of .* holds NUL: it is not UTF-8 text"):
            index_images(write_list(tmp_path, name, "path\nimgs/0.jpg\n", encoding))
    with pytest.raises(UserError, match=r"line 3 of .*nul.csv' holds NUL"):
        index_images(write_list(tmp_path, "nul.csv", "path\na.jpg\nb\0.jpg\n"))


def test_long_fields_beside_the_path_are_read_over(tmp_path: Path) -> None:
    rows = 'path,rle\na.jpg,"' + "1 2 " * 22000 + '"\nb.jpg,"' + "1 2 " * 34000 + '"\n'
    assert index_images(write_list(tmp_path, "big.csv", rows)).ids() == ["a.jpg", "b.jpg"]


def test_a_quote_that_is_left_open_is_refused_with_its_line(tmp_path: Path) -> None:
    rows = 'path,note\nimgs/0.jpg,"5 inch\nimgs/1.jpg,x\nimgs/2.jpg,y\n'
    with pytest.raises(UserError, match=r"line 2 of .*unclosed.csv' opens a quote that nothing closes"):
        index_images(write_list(tmp_path, "unclosed.csv", rows))
    with pytest.raises(UserError, match=r"line 2 of .*amid.csv' is not CSV"):
        index_images(write_list(tmp_path, "amid.csv", 'path,note\na.jpg,"5" inch\n'))


def test_a_path_that_a_list_names_twice_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"imgs/0.jpg is named twice \(1 such pairs\), in rows 1 and 3 of the data"):
        index_images(write_list(tmp_path, "twice.csv", "path,label\nimgs/0.jpg,1\nimgs/1.jpg,1\nimgs/0.jpg,2\n"))
    with pytest.raises(UserError, match=r"id '7' is given to two images"):
        index_images(write_list(tmp_path, "ids.csv", "path,id\n0.jpg,7\n1.jpg,7\n"))


def test_tars_written_one_after_another_are_read_on_and_what_is_no_tar_is_told(tmp_path: Path) -> None:
    for name, members in (("a.tar", ["a0.jpg", "a1.jpg"]), ("b.tar", ["b0.jpg", "b1.jpg"])):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member in members:
                info = tarfile.TarInfo(member)
                info.size = 3
                tar.addfile(info, io.BytesIO(member[:2].encode() + b"!"))
    both = (tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes()
    (tmp_path / "cat.tar").write_bytes(both)
    index = index_images(str(tmp_path / "cat.tar"))
    assert index.ids() == [f"cat.tar/{name}" for name in ("a0", "a1", "b0", "b1")]
    assert [index.read(i) for i in range(4)] == [b"a0!", b"a1!", b"b0!", b"b1!"]
    assert index.remarks == []
    (tmp_path / "junk.tar").write_bytes(both + b"x" * 700)
    index = index_images(str(tmp_path / "junk.tar"))
    assert len(index) == 4
    assert index.remarks == [f"{tmp_path / 'junk.tar'}: 700 bytes behind its end mark are not a tar; left out"]


def test_tars_are_known_in_any_letter_case_and_by_a_pattern(tmp_path: Path) -> None:
    for name in ("s-1.TAR", "s-0.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.addfile(tarfile.TarInfo("x.jpg"), io.BytesIO())
    assert index_images(str(tmp_path / "s-1.TAR")).ids() == ["s-1.TAR/x"]
    assert index_images(str(tmp_path / "s-*.[tT]*")).ids() == ["s-0.tar/x", "s-1.TAR/x"]
    with pytest.raises(UserError, match="is not a file or a folder"):
        index_images(str(tmp_path / "t-*.tar"))

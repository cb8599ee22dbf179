import io
import json
import os
import tarfile

import pytest
from PIL import Image

from batchjob.errors import UserError
from batchjob.images import ReadFailure
from batchjob.sources import ImageIndex, index_images


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
    assert one.coco_id(0) == "000000000139.jpg"
    assert one.annotations == both.annotations == str(tmp_path / "annotations" / "instances_val2017.json")
    with pytest.raises(UserError, match="did you mean 'val2017'"):
        index_images(str(tmp_path), split="val2071")


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

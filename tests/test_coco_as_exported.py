"""COCO JSON as exporters write it: annotations are read, or left out and counted by cause, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchjob.data import annotations as coco
from batchjob.data.masks import BadMask, check_rle, mask_of
from batchjob.errors import UserError
from batchjob.geometry import Geometry

SIDE = 64
GRID = Geometry(SIDE, SIDE, 16, 16)
BOX = [8, 8, 40, 8, 40, 40, 8, 40]


def image(number: int, name: str, **more: Any) -> dict[str, Any]:
    return {"id": number, "file_name": name, "height": SIDE, "width": SIDE} | more


def annotation(segmentation: Any, **more: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": 1, "category_id": 1, "segmentation": segmentation, "iscrowd": 0} | more


def write(path: Path, second: Any, **more: Any) -> Path:
    """Opens a file with a plain annotation and a second one."""
    content = {"images": [image(1, "0.jpg")], "annotations": [annotation([BOX]), second]}
    path.write_text(json.dumps(content | {"categories": [{"id": 1, "name": "cat"}]} | more))
    return path


def opened(folder: Path, second: Any, **more: Any) -> coco.AnnotationFiles:
    return coco.open_annotations(write(folder / "a.json", second, **more))


def second_mask(files: coco.AnnotationFiles) -> Any:
    one = next(iter(files)).instances[1]
    return mask_of(one.segments, SIDE, SIDE)


# ---- which image ----


def names(folder: Path, entries: list[dict[str, Any]]) -> coco.AnnotationFiles:
    content = {"images": entries, "annotations": [annotation([BOX], image_id=e["id"]) for e in entries]}
    (folder / "a.json").write_text(json.dumps(content | {"categories": [{"id": 1, "name": "cat"}]}))
    return coco.open_annotations(folder / "a.json")


def test_an_id_is_not_a_file_name(tmp_path: Path) -> None:
    found = names(tmp_path, [image(n - 6, f"{n}.jpg") for n in (7, 8, 9)])
    joined = found.join([f"{n}.jpg" for n in range(10)], "photos")
    assert sorted(joined.entries) == ["7.jpg", "8.jpg", "9.jpg"]
    assert joined.remarks()[0] == "annotations: 3 of 10 images are annotated"


def test_annotations_that_fit_no_image_are_refused_with_a_name_of_each_side(tmp_path: Path) -> None:
    found = names(tmp_path, [image(n + 100, f"foo{n}.jpg") for n in range(3)])
    with pytest.raises(UserError, match=r"annotates none of the 2 images of photos: .* 'foo0.jpg', .* such as '0.jpg'"):
        found.join(["0.jpg", "1.jpg"], "photos")


def test_separators_of_windows_and_longer_paths_join_by_the_longest_common_end(tmp_path: Path) -> None:
    found = names(tmp_path, [image(n, f"images\\{n - 1}.jpg") for n in (1, 2, 3)])
    joined = found.join([f"images/{n}.jpg" for n in range(3)], "photos")
    assert [joined.image(f"images/{n}.jpg").key for n in range(3)] == [f"images\\{n}.jpg" for n in range(3)]  # type: ignore[union-attr]
    found = names(tmp_path, [image(1, "train/0001.jpg"), image(2, "val/0001.jpg")])
    joined = found.join(["data/val/0001.jpg", "data/train/0001.jpg"], "photos")
    assert [found.keys[joined.entries[f"data/{s}/0001.jpg"]] for s in ("train", "val")] == found.keys


def test_two_rows_that_fit_one_entry_are_refused_with_both(tmp_path: Path) -> None:
    found = names(tmp_path, [image(1, "0001.jpg")])
    with pytest.raises(UserError, match=r"entry '0001.jpg' could be the image 'train/0001.jpg' or 'val/0001.jpg'"):
        found.join(["train/0001.jpg", "val/0001.jpg"], "photos")
    assert found.join(["val/0001.jpg", "0001.jpg"], "photos").entries == {"0001.jpg": 0}  # equal paths come first


def test_a_join_across_folders_of_other_names_is_reported(tmp_path: Path) -> None:
    joined = names(tmp_path, [image(1, "images/1.jpg")]).join(["val/1.jpg"], "photos")
    assert "'val/1.jpg' was taken for 'images/1.jpg'" in joined.remarks()[1]


def test_ids_decide_where_no_entry_has_a_file_name(tmp_path: Path) -> None:
    entries = [{"id": n, "height": SIDE, "width": SIDE} for n in (7, 8)]
    joined = names(tmp_path, entries).join(["val2017/000000000008.jpg", "x.jpg"], "photos")
    assert list(joined.entries) == ["val2017/000000000008.jpg"]


# ---- what is left out, and why ----

RLE = {"size": [SIDE, SIDE], "counts": [100, 50, SIDE * SIDE - 150]}
LEFT_OUT = {
    "NaN": (annotation([[10, 10, float("nan"), 10, 90, 90]]), "polygon with a coordinate that is not"),
    "null": (annotation([[10, 10, None, 10, 60, 60]]), "polygon with a coordinate that is not a number"),
    "far outside": (annotation([[10, 10, 1e9, 10, 60, 60]]), "polygon that lies far outside"),
    "odd": (annotation([[10, 10, 20, 10, 60, 60, 7]]), "polygon with an odd number"),
    "no category": (annotation([BOX], category_id=None), "category_id that is not a whole number"),
    "category of 2^40": (annotation([BOX], category_id=2**40), "category_id that is not a whole number"),
    "no counts": (annotation({"size": [SIDE, SIDE], "counts": None}), "neither polygons nor an RLE"),
    "printed bytes": (annotation({"size": [SIDE, SIDE], "counts": "b'PXb15g5'"}), "RLE that does not add up"),
    "short": (annotation({"size": [SIDE, SIDE], "counts": [2000, 500]}), "RLE that does not add up"),
    "negative": (annotation({"size": [SIDE, SIDE], "counts": [-5, SIDE * SIDE + 5]}), "RLE that does not add up"),
    "another size": (annotation({"size": [9, 9], "counts": [0, 81]}), "RLE of another size than its image"),
    "not an object": ([1, 2], "annotation without an image_id"),
    "nobody's": (annotation([BOX], image_id=77), "image_id that no image has"),
    "crowd": (annotation([BOX], iscrowd="perhaps"), "iscrowd that is neither 0 nor 1"),
    "no mask": (annotation([]), "no mask"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_an_annotation_without_a_usable_mask_is_left_out_and_counted_by_cause(name: str, tmp_path: Path) -> None:
    second, cause = LEFT_OUT[name]
    files = opened(tmp_path, second)
    assert [n for text, n in files.left_out.items() if cause in text] == [1], files.left_out
    joined = files.join(["0.jpg"], "photos")
    assert any(cause in line for line in joined.remarks())
    assert coco.instances_on_grid(joined.image("0.jpg"), GRID, SIDE, SIDE).category.tolist() == [1]  # type: ignore[arg-type]


READ = {
    "points in pairs": [[[8, 8], [40, 8], [40, 40], [8, 40]]],
    "points in pairs, more": [[[8, 8], [24, 8], [40, 8], [40, 40], [24, 40], [8, 40]]],
    "one flat polygon": BOX,
    "text": [[str(v) for v in BOX]],
}


@pytest.mark.parametrize("name", READ)
def test_polygons_are_read_however_they_are_nested(name: str, tmp_path: Path) -> None:
    files = opened(tmp_path, annotation(READ[name]))
    assert not files.left_out
    first, second = next(iter(files)).instances
    assert (mask_of(first.segments, SIDE, SIDE) == mask_of(second.segments, SIDE, SIDE)).all()


def test_an_rle_in_a_list_is_an_rle(tmp_path: Path) -> None:
    assert second_mask(opened(tmp_path, annotation([RLE]))).sum() == 50


@pytest.mark.parametrize("box", [[None] * 4, None, "left", [1, 2]])
def test_a_box_that_is_null_is_ignored(box: Any, tmp_path: Path) -> None:
    files = opened(tmp_path, annotation([BOX], bbox=box))
    assert not files.left_out
    assert next(iter(files)).instances[1].box is None


@pytest.mark.parametrize(("value", "is_crowd"), [("0", False), (0.0, False), (False, False), ("1", True), (1, True)])
def test_iscrowd_is_read_as_the_number_it_says(value: Any, is_crowd: bool, tmp_path: Path) -> None:
    assert next(iter(opened(tmp_path, annotation([BOX], iscrowd=value)))).instances[1].crowd is is_crowd


@pytest.mark.parametrize("image_id", [1.0, "1"])
def test_ids_may_be_floats_or_texts(image_id: Any, tmp_path: Path) -> None:
    assert len(next(iter(opened(tmp_path, annotation([BOX], image_id=image_id)))).instances) == 2


REFUSED = {
    "categories named": ({"categories": [{"id": "cat", "name": "cat"}]}, r"`categories`\[0\] has the id 'cat'"),
    "category too large": ({"categories": [{"id": 2**40, "name": "x"}]}, r"`categories`\[0\] has the id 1099511627776"),
    "images are texts": ({"images": ["0.jpg", "1.jpg"]}, r"`images`\[0\] is not an object"),
    "height with its unit": ({"images": [image(1, "0.jpg", height="224px")]}, r"\(0.jpg\) has the height '224px'"),
    "one id twice": ({"images": [image(1, "0.jpg"), image(1, "1.jpg")]}, r"the id 1 that `images`\[0\] has too"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ambiguous_images_or_categories_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    more, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path, annotation([BOX]), **more)
    assert "\n" not in str(error.value)


def test_a_short_rle_is_refused() -> None:
    with pytest.raises(BadMask):
        check_rle([SIDE, SIDE], [2000, 500], SIDE, SIDE)


def test_nan_in_a_field_that_is_not_read_is_ignored(tmp_path: Path) -> None:
    files = opened(tmp_path, annotation([BOX], area=float("nan"), note="NaN"))
    assert not files.left_out
    assert second_mask(files).any()


def test_a_file_that_changed_since_it_was_scanned_is_refused(tmp_path: Path) -> None:
    files = opened(tmp_path, annotation([BOX]))
    write(tmp_path / "a.json", annotation([BOX, BOX]))
    with pytest.raises(UserError, match="changed while it was in use"):
        files.at(0)


def test_panoptic_files_give_things_and_leave_stuff_out(tmp_path: Path) -> None:
    ids = np.zeros((SIDE, SIDE), np.int64)
    ids[:32], ids[32:, :32], ids[32:, 32:] = 5, 300, 70000
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    (tmp_path / "panoptic_x").mkdir()
    Image.fromarray(rgb).save(tmp_path / "panoptic_x" / "0.png")
    segments = [{"id": 5, "category_id": 1}, {"id": 300, "category_id": 2}, {"id": 70000, "category_id": 1}]
    content = {
        "images": [image(1, "0.jpg")],
        "annotations": [{"image_id": 1, "file_name": "0.png", "segments_info": segments}],
        "categories": [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}],
    }
    (tmp_path / "panoptic_x.json").write_text(json.dumps(content))
    files = coco.open_annotations(tmp_path / "panoptic_x.json")
    assert dict(files.left_out) == {"a segment of stuff, which has no instances": 1}
    found = coco.instances_on_grid(files.at(0), GRID, SIDE, SIDE)
    expected = np.full((4, 4), -1)
    expected[:2], expected[2:, 2:] = 0, 1
    assert found.owner.reshape(4, 4).tolist() == expected.tolist()
    assert found.category.tolist() == [1, 1]


@pytest.mark.parametrize("where", ["images", "categories", "annotations", "odd id", "image_id"])
def test_a_text_that_is_not_utf_8_is_refused_or_costs_its_annotation(where: str, tmp_path: Path) -> None:
    second = annotation([BOX], image_id="é" if where == "image_id" else 1)
    odd = {"annotations": {"file_name": "é"}, "odd id": {"file_name": "é", "id": ["no", "id"]}}.get(where, {})
    path = write(tmp_path / "a.json", second | odd)
    content = json.loads(path.read_text())
    if where in ("images", "categories"):
        content[where].append({"id": 9, "name": "é", "file_name": "é"})
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="latin-1")
    if where in ("images", "categories"):
        with pytest.raises(UserError, match=rf"(?i)`{where}`\[1\] is not an object with .*utf-8"):
            coco.open_annotations(path)
    else:
        assert sum(coco.open_annotations(path).left_out.values()) == 1

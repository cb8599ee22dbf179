"""Pascal VOC's folders, and those that other tools write in this layout, are checked like COCO's masks."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from batchjob.data import annotations as coco
from batchjob.errors import UserError
from batchjob.geometry import Geometry
from tests.conftest import TINY, Command
from tests.pictures import bomb

GRID = Geometry(4, 4, 1, 1)
OBJECTS = np.array([[1, 1, 2, 2], [1, 1, 2, 2], [255, 255, 0, 0], [3, 0, 0, 0]], np.uint8)
CLASSES = np.array([[8, 8, 12, 12], [8, 255, 12, 12], [255, 255, 0, 0], [8, 0, 0, 0]], np.uint8)


def make(root: Path, objects: Any = OBJECTS, classes: Any = CLASSES) -> coco.ImageAnnotations:
    """Returns the annotations of the one image of a VOC folder."""
    for name, values in (("SegmentationObject", objects), ("SegmentationClass", classes)):
        if values is not None:
            (root / name).mkdir(parents=True, exist_ok=True)
            picture = values if isinstance(values, Image.Image) else Image.fromarray(values)
            picture.save(root / name / "2007_000001.png")
    found = coco.open_annotations(root).image("JPEGImages/2007_000001.jpg")
    assert found is not None
    return found


def test_voc_folders_give_objects_their_classes_and_the_border_belongs_to_no_object(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    objects = np.array([[1, 1, 2, 2], [1, 1, 2, 2], [255, 255, 0, 0], [3, 0, 0, 0]], np.uint8)
    classes = np.array([[8, 8, 12, 12], [8, 255, 12, 12], [255, 255, 0, 0], [8, 0, 0, 0]], np.uint8)
    for name, values in (("SegmentationObject", objects), ("SegmentationClass", classes)):
        (root / name).mkdir(parents=True)
        Image.fromarray(values).save(root / name / "2007_000001.png")
    annotations = coco.open_annotations(tmp_path / "VOCdevkit")
    image = annotations.image("JPEGImages/2007_000001.jpg")
    assert image is not None
    found = coco.instances_on_grid(image, GRID, 4, 4)
    assert found.owner.reshape(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [-1] * 4, [-1] * 4]
    assert [annotations.categories[int(c)] for c in found.category] == ["cat", "dog"]
    assert found.boxes.tolist() == [[0, 0, 2, 2], [2, 0, 4, 2]]
    assert found.total == 3


def test_pictures_of_16_bits_and_of_two_values_are_read_as_numbers(tmp_path: Path) -> None:
    wide = make(tmp_path / "a", OBJECTS.astype(np.uint16) * 100, None)
    assert coco.instances_on_grid(wide, GRID, 4, 4).total == 4  # 25,500 is not the border
    mask = coco.instances_on_grid(make(tmp_path / "b", Image.fromarray(OBJECTS == 1), None), GRID, 4, 4)
    assert mask.owner.reshape(4, 4).tolist() == [[0, 0, -1, -1]] * 2 + [[-1] * 4] * 2


@pytest.mark.parametrize(
    ("objects", "classes", "message"),
    [
        (OBJECTS, CLASSES[:2], r"SegmentationClass\S+ is 4x2 pixels, and \S+ 4x4; give the pictures that belong"),
        (np.zeros((4, 4, 3), np.uint8), CLASSES, "SegmentationObject.* is a picture of colours; VOC's hold numbers"),
        (OBJECTS, np.zeros((4, 4, 3), np.uint8), "SegmentationClass.* is a picture of colours"),
        (np.arange(40_000, dtype=np.uint16).reshape(200, 200), None, "has 40000 objects; at most 32767"),
    ],
    ids=["another size", "colours", "colours of classes", "noise"],
)
def test_pictures_that_are_not_voc_s_are_refused_by_name(
    objects: Any, classes: Any, message: str, tmp_path: Path
) -> None:
    image = make(tmp_path, objects, classes)
    with pytest.raises(UserError, match=message):
        coco.instances_on_grid(image, GRID, *np.shape(objects)[:2])


def test_damaged_pictures_and_bombs_are_refused_by_name(tmp_path: Path) -> None:
    image = make(tmp_path)
    for name in ("SegmentationClass", "SegmentationObject"):
        path = tmp_path / name / "2007_000001.png"
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(UserError, match=f"the masks of .*{name}.* can't be read"):
            coco.instances_on_grid(image, GRID, 4, 4)
    (tmp_path / "SegmentationObject" / "2007_000001.png").write_bytes(bomb(10_000, 10_000))
    with pytest.raises(UserError, match="has 10000x10000 pixels; at most"):
        coco.instances_on_grid(image, GRID, 4, 4)


def test_masks_of_another_size_than_the_photo_are_not_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="annotated at 4x4, the image is 8x8"):
        coco.instances_on_grid(make(tmp_path), GRID, 8, 8)


def test_classes_unknown_to_voc_are_named_by_number_and_no_class_is_called_object(
    tmp_path: Path, batchjob: Command
) -> None:
    """Runs dataset scope, whose tables name the category of each patch."""
    objects = np.repeat(np.repeat(OBJECTS, 16, 0), 16, 1)
    classes = np.where(objects == 1, 33, 0).astype(np.uint8)
    (tmp_path / "JPEGImages").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        tmp_path / "JPEGImages" / "2007_000001.jpg"
    )
    make(tmp_path, objects, classes)
    options = ["--scope", "dataset", "--workers", 0, "--annotations", tmp_path]
    ended = batchjob("run", tmp_path / "JPEGImages", tmp_path / "run", *TINY, *options)
    assert ended.code == 0, ended.err
    ended = batchjob("stats", tmp_path / "run")
    assert ended.code == 0, ended.err
    table = pd.read_parquet(tmp_path / "run" / "stats" / "codebook_categories.parquet")
    assert set(table["category"]) == {"no instance", "33", "object"}

"""Annotations: what COCO and VOC files say, and where it lands on the patch grid."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from threadpoolctl import threadpool_limits

from batchjob.data import annotations as coco
from batchjob.data.masks import mask_of as decode
from batchjob.errors import UserError
from batchjob.geometry import Geometry

GRID = Geometry(4, 4, 1, 1)  # an image of 4x4 pixels is its own patch grid


def rectangle(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def write_coco(path: Path, annotations: list[dict[str, Any]], images: list[dict[str, Any]] | None = None) -> Path:
    images = images or [{"id": 1, "file_name": "a.jpg", "height": 4, "width": 4}]
    base = {"image_id": 1, "category_id": 1, "iscrowd": 0}
    content = {
        "images": images,
        "annotations": [{**base, **a} for a in annotations],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "empty"}],
    }
    path.write_text(json.dumps(content))
    return path


def only(path: Path) -> coco.ImageAnnotations:
    (image,) = coco.open_annotations(path)
    return image


def owner(image: coco.ImageAnnotations, geometry: Geometry = GRID, height: int = 4, width: int = 4) -> Any:
    return coco.instances_on_grid(image, geometry, height, width).owner.reshape(geometry.grid)


def mask_of(text: str) -> Any:
    return np.array([[c == "#" for c in line] for line in text.split()], np.uint8)


LEFT = mask_of("##.. ##.. ##.. ##..")


def segmentation(kind: str) -> Any:
    if kind == "polygon":
        return [rectangle(0, 0, 2, 4)]
    runs = [8, 8]  # column-major, background first: no pixel of background, then eight of the object
    if kind == "uncompressed":
        return {"size": [4, 4], "counts": [0, *runs]}
    encoded = coco_mask.encode(np.asfortranarray(LEFT))
    return {"size": [4, 4], "counts": encoded["counts"].decode()}


@pytest.mark.parametrize("kind", ["polygon", "uncompressed", "compressed"])
def test_polygons_and_both_kinds_of_rle_give_the_same_owner(tmp_path: Path, kind: str) -> None:
    image = only(write_coco(tmp_path / "a.json", [{"segmentation": segmentation(kind)}]))
    assert (owner(image) == np.where(LEFT, 0, -1)).all()


def test_a_patch_belongs_to_the_instance_that_covers_it_most_if_it_covers_half(tmp_path: Path) -> None:
    grid = Geometry(4, 4, 2, 2)  # patches of 2x2 pixels
    first, second = mask_of("##.. ##.. #### ####"), mask_of("..#. .... ..## ..##")
    counts = [
        {"segmentation": {"size": [4, 4], "counts": coco_mask.encode(np.asfortranarray(m))["counts"].decode()}}
        for m in (first, second)
    ]
    found = coco.instances_on_grid(only(write_coco(tmp_path / "a.json", counts)), grid, 4, 4)
    # bottom right: both cover all of it; the second, smaller one owns it, but owns no other patch, so it is left out;
    # top right: a quarter is less than half
    assert found.owner.tolist() == [0, -1, 0, -1]
    assert found.total == 2
    assert len(found.category) == 1  # the second instance does not own any patch
    assert found.coverage.tolist() == [[1, 0, 1, 1]]
    assert found.coverage.sum(axis=1).tolist() == [3]


def test_exactly_half_is_enough(tmp_path: Path) -> None:
    grid = Geometry(4, 4, 2, 2)
    image = only(write_coco(tmp_path / "a.json", [{"segmentation": [rectangle(0, 0, 4, 1)]}]))
    assert owner(image, grid).tolist() == [[0, 0], [-1, -1]]


def test_crowds_and_instances_of_fewer_than_two_patches_are_left_out(tmp_path: Path) -> None:
    image = only(
        write_coco(
            tmp_path / "a.json",
            [
                {"segmentation": [rectangle(0, 0, 1, 1)]},
                {"segmentation": {"size": [4, 4], "counts": [4, 4, 8]}, "iscrowd": 1},
                {"segmentation": [rectangle(2, 0, 4, 4)], "category_id": 2},
            ],
        )
    )
    found = coco.instances_on_grid(image, GRID, 4, 4)
    assert (found.owner.reshape(4, 4) == np.where(LEFT, -1, 0)).all()
    assert found.category.tolist() == [2]
    assert found.total == 2


def rle(mask: Any) -> dict[str, Any]:
    return {"size": list(mask.shape), "counts": coco_mask.encode(np.asfortranarray(mask))["counts"].decode()}


def test_of_equal_coverage_the_smaller_instance_owns_the_patch_and_of_equal_areas_the_earlier(tmp_path: Path) -> None:
    large, small = mask_of("#### #### .... ...."), mask_of("##.. ##.. .... ....")
    front, behind = [0, 0, 1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0, 0]
    for masks, upper in (((small, large), front), ((large, small), behind), ((small, small), [0, 0, -1, -1] * 2)):
        image = only(write_coco(tmp_path / "a.json", [{"segmentation": rle(m)} for m in masks]))
        assert owner(image).ravel().tolist() == upper + [-1] * 8


def test_coverage_that_differs_beyond_the_fifth_decimal_is_equal() -> None:
    coverage = np.array([[0.50001, 0.7, 0.5, 0.49999], [0.50001, 0.70001, 0.5, 0]], np.float32)
    assert coco.find_owners(coverage, np.array([9, 8])).tolist() == [1, 1, 1, -1]
    assert coco.find_owners(coverage, np.array([8, 9])).tolist() == [0, 1, 0, -1]
    assert coco.find_owners(np.zeros((0, 3)), np.zeros(0, int)).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_equal_masks_inside_different_larger_masks_tie_on_every_patch_for_any_number_of_threads(
    tmp_path: Path, resize: Any
) -> None:
    """Compares a mask with the same mask inside a larger one: with equal coverage, float32 sums used to differ."""
    rng = np.random.default_rng(1)
    inner = np.zeros((211, 307), np.uint8)
    inner[20:190, 31:280] = rng.random((170, 249)) < 0.9
    outer = inner.copy()
    outer[:, 280:] = 1
    outer[190:] = 1
    images = [{"id": 1, "file_name": "a.jpg", "height": 211, "width": 307}]
    image = only(write_coco(tmp_path / "a.json", [{"segmentation": rle(m)} for m in (outer, inner)], images))
    geometry, owners = Geometry(224, 224, 16, 16, resize), []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found = coco.instances_on_grid(image, geometry, 211, 307)
        same = found.coverage[0] == found.coverage[1]
        assert (found.owner[same & (found.coverage[1] >= 0.5)] == 1).all()
        assert (same & (found.coverage[1] >= 0.5)).sum() > 60
        owners.append(found.owner)
        np.testing.assert_array_equal(found.coverage[1].reshape(14, 14), pooled_exactly(inner, geometry))
    np.testing.assert_array_equal(*owners)


def pooled_exactly(mask: Any, geometry: Geometry) -> Any:
    """Computes the coverage to 5 decimals with Python's whole numbers."""
    rows, columns, area = geometry.patch_lengths(*mask.shape)
    covered = rows.astype(np.int64) @ mask.astype(np.int64) @ columns.T.astype(np.int64)
    return (np.rint(covered / area * 1e5) / 1e5).astype(np.float32)


def test_where_the_owners_are_known_the_other_masks_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [rectangle(0, 0, 0.4, 0.4), rectangle(0, 0, 2, 4), rectangle(2, 0, 4, 2), rectangle(3, 3, 3.3, 3.3)]
    path = write_coco(tmp_path / "a.json", [{"id": i, "segmentation": [shape]} for i, shape in enumerate(shapes)])
    found = coco.instances_on_grid(only(path), GRID, 4, 4)
    known = np.append(found.index, -1)[found.owner]
    decoded: list[Any] = []

    seen = lambda segments, *size: decoded.append(segments) or decode(segments, *size)  # noqa: E731
    monkeypatch.setattr("batchjob.data.masks.mask_of", seen)
    again = coco.instances_on_grid(only(path), GRID, 4, 4, known=known)
    assert len(decoded) == 2
    for field in dataclasses.fields(found):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(found, field.name))
    nobody = coco.instances_on_grid(only(path), GRID, 4, 4, known=np.full(16, -1))
    assert (len(nobody.category), nobody.total, nobody.owner.max()) == (0, 4, -1)


def test_k_is_one_more_than_the_instances_of_two_patches_between_two_and_sixteen() -> None:
    assert coco.k_instances(np.array([-1, -1])) == 2
    assert coco.k_instances(np.array([0, 0, 1, -1])) == 2
    assert coco.k_instances(np.array([0, 0, 1, 1, 2, 2])) == 4
    assert coco.k_instances(np.repeat(np.arange(40), 2)) == 16


def test_masks_follow_squash_crop_and_pad(tmp_path: Path) -> None:
    tall = [{"id": 1, "file_name": "a.jpg", "height": 8, "width": 4}]
    image = only(write_coco(tmp_path / "a.json", [{"segmentation": [rectangle(0, 0, 4, 4)]}], tall))
    upper = np.zeros((4, 4), int) - 1
    upper[:2] = 0
    assert (owner(image, Geometry(4, 4, 1, 1, "squash"), 8) == upper).all()
    assert (owner(image, Geometry(4, 4, 1, 1, "crop"), 8) == upper).all()  # rows 2 to 6 are kept: two of them masked
    padded = np.zeros((4, 4), int) - 1
    padded[:2, :2] = 0  # the image fills the left two columns
    assert (owner(image, Geometry(4, 4, 1, 1, "pad"), 8) == padded).all()
    boxes = {
        r: coco.instances_on_grid(image, Geometry(4, 4, 1, 1, r), 8, 4).boxes.tolist()  # type: ignore[arg-type]
        for r in ("squash", "crop", "pad")
    }
    assert boxes == {"squash": [[0, 0, 4, 2]], "crop": [[0, 0, 4, 2]], "pad": [[0, 0, 2, 2]]}


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_coverage_is_the_geometrys_own_area_average(tmp_path: Path, resize: Any) -> None:
    mask = np.random.default_rng(0).random((37, 53)) < 0.5
    mask[:5], mask[:, 40:] = False, False
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    images = [{"id": 1, "file_name": "a.jpg", "height": 37, "width": 53}]
    annotation = {"segmentation": {"size": [37, 53], "counts": rle["counts"].decode()}}
    image = only(write_coco(tmp_path / "a.json", [annotation], images))
    geometry = Geometry(20, 24, 4, 4, resize)
    found = coco.instances_on_grid(image, geometry, 37, 53)
    np.testing.assert_allclose(found.coverage[0].reshape(5, 6), np.round(geometry.pool(mask), 5), atol=1e-7)


def test_an_annotation_of_another_size_is_refused(tmp_path: Path) -> None:
    image = only(write_coco(tmp_path / "a.json", [{"segmentation": [rectangle(0, 0, 2, 4)]}]))
    assert image.fits(4, 4)
    assert not image.fits(4, 5)
    with pytest.raises(ValueError, match="annotated at 4x4, the image is 5x4"):
        coco.instances_on_grid(image, GRID, 5, 4)
    odd = [{"segmentation": {"size": [4, 5], "counts": [0, 20]}}]
    unsized = [{"id": 1, "file_name": "a.jpg"}]
    assert not only(write_coco(tmp_path / "b.json", odd, unsized)).fits(4, 4)  # then the RLE's own size counts
    other = coco.open_annotations(write_coco(tmp_path / "c.json", odd))
    assert dict(other.left_out) == {"an RLE of another size than its image": 1}


def test_a_missing_image_size_is_an_error(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}]
    assert only(write_coco(tmp_path / "a.json", [{"segmentation": segmentation("compressed")}], images)).size == (4, 4)
    with pytest.raises(UserError, match="neither height nor width"):
        _ = only(write_coco(tmp_path / "b.json", [{"segmentation": segmentation("polygon")}], images)).size


def test_images_are_found_by_path_file_name_and_stem_but_not_by_id(tmp_path: Path) -> None:
    images = [
        {"id": "seven", "file_name": "val2017/000007.jpg", "height": 4, "width": 4},
        {"id": 8, "file_name": "x/same.jpg", "height": 4, "width": 4},
        {"id": 9, "file_name": "y/same.jpg", "height": 4, "width": 4},
    ]
    found = coco.open_annotations(write_coco(tmp_path / "a.json", [{"image_id": "seven"}], images))
    for name in ("val2017/000007.jpg", "root/val2017/000007.jpg", "elsewhere/000007.png", "shard.tar/000007"):
        image = found.image(name)
        assert image is not None, name
        assert len(image.instances) == 1
    assert found.image("x/same.jpg") is not None
    assert found.image("seven") is None  # ids are not file names
    assert found.image("000008.jpg") is None
    with pytest.raises(UserError, match=r"'z/same.jpg' could be 'x/same.jpg' or 'y/same.jpg'"):
        found.image("z/same.jpg")
    assert found.categories == {1: "cat", 2: "empty"}


def test_annotations_without_a_mask_are_instances_that_own_nothing(tmp_path: Path) -> None:
    bad = [{}, {"segmentation": []}, {"segmentation": [[1, 2, 3, 4]]}, {"segmentation": [[0, 0, 1, 1, 2]]}]
    found = coco.instances_on_grid(only(write_coco(tmp_path / "a.json", bad)), GRID, 4, 4)
    assert found.total == 4
    assert len(found.category) == 0
    assert (found.owner == -1).all()
    assert coco.k_instances(found.owner) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[]", "has no list of `images`"),
        ('{"images": []}', "has no list of `annotations`"),
        ('{"images": [], "annotations": []}', "annotates no image"),
        ('{"images": [], "annotations": [{"caption": "a cat"}]}', "not captions"),
    ],
)
def test_a_file_that_is_not_an_instances_json_is_an_error_of_one_line(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        coco.open_annotations(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_without_annotations_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        coco.open_annotations(tmp_path / "missing.json")
    with pytest.raises(UserError, match="neither SegmentationObject"):
        coco.open_annotations(tmp_path)


def test_several_files_and_a_root_folder_join(tmp_path: Path) -> None:
    folder = tmp_path / "annotations"
    folder.mkdir()
    for i, name in enumerate(("instances_a.json", "instances_b.json")):
        write_coco(folder / name, [], [{"id": i, "file_name": f"{i}.jpg", "height": 4, "width": 4}])
    assert len(coco.open_annotations(tmp_path)) == 2
    assert len(coco.open_annotations(f"{folder}/instances_a.json,{folder}/instances_b.json")) == 2

"""Generated COCO JSON: reading always ends within bounds, and valid masks equal those of pycocotools."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from batchjob.data import annotations as coco
from batchjob.data.masks import BadMask, check_polygon, check_rle, mask_of, read_masks
from batchjob.errors import UserError
from tests.test_coco_as_exported import BOX, GRID, SIDE, annotation, image

MOST_GROWTH_BYTES = 2**28


@st.composite
def masks(draw: Any) -> Any:
    height, width, seed = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    return (rng.random((height, width)) < rng.random()).astype(np.uint8)


@settings(max_examples=200, deadline=None)
@given(masks())
def test_run_lengths_of_both_kinds_are_pycocotools_own_mask(mask: Any) -> None:
    encoded: Any = coco_mask.encode(np.asfortranarray(mask))
    found = check_rle(encoded["size"], encoded["counts"].decode(), *mask.shape)
    np.testing.assert_array_equal(found.mask(), coco_mask.decode(encoded))
    again = check_rle(encoded["size"], found.counts.tolist(), *mask.shape)
    np.testing.assert_array_equal(again.mask(), mask)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-100, 200), min_size=6, max_size=30).filter(lambda p: len(p) % 2 == 0))
def test_polygons_are_pycocotools_own_mask(polygon: list[float]) -> None:
    segment = check_polygon(polygon, 64, 48)
    assert segment is not None
    whole = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], 64, 48)))
    np.testing.assert_array_equal(mask_of([segment], 64, 48), whole)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(min_codepoint=40, max_codepoint=120), max_size=40))
def test_any_text_as_an_rle_is_a_mask_or_a_cause(text: str) -> None:
    try:
        found = check_rle([20, 30], text, 20, 30)
    except BadMask:
        return
    assert found.mask().shape == (20, 30)


@st.composite
def valid_annotations(draw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draws an object of a SIDE × SIDE image: (as an exporter writes it, as pycocotools takes it)."""
    number = st.floats(-SIDE, 2 * SIDE).map(lambda v: round(v, 2))
    crowd = draw(st.sampled_from([0, "0", False, None, "false"]))
    kind = draw(st.sampled_from(["flat", "pairs", "one flat", "text", "counts", "listed"]))
    if kind in ("flat", "pairs", "one flat"):
        count = 1 if kind == "one flat" else draw(st.integers(1, 3))
        flat = [[draw(number) for _ in range(2 * draw(st.integers(3, 7)))] for _ in range(count)]
        pairs = [[part[i : i + 2] for i in range(0, len(part), 2)] for part in flat]
        written: Any = {"flat": flat, "pairs": pairs, "one flat": flat[0]}[kind]
        wanted: Any = flat
    else:
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        mask = np.asfortranarray(rng.random((SIDE, SIDE)) < rng.random(), dtype=np.uint8)
        rle: Any = coco_mask.encode(mask)
        text = {"size": rle["size"], "counts": rle["counts"].decode()}
        runs = check_rle(text["size"], text["counts"], SIDE, SIDE).counts.tolist()
        wanted = {"size": text["size"], "counts": runs}
        written = {"text": text, "counts": wanted, "listed": [text]}[kind]
    return {"segmentation": written, "iscrowd": crowd}, {"segmentation": wanted, "iscrowd": 0}


@settings(max_examples=150, deadline=60_000, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 2), valid_annotations()), min_size=1, max_size=6))
def test_a_file_of_valid_masks_gives_pycocotools_own_image_by_image(
    tmp_path: Path, members: list[tuple[int, tuple[dict[str, Any], dict[str, Any]]]]
) -> None:
    images = [image(i, f"{i}.jpg") for i in range(3)]
    common = [{"id": n, "image_id": i, "category_id": 1} for n, (i, _) in enumerate(members, start=1)]
    categories = [{"id": 1, "name": "cat"}]
    written = [own | one for own, (_, (one, _)) in zip(common, members, strict=True)]
    wanted = [own | one for own, (_, (_, one)) in zip(common, members, strict=True)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": images, "annotations": written, "categories": categories}))
    files = coco.open_annotations(path)
    assert not files.left_out
    theirs = COCO()
    theirs.dataset = {"images": images, "annotations": wanted, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        theirs.createIndex()
    for i in range(3):
        expected = [theirs.annToMask(one) for one in wanted if one["image_id"] == i]
        found = dict(read_masks(files.at(i).instances, SIDE, SIDE))
        assert set(found) == {n for n, mask in enumerate(expected) if mask.any()}
        for number, mask in found.items():
            np.testing.assert_array_equal(mask, expected[number])


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)
NUMBERS = st.floats() | st.integers(-(10**12), 10**12) | st.none() | st.text(max_size=3)
SEGMENTATIONS = (
    st.lists(st.lists(NUMBERS, max_size=9), max_size=3)
    | st.fixed_dictionaries({"size": ANYTHING | st.just([SIDE, SIDE]), "counts": ANYTHING | st.lists(st.integers())})
    | ANYTHING
)
ANNOTATIONS = st.fixed_dictionaries(
    {"image_id": st.just(1) | ANYTHING, "segmentation": SEGMENTATIONS},
    optional={"category_id": st.just(1) | ANYTHING, "iscrowd": ANYTHING, "bbox": ANYTHING, "segments_info": ANYTHING},
)


def resident_bytes(field: str) -> int:
    """Returns VmHWM, the peak memory of this process, or VmRSS, its memory now; both include C libraries."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


HUGE: list[Any] = [
    [[1e9, 0, 1e9, 1e9, 0, 1e9]],
    [[1e12, 0, 1e12, 1e12, 0, 1e12]],
    [[float("nan"), 0, 5, 5, 0, 5]],
    {"size": [10**5, 10**5], "counts": [10**10]},
    {"size": [SIDE, SIDE], "counts": [2**62, 2**62]},
    {"size": [SIDE, SIDE], "counts": "o" * 10**5},
    [[0.0, 0.0, SIDE, SIDE] * 50_000],
]


@settings(max_examples=300, deadline=60_000, suppress_health_check=list(HealthCheck))
@given(st.lists(ANNOTATIONS | ANYTHING, max_size=4), st.sampled_from(["annotations", "images", "categories"]))
@example([annotation(shape) for shape in HUGE], "annotations")
@example([{"id": 2, "file_name": "1.jpg", "height": 10**9, "width": 10**9}], "images")
def test_whatever_an_exporter_writes_is_read_counted_or_refused_within_bounded_time_and_memory(
    tmp_path: Path, members: list[Any], where: str
) -> None:
    """Checks for crashes, hangs and too much memory, and that every annotation with a mask gives owners on the grid."""
    content: dict[str, Any] = {"images": [image(1, "0.jpg")], "annotations": [annotation([BOX])], "categories": []}
    content[where] = content[where] + members
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = resident_bytes("VmRSS")
    try:
        files = coco.open_annotations(path)
        for i in range(len(files)):
            one = files.at(i)
            if one.fits(SIDE, SIDE):
                assert coco.instances_on_grid(one, GRID, SIDE, SIDE).owner.shape == (16,)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    assert resident_bytes("VmHWM") - before < MOST_GROWTH_BYTES

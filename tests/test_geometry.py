"""The one mapping from a photo's pixels to the patch grid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchjob.geometry import Geometry, Resize

SIZES = st.integers(1, 90)
RESIZES = st.sampled_from(["squash", "crop", "pad"])


def test_a_photo_of_the_input_s_size_maps_pixel_by_pixel() -> None:
    mask = np.arange(64 * 64).reshape(64, 64) % 7 == 0
    expected = mask.reshape(4, 16, 4, 16).mean((1, 3))
    np.testing.assert_allclose(Geometry(64, 64, 16, 16).pool(mask), expected, atol=1e-6)


def test_squash_averages_areas_exactly_at_any_scale() -> None:
    mask = np.zeros((3, 5), np.float32)
    mask[1, 2] = 1
    pooled = Geometry(32, 32, 16, 16).pool(mask)  # a patch is 1.5 x 2.5 source pixels
    np.testing.assert_allclose(pooled, np.full((2, 2), 0.5 * 0.5 / (1.5 * 2.5)), atol=1e-6)


def test_crop_takes_the_centre_of_the_longer_side() -> None:
    geometry = Geometry(32, 32, 16, 16, "crop")
    assert geometry.source_box(40, 80) == (20.0, 0.0, 60.0, 40.0)
    mask = np.zeros((40, 80))
    mask[:, 20:40] = 1
    np.testing.assert_allclose(geometry.pool(mask), [[1, 0], [1, 0]], atol=1e-6)


def test_pad_keeps_the_aspect_and_marks_what_is_padding() -> None:
    geometry = Geometry(32, 32, 8, 8, "pad")
    assert geometry.content_size(30, 60) == (16, 32)
    assert geometry.content_patches(30, 60).tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    np.testing.assert_allclose(geometry.pool(np.ones((30, 60))), [[1] * 4] * 2 + [[0] * 4] * 2, atol=1e-6)


def test_a_patch_half_in_the_padding_counts_as_half_covered() -> None:
    geometry = Geometry(32, 32, 16, 16, "pad")
    assert geometry.content_size(24, 32) == (24, 32)
    np.testing.assert_allclose(geometry.pool(np.ones((24, 32))), [[1, 1], [0.5, 0.5]], atol=1e-6)
    assert geometry.content_patches(24, 32).all()
    assert not geometry.content_patches(23, 32)[1].any()


@given(SIZES, SIZES, RESIZES)
def test_coverage_is_a_share_and_nothing_is_lost(height: int, width: int, resize: Resize) -> None:
    geometry = Geometry(48, 32, 16, 16, resize)
    pooled = geometry.pool(np.ones((height, width)))
    assert pooled.shape == geometry.grid == (3, 2)
    assert (pooled <= 1 + 1e-5).all()
    content = geometry.content_size(height, width)
    assert pooled.sum() * 256 == pytest.approx(content[0] * content[1], rel=1e-4)


@given(SIZES, SIZES, RESIZES)
def test_masks_of_disjoint_instances_never_cover_more_than_the_patch(height: int, width: int, resize: Resize) -> None:
    geometry = Geometry(32, 32, 16, 16, resize)
    owner = np.random.default_rng(height * 91 + width).integers(0, 3, (height, width))
    parts = sum(geometry.pool(owner == i) for i in range(3))
    np.testing.assert_allclose(parts, geometry.pool(np.ones((height, width))), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), RESIZES)
def test_covered_areas_are_whole_numbers_that_float64_adds_exactly_in_any_order(
    height: int, width: int, resize: Resize
) -> None:
    rows, columns, area = Geometry(48, 32, 16, 16, resize).patch_lengths(height, width)
    mask = np.random.default_rng(height * 91 + width).integers(0, 2, (height, width))
    exact = [[sum(int(r[y]) * int(c[x]) for y, x in np.argwhere(mask) if r[y] and c[x]) for c in columns] for r in rows]
    assert (rows @ mask.astype(np.float64) @ columns.T).tolist() == exact
    assert max(map(max, exact)) <= area * (1 + 1e-6) < 2**53


def test_a_photo_of_ninety_megapixels_is_added_exactly_too() -> None:
    rows, columns, area = Geometry(32, 32, 16, 16).patch_lengths(9000, 9900)
    assert area < 2**53
    assert (rows.sum(1)[:, None] * columns.sum(1)).tolist() == [[area, area], [area, area]]

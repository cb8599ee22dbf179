"""What the pictures show: known partitions in the right cells, in the right colours."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from batchjob import figures
from batchjob.figures import canvas, maps, palette, view
from batchjob.geometry import Geometry

QUARTERS = np.kron(np.array([[0, 1], [2, 3]], dtype=np.uint8), np.ones((4, 4), dtype=np.uint8))


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_equal_partitions_get_equal_colours_whatever_their_numbers() -> None:
    shuffled = np.array([3, 0, 1, 2], dtype=np.uint8)[QUARTERS]
    first, second = palette.match_colours(np.stack([QUARTERS, shuffled]))
    assert np.array_equal(first, second)
    assert len(np.unique(first)) == 4


def test_an_object_keeps_its_colour_where_the_rest_is_cut_otherwise() -> None:
    whole = np.where(QUARTERS == 3, 1, 0).astype(np.uint8)
    first, second = palette.match_colours(np.stack([QUARTERS, whole]))
    assert set(first[QUARTERS == 3]) == set(second[QUARTERS == 3])


def test_noise_and_missing_labels_are_no_clusters_and_stay_as_they_are() -> None:
    marked = QUARTERS.copy()
    marked[0, 0], marked[0, 1] = palette.NOISE, palette.NONE
    (matched,) = palette.match_colours(marked[None])
    assert (matched[0, 0], matched[0, 1]) == (palette.NOISE, palette.NONE)
    nothing = np.full((2, 3, 3), palette.NONE, dtype=np.uint8)
    assert np.array_equal(palette.match_colours(nothing), nothing)


def test_each_patch_is_painted_in_its_clusters_colour() -> None:
    grey = np.full((80, 40, 3), 128, dtype=np.uint8)
    painted = canvas.blend(grey, QUARTERS, colours=palette.label_colours(4))
    for label, (y, x) in enumerate([(10, 10), (10, 30), (70, 10), (70, 30)]):
        expected = (1 - canvas.PHOTO_SHARE) * palette.cluster_colours(4)[label] * 255 + canvas.PHOTO_SHARE * 128
        assert np.abs(painted[y, x] - expected).max() <= 1


def test_borders_run_between_clusters_and_nowhere_else() -> None:
    segments = canvas.borders(QUARTERS)
    assert len(segments) == 16
    assert np.all((segments[..., 0] == 4).all(1) | (segments[..., 1] == 4).all(1))
    assert len(canvas.borders(np.zeros((3, 5), dtype=np.uint8))) == 0


@pytest.mark.parametrize(("heads", "methods", "grid"), [(1, 1, (4, 4)), (3, 2, (8, 5)), (13, 1, (2, 3))])
def test_the_grid_takes_any_number_of_heads_methods_and_patches(
    heads: int, methods: int, grid: tuple[int, int], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 255, (60, 90, 3), dtype=np.uint8), rng.integers(0, 255, (90, 40, 3), dtype=np.uint8)]
    figure = figures.study_grid(
        photos,
        rng.random((2, heads, *grid)),
        rng.integers(0, 3, (2, methods, heads, *grid), dtype=np.uint8),
        titles=["a $x^2 photo", "long " * 60],
        methods=[f"method {m}" for m in range(methods)],
    )
    assert len(figure.axes) == 2 * (1 + heads * (1 + methods))
    (path,) = figures.save(figure, tmp_path / "grid")
    assert pixels(path).shape[2] == 3


def test_the_attended_mask_is_the_fewest_patches_that_hold_the_mass() -> None:
    values = np.array([[0.5, 0.1], [0.1, 0.3]])
    assert maps.attended(values, 0.6).tolist() == [[True, False], [False, True]]
    assert maps.attended(values, 0.5).tolist() == [[True, False], [False, False]]
    assert not maps.attended(np.full((2, 2), np.nan), 0.6).any()


def test_long_ids_keep_their_names_and_lose_their_folders() -> None:
    assert canvas.short_id("a/long/folder/name.jpg", 12) == "…/name.jpg"
    assert canvas.short_id("short.jpg", 12) == "short.jpg"
    assert len(canvas.short_id("x" * 50, 12)) == 12
    assert canvas.short_id("line\nbreak", 20) == "line\\nbreak"


def test_a_padded_photos_grid_reaches_beyond_the_photo() -> None:
    shown, span = view.display(Geometry(64, 64, 8, 8, "pad"), 100, 200, 448)
    assert (shown.height, shown.width) == (224, 448)
    assert span == (2.0, 1.0)


def test_a_cropped_photo_is_shown_as_the_crop_that_the_model_saw() -> None:
    shown, span = view.display(Geometry(64, 32, 8, 8, "crop"), 100, 200, 448)
    assert (shown.height, shown.width, shown.resize) == (448, 224, "crop")
    assert span == (1.0, 1.0)

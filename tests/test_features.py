"""Rows of a dataset-wide k-means: their features, the sample that the fit sees, and the nearest centroid."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchjob.codebook.features import _pool_by_offset, features, nearest_centroids
from batchjob.codebook.rows import (
    CELLS,
    RowKind,
    affordable_rows,
    asked_rows,
    draw_sample,
    hash_numbers,
    offset_cells,
    row_kind,
    row_numbers,
)
from batchjob.config import Options
from batchjob.errors import UserError
from batchjob.model.attention import LayerMaps, renormalise

ROWS = RowKind("rows", "absolute", (3, 4))
RELATIVE = RowKind("rows", "relative", (3, 4))
CLS = RowKind("cls", "absolute", (3, 4))


def some_maps(batch: int = 2, heads: int = 3, patches: int = 12, seed: int = 0) -> LayerMaps:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(batch, heads, patches, patches, generator=generator) / patches
    cls = torch.rand(batch, heads, patches, generator=generator) / patches
    return LayerMaps(0, rows, cls, torch.zeros(batch, heads), torch.ones(batch, dtype=torch.bool))


@pytest.mark.parametrize("patches", [1, 2, 4, 8, 14, 16, 24, 37, 64])
def test_offset_cells_are_odd_centred_and_at_most_fifteen(patches: int) -> None:
    size, cells = offset_cells(patches)
    offsets = np.arange(-(patches - 1), patches)
    cell = (offsets + size // 2) // size + cells // 2
    assert size % 2 == 1
    assert cells % 2 == 1
    assert cells <= CELLS
    assert (cell.min(), cell.max()) == (0, cells - 1)
    assert cell[patches - 1] == cells // 2  # offset 0
    assert (cell + cell[::-1] == cells - 1).all()  # as many cells to the left as to the right


def rows_of(maps: LayerMaps, kind: RowKind, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Returns [B, H, R, P]: the rows to cluster, each with sum 1."""
    return renormalise(maps.cls[:, :, None] if kind.queries == "cls" else maps.rows, mask)


def vectors(rows: torch.Tensor) -> torch.Tensor:
    """Returns [M, H, P]: the rows of all images one after the other."""
    return rows.transpose(1, 2).flatten(0, 1)


def test_absolute_rows_sum_to_one_and_keep_their_order() -> None:
    maps = some_maps()
    chosen = torch.tensor([0, 5, 12, 23])
    found = features(vectors(rows_of(maps, ROWS))[chosen], chosen % 12, ROWS, distance="euclidean")
    assert found.shape == (4, 3, 12)
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 3))
    expected = maps.rows[1, 2, 11] / maps.rows[1, 2, 11].sum()
    torch.testing.assert_close(found[3, 2], expected)


def test_relative_rows_are_a_sum_over_cells_of_offsets() -> None:
    kind = RowKind("rows", "relative", (9, 10))
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(6, 2, 90, generator=generator)
    places = torch.tensor([0, 9, 45, 44, 80, 89])
    found = _pool_by_offset(rows, places, kind.grid).view(6, 2, *kind.shape)
    (tall, down), (wide, across) = offset_cells(9), offset_cells(10)
    expected = torch.zeros_like(found)
    for m, place in enumerate(places.tolist()):
        for key in range(90):
            y = (key // 10 - place // 10 + tall // 2) // tall + down // 2
            x = (key % 10 - place % 10 + wide // 2) // wide + across // 2
            expected[m, :, y, x] += rows[m, :, key]
    torch.testing.assert_close(found, expected)


def test_the_same_pattern_anywhere_is_the_same_relative_row() -> None:
    grid = (9, 9)
    kind = RowKind("rows", "relative", grid)
    rows = torch.zeros(2, 1, *grid)
    rows[0, 0, 4, 5], rows[0, 0, 5, 4] = 0.2, 0.3  # one to the right and one below the query at (4, 4)
    rows[1, 0, 2, 3], rows[1, 0, 3, 2] = 0.4, 0.6  # the same pattern around (2, 2), with more mass on the prefix tokens
    places = torch.tensor([4 * 9 + 4, 2 * 9 + 2])
    rows = renormalise(rows.flatten(2))
    found = features(rows, places, kind, distance="euclidean")
    torch.testing.assert_close(found[0], found[1])
    absolute = features(rows, places, RowKind("rows", "absolute", grid), distance="euclidean")
    assert not torch.allclose(absolute[0], absolute[1])


def test_distances_are_those_asked_for() -> None:
    maps = some_maps()
    rows, places = vectors(rows_of(maps, ROWS)), torch.arange(24) % 12
    plain = features(rows, places, ROWS, distance="euclidean")
    torch.testing.assert_close(features(rows, places, ROWS, distance="hellinger"), plain.sqrt())
    cosine = features(rows, places, ROWS, distance="cosine")
    torch.testing.assert_close(cosine.norm(dim=-1), torch.ones(24, 3))


def test_padding_keys_take_no_part_in_a_row() -> None:
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 8:] = False
    maps = some_maps()
    changed = maps.rows.clone()
    changed[..., 8:] = 7.0
    chosen = torch.arange(8)
    a = features(vectors(rows_of(maps, ROWS, mask))[chosen], chosen, ROWS, distance="euclidean")
    b = features(vectors(renormalise(changed, mask))[chosen], chosen, ROWS, distance="euclidean")
    torch.testing.assert_close(a, b)
    assert (a[..., 8:] == 0).all()


@pytest.mark.parametrize("kind", [ROWS, RELATIVE, CLS])
def test_labels_are_the_nearest_centroids_and_inertia_their_squared_distances(kind: RowKind) -> None:
    maps = some_maps(batch=4, seed=3)
    every = torch.arange(4 * kind.per_image)
    x = features(vectors(rows_of(maps, kind)), every % kind.per_image, kind, distance="euclidean")  # [M, H, D]
    centroids = x[::3].transpose(0, 1).contiguous()[:, :5]
    found = nearest_centroids(rows_of(maps, kind), centroids, kind, distance="euclidean")
    squares = (x.transpose(0, 1)[:, :, None].double() - centroids[:, None].double()).square().sum(-1)  # [H, M, K]
    best = squares.min(2)
    labels = best.indices.view(3, 4, -1).transpose(0, 1)
    assert torch.equal(found.labels.view(4, 3, -1).long(), labels)
    expected = best.values.view(3, 4, -1).sum(2).T
    torch.testing.assert_close(found.inertia.view(4, 3), expected.float(), atol=1e-7, rtol=1e-4)
    assert found.k.tolist() == [len(set(row.tolist())) for row in labels.flatten(0, 1)]


def test_padding_patches_have_no_label() -> None:
    maps, mask = some_maps(), torch.ones(2, 12, dtype=torch.bool)
    mask[1, 4:] = False
    centroids = torch.eye(12)[None].expand(3, -1, -1).contiguous()[:, :6]
    found = nearest_centroids(rows_of(maps, ROWS, mask), centroids, ROWS, distance="euclidean", mask=mask)
    labels = found.labels.view(2, 3, 12)
    assert (labels[1, :, 4:] == 255).all()
    assert (labels[1, :, :4] < 6).all()
    assert (labels[0] < 6).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**31))
def test_a_sample_has_the_size_asked_for_and_depends_on_seed_and_number_alone(total: int, rows: int, seed: int) -> None:
    sample = draw_sample(total, rows, seed)
    numbers = np.arange(total)
    chosen = sample.chosen(numbers)
    assert chosen.sum() == sample.rows == min(rows, total)
    order = np.random.default_rng(0).permutation(total)
    assert (sample.chosen(numbers[order]) == chosen[order]).all()
    half = total // 2
    assert sample.most_rows(0, half) + sample.most_rows(half, total) == sample.rows


def test_a_sample_is_uniform_and_another_seed_gives_another() -> None:
    sample, other = draw_sample(200_000, 20_000, 1), draw_sample(200_000, 20_000, 2)
    numbers = np.arange(200_000)
    by_tenth = sample.chosen(numbers).reshape(10, -1).sum(1)
    by_patch = sample.chosen(numbers).reshape(-1, 20).sum(0)  # all patches of the grid are equally likely
    assert np.abs(by_tenth - 2000).max() < 4 * np.sqrt(2000)
    assert np.abs(by_patch - 1000).max() < 4 * np.sqrt(1000)
    both = (sample.chosen(numbers) & other.chosen(numbers)).sum()
    assert abs(both - 2000) < 4 * np.sqrt(2000)


def test_a_sample_of_very_many_rows_keeps_its_size_without_hashing_every_row() -> None:
    sample = draw_sample(10**12, 10**6, 0)
    seen = int(sample.chosen(np.arange(5 * 10**6)).sum())
    assert 0.98e6 < sample.rows < 10**6
    assert seen <= sample.most_rows(0, 5 * 10**6) <= 100


def test_hashes_are_uniform_in_every_bit() -> None:
    hashes = hash_numbers(np.arange(20_000), 7)
    ones = [int(((hashes >> np.uint64(bit)) & np.uint64(1)).sum()) for bit in range(64)]
    assert max(abs(count - 10_000) for count in ones) < 4.5 * np.sqrt(5000)


def test_row_numbers_follow_the_images() -> None:
    assert row_numbers(np.array([0, 5]), ROWS)[1].tolist() == list(range(60, 72))
    assert row_numbers(np.array([0, 5]), CLS).tolist() == [[0], [5]]


def test_the_sample_is_cut_to_the_budget_and_says_so() -> None:
    rows, why = affordable_rows(1_000_000, row_bytes=1000, budget_bytes=10_000_000, largest_share=0.5)
    assert rows * 1000 * 0.5 < 10_000_000
    assert rows > 19_000
    assert "instead of 1,000,000" in why
    rows, why = affordable_rows(1000, row_bytes=1000, budget_bytes=10_000_000, largest_share=1.0)
    assert (rows, "instead" in why) == (1000, False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"algorithm": "spectral"}, "give --algorithm kmeans"),
        ({"k": "instances"}, "give a number"),
        ({"queries": "cls", "features": "relative"}, "CLS has no place"),
        ({"fit_rows": "many"}, "not a number of rows"),
        ({"fit_rows": "3"}, "below --k 5"),
    ],
)
def test_options_that_contradict_each_other_are_refused(change: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        row_kind(Options(scope="dataset", **change), (14, 14))


def test_a_given_number_of_rows_is_used_unchanged() -> None:
    assert asked_rows(Options(scope="dataset", fit_rows="1234")) == 1234
    assert row_kind(Options(scope="dataset"), (14, 14)).width == 196
    assert row_kind(Options(scope="dataset", features="relative"), (14, 14)).shape == (9, 9)

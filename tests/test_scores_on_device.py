"""Scores computed on the device while labelling are those of the NumPy specification."""

from typing import Any

import numpy as np
import torch

from batchjob.metrics import attention, nulls
from batchjob.metrics import on_device as map_scores

GRID = (4, 5)
PATCHES = 20


def random_rows(images: int, heads: int, seed: int = 0, patches: int = PATCHES) -> Any:
    rows = np.random.default_rng(seed).gamma(0.3, size=(images, heads, patches, patches))
    return rows / rows.sum(axis=-1, keepdims=True)


def test_attention_scores_equal_the_numpy_specification() -> None:
    rows = random_rows(3, 2)
    ours = map_scores.attention_scores(torch.as_tensor(rows), GRID)
    assert tuple(ours) == map_scores.ATTENTION_SCORES
    for i in range(3):
        for name, expected in attention.attention_scores(rows[i], GRID).items():
            np.testing.assert_allclose(ours[name][i].numpy(), expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_padding_is_left_out_as_if_the_grid_were_smaller() -> None:
    rows = random_rows(2, 2)
    keep = np.zeros((2, *GRID), bool)
    keep[:, :, :3] = True  # the content fills the left three columns
    inside = keep[0].ravel()
    small = rows[:, :, inside][:, :, :, inside]
    small = small / small.sum(axis=-1, keepdims=True)
    ours = map_scores.attention_scores(torch.as_tensor(rows), GRID, torch.as_tensor(keep.reshape(2, -1)))
    for i in range(2):
        for name, expected in attention.attention_scores(small[i], (4, 3)).items():
            np.testing.assert_allclose(ours[name][i].numpy(), expected, rtol=1e-5, atol=1e-5, err_msg=name)


def drawn(row: int, instances: int = 5, categories: int = 2) -> attention.PatchPairs:
    random = np.random.default_rng(row)
    owner = random.integers(-1, instances, PATCHES)
    owner[: 2 * instances] = np.arange(2 * instances) % instances
    return attention.draw_pairs(owner, np.arange(instances) % categories, row=row, seed=0)


def test_pair_scores_equal_the_numpy_specification_ties_and_empty_images_too() -> None:
    rows = random_rows(4, 3)
    rows[1] = np.round(rows[1], 1)  # many ties
    none = np.zeros(0, np.int64)
    pairs = [drawn(0), drawn(1), attention.PatchPairs(none, none, none.astype(bool), none), drawn(3, 4, 1)]
    ours = map_scores.pair_scores(torch.as_tensor(rows, dtype=torch.float32), pairs, GRID)
    for i, of_image in enumerate(pairs):
        for name, expected in attention.pair_scores(rows[i].astype(np.float32), of_image, GRID).items():
            np.testing.assert_allclose(ours[name][i].numpy(), expected, rtol=1e-6, err_msg=f"{name} {i}")


def test_an_image_scores_the_same_bit_for_bit_whatever_else_is_in_the_batch() -> None:
    rows = torch.as_tensor(random_rows(5, 3), dtype=torch.float32)
    pairs = [drawn(i) for i in range(5)]
    together = map_scores.pair_scores(rows, pairs, GRID)
    for i in range(5):
        alone = map_scores.pair_scores(rows[i : i + 1], pairs[i : i + 1], GRID)
        for name in map_scores.PAIR_SCORES:
            assert torch.equal(alone[name][0], together[name][i]), name


def test_no_pairs_at_all_score_nothing() -> None:
    none = np.zeros(0, np.int64)
    pairs = [attention.PatchPairs(none, none, none.astype(bool), none)] * 2
    ours = map_scores.pair_scores(torch.as_tensor(random_rows(2, 3)), pairs, GRID)
    assert all(torch.isnan(v).all() and v.shape == (2, 3) for v in ours.values())


def test_locality_sums_hold_each_offsets_attention_and_leave_padding_and_failures_out() -> None:
    rows = random_rows(4, 2, patches=4)
    keep = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]], bool)
    rows[2] = np.nan  # a failed image
    sums = map_scores.LocalitySums(1, 2, (2, 2), torch.device("cpu"))
    sums.add(0, torch.as_tensor(rows[:2]), torch.as_tensor(keep[:2]))
    sums.add(0, torch.as_tensor(rows[2:]), torch.as_tensor(keep[2:]))
    found = sums.arrays()
    expected, count = np.zeros((2, 3, 3)), np.zeros((3, 3))
    for image in range(4):
        for q in range(4):
            for k in range(4):
                if keep[image, q] and keep[image, k]:
                    offset = (k // 2 - q // 2 + 1, k % 2 - q % 2 + 1)
                    expected[:, *offset] += rows[image, :, q, k]
                    count[offset] += 1
    np.testing.assert_allclose(found["locality_sum"][0], expected)
    np.testing.assert_allclose(found["locality_count"][0], count)


def test_attention_that_depends_on_the_offset_alone_is_its_own_locality_null() -> None:
    index = nulls.offset_index(GRID)
    kernel = np.random.default_rng(0).random(index.max() + 1)
    rows = kernel[index][None]
    sums = nulls.offset_sums(rows, GRID)
    counts = nulls.offset_sums(np.ones_like(rows), GRID)
    expected = rows / rows.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(nulls.locality_rows(sums, counts, GRID), expected)

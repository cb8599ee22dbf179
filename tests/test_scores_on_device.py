"""Scores computed on the device while labelling are those of the NumPy specification."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from batchjob.data.instances import GridInstances
from batchjob.geometry import Geometry
from batchjob.job import scores
from batchjob.job.lent import LentObjects
from batchjob.metrics import attention
from batchjob.metrics import on_device as map_scores
from batchjob.metrics.nulls import SWAPS
from batchjob.metrics.pair_table import PairTable

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
    ours = map_scores.pair_scores(torch.as_tensor(rows, dtype=torch.float32), PairTable.of(pairs, GRID))
    for i, of_image in enumerate(pairs):
        for name, expected in attention.pair_scores(rows[i].astype(np.float32), of_image, GRID).items():
            np.testing.assert_allclose(ours[name][i].numpy(), expected, rtol=1e-6, err_msg=f"{name} {i}")


def test_an_image_scores_the_same_bit_for_bit_whatever_else_is_in_the_batch() -> None:
    rows = torch.as_tensor(random_rows(5, 3), dtype=torch.float32)
    pairs = [drawn(i) for i in range(5)]
    together = map_scores.pair_scores(rows, PairTable.of(pairs, GRID))
    for i in range(5):
        alone = map_scores.pair_scores(rows[i : i + 1], PairTable.of(pairs[i : i + 1], GRID))
        for name in map_scores.PAIR_NAMES:
            assert torch.equal(alone[name][0], together[name][i]), name


def test_images_without_pairs_have_no_score() -> None:
    none = np.zeros(0, np.int64)
    pairs = [attention.PatchPairs(none, none, none.astype(bool), none)] * 2
    ours = map_scores.pair_scores(torch.as_tensor(random_rows(2, 3)), PairTable.of(pairs, GRID))
    assert all(torch.isnan(v).all() and v.shape == (2, 3) for v in ours.values())


def test_drawn_pairs_score_the_same_whichever_image_they_are_lent_to() -> None:
    rows = random_rows(3, 2)
    pairs = [drawn(i) for i in range(4)]
    image = [2, 0, 2, 1]
    ours = map_scores.pair_scores(torch.as_tensor(rows, dtype=torch.float32), PairTable.of(pairs, GRID, image))
    for i, of_image in enumerate(image):
        expected = attention.pair_scores(rows[of_image].astype(np.float32), pairs[i], GRID)
        for name in map_scores.PAIR_NAMES:
            np.testing.assert_allclose(ours[name][i].numpy(), expected[name], rtol=1e-6, err_msg=f"{name} {i}")


def test_the_swap_null_on_the_device_is_the_mean_over_other_photos_objects_without_padding() -> None:
    random = np.random.default_rng(0)
    owner = random.integers(-1, 3, (6, PATCHES)).astype(np.int16)
    owner[:, :9] = np.arange(9) % 3
    instances = GridInstances(
        owner,
        np.zeros(18, np.int32),
        np.arange(18, dtype=np.int32) % 3,
        np.arange(7) * 3,
        np.full((6, 2), 32, np.int32),
    )
    lends = LentObjects(instances, Geometry(32, 40, 8, 8), seed=0)
    keep = np.ones(PATCHES, bool)
    keep[-5:] = False  # the last row of patches is padding
    rows = random_rows(1, 2)
    lent = lends.lent_pairs(0, keep)
    assert len(lent) == 5  # all images but the image itself
    assert all(keep[p.first].all() and keep[p.second].all() for p in lent)
    batch = SimpleNamespace(rows=np.array([0]), heights=[32], widths=[32], host_mask=torch.as_tensor(keep[None]))
    scorer = scores.Scorer.__new__(scores.Scorer)
    scorer._plan = SimpleNamespace(model=SimpleNamespace(grid=GRID))
    scorer._device = torch.device("cpu")
    batch.pairs = scorer._pairs_of(lends, batch)
    found = scores._score_pairs(torch.as_tensor(rows, dtype=torch.float32), batch.pairs)
    for name in ("pair_auc", "pair_auc_matched"):
        each = [attention.pair_scores(rows[0].astype(np.float32), p, GRID)[name] for p in lent]
        np.testing.assert_allclose(found[f"{name}.swap"][0].numpy(), np.mean(each, axis=0), rtol=1e-6)
        by_lender = found[f"{name}.by_lender"][0].numpy()
        np.testing.assert_allclose(by_lender[:, :5].T, each, atol=5e-4)  # float16
        assert by_lender.shape == (2, SWAPS)
        assert np.isnan(by_lender[:, 5:]).all()
    nulls = {f"{name}.{null}" for name in ("pair_auc", "pair_auc_matched") for null in ("swap", "by_lender")}
    assert set(found) == {*map_scores.PAIR_NAMES, *nulls}

"""`instance_ari_truth`: k-means started from the instances themselves, on scenes whose answer is known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from batchjob.clustering.from_labels import _settle_in_torch, settle
from batchjob.codes import NO_LABEL
from batchjob.data.instances import GridInstances
from batchjob.geometry import Geometry
from batchjob.job.lent import LentObjects
from batchjob.job.scores import Scorer
from batchjob.metrics import truth
from batchjob.metrics.clusters import instance_scores
from batchjob.metrics.on_device import instance_ari, twins_of
from tests import scenes

GRID, PATCHES = (4, 5), 20


def random_owners(random: np.random.Generator, count: int, instances: int = 3) -> np.ndarray:
    """Returns [count, P]: every instance owns at least two patches, and some patches belong to no instance."""
    owner = random.integers(-1, instances, (count, PATCHES)).astype(np.int16)
    owner[:, : 2 * instances] = np.arange(2 * instances) % instances
    return owner


def test_lloyd_from_the_instances_by_hand() -> None:
    # Six patches are at 0, 1, 2, 8, 9, 10 on a line; the first instance owns four of them, the second two. The means
    # are 2.75 and 9.5, so the patch at 8 changes its cluster, and no patch does afterwards.
    rows = np.array([0.0, 1, 2, 8, 9, 10])[:, None]
    owner = np.array([0, 0, 0, 0, 1, 1])
    labels = truth.settle(rows, truth.clusters_of(owner, 2))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    # Of 15 pairs 4 are together in both, 6 in the clusters, 7 in the instances: (4 − 2.8) / (6.5 − 2.8).
    found = truth.instance_ari_truth(rows[None], owner, np.array([7, 7]))
    assert found[0] == pytest.approx(1.2 / 3.7)


def test_the_rest_of_the_patches_is_one_cluster_more_and_padding_is_in_none() -> None:
    owner = np.array([-1, 0, 1, -1, 0])
    keep = np.array([True, True, True, False, True])
    assert truth.clusters_of(owner, 2).tolist() == [2, 0, 1, 2, 0]
    assert truth.clusters_of(owner, 2, keep).tolist() == [2, 0, 1, -1, 0]


@pytest.mark.parametrize(("kind", "expected"), [("class", 0.0), ("instance", 1.0)])
def test_a_head_that_holds_instances_keeps_them_and_one_that_holds_the_class_loses_them(
    kind: str, expected: float
) -> None:
    random = np.random.default_rng(0)
    for count in (2, 3, 6):
        owner = scenes.disks(count, random)
        group = owner if kind == "instance" else np.minimum(owner, 0)
        rows = (group[:, None] == group[None, :]).astype(float)
        rows /= rows.sum(axis=1, keepdims=True)
        assert truth.instance_ari_truth(rows[None], owner, np.zeros(count, int)) == [expected]


def test_local_attention_does_as_well_from_any_objects_so_its_gain_over_swap_is_nothing() -> None:
    random = np.random.default_rng(0)
    owners = [scenes.disks(2, random) for _ in range(24)]
    local = scenes.attention("local", owners[0], random)[None]  # its attention does not depend on the objects
    values = np.array([truth.instance_ari_truth(local, owner, np.zeros(2, int))[0] for owner in owners])
    gains = values - [np.delete(values, i).mean() for i in range(len(values))]
    assert values.mean() > 0.3  # a high score says nothing by itself
    assert abs(gains.mean()) < 1e-9


def test_the_compiled_steps_and_those_of_the_device_are_the_specification() -> None:
    random = np.random.default_rng(0)
    rows = random.gamma(0.3, size=(3, 2, PATCHES, PATCHES))
    rows[:, 1] = np.round(rows[:, 1], 0)  # rows that are equal, and means that are equally near
    starts = random_owners(random, 12).reshape(3, 4, PATCHES)
    starts[starts < 0] = 3
    starts[1, :, 15:] = -1  # padding
    starts[2, 2:] = -1  # one image has fewer starts
    x, given = torch.as_tensor(rows, dtype=torch.float32), torch.as_tensor(starts)
    compiled, in_torch = settle(x, given), _settle_in_torch(x, given)
    assert torch.equal(_settle_in_torch(x, given, budget_bytes=1), in_torch)  # image by image
    moved = 0
    for image, head, start in np.ndindex(3, 2, 4):
        own = starts[image, start]
        expected = own if (own < 0).all() else truth.settle(np.float32(rows[image, head]).astype(float), own)
        moved += int((expected != own).sum())
        assert compiled[image, head, start].tolist() == expected.tolist()
        assert in_torch[image, head, start].tolist() == expected.tolist()
    assert moved > 50


def test_rows_that_are_all_equal_fall_into_the_first_cluster() -> None:
    starts = torch.arange(PATCHES, dtype=torch.int16)[None, None] % 3
    for found in (settle(torch.ones(1, 1, PATCHES, 4), starts), _settle_in_torch(torch.ones(1, 1, PATCHES, 4), starts)):
        assert found.unique().tolist() == [0]


def test_the_index_on_the_device_is_that_of_numpy_whatever_else_is_in_the_batch() -> None:
    random = np.random.default_rng(0)
    owner = random_owners(random, 5, instances=4)
    categories = [np.array(c, np.int32) for c in ([1, 1, 1, 1], [1, 2, 1, 2], [1, 2, 3, 4], [9, 9, 2, 3], [5, 1, 1, 1])]
    labels = random.integers(0, 5, (5, 3, PATCHES))
    labels[3, :, 15:] = -1
    labels[0, 1], labels[1, 2] = owner[0], 0

    def score(part: slice) -> torch.Tensor:
        own, twins = owner[part].astype(np.int64), twins_of(categories[part]).astype(np.float64)
        return instance_ari(*map(torch.as_tensor, (labels[part], own, twins)), clusters=5)

    ours = score(slice(0, 5))
    for i, category in enumerate(categories):
        known = np.where(labels[i] < 0, NO_LABEL, labels[i])
        np.testing.assert_allclose(ours[i], instance_scores(known, owner[i], category)["instance_ari"], rtol=1e-6)
        alone = score(slice(i, i + 1))
        assert torch.equal(alone[0].nan_to_num(-9), ours[i].nan_to_num(-9))
    assert ours[0, 1] == 1
    assert ours[1, 2] == 0
    assert ours[2].isnan().all()  # every category has one instance only


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", ["attention", "key"])
def test_a_batch_is_scored_from_its_own_objects_and_for_swap_from_those_of_other_photos(
    kind: str, distance: str
) -> None:
    random = np.random.default_rng(0)
    owner = random_owners(random, 6)
    category = np.tile(np.array([1, 1, 2], np.int32), 6)
    category[-3:] = [1, 2, 3]  # the last image does not have two instances of one category
    numbers = np.arange(18, dtype=np.int32) % 3
    instances = GridInstances(owner, category, numbers, np.arange(7) * 3, np.full((6, 2), 32, np.int32))
    keep = np.ones(PATCHES, bool)
    keep[-5:] = False  # the last row of patches is padding
    rows = random.gamma(0.3, size=(3, 2, PATCHES, 7 if kind == "key" else PATCHES)).astype(np.float32)
    options = SimpleNamespace(score_groups={"pairs"}, distance=distance)
    plan: Any = SimpleNamespace(model=SimpleNamespace(grid=GRID), options=options, vector_size=7 * (kind == "key"))
    scorer = Scorer.__new__(Scorer)
    scorer._device = torch.device("cpu")
    scorer._plan, scorer._objects = plan, LentObjects(instances, Geometry(32, 40, 8, 8), seed=0)
    mask = torch.as_tensor(np.stack([keep] * 3))
    heights = np.array([32, 32, 33])  # the last image has another size than the annotated one
    batch: Any = SimpleNamespace(rows=np.array([0, 5, 2]), heights=heights, widths=np.full(3, 32), mask=mask)
    batch.host_mask, batch.pairs = mask, None
    scorer.prepare(batch)
    found = {name: values.numpy() for name, values in scorer(torch.as_tensor(rows), batch).items()}
    assert ("pair_auc" in found) == (kind == "attention")
    own, swap = found["instance_ari_truth"], found["instance_ari_truth.swap"]
    assert np.isnan(own[1:]).all()
    assert np.isnan(swap[1:]).all()
    x = rows[0].astype(float)
    if kind == "attention":
        x = x * keep / (x * keep).sum(axis=-1, keepdims=True)
    if distance == "cosine":
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(own[0], truth.instance_ari_truth(x, owner[0], category[:3], keep), rtol=1e-6)
    others = [truth.instance_ari_truth(x, owner[i], category[:3], keep) for i in (1, 2, 3, 4)]
    np.testing.assert_allclose(swap[0], np.mean(others, axis=0), rtol=1e-6)
    by_lender = found["instance_ari_truth.by_lender"]
    in_order = scorer._objects._donors.of(0)
    by_row = dict(zip((1, 2, 3, 4), others, strict=True))
    np.testing.assert_allclose(by_lender[0, :, : len(in_order)].T, [by_row[int(r)] for r in in_order], atol=5e-4)
    assert np.isnan(by_lender[0, :, len(in_order) :]).all()
    assert np.isnan(by_lender[1:]).all()

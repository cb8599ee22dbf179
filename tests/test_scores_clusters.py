"""Scores of clusters: computed by hand on a few patches, and equal to scikit-learn's."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

from batchjob.metrics import agreement as partitions
from batchjob.metrics import clusters as scores
from batchjob.stats.image import stability

# ---- partitions ----

labellings = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        arrays(np.uint8, (3, n), elements=st.integers(0, 6)), arrays(np.int64, n, elements=st.integers(0, 4))
    )
)


@given(labellings)
def test_ari_and_ami_are_scikit_learns(case: Any) -> None:
    labels, groups = case
    table = partitions.contingency(labels, groups)
    np.testing.assert_allclose(partitions.ari(table), [adjusted_rand_score(groups, row) for row in labels], atol=1e-12)
    np.testing.assert_allclose(
        partitions.ami(table), [adjusted_mutual_info_score(groups, row) for row in labels], atol=1e-7
    )


@given(labellings, st.randoms(use_true_random=False))
def test_renaming_clusters_or_moving_patches_changes_no_index(case: Any, random: Any) -> None:
    labels, groups = case
    names = list(range(7))
    random.shuffle(names)
    order = list(range(labels.shape[1]))
    random.shuffle(order)
    table, other = (
        partitions.contingency(labels, groups),
        partitions.contingency(np.array(names)[labels][:, order], groups[order]),
    )
    np.testing.assert_allclose(partitions.ari(table), partitions.ari(other), atol=1e-12)
    np.testing.assert_allclose(partitions.ami(table), partitions.ami(other), atol=1e-9)


def test_a_table_counts_by_hand_leaves_255_out_and_takes_noise_for_a_cluster() -> None:
    labels = np.array([[0, 0, 1, 254, 255, 1]], np.uint8)
    table = partitions.contingency(labels, np.array([0, 1, 1, 1, 0, -1]))
    assert table[0].tolist() == [[1, 1], [0, 1], [0, 1]]
    assert np.isnan(partitions.ari(partitions.contingency(labels, np.full(6, -1), 1))).all()


def test_ari_by_hand() -> None:
    # two of six pairs are together in the groups, and none of these in the crossed clusters: (0 − 2/3) / (2 − 2/3)
    table = partitions.contingency(np.array([[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]), np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(partitions.ari(table), [1, -0.5, 0])


# ---- clusters against instances ----


def test_instance_ari_is_the_mean_over_categories_of_the_index_over_their_own_patches() -> None:
    owner = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, -1, -1])
    category = np.array([7, 7, 9, 9, 5])
    labels = np.array([[0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 0, 1]], np.uint8)
    found = scores.instance_scores(labels, owner, category)
    # the first labelling separates category 7 and joins 9 (index 0); category 5 has one instance and does not count
    np.testing.assert_allclose(found["instance_ari"], [0.5, 1])
    np.testing.assert_allclose(found["instance_ami"], [0.5, 1], atol=1e-12)


@given(st.integers(0, 1000))
def test_instance_scores_are_scikit_learns_over_each_category(seed: int) -> None:
    random = np.random.default_rng(seed)
    owner, category = random.integers(-1, 5, 60), random.integers(0, 2, 5)
    owner[:5] = np.arange(5)
    labels = random.integers(0, 4, (3, 60)).astype(np.uint8)
    found = scores.instance_scores(labels, owner, category)
    for name, index in (("instance_ari", adjusted_rand_score), ("instance_ami", adjusted_mutual_info_score)):
        for c in range(3):
            values = [
                index(owner[inside], labels[c, inside])
                for value in np.unique(category)
                if (category == value).sum() >= 2
                for inside in [np.isin(owner, np.flatnonzero(category == value))]
            ]
            assert found[name][c] == pytest.approx(np.mean(values) if values else np.nan, abs=1e-9, nan_ok=True)


def test_images_without_two_instances_of_a_category_have_no_score() -> None:
    labels = np.zeros((2, 4), np.uint8)
    for owner, category in (([-1] * 4, []), ([0, 0, -1, -1], [3]), ([0, 0, 1, 1], [3, 4])):
        found = scores.instance_scores(labels, np.array(owner), np.array(category, int))
        assert np.isnan(found["instance_ari"]).all()
        assert np.isnan(found["instance_ami"]).all()


def test_image_ari_takes_the_background_for_one_more_group_and_leaves_padding_out() -> None:
    owner = np.array([-1, -1, 0, 0, 1, 1, -1])
    labels = np.array([[2, 2, 0, 0, 1, 1, 255], [0, 0, 0, 1, 1, 1, 255]], np.uint8)
    expected = [1, adjusted_rand_score([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1])]
    np.testing.assert_allclose(scores.image_ari(partitions.contingency(labels, owner + 1)), expected)
    assert np.isnan(scores.image_ari(partitions.contingency(labels, np.zeros(7, int)))).all()


def test_pair_ari_and_its_modifiers_by_hand() -> None:
    # two by four patches: instance 0 on the left, 1 beside it, 2 of another category, 3 of the first at the right
    owner = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    category = np.array([1, 1, 8, 1])
    boxes = np.array([[0, 0, 2, 2], [1, 0, 2, 2], [2, 0, 3, 2], [3, 0, 4, 2]], float)
    pairs = scores.instance_pairs(owner, category, boxes, (2, 4))
    assert list(zip(pairs.first, pairs.second, strict=True)) == [(0, 1), (0, 3), (1, 3)]
    assert pairs.distance.tolist() == [1, 3, 2]
    assert pairs.box_iou.tolist() == [0.5, 0, 0]
    assert pairs.smaller.tolist() == pairs.larger.tolist() == [2, 2, 2]
    labels = np.array([[0, 1, 0, 1, 0, 1, 0, 1]], np.uint8)
    table = partitions.contingency(labels, owner)
    np.testing.assert_allclose(scores.pair_ari(table, pairs.first, pairs.second), [[1, 1, 0]])
    none = scores.instance_pairs(owner[:0], category[:0], boxes[:0], (0, 0))
    assert scores.pair_ari(table[:, :, :0], none.first, none.second).shape == (1, 0)


def test_coherence_sizes_and_agreement_by_hand() -> None:
    labels = np.array([[0, 0, 1, 1], [0, 1, 1, 255], [0, 0, 0, 254]], np.uint8)  # on 2x2 patches
    np.testing.assert_allclose(scores.coherence(labels, (2, 2)), [0.5, 0, 0.5])
    sizes = scores.cluster_sizes(labels)
    assert sizes["clusters"].tolist() == [2, 2, 2]
    np.testing.assert_allclose(sizes["largest_cluster"], [0.5, 2 / 3, 0.75])
    np.testing.assert_allclose(sizes["smallest_cluster"], [0.5, 1 / 3, 0.25])
    table = scores.agreement(labels[[0, 2]], labels[[0, 2]])
    expected = adjusted_rand_score([0, 0, 1, 1], [0, 0, 0, 1])
    np.testing.assert_allclose(table, [[1, expected], [expected, 1]], atol=1e-12)


def test_repeats_that_agree_are_stable() -> None:
    repeats = np.array([[[0, 0, 1, 1], [1, 1, 0, 0]], [[0, 0, 1, 1], [0, 1, 0, 1]]], np.uint8)
    np.testing.assert_allclose(stability(repeats), [1, -0.5])
    assert np.isnan(stability(repeats[:, :1])).all()

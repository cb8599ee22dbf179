"""The search for the best k-means partition, against brute force, scikit-learn and known answers; no torch."""

import subprocess
import sys

import numpy as np
import pytest
from sklearn.cluster import KMeans

from batchjob.clustering.search import NotFiniteError, best_partition, best_partitions
from batchjob.codes import NO_LABEL
from tests.conftest import ROOT


def inertia_of(rows, labels):
    rows = np.asarray(rows, np.float64)
    return sum(((own - own.mean(0)) ** 2).sum() for own in (rows[labels == c] for c in np.unique(labels)))


def partitions_into(count, k):
    """Every way of cutting `count` rows into exactly k clusters, numbered by first appearance."""

    def grow(labels, used):
        if len(labels) == count:
            if used == k:
                yield np.array(labels)
            return
        for label in range(min(used + 1, k)):
            yield from grow([*labels, label], max(used, label + 1))

    return grow([], 0)


@pytest.mark.parametrize(("count", "k"), [(5, 2), (7, 3), (8, 4), (10, 2), (10, 3), (9, 8)])
def test_the_partition_is_the_best_of_all_there_are(count, k):
    for seed in range(6):
        rows = np.random.default_rng((seed, count, k)).normal(size=(count, 3)).astype(np.float32)
        best = min(inertia_of(rows, labels) for labels in partitions_into(count, k))
        found = best_partition(rows, k, seed=seed)
        assert found.inertia == pytest.approx(best, rel=1e-5)
        assert inertia_of(rows, found.labels) == pytest.approx(best, rel=1e-5)
        assert found.settled


def test_clusters_are_numbered_by_first_appearance_and_masked_rows_have_none():
    rows = np.array([[9.0], [0.0], [0.1], [5.0], [9.1], [77.0]])
    found = best_partition(rows, 3, mask=np.array([True] * 5 + [False]))
    assert found.labels.tolist() == [0, 1, 1, 2, 0, NO_LABEL]
    assert found.inertia == pytest.approx(0.005 + 0.005)


def test_quarters_of_a_square_are_the_best_four_clusters_of_its_positions():
    y, x = np.divmod(np.arange(36), 6)
    found = best_partition(np.stack([y, x], axis=1), 4)
    assert found.labels.reshape(6, 6)[[0, -1]].tolist() == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]]
    assert (found.inertia, found.settled) == (pytest.approx(48.0), True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_that_is_not_finite_is_named_with_its_problem(dtype):
    rows = np.random.default_rng(0).random((4, 6, 3)).astype(dtype)
    rows[2, 1, 1], rows[3, 0, 0] = np.nan, np.inf
    with pytest.raises(NotFiniteError, match="2 clustering problems hold NaN or infinity: 2, 3"):
        best_partitions(rows, np.full(4, 2), np.arange(4))


def test_the_search_ends_no_higher_than_many_starts_of_scikit_learn():
    rows = np.random.default_rng(1).random((120, 5)).astype(np.float32)
    theirs = KMeans(6, n_init=100, random_state=0).fit(rows).inertia_
    assert best_partition(rows, 6).inertia <= theirs * (1 + 1e-5)


def test_it_needs_no_torch():
    code = "import sys; from batchjob.clustering.search import best_partition as f; f([[0], [1.0]], 2)"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

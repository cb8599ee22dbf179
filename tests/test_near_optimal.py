"""The search for the best k-means partition, against brute force, scikit-learn and known answers, without torch."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import KMeans

from batchjob.clustering import jit, moves
from batchjob.clustering.search import AUTO, NotFiniteError, best_partition, best_partitions
from batchjob.codes import NO_LABEL
from tests.conftest import ROOT


def inertia_of(rows, labels):
    rows = np.asarray(rows, np.float64)
    return sum(((own - own.mean(0)) ** 2).sum() for own in (rows[labels == c] for c in np.unique(labels)))


def partitions_into(count, k):
    """Yields every partition of `count` rows into exactly k clusters, numbered by first appearance."""

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


@pytest.mark.parametrize("n_init", [AUTO, 3])
def test_the_bits_are_the_same_in_any_batch_and_for_any_number_of_threads(n_init):
    rows = np.random.default_rng(2).random((40, 50, 50)).astype(np.float32)
    k, seeds = np.arange(40) % 9 + 1, np.arange(40) * 7
    alone = best_partitions(rows, k, seeds, n_init=n_init)
    for threads in (2, 5):
        shared = best_partitions(rows, k, seeds, n_init=n_init, threads=threads)
        assert np.array_equal(shared.labels, alone.labels)
        assert np.array_equal(shared.inertia, alone.inertia)
        assert np.array_equal(shared.settled, alone.settled)
    part = [31, 2, 17]
    few = best_partitions(rows[part], k[part], seeds[part], n_init=n_init)
    assert np.array_equal(few.labels, alone.labels[part])
    assert np.array_equal(few.inertia, alone.inertia[part])


def test_a_mask_gives_the_bits_of_the_rows_inside_it():
    rows = np.random.default_rng(3).random((40, 12)).astype(np.float32)
    mask = np.arange(40) % 3 > 0
    masked, cut = best_partition(rows, 4, mask=mask), best_partition(rows[mask], 4)
    assert np.array_equal(masked.labels[mask], cut.labels)
    assert masked.inertia == cut.inertia


def test_one_plain_start_is_not_settled_and_two_that_agree_are():
    rows = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0) + np.random.default_rng(4).normal(0, 0.1, (15, 3))
    assert not best_partition(rows.astype(np.float32), 3, n_init=1).settled
    assert best_partition(rows.astype(np.float32), 3, n_init=8).settled


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e18])
def test_the_clusters_do_not_depend_on_the_unit(size):
    rows = np.random.default_rng(5).random((30, 4)).astype(np.float32)
    assert np.array_equal(best_partition(rows * np.float32(size), 4).labels, best_partition(rows, 4).labels)


def test_nearly_equal_rows_far_from_zero_are_still_told_apart():
    rows = (1000 + np.repeat([0.0, 1e-3, 2e-3], 4))[:, None].astype(np.float32)
    found = best_partition(rows, 3)
    assert found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    tight = np.eye(3, dtype=np.float32)[np.arange(30) % 3] * 100
    tight += np.random.default_rng(6).random((30, 3)).astype(np.float32) * 1e-3
    found = best_partition(tight, 6)
    assert found.inertia == pytest.approx(inertia_of(tight, found.labels), rel=1e-6)
    theirs = KMeans(6, n_init=50, random_state=0).fit(tight.astype(np.float64)).inertia_
    assert found.inertia <= theirs * 1.001


@pytest.mark.parametrize("length", [300, 1000, 2000])
def test_one_row_that_is_far_from_all_others_does_not_stop_their_moves(length):
    """In single precision its square hides gains of the other rows."""
    for seed in range(3):
        rows = np.random.default_rng(seed).normal(size=(200, 8))
        rows[0] *= length / np.linalg.norm(rows[0])
        rows = rows.astype(np.float32)
        single, double = (best_partition(rows.astype(kind), 6, seed=seed) for kind in (np.float32, np.float64))
        assert single.inertia <= double.inertia * 1.0005


def test_k_above_the_number_of_different_rows_is_that_number():
    rows = np.repeat(np.array([[3.0, 0.0], [1.0, 1.0]], np.float32), 3, axis=0)
    found = best_partition(rows, 5)
    assert (found.labels.tolist(), found.inertia, found.settled) == ([0, 0, 0, 1, 1, 1], 0.0, True)
    assert best_partition(np.zeros((4, 2)), 3).labels.tolist() == [0, 0, 0, 0]


def test_the_search_imports_no_torch():
    code = "import sys; from batchjob.clustering.search import best_partition as f; f([[0], [1.0]], 2)"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_grids_many_equal_partitions_do_not_keep_the_search_going() -> None:
    """Clusters 14 × 14 positions into seven; when rounding decided between equal ones, this took 34 s, now 0.1 s."""
    places = np.stack(np.divmod(np.arange(196), 14), axis=1).astype(np.float64)
    rows = np.broadcast_to(places, (20, 196, 2))
    found = best_partitions(rows, np.full(20, 7), np.arange(20))
    assert found.inertia.max() <= 1.02 * found.inertia.min()
    assert (np.diff(found.labels.astype(int).max(axis=1)) == 0).all()


def test_code_that_was_compiled_before_any_of_its_files_changed_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = jit._digest()
    assert f"batchjob-{now}" in moves.search.stats.cache_path
    shutil.copytree(Path(jit.__file__).parent, tmp_path / "clustering")
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "clustering" / "jit.py"))
    for name, is_compiled in (("engines.py", False), ("draws.py", True)):
        with (tmp_path / "clustering" / name).open("a") as file:
            file.write("# changed\n")
        jit._digest.cache_clear()
        assert (jit._digest() != now) is is_compiled, name
    jit._digest.cache_clear()

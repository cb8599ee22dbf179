"""A test of gains over `swap` knows that photos lend their objects to each other."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from batchjob.data.instances import GridInstances
from batchjob.metrics.nulls import BY_LENDER, LENDERS, LENT, Donors
from batchjob.metrics.uncertainty import first_half, interval, mean_known, sign_flip
from batchjob.stats.lent import HALVES, Lent, attribute, excess
from batchjob.stats.run import run_stats
from tests import made_up_runs

Floats = NDArray[np.float64]


def lenders(n: int, number: int, seed: int) -> list[NDArray[np.intp]]:
    random = np.random.default_rng(seed)
    return [random.choice(np.delete(np.arange(n), i), number, replace=False) for i in range(n)]


def gains_and_lent(
    scores: Floats, lent: list[NDArray[np.intp]], half: NDArray[np.int64]
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Returns gains over `swap` [n, C] of scores [map, objects, C], what objects add to others' [n, HALVES, C], and how
    many photos lend to each [n].
    """
    n, _, columns = scores.shape
    added, sums, gains = Lent(n), np.zeros((n, HALVES, columns)), np.zeros((n, columns))
    for i, others in enumerate(lent):
        each = scores[i, others]
        gains[i] = scores[i, i] - mean_known(each, axis=0)
        added.lend(i, others)
        added.add("s", i, each, scores[i, i], int(half[i]))
    found = added.sums()
    sums[found.rows] = found.sums["s"]
    attribute(sums, found.lenders, np.ones((n, columns), bool), half)
    return gains, sums, (found.lenders >= 0).sum(axis=1)


def test_a_score_that_is_a_sum_of_map_and_objects_has_gains_that_differ_but_cancel() -> None:
    """With score = a(map) + b(objects) and all photos lending to all, no photo has a part in the mean gain."""
    random = np.random.default_rng(0)
    n = 21
    scores = (random.normal(size=(n, 1, 1)) + random.normal(size=(1, n, 1))).repeat(2, axis=2)
    everyone = [np.delete(np.arange(n), i) for i in range(n)]
    gains, lent, _ = gains_and_lent(scores, everyone, np.zeros(n, int))
    assert gains.std() > 0.5
    assert np.abs(gains - lent.sum(axis=1)).max() < 0.01 * gains.std()
    found = interval(gains, lent.sum(axis=1))
    np.testing.assert_allclose([found.low, found.mean, found.high], 0, atol=0.01)


@pytest.mark.parametrize("n", [13, 21])
@pytest.mark.parametrize("effect", [0.0, 0.35])
def test_p_is_that_of_a_permutation_of_the_objects(effect: float, n: int) -> None:
    """The oracle gives each map another photo's objects, in 4,000 orders: exact where maps do not know the objects."""
    random = np.random.default_rng(3)
    columns = 40
    scores = random.normal(size=(n, n, columns)) + 3 * random.normal(size=(1, n, columns))
    scores += effect * np.eye(n)[:, :, None]
    everyone = [np.delete(np.arange(n), i) for i in range(n)]
    gains, lent, count = gains_and_lent(scores, everyone, np.zeros(n, int))
    orders = np.array([random.permutation(n) for _ in range(4000)])
    drawn = np.mean([scores[i, orders[:, i]] for i in range(n)], axis=0)
    middle = drawn.mean(axis=0)
    own = np.abs(scores[np.arange(n), np.arange(n)].mean(axis=0) - middle)
    oracle = (np.abs(drawn - middle) >= own).mean(axis=0)
    found = sign_flip(gains, lent.sum(axis=1), excess(gains, lent, slice(HALVES), count), flips=10_000)
    print(
        n,
        effect,
        (found - oracle).mean(),
        np.corrcoef(found, oracle)[0, 1],
        (sign_flip(gains, lent.sum(axis=1), flips=10_000) - oracle).mean(),
        (sign_flip(gains, flips=10_000) - oracle).mean(),
    )
    assert abs((found - oracle).mean()) < 0.015
    assert np.corrcoef(found, oracle)[0, 1] > 0.95  # each test estimates the spread from 21 photos
    assert (sign_flip(gains, flips=10_000) - oracle).mean() > 0.1  # gains taken for independent


@pytest.mark.parametrize("only_half", [False, True])
@pytest.mark.parametrize("number", [6, 20])
def test_five_of_a_hundred_tests_reject_where_objects_decide_the_score(number: int, only_half: bool) -> None:
    """63 photos with few or many lenders; also for the mean over one half, which borrows from both halves."""
    found, plain, covered = [], [], []
    for seed in range(30):
        random = np.random.default_rng(seed)
        n, columns = 63, 100
        scores = random.normal(size=(n, n, columns)) + 3 * random.normal(size=(1, n, columns))
        half = np.arange(n) % 2
        sevens = [np.delete(np.arange(7), i % 7) + i // 7 * 7 for i in range(n)]
        gains, lent, count = gains_and_lent(scores, sevens if number == 6 else lenders(n, 20, seed), half)
        if only_half:
            gains[half == 0] = np.nan
        halves = slice(1, HALVES) if only_half else slice(HALVES)
        taken, more = lent[:, halves].sum(axis=1), excess(gains, lent, halves, count)
        np.testing.assert_allclose(np.nansum(gains, axis=0), (np.nan_to_num(gains) - taken).sum(axis=0), atol=1e-9)
        found.append(sign_flip(gains, taken, more, flips=2000) <= 0.05)
        plain.append(sign_flip(gains, flips=2000) <= 0.05)
        bounds = interval(gains, taken, resamples=500)
        covered.append((bounds.low <= 0) & (bounds.high >= 0))
    print(number, only_half, np.mean(found), np.mean(covered), np.mean(plain))
    assert np.mean(found) == pytest.approx(0.05, abs=0.01)
    assert np.mean(covered) == pytest.approx(0.945, abs=0.02)
    assert np.mean(plain) < 0.02


def test_few_photos_with_gains_among_many_that_lend_have_an_interval() -> None:
    gains = np.full((6, 1), np.nan)
    gains[:2, 0] = 0.2, 0.4
    lent = np.array([[0.1], [0.0], [-0.1], [0.0], [0.05], [-0.05]])
    found = interval(gains, lent)
    assert found.mean[0] == pytest.approx(0.3)
    assert found.low[0] < 0.3 < found.high[0]


def test_a_photo_without_a_gain_takes_nothing_from_others_and_undefined_scores_do_not_count() -> None:
    added = Lent(2)
    added.lend(0, np.array([4, 7, 1]))
    values = np.array([[0.2, 0.5], [np.nan, 0.1], [0.6, 0.6]])
    added.add("s", 0, values, np.array([0.9, np.nan]), half=1)
    found = added.sums()
    assert found.rows.tolist() == [1, 4, 7]
    assert found.lenders[0, :4].tolist() == [4, 7, 1, -1]
    assert (found.lenders[1] == -1).all()
    np.testing.assert_allclose(found.sums["s"][:, 1], [[0.1, 0], [-0.1, 0], [0, 0]])
    assert (found.sums["s"][:, 0] == 0).all()


def test_a_photo_that_lends_alone_and_gains_that_are_all_zero_have_a_p() -> None:
    """With so few flips the observed signs always count; with no spread nothing is counted twice."""
    gains, lent = np.array([[0.3, 0.0], [0.1, 0.0], [0.2, 0.0]]), np.zeros((3, HALVES, 2))
    more = excess(gains, lent, slice(HALVES), np.ones(3, int))
    np.testing.assert_allclose(more, [0.14 / 3, 0])
    assert sign_flip(gains, lent.sum(axis=1), more).tolist() == [0.25, 1]


def test_stats_writes_what_each_photo_lends_from_labels_maps_and_the_scores_of_labelling(tmp_path: Path) -> None:
    run = made_up_runs.write_run(tmp_path / "run", 24)
    annotations = made_up_runs.write_annotations(tmp_path / "coco.json", 24)
    run_stats([run], annotations=str(annotations), jobs=1)
    group = zarr.open_group(str(run / "scores.zarr"), mode="r")
    half = (~first_half(made_up_runs.image_ids(24))).astype(int)
    counts = np.diff(GridInstances.load(run / "index").start)
    donors = Donors(counts, counts > 1, seed=0)
    for name in ("pair_auc", "pair_auc_matched"):
        each, own = np.asarray(group[name + BY_LENDER]), np.asarray(group[name])
        added = Lent(24)
        for i in range(24):
            lent = donors.of(i)
            values = np.moveaxis(each[i], -1, 0)[: len(lent)].reshape(len(lent), -1)
            added.lend(i, lent)
            added.add(name, i, values.astype(float), own[i].ravel(), int(half[i]))
        found, expected = added.sums(), np.zeros((24, HALVES, own[0].size))
        expected[found.rows] = found.sums[name]
        known = np.isfinite(own) & np.isfinite(np.asarray(group[f"{name}.swap"]))
        attribute(expected, found.lenders, known.reshape(24, -1), half)
        np.testing.assert_allclose(np.asarray(group[name + LENT]).reshape(expected.shape), expected, atol=1e-5)
        assert np.asarray(group[name + LENDERS]).tolist() == [len(donors.of(i)) for i in range(24)]
    for name in ("instance_ari", "image_ari", "jaccard_60", "corloc"):
        lent_by = np.asarray(group[name + LENT])
        assert lent_by.shape == (24, HALVES, *group[name].shape[1:])
        np.testing.assert_allclose(lent_by.sum(axis=0), 0, atol=1e-4)
        assert np.abs(lent_by).max() > 0 or name == "corloc"

"""Intervals have their nominal coverage, tests their nominal level, and corrections follow the textbook."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats

from batchjob.metrics import uncertainty as bootstrap
from batchjob.metrics.uncertainty import first_half, holm, interval, resampled_means, resampled_ratios, sign_flip


def coverage(n: int, trials: int, *, skewed: bool) -> float:
    """Returns the share of 10 × `trials` data sets of n images whose interval holds the true mean.

    The data are skewed, like a score between 0 and 1 that is near 0 for many images and high for a few.
    """
    held = []
    for seed in range(10):  # columns share resamples, so their coverages are correlated
        random = np.random.default_rng(seed)
        values = random.beta(0.5, 1.5, (n, trials)) if skewed else random.normal(0.25, size=(n, trials))
        found = interval(values, resamples=1000, seed=seed)
        held.append((found.low <= 0.25) & (found.high >= 0.25))
    return float(np.mean(held))


def test_the_interval_covers_95_of_100_at_200_images() -> None:
    assert coverage(200, 150, skewed=True) == pytest.approx(0.95, abs=0.02)
    assert coverage(200, 150, skewed=False) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(("n", "expected"), [(8, 0.88), (20, 0.93), (50, 0.95)])
def test_the_interval_covers_less_for_few_images_as_the_page_says(n: int, expected: float) -> None:
    covered = coverage(n, 300, skewed=True)
    assert covered == pytest.approx(expected, abs=0.02)


def test_the_interval_of_one_seed_is_always_the_same_and_its_mean_is_the_mean() -> None:
    values = np.random.default_rng(0).random((30, 3))
    one, two = interval(values), interval(values)
    assert (one.low == two.low).all()
    np.testing.assert_allclose(one.mean, values.mean(axis=0))
    assert ((one.low < one.mean) & (one.mean < one.high)).all()
    assert one.n.tolist() == [30, 30, 30]


def test_images_without_a_score_are_left_out_column_by_column() -> None:
    values = np.random.default_rng(0).random((40, 2))
    holed = values.copy()
    holed[::2, 1] = np.nan
    found = interval(np.column_stack([holed, np.full(40, np.nan)]))
    alone = interval(values[1::2, 1:])
    assert found.n.tolist() == [40, 20, 0]
    assert (found.low[1], found.high[1]) == (alone.low[0], alone.high[0])
    assert np.isnan([found.mean[2], found.low[2], found.high[2]]).all()


def test_one_image_has_a_mean_and_no_interval() -> None:
    found = interval(np.array([[0.5, 0.5, np.nan], [np.nan, 0.7, np.nan]]))
    assert found.n.tolist() == [1, 2, 0]
    np.testing.assert_array_equal(found.mean, [0.5, 0.6, np.nan])
    assert np.isfinite(found.low).tolist() == np.isfinite(found.high).tolist() == [False, True, False]


def test_differences_of_columns_are_paired() -> None:
    random = np.random.default_rng(0)
    hard = random.random(50)  # the difficulty of an image affects both heads
    gains = np.column_stack([hard + 0.1, hard])
    found = interval((gains[:, 0] - gains[:, 1])[:, None])
    assert found.low[0] == pytest.approx(0.1)
    means = resampled_means(gains)
    np.testing.assert_allclose(means[:, 0] - means[:, 1], 0.1)


def test_the_blocks_of_resamples_do_not_change_what_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((25, 2))
    monkeypatch.setattr(bootstrap, "_BLOCK", 60)
    small = resampled_means(values, resamples=500)
    assert small.shape == (500, 2)
    assert small.mean() == pytest.approx(values.mean(), abs=0.02)
    assert small.std() == pytest.approx(values.std() / 5, rel=0.2)


def test_ratios_are_means_over_what_the_drawn_images_hold() -> None:
    count = np.array([[1.0], [3], [2]])
    np.testing.assert_allclose(resampled_ratios(count * 0.25, count), 0.25)


def test_the_sign_flip_test_by_hand_and_against_scipy() -> None:
    # two of the eight flips of 1, 2, 3 reach a sum of six
    assert sign_flip(np.array([[1.0], [2], [3]]))[0] == pytest.approx(2 / 8)
    gains = np.random.default_rng(3).normal(0.3, size=(12, 2))
    expected = [
        scipy_stats.permutation_test((gains[:, i],), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
        for i in range(2)
    ]
    np.testing.assert_allclose(sign_flip(gains), expected)


def test_random_flips_come_near_all_flips_and_wilcoxons_order() -> None:
    gains = np.random.default_rng(4).normal(0.25, size=(16, 1))
    everything = sign_flip(gains)[0]  # 65,536 flips are fewer than 100,000
    some = sign_flip(gains, flips=20_000)[0]
    assert some == pytest.approx(everything, abs=0.01)


def test_under_no_effect_the_sign_flip_test_rejects_five_of_a_hundred() -> None:
    gains = np.random.default_rng(5).normal(size=(40, 2000))
    assert (sign_flip(gains, flips=2000) <= 0.05).mean() == pytest.approx(0.05, abs=0.015)


def test_many_images_are_tested_in_single_precision_and_give_the_normal_p_value() -> None:
    gains = np.random.default_rng(6).normal(0.03, size=(3000, 2))
    expected = scipy_stats.ttest_1samp(gains, 0).pvalue
    np.testing.assert_allclose(sign_flip(gains, flips=20_000), expected, atol=0.01)


def test_zero_gains_have_p_one_and_missing_ones_none() -> None:
    p = sign_flip(np.column_stack([np.zeros(5), np.full(5, np.nan)]))
    assert p[0] == 1
    assert np.isnan(p[1])


def test_holm_by_hand() -> None:
    # 0.01 × 4, 0.02 × 3, then 0.03 × 2 is not below it, then 0.9
    np.testing.assert_allclose(holm(np.array([0.02, 0.9, 0.01, np.nan, 0.03])), [0.06, 0.9, 0.04, np.nan, 0.06])
    assert holm(np.array([np.nan])).tolist() == pytest.approx([np.nan], nan_ok=True)


@given(arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 1)))
def test_holm_keeps_the_order_and_never_lowers_a_p_value(p: np.ndarray) -> None:
    corrected = holm(p)
    assert (corrected >= p - 1e-12).all()
    assert (corrected <= 1).all()
    assert (np.diff(corrected[np.argsort(p, kind="stable")]) >= -1e-12).all()


def test_the_halves_depend_on_the_id_alone_and_are_halves() -> None:
    ids = [f"val2017/{i:012d}.jpg" for i in range(2000)]
    half = first_half(ids)
    assert half.mean() == pytest.approx(0.5, abs=0.04)
    assert (first_half(ids[::-1]) == half[::-1]).all()
    assert first_half([]).shape == (0,)

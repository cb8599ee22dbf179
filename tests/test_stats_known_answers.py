"""Heads that are independent of a photo's objects must not gain over `swap`, whatever their habits are."""

import numpy as np
import pytest

from tests.false_alarms import HEADS, gains_of_a_data_set, mean_rates, rates_of_a_data_set


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_of_heads_that_know_nothing_five_of_a_hundred_tests_reject(resize: str) -> None:
    """`python -m tests.false_alarms` takes 200 data sets, for limits of 0.05 ± 0.02 and 0.07."""
    alone, named = mean_rates(rates_of_a_data_set(resize, seed) for seed in range(16))
    assert {"instance_ari", "instance_ami", "image_ari", "pair_ari", "pair_auc", "pair_auc_matched"} <= set(alone)
    assert {"jaccard_60", "jaccard_80", "jaccard_90", "corloc", "instance_ari_truth"} <= set(alone)
    assert {n: v for n, v in alone.items() if abs(v - 0.05) > 0.08} == {}, alone
    assert {n: v for n, v in named.items() if v > 0.25} == {}, named


def test_a_head_that_knows_nothing_gains_nothing_within_its_error_and_no_null_is_missing() -> None:
    gains = gains_of_a_data_set("pad", 1)
    for name, (values, *_) in gains.items():
        known = values[np.isfinite(values)]
        assert len(known) >= 0.8 * values.size, name
        assert abs(known.mean()) <= 4 * known.std() / np.sqrt(len(known) / HEADS) + 1e-9, name

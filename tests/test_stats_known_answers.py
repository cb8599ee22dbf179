"""Heads of known kinds: what they must gain over `swap`, and how often a test may reject where there is nothing."""

import numpy as np
import pandas as pd
import pytest

from batchjob.stats import run_stats
from tests.false_alarms import HEADS, gains_of_a_data_set, mean_rates, rates_of_a_data_set
from tests.made_up_runs import KINDS, table, write_annotations, write_run

SCORES = {"instance_ari", "instance_ami", "image_ari", "pair_ari", "pair_auc", "pair_auc_matched"}
SCORES |= {"jaccard_60", "jaccard_80", "jaccard_90", "corloc"}


@pytest.fixture(scope="module")
def over_swap(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The summary of 40 scenes over `swap`, with the standard errors of the gains."""
    folder = tmp_path_factory.mktemp("known")
    run = write_run(folder / "run", 40)
    run_stats([run], annotations=str(write_annotations(folder / "a.json", 40)), jobs=1)
    found = table(run, "summary").query("null == 'swap' and score in @SCORES")
    kind = [KINDS[head] for head in found["head"]]
    return found.assign(kind=kind, error=(found["gain_high"] - found["gain_low"]) / (2 * 1.96))


def test_attention_by_instance_gains_in_every_score(over_swap: pd.DataFrame) -> None:
    found = over_swap.query("kind == 'instance'")
    assert set(found["score"]) == SCORES
    assert (found["gain"] > 0.1).all(), found
    assert (found["p_holm"] < 0.001).all(), found


@pytest.mark.parametrize("kind", ["local", "random"])
def test_attention_that_knows_no_objects_gains_nothing_in_any_score(over_swap: pd.DataFrame, kind: str) -> None:
    found = over_swap.query("kind == @kind")
    assert set(found["score"]) == SCORES
    assert (found["gain"].abs() <= 4 * found["error"] + 1e-6).all(), found
    assert (found["p_holm"] > 0.05).all(), found


def test_attention_by_class_finds_the_class_and_scores_zero_between_its_objects(over_swap: pd.DataFrame) -> None:
    """Other photos' objects lie partly outside the class, so a little of them is separated: the gain is below zero."""
    found = over_swap.query("kind == 'class'").set_index("score")
    assert found.loc["image_ari", "gain"] > 0.5
    assert found.loc["image_ari", "p_holm"] < 0.001
    for score in ("instance_ari", "instance_ami", "pair_ari"):
        assert abs(found.loc[score, "mean"]) < 0.03
        assert -0.12 < found.loc[score, "gain"] < 0
    assert abs(found.loc["pair_auc", "mean"] - 0.5) < 0.02
    assert abs(found.loc["pair_auc_matched", "mean"] - 0.5) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_of_heads_that_know_nothing_five_of_a_hundred_tests_reject(resize: str) -> None:
    """`python -m tests.false_alarms` takes 200 data sets, for limits of 0.05 ± 0.02 and 0.07."""
    alone, named = mean_rates(rates_of_a_data_set(resize, seed) for seed in range(50))
    assert {*SCORES, "instance_ari_truth"} <= set(alone)
    assert {n: v for n, v in alone.items() if not 0.005 < v < 0.11} == {}, alone  # 5 % ± 2, ± 1.3 twice of chance
    assert np.mean(list(alone.values())) == pytest.approx(0.05, abs=0.025)
    assert {n: v for n, v in named.items() if v > 0.16} == {}, named


def test_a_head_that_knows_nothing_gains_nothing_within_its_error_and_no_null_is_missing() -> None:
    gains = gains_of_a_data_set("pad", 1)
    for name, (values, *_) in gains.items():
        known = values[np.isfinite(values)]
        assert len(known) >= 0.8 * values.size, name
        assert abs(known.mean()) <= 4 * known.std() / np.sqrt(len(known) / HEADS) + 1e-9, name

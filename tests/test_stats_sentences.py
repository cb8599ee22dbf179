"""The sentences and numbers that `stats` prints."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from batchjob.errors import counted
from batchjob.stats import sentences, text
from batchjob.stats.modifiers import describe as describe_modifiers
from batchjob.stats.numbers import gain, number, p_number, p_value
from batchjob.store.run import Run
from tests.made_up_runs import write_run

QUESTION = {"score": "instance_ari", "algorithm": "kmeans", "layer": 11, "head": 1, "n": 113, "informative": 90}

QUESTION |= {"mean": 0.44, "better": 3, "worse": 1, "too_few": 0, "heads": 12, "enough": True, "sure": True}

SWAP = QUESTION | {"null": "swap", "null_mean": 0.21, "gain": 0.23, "gain_low": 0.18, "gain_high": 0.27, "p": 1e-5}

PLACE = QUESTION | {"null": "position", "null_mean": 0.33, "gain": 0.11, "gain_low": 0.05, "gain_high": 0.16, "p": 0.02}


def test_the_answer_is_a_whole_sentence(tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "run", 2))
    run.__dict__["layers"] = (10, 11)
    assert sentences.sentence(run, [SWAP, PLACE]) == (
        "Head 1 of layer 11 separates objects of one class: ARI 0.44, against 0.21 with other photos' objects (+0.23 "
        "[+0.18, +0.27], p < 0.001, n = 113, chosen on the other half) and 0.33 by position alone (+0.11 [+0.05, "
        "+0.16], p = 0.02)."
    )
    open_ = sentences.sentence(run, [SWAP | {"p": 0.2, "sure": False}, PLACE])
    assert open_.startswith("It is open whether head 1 of layer 11 separates objects of one class: ARI 0.44")
    worse = sentences.sentence(run, [SWAP | {"gain": -0.2}, PLACE])
    assert worse.startswith("Head 1 of layer 11 does worse than with other photos' objects: ARI 0.44")
    few = {"enough": False, "sure": False}
    told = sentences.sentence(run, [SWAP | few, PLACE | few])
    assert told.startswith("Too few to say whether head 1 of layer 11 separates objects of one class: ARI 0.44")
    assert "p " not in told.replace("photos", "")
    example = sentences.sentence(run, [SWAP | {"n": 5}, PLACE | {"n": 5}])
    assert example == (
        "An example, 5 photos: head 1 of layer 11 has ARI 0.44, against 0.21 with other photos' objects and 0.33 by "
        "position alone."
    )
    assert sentences.counts([SWAP, PLACE]) == (
        "Of 12 heads over all images, 3 do better than with other photos' objects and 1 does worse; 3 do better than "
        "position alone and 1 does worse (p ≤ 0.05 after Holm's correction)."
    )
    whole = sentences.answer(run, pd.DataFrame([SWAP | {"n": 40}, PLACE | {"n": 40}]))
    assert whole[-1].startswith("Under 50 images (here 40)")


def test_a_null_that_is_known_on_fewer_photos_is_told_with_the_score_on_these(tmp_path: Path) -> None:
    """Else the reader subtracts two figures of different photos, and the printed gain contradicts them."""
    run = Run(write_run(tmp_path / "run", 2))
    fewer = PLACE | {"n": 6, "mean": 0.3, "null_mean": 0.31, "gain": -0.01, "gain_low": -0.1, "gain_high": 0.1}
    told = sentences.sentence(run, [SWAP, fewer | {"enough": False}])
    assert told.endswith("and 0.31 by position alone (−0.01 [−0.10, +0.10], on 6 photos, where it has 0.30).")
    example = sentences.sentence(run, [SWAP | {"n": 7}, fewer])
    assert example.endswith("0.31 by position alone (on 6 photos, where it has 0.30).")


@pytest.mark.parametrize(
    ("cluster_on", "asked", "who"),
    [
        ("attention", "self-attention", "Head 1 separates"),
        ("key", "keys", "Head 1 by its keys separates"),
        ("query", "queries", "Head 1 by its queries separates"),
        ("token", "tokens", "Layer 11 by its tokens separates"),
    ],
)
def test_the_question_and_the_answer_name_what_was_clustered(
    tmp_path: Path, cluster_on: str, asked: str, who: str
) -> None:
    run = Run(write_run(tmp_path / "run", 2, cluster_on=cluster_on))
    assert sentences.question([run]) == f"Do clusters of {asked} separate objects of the same class?"
    assert sentences.sentence(run, [SWAP, PLACE]).startswith(f"{who} objects of one class: ARI 0.44")
    of_maps = sentences.sentence(run, [SWAP | {"score": "jaccard_60"}])
    assert " by its " not in of_maps, "the CLS map is the same, whatever is clustered"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (0, "No photo has two objects of one category that the patch grid shows, so the question has no answer here."),
        (1, "One photo has two objects of one category. To choose the head and to measure it takes two or more."),
        (4, "4 photos have two objects of one category: too few to choose the head on one half of the photos and"),
    ],
)
def test_why_the_question_has_no_answer(found: int, said: str) -> None:
    (line,) = sentences.why_none({"with two of a category": found})
    assert line.startswith(said)


RANDOM = QUESTION | {"null": "random", "null_mean": 0.1, "gain": 0.34, "gain_low": 0.28, "gain_high": 0.4, "p": 1e-5}


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        (1, "one seed where three are asked for"),
        (2, "two seeds where three are asked for"),
        (3, "three seeds"),
        (5, "5 seeds"),
    ],
)
def test_untrained_weights_are_a_clause_of_the_answer_with_the_number_of_seeds(
    tmp_path: Path, seeds: int, said: str
) -> None:
    run = Run(write_run(tmp_path / "run", 2))
    rows = [SWAP | {"seeds": 0}, PLACE | {"seeds": 0}, RANDOM | {"seeds": seeds}]
    assert sentences.sentence(run, rows) == (
        "Head 1 separates objects of one class: ARI 0.44, against 0.21 with other photos' objects (+0.23 [+0.18, "
        "+0.27], p < 0.001, n = 113, chosen on the other half), 0.33 by position alone (+0.11 [+0.05, +0.16], p = "
        f"0.02) and 0.10 for untrained weights (+0.34 [+0.28, +0.40], p < 0.001, {said})."
    )
    assert sentences.counts(rows).endswith(
        "; 3 do better than with untrained weights and 1 does worse (p ≤ 0.05 after Holm's correction)."
    )
    few = sentences.sentence(run, [row | {"n": 5} for row in rows])
    assert few.endswith(
        "against 0.21 with other photos' objects, 0.33 by position alone and 0.10 for untrained weights"
        f"{'' if seeds >= 3 else f' ({said})'}."
    )
    (told,) = [line for line in sentences.answer(run, pd.DataFrame(rows[::-1])) if "ARI" in line]
    assert told == sentences.sentence(run, rows)  # the main null first, untrained weights last


@pytest.mark.parametrize(
    ("found", "options", "said"),
    [
        (1176, {}, "k-means settled in all 1,176 clusterings."),
        (
            953,
            {},
            "k-means settled in 81 % of 1,176 clusterings. In the others it found its best partition only once: "
            "a run with --repeats 3 shows what moves.",
        ),
        (
            953,
            {"repeats": 3},
            "k-means settled in 81 % of 1,176 clusterings. In the others it found its best partition only once: the "
            "score stability shows what moves.",
        ),
        (
            1175,
            {},
            "k-means settled in 99 % of 1,176 clusterings. In the others it found its best partition only once: "
            "a run with --repeats 3 shows what moves.",
        ),
        (
            0,
            {},
            "k-means settled in none of 1,176 clusterings: no best partition was found twice, or the engine does not "
            "say so (sklearn, cuml).",
        ),
        (
            9,
            {"n_init": "1"},
            "k-means had one start a clustering (--n-init 1), so nothing says whether it would settle.",
        ),
    ],
)
def test_the_share_of_settled_clusterings_is_said_with_what_to_do(
    found: int, options: dict[str, Any], said: str
) -> None:
    counts = {"clusterings by kmeans": 1176, "settled by kmeans": found}
    assert text.settled(counts, {"n_init": "auto", **options}) == [said]
    assert text.settled({}, {"n_init": "auto"}) == []


@pytest.mark.parametrize(
    ("better", "worse", "too_few", "heads", "told"),
    [
        (
            1,
            1,
            1,
            3,
            "Of 3 heads over all images, 1 does better than position alone, 1 does worse, and of 1 too little ",
        ),
        (0, 3, 0, 4, "Of 4 heads over all images, none does better than position alone and 3 do worse (p ≤ 0.05 "),
        (2, 0, 0, 4, "Of 4 heads over all images, 2 do better than position alone and none does worse (p ≤ 0.05 "),
        (
            0,
            0,
            2,
            4,
            "Of 4 heads over all images, none does better than position alone, none does worse, and of 2 too ",
        ),
        (1, 0, 0, 1, "Of the one head over all images, "),
    ],
)
def test_heads_are_counted_in_right_english(better: int, worse: int, too_few: int, heads: int, told: str) -> None:
    row = PLACE | {"better": better, "worse": worse, "too_few": too_few, "heads": heads}
    assert sentences.counts([row]).startswith(told)


def test_heads_of_which_too_little_is_known_are_not_counted() -> None:
    few = {"better": 0, "worse": 0, "too_few": 12}
    assert sentences.counts([SWAP | few, PLACE | few]) == ""
    assert sentences.counts([SWAP, PLACE | few]) == (
        "Of 12 heads over all images, 3 do better than with other photos' objects and 1 does worse; too little is "
        "known to say whether any does better than position alone (p ≤ 0.05 after Holm's correction)."
    )


def test_one_of_a_thing_is_told_in_the_singular() -> None:
    assert [counted(n, "photo") for n in (0, 1, 1204)] == ["0 photos", "1 photo", "1,204 photos"]
    assert text.left_out({"left out: a crowd": 1}) == ["1 annotation left out: a crowd"]


def test_p_is_not_printed_of_too_few_images() -> None:
    assert [p_number(0.03), p_number(0.03, enough=False), p_number(np.nan, enough=False)] == ["0.03", "too few", "–"]
    assert [p_value(0.03), p_value(0.03, enough=False)] == ["p = 0.03", "too few to say"]


def test_a_rank_correlation_of_constant_values_is_not_printed() -> None:
    row = {"layer": 0, "head": 0, "algorithm": "kmeans", "modifier": "smaller", "low": 2.0, "high": 4.0, "gain": 0.05}
    row |= {"gain_low": -0.1, "gain_high": 0.2, "pairs": 50, "images": 40, "correlation": np.nan}
    (line,) = describe_modifiers(pd.DataFrame([row]), 0, 0, "kmeans")
    assert line == "pair_ari over position by smaller: 2 to 4 +0.05 [−0.10, +0.20] (50 pairs, 40 photos)"


def test_pairs_of_few_photos_have_no_interval_and_those_of_an_example_are_not_told() -> None:
    """Forty pairs of one photo gave an interval of no width."""
    row = {"layer": 0, "head": 0, "algorithm": "kmeans", "modifier": "smaller", "low": 2.0, "high": 4.0, "gain": 0.05}
    row |= {"gain_low": 0.05, "gain_high": 0.05, "pairs": 40, "images": 1, "correlation": np.nan}
    few = row | {"low": 4.0, "high": 8.0, "pairs": 20, "images": 19}
    (line,) = describe_modifiers(pd.DataFrame([row, few]), 0, 0, "kmeans")
    assert line.endswith("by smaller: 2 to 4 +0.05 (40 pairs, 1 photo); 4 to 8 +0.05 (20 pairs, 19 photos)")
    assert describe_modifiers(pd.DataFrame([row]), 0, 0, "kmeans") == []


@pytest.mark.parametrize(("what", "who"), [("key", "head 3 by its keys"), ("token", "layer 0 by its tokens")])
def test_scores_of_vectors_are_told_as_theirs(tmp_path: Path, what: str, who: str) -> None:
    run = Run(write_run(tmp_path / "run", 4, cluster_on=what))
    row = SWAP | {"score": "instance_ari_truth", "algorithm": "", "layer": 0, "head": 3}
    assert who in sentences.sentence(run, [row]).lower()


def test_tokens_of_a_vit_are_not_told_as_a_cnns_features(tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "run", 4, cluster_on="token"))
    run.__dict__["_names"] = frozenset({"saliency"})
    lines = text.describe(run, {}, pd.DataFrame({"score": [], "mean": [], "null": [], "head": []}), [])
    assert "tokens belong to a whole layer, so each layer has one head, and its map is their saliency" in lines
    assert not any("CNN" in line for line in lines)


def test_commands_that_would_give_missing_scores_are_those_of_the_run(tmp_path: Path) -> None:
    untrained = Run(write_run(tmp_path / "untrained", 4, weights="random", seed=3))
    hints = text.missing_inputs(untrained, [], has_annotations=True, has_random=True)
    assert len(hints) == 2
    assert all("--weights random" in hint and "--seed 3" in hint for hint in hints)
    keys = Run(write_run(tmp_path / "keys", 4, cluster_on="key"))
    (hint,) = text.missing_inputs(keys, [], has_annotations=True, has_random=True)
    assert hint.startswith(
        "instance_ari_truth needs the keys themselves; it comes from: batchjob run DATA --cluster-on key"
    )
    assert "--scores pairs --annotations" in hint


def test_a_cnns_self_similarity_is_nowhere_called_attention(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 4)
    vit, cnn = Run(folder), Run(folder)
    cnn.__dict__["_names"] = frozenset({"saliency"})
    row = SWAP | {"score": "pair_auc", "algorithm": ""}
    assert "attends within objects" in sentences.sentence(vit, [row])
    assert "finds more self-similarity within objects" in sentences.sentence(cnn, [row])
    assert "atten" not in sentences.sentence(cnn, [row])
    hints = text.missing_inputs(cnn, [], has_annotations=True, has_random=True)
    assert all("the attention itself" not in hint for hint in hints)
    lines = text.describe(cnn, {}, pd.DataFrame({"score": [], "mean": [], "null": [], "head": []}), [])
    assert any("a CNN has no attention" in line for line in lines)


def test_numbers_that_round_to_zero_have_no_sign() -> None:
    assert [gain(v) for v in (-0.0001, 0.0001, 0.0, -0.0)] == ["0.000"] * 4
    assert [number(v) for v in (-0.0001, -0.0)] == ["0.000"] * 2
    assert [gain(v) for v in (-0.1, 0.1, np.nan)] == ["−0.100", "+0.100", "–"]
    assert gain(-0.004, 2) == "0.00"

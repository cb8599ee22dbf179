"""The answer in sentences: what the head that one half of the images chose does on the other half."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from batchjob.metrics import catalogue
from batchjob.metrics.uncertainty import ENOUGH_IMAGES, is_enough
from batchjob.stats.numbers import gain, number, p_value
from batchjob.stats.summary import SURE
from batchjob.store.run import Run

AN_EXAMPLE = 8  # images; fewer are told as an example
_QUESTION = "Do clusters of {rows} separate objects of the same class?"
Row = Mapping[str, Any]  # of stats/selection.parquet
# What each null model is, in the place of X in "0.44, against 0.21 X".
AGAINST = {
    "swap": "with other photos' objects",
    "position": "by position alone",
    "distance": "by distance alone",
    "random": "untrained",
}
THAN = {
    "swap": "than with other photos' objects",
    "position": "than position alone",
    "distance": "than distance alone",
    "random": "than untrained",
}


def question(runs: Sequence[Run]) -> str:
    """The study's question, of attention or of what stands in its place in these runs."""
    rows = dict.fromkeys("self-similarity" if run.rows_name != "attention" else "self-attention" for run in runs)
    return _QUESTION.format(rows=" or ".join(rows))


def head_name(run: Run, layer: int, head: int) -> str:
    """`head 3`, with its layer where the run has several.

    Parameters
    ----------
    run
        Whose head.
    layer, head
        Their numbers.
    """
    return f"head {head}" if len(run.layers) == 1 else f"head {head} of layer {layer}"


def claim(score: str, rows_name: str) -> str:
    """What a score says that a head does; of a CNN's self-similarity it does not say that it attends.

    Parameters
    ----------
    score
        Its name.
    rows_name
        What the run's rows are: `attention` or `self-similarity`.
    """
    row = catalogue.score(score)
    found = row.claim if row and row.claim else f"has {score.replace('_', ' ')}"
    return found if rows_name == "attention" else found.replace("attends", f"finds more {rows_name}")


def sentence(run: Run, rows: Sequence[Row]) -> str:
    """What the chosen head does on the other half of the images.

    It claims that the head does something only where the main null's test says so and the images are enough for a
    claim.

    Parameters
    ----------
    run
        Whose head.
    rows
        Of stats/selection.parquet: one score's and algorithm's, one a null, the main one first.
    """
    main, score = rows[0], str(rows[0]["score"])
    row = catalogue.score(score)
    what = row.short if row and row.short else score.replace("_", " ")
    who = head_name(run, main["layer"], main["head"])
    if len(run.algorithms) > 1 and main["algorithm"]:
        who += f" by {main['algorithm']}"
    value = f"{what} {number(main['mean'], 2)}"
    if main["n"] < AN_EXAMPLE:
        nulls = " and ".join(f"{number(r['null_mean'], 2)} {AGAINST[r['null']]}" for r in rows)
        photos = f"{main['n']} photo{'s' if main['n'] > 1 else ''}"
        return f"An example, {photos}: {who} has {value}, against {nulls}."
    if not is_enough(main["n"], main["informative"]):
        start = f"Too few to say whether {who} {claim(score, run.rows_name)}"
    elif main["p"] > SURE:
        start = f"It is open whether {who} {claim(score, run.rows_name)}"
    elif main["gain"] > 0:
        start = f"{who[0].upper()}{who[1:]} {claim(score, run.rows_name)}"
    else:
        start = f"{who[0].upper()}{who[1:]} does worse {THAN[main['null']]}"
    return f"{start}: {value}, against {' and '.join(_against(r, is_first=r is main) for r in rows)}."


def _against(row: Row, *, is_first: bool) -> str:
    interval = f"[{gain(row['gain_low'], 2)}, {gain(row['gain_high'], 2)}]"
    parts = [f"{gain(row['gain'], 2)} {interval}"]
    if is_enough(row["n"], row["informative"]):
        parts.append(p_value(row["p"]))
    if is_first:
        parts += [f"n = {row['n']}", "chosen on the other half"]
    return f"{number(row['null_mean'], 2)} {AGAINST[row['null']]} ({', '.join(parts)})"


def counts(rows: Sequence[Row]) -> str:
    """How many heads do better and worse, by p-values corrected for their number; empty where nothing can be said."""
    if not is_enough(rows[0]["n"], rows[0]["informative"]):
        return ""
    parts = [f"{r['better']} do better {THAN[r['null']]}, {r['worse']} worse" for r in rows]
    return f"Of {rows[0]['heads']} heads over all images, {'; '.join(parts)} (p ≤ {SURE} after Holm's correction)."


def answer(run: Run, selection: pd.DataFrame) -> list[str]:
    """The study's question answered, for each algorithm; nothing without objects.

    Parameters
    ----------
    run
        That is asked.
    selection
        stats/selection.parquet.
    """
    lines = []
    for rows in _grouped(selection, [catalogue.QUESTION]):
        lines.append(sentence(run, rows))
        lines += [found] if (found := counts(rows)) else []
        n = int(rows[0]["n"])
        if AN_EXAMPLE <= n < ENOUGH_IMAGES:
            lines.append(
                f"Under {ENOUGH_IMAGES} images (here {n}) a 95 % interval covers less than it says: 0.93 at 20, 0.90 "
                "at 10, and far less for a score that is mostly 0."
            )
    return lines


def exploratory(run: Run, selection: pd.DataFrame, scores: Sequence[str] = ()) -> list[str]:
    """The other scores, marked as exploratory: they are many, and their p-values are not corrected for that.

    Parameters
    ----------
    run
        That is asked.
    selection
        stats/selection.parquet.
    scores
        Their names; by default all by which a head is chosen.
    """
    wanted = scores or [s.name for s in catalogue.SCORES if s.is_chosen]
    return [
        f"Exploratory, {rows[0]['score']}: {sentence(run, rows)}"
        for rows in _grouped(selection, [s for s in wanted if s != catalogue.QUESTION])
    ]


def _grouped(selection: pd.DataFrame, scores: Sequence[str]) -> list[list[Row]]:
    """The rows of each of these scores and each algorithm, the score's main null first."""
    found: list[list[Row]] = []
    for score in scores:
        mine = selection[selection["score"] == score] if len(selection) else selection
        for _, of_algorithm in mine.groupby("algorithm", sort=False) if len(mine) else ():
            rows: list[Any] = of_algorithm.to_dict("records")
            order = {null: place for place, null in enumerate(catalogue.nulls_of(score))}
            found.append(sorted(rows, key=lambda r: order.get(r["null"], len(order))))
    return found

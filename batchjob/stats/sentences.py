"""Writes the answer in sentences: what the head that one half of the images chose does on the other half."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from batchjob.errors import counted
from batchjob.metrics import catalogue
from batchjob.metrics.uncertainty import AN_EXAMPLE, ENOUGH_IMAGES, SURE
from batchjob.stats.numbers import SEEDS, gain, gain_interval, listed, number, p_value, seeds
from batchjob.store.run import Run

_QUESTION = "Do clusters of {rows} separate objects of the same class?"
Row = Mapping[str, Any]  # of stats/selection.parquet
# The words for a null model in place of X in "0.44, against 0.21 X".
_AGAINST = {
    "swap": "with other photos' objects",
    "position": "by position alone",
    "distance": "by distance alone",
    "random": "for untrained weights",
}
# The words for a null model in place of X in "does better X".
_THAN = {
    "swap": "than with other photos' objects",
    "position": "than position alone",
    "distance": "than distance alone",
    "random": "than with untrained weights",
}


def question(runs: Sequence[Run]) -> str:
    """Asks the study's question about what the runs cluster: self-attention, keys, or a CNN's self-similarity."""
    names = dict.fromkeys("self-attention" if run.clustered == "attention" else run.clustered for run in runs)
    return _QUESTION.format(rows=" or ".join(names))


def _head_name(run: Run, layer: int, head: int, *, is_of_clustered: bool) -> str:
    """Names a head, and for a score of vectors or their clusters which ones: `head 3 of layer 11 by its keys`."""
    if run.options.get("cluster_on") == "token":
        return f"layer {layer} by its {run.clustered}" if is_of_clustered else f"layer {layer}"
    name = f"head {head}" if len(run.layers) == 1 else f"head {head} of layer {layer}"
    is_by = is_of_clustered and run.options.get("cluster_on", "attention") != "attention"
    return f"{name} by its {run.clustered}" if is_by else name


def _claim(score: str, rows_name: str) -> str:
    """Says what a head with a high score does. A CNN's self-similarity is not said to attend."""
    row = catalogue.score(score)
    found = row.claim if row and row.claim else f"has {score.replace('_', ' ')}"
    return found if rows_name == "attention" else found.replace("attends", f"finds more {rows_name}")


def sentence(run: Run, rows: Sequence[Row]) -> str:
    """Says what the chosen head does on the other half of the images.

    The sentence claims something only if the main null's test is sure and there are enough images.

    Parameters
    ----------
    run
        The run of the head.
    rows
        Rows of stats/selection.parquet: those of one score and algorithm, one a null model, the main null first.

    Returns
    -------
    One sentence with the score, the nulls, the gains with 95 % intervals and p-values.
    """
    main, score = rows[0], str(rows[0]["score"])
    row = catalogue.score(score)
    what = row.short if row and row.short else score.replace("_", " ")
    is_of_clustered = catalogue.is_of_labels(score) or (row is not None and row.source in catalogue.OF_VECTORS)
    who = _head_name(run, main["layer"], main["head"], is_of_clustered=is_of_clustered)
    claim = _claim(score, run.rows_name)
    if len(run.algorithms) > 1 and main["algorithm"]:
        who += f" by {main['algorithm']}"
    value = f"{what} {number(main['mean'], 2)}"
    if main["n"] < AN_EXAMPLE:
        nulls = listed([f"{number(r['null_mean'], 2)} {_AGAINST[r['null']]}{_remarks(r, main)}" for r in rows])
        return f"An example, {counted(main['n'], 'photo')}: {who} has {value}, against {nulls}."
    if not main["enough"]:
        start = f"Too few to say whether {who} {claim}"
    elif not main["sure"]:
        start = f"It is open whether {who} {claim}"
    elif main["gain"] > 0:
        start = f"{who[0].upper()}{who[1:]} {claim}"
    else:
        start = f"{who[0].upper()}{who[1:]} does worse {_THAN[main['null']]}"
    return f"{start}: {value}, against {listed([_against(r, main) for r in rows])}."


def _remarks(row: Row, main: Row) -> str:
    parts = [seeds(row["seeds"])] if row["null"] == catalogue.RANDOM and row["seeds"] < SEEDS else []
    parts += _other_photos(row, main)
    return f" ({', '.join(parts)})" if parts else ""


def _other_photos(row: Row, main: Row) -> list[str]:
    """Says on how many photos a null is known and what the head has on these, if they are not those of the main null.

    The gain over it is not the difference between its figure and the head's figure that is printed first.
    """
    return [] if row["n"] == main["n"] else [f"on {counted(row['n'], 'photo')}, where it has {number(row['mean'], 2)}"]


def _against(row: Row, main: Row) -> str:
    parts = [f"{gain(row['gain'], 2)} {gain_interval(row['gain_low'], row['gain_high'], 2)}"]
    if row["enough"]:
        parts.append(p_value(row["p"]))
    if row is main:
        parts += [f"n = {row['n']}", "chosen on the other half"]
    else:
        parts += _other_photos(row, main)
    if row["null"] == catalogue.RANDOM:
        parts.append(seeds(row["seeds"]))
    return f"{number(row['null_mean'], 2)} {_AGAINST[row['null']]} ({', '.join(parts)})"


def counts(rows: Sequence[Row]) -> str:
    """Counts the heads that do better and worse than each null, from rows as of `sentence`.

    Empty where all heads have too few images.
    """
    if all(r["too_few"] == r["heads"] for r in rows):
        return ""
    count = rows[0]["heads"]
    heads = f"Of {count} heads" if count > 1 else "Of the one head"
    return f"{heads} over all images, {'; '.join(map(_count, rows))} (p ≤ {SURE} after Holm's correction)."


def _count(row: Row) -> str:
    """Counts against one null: `3 do better than position alone, 1 does worse, and of 2 too little is known to say`."""
    than, few = _THAN[row["null"]], row["too_few"]
    if few == row["heads"]:
        return f"too little is known to say whether any does better {than}"
    parts = [f"{_who_do(row['better'])} better {than}", f"{_who_do(row['worse'])} worse"]
    if not few:
        return " and ".join(parts)
    return f"{', '.join(parts)}, and of {few} too little is known to say"


def _who_do(count: int) -> str:
    return "none does" if count == 0 else "1 does" if count == 1 else f"{count:,} do"


def answer(run: Run, selection: pd.DataFrame) -> list[str]:
    """Answers the study's question for each algorithm.

    Parameters
    ----------
    run
        The run that is asked.
    selection
        stats/selection.parquet.

    Returns
    -------
    Sentences; none where the run has no scores against objects.
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


def why_none(counts: Mapping[str, int]) -> list[str]:
    """Says why the question has no answer in a run that was scored against objects.

    Parameters
    ----------
    counts
        stats/counts.json.

    Returns
    -------
    One sentence.
    """
    found = counts.get("with two of a category", 0)
    if not found:
        return [
            "No photo has two objects of one category that the patch grid shows, so the question has no answer here."
        ]
    if found == 1:
        return ["One photo has two objects of one category. To choose the head and to measure it takes two or more."]
    return [
        f"{found:,} photos have two objects of one category: too few to choose the head on one half of the photos and "
        "to measure it on the other."
    ]


def exploratory(run: Run, selection: pd.DataFrame, scores: Sequence[str] = ()) -> list[str]:
    """Says what the other scores found, marked as exploratory: their p-values are not corrected for their number.

    Parameters
    ----------
    run, selection
        As `answer`.
    scores
        Names of scores; by default all scores by which a head is chosen.

    Returns
    -------
    One sentence a score and algorithm.
    """
    wanted = scores or [s.name for s in catalogue.SCORES if s.is_chosen]
    return [
        f"Exploratory, {rows[0]['score']}: {sentence(run, rows)}"
        for rows in _grouped(selection, [s for s in wanted if s != catalogue.QUESTION])
    ]


def _grouped(selection: pd.DataFrame, scores: Sequence[str]) -> list[list[Row]]:
    """Groups the rows by score and algorithm, the score's main null first in each group."""
    found: list[list[Row]] = []
    for score in scores:
        mine = selection[selection["score"] == score] if len(selection) else selection
        for _, of_algorithm in mine.groupby("algorithm", sort=False) if len(mine) else ():
            rows: list[Any] = of_algorithm.to_dict("records")
            order = {null: place for place, null in enumerate(catalogue.nulls_of(score))}
            found.append(sorted(rows, key=lambda r: order.get(r["null"], len(order))))
    return found

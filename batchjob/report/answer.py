"""What the statistics say, for the page: the answer in a sentence, and the paired differences of several runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from batchjob.metrics import catalogue
from batchjob.stats import sentences as told
from batchjob.stats.numbers import gain, number, p_value
from batchjob.store.run import Run

_DIFFERENCES_HEADER = ["Score", "Heads", "n", "First run", "Second run", "Difference", "95 % interval", "p"]


@dataclass(frozen=True)
class Differences:
    """The table of paired differences and what to know about it."""

    note: str = ""
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def sentences(view: Run) -> list[str]:
    """The answer to the study's question first, then what qualifies it; nothing without statistics."""
    selection = view.table("selection")
    if selection is None or not len(selection):
        return _without_objects(view)
    lines = told.answer(view, selection)
    return [*lines, *told.exploratory(view, selection, catalogue.leading()[:4])] or _without_objects(view)


def _without_objects(view: Run) -> list[str]:
    if view.table("summary") is None:
        return []
    return [
        "The statistics know no objects: the question needs instance masks.",
        f"Give them: batchjob stats {view.folder} --annotations instances.json. The table below has what needs none.",
    ]


def differences(views: Sequence[Run]) -> Differences:
    """Paired differences of the first run and each other, from the comparison that `stats RUN RUN …` wrote."""
    runs = " ".join(str(view.folder) for view in views)
    missing = Differences(f"Paired differences come from statistics of the runs together: batchjob stats {runs}")
    table = views[0].table("comparison")
    if table is None or not len(table):
        return missing
    names = [view.folder.absolute().name for view in views]
    table = table[table["run_a"].isin(names) & table["run_b"].isin(names) & (table["of"] != "head")]
    if not len(table):
        return missing
    note = "On the same images: the best head of each run, chosen on one half of them, on the other half; and the mean "
    note += "over heads. A difference is the first run less the second."
    several = len(views) > 2
    rows = [_difference(row, several) for row in table.to_dict("records")]
    return Differences(note, (["Runs"] if several else []) + _DIFFERENCES_HEADER, rows)


def _difference(row: Any, several: bool) -> list[str]:
    heads = "mean of heads"
    if row["of"] == "best head":
        places = [f"{row[f'layer_{x}']}/{row[f'head_{x}']}" for x in "ab"]
        heads = f"best: {places[0]} and {places[1]} (layer/head)"
    cells = [
        str(row["score"]).replace("_", " "),
        heads,
        str(row["n"]),
        number(row["mean_a"]),
        number(row["mean_b"]),
        gain(row["difference"]),
        f"[{gain(row['low'])}, {gain(row['high'])}]",
        p_value(row["p"]).removeprefix("p ").removeprefix("= "),
    ]
    return ([f"{row['run_a']} − {row['run_b']}"] if several else []) + cells


def known_scores(summary: pd.DataFrame) -> list[str]:
    """The scores that have a value, the study's question first."""
    found = set(summary[np.isfinite(summary["mean"])]["score"])
    first = [name for name in catalogue.leading() if name in found]
    return first + sorted(found - set(first))

"""Reads for the page what the statistics say: the answer in sentences, and the paired differences of several runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from batchjob.figures.statistics import NULLS, score_name
from batchjob.metrics import catalogue
from batchjob.stats import sentences as told
from batchjob.stats.compare import comparable
from batchjob.stats.differences import heads_compared
from batchjob.stats.numbers import gain, gain_interval, number, p_number
from batchjob.store.run import Run

P_NOTE = "p is from a paired sign-flip test, which tests whether the gains lie symmetrically about zero."
_NOTE = (
    "All differences are on the same images. The best head of each run is chosen on one half of them and compared on "
    "the other half; the mean over heads is compared on all, and is of the heads that both runs have, or of all heads "
    "of each where they share none. A difference is the first run minus the second. "
    f"{P_NOTE.replace('gains', 'differences')}"
)
_DIFFERENCES_HEADER = ["Score", "Heads", "n", "First run", "Second run", "Difference", "95 % interval", "p"]


@dataclass(frozen=True)
class Differences:
    """The table of paired differences."""

    note: str = ""  # what the table shows, or why there is none
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)  # of the study's question
    others: list[list[str]] = field(default_factory=list)  # of the other scores


def sentences(run: Run) -> list[str]:
    """Says the answer to the study's question first, and then the exploratory results; nothing without statistics."""
    selection = run.table("selection")
    if selection is None:
        return []
    if "sure" not in selection:
        return [f"The statistics are of an earlier version; make them again with: batchjob stats {run.folder}"]
    return [*run.answer[1], *told.exploratory(run, selection, catalogue.leading()[:4])] or _without_objects(run)


def _without_objects(run: Run) -> list[str]:
    return [
        "The statistics know no objects: the question needs instance masks.",
        f"Give them: batchjob stats {run.folder} --annotations instances.json. The table below has what needs none.",
    ]


def differences(runs: Sequence[Run]) -> Differences:
    """Reads the paired differences of the runs from the comparison that `stats RUN RUN …` wrote into one of them.

    If none of them has a comparison, the note says why there can't be one, or which command makes it.
    """
    outdated = ""
    for run in runs:
        table = run.table("comparison")
        if table is None or not len(table):
            continue
        if "heads_a" not in table:  # a table of an earlier version, whose means are of other heads
            outdated = "The runs were compared by an earlier version of batchjob. "
            continue
        digests = {other.stats_digest for other in runs}
        names = [name for name, digest in run.compared.items() if digest in digests]
        table = table[table["run_a"].isin(names) & table["run_b"].isin(names) & (table["of"] != "head")]
        if not len(table) and len(set(run.compared) & {other.name for other in runs}) > 1:
            outdated = "The runs were compared before their statistics were made again. "
        if len(table):
            several = len(runs) > 2
            is_named = table.loc[table["algorithm"] != "", "algorithm"].nunique() > 1
            is_asked = table["score"].isin([catalogue.QUESTION, f"{catalogue.QUESTION} over position"])
            rows, others = (
                [_difference(row, several, is_named) for row in part.to_dict("records")]
                for part in (table[is_asked], table[~is_asked])
            )
            first, second = (str(table[side].iloc[0]) for side in ("run_a", "run_b"))
            header = [*_DIFFERENCES_HEADER[:3], *((first, second) if not several else _DIFFERENCES_HEADER[3:5])]
            header += _DIFFERENCES_HEADER[5:]
            return Differences(_NOTE, (["Runs"] if several else []) + header, rows, others)
    return Differences(outdated + _why_none(runs))


def _why_none(runs: Sequence[Run]) -> str:
    trained = [run for run in runs if not run.is_random]
    if trained and len(trained) < 2:
        untrained = ", ".join(run.name for run in runs if run.is_random)
        return (
            f"{untrained} is untrained: a null model of the other run, in whose answer it stands, and not a side to "
            "compare."
        )
    if reason := comparable(trained or runs):
        return f"The runs are not compared patch by patch: {reason}."
    if not set.intersection(*(set(run.ids) for run in runs)):
        return "The runs are not compared: they have no image in common."
    folders = " ".join(str(run.folder) for run in runs)
    return f"Paired differences come from statistics of the runs together: batchjob stats {folders}"


def _difference(row: Any, several: bool, is_named: bool) -> list[str]:
    """Returns the cells of a row, with the names of the runs if there are `several`, and of the algorithm if asked."""
    heads = heads_compared(row)
    if row["of"] == "best head":
        places = [f"{row[f'layer_{x}']}/{row[f'head_{x}']}" for x in "ab"]
        heads = f"best: {places[0]} and {places[1]} (layer/head)"
    heads += f", {row['algorithm']}" if is_named and row["algorithm"] else ""
    cells = [
        _score_words(str(row["score"])),
        heads,
        str(row["n"]),
        number(row["mean_a"]),
        number(row["mean_b"]),
        gain(row["difference"]),
        gain_interval(row["low"], row["high"]),
        p_number(row["p"], enough=row["enough"]),
    ]
    return ([f"{row['run_a']} − {row['run_b']}"] if several else []) + cells


def _score_words(compared: str) -> str:
    """Writes the words for `SCORE`, or for `SCORE over NULL`, which compares gains."""
    score, over, null = compared.partition(" over ")
    return f"{score_name(score)}{over}{NULLS[null][1] if null in NULLS else null}"

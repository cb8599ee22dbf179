"""Compares runs by paired differences: of their best heads, of the mean over heads, and head by head."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchjob.metrics import catalogue
from batchjob.metrics.uncertainty import SURE, first_half, holm, informative, interval, is_enough, sign_flip
from batchjob.stats.compare import COMPARED, Common
from batchjob.stats.numbers import counted, gain, gain_interval, number, p_value
from batchjob.stats.summary import columns_of
from batchjob.store.run import Run

Floats = NDArray[np.float64]
COLUMNS = [
    "run_a",
    "run_b",
    "score",
    "of",
    "algorithm",
    "layer_a",
    "head_a",
    "layer_b",
    "head_b",
    "n",
    "informative",
    "mean_a",
    "mean_b",
]
COLUMNS += ["difference", "low", "high", "p", "p_holm", "enough", "sure"]
# Besides the scores, their gains over position are compared: these take out the effect of each run's own grid.
_OVER = " over position"
_GAINS = tuple(f"{name}{_OVER}" for name in COMPARED if catalogue.is_of_labels(name))


def _values_of(common: Common, place: int, score: str) -> Floats | None:
    """Returns [n, C]: a score or gain of the run at `place`; None where no image has it."""
    name = score.removesuffix(_OVER)
    found = common.values[place].get(name)
    if found is None or not np.isfinite(found).any():
        return None
    return found if name == score else found - common.values[place][f"{name}.position"]


def differences(runs: Sequence[Run], common: Common) -> pd.DataFrame:
    """Tabulates the paired differences run_a − run_b on the same images, for each two runs and each score.

    The best head of a run is the one that `stats` chose by its gain over `swap`, on one half of the images. It is
    compared on the other half.

    Parameters
    ----------
    runs
        The runs that are compared.
    common
        What `compare` returns for them.

    Returns
    -------
    Rows whose `of` is `best head` or `mean of heads`, and a row for each `head` where both runs have the same heads.
    `p` comes from sign flips; `p_holm` is corrected over the heads, and NaN in the other rows. `n` counts the images
    that have the score in both runs, and `informative` those of them whose difference is not the most common one (two
    runs that mostly agree differ by zero). `enough` says whether both are enough for a claim. `sure` says whether the
    difference may be called more or less than zero: there are enough images, and p is at most `SURE`, after the
    correction in the rows of heads.
    """
    first = first_half(common.ids)
    rows: list[tuple[Any, ...]] = []
    for a in range(len(runs)):
        for b in range(a + 1, len(runs)):
            for score in (*COMPARED, *_GAINS):
                one, other = _values_of(common, a, score), _values_of(common, b, score)
                if one is not None and other is not None:
                    rows += _pair(runs[a], runs[b], score, one, other, first)
    return pd.DataFrame(rows, columns=COLUMNS)


def _pair(a: Run, b: Run, score: str, one: Floats, other: Floats, first: NDArray[np.bool_]) -> list[tuple[Any, ...]]:
    names_a, names_b = (columns_of(run, score.removesuffix(_OVER)) for run in (a, b))
    rows: list[tuple[Any, ...]] = []

    def compare_columns(of: str, x: Floats, y: Floats, heads: list[tuple[Any, ...]]) -> None:
        known = np.isfinite(x) & np.isfinite(y)
        stack = [np.where(known, values, np.nan) for values in (x, y, x - y)]
        left, right, gap = (interval(values) for values in stack)
        p = sign_flip(stack[2])
        corrected = holm(p) if of == "head" else np.full(len(p), np.nan)
        tested = corrected if of == "head" else p  # the other rows have one test each
        for i, head in enumerate(heads):
            if gap.n[i]:
                n, telling = int(gap.n[i]), informative(stack[2][:, i])
                enough = is_enough(n, telling)
                figures = (left.mean[i], right.mean[i], gap.mean[i], gap.low[i], gap.high[i], p[i], corrected[i])
                claims = (enough, bool(enough and tested[i] <= SURE))
                rows.append((a.name, b.name, score, of, *head, n, telling, *figures, *claims))

    i, j = _best(a, score, names_a), _best(b, score, names_b)
    if i is not None and j is not None:
        algorithm = names_a[i][0] if names_a[i][0] == names_b[j][0] else f"{names_a[i][0]}|{names_b[j][0]}"
        compare_columns(
            "best head", one[~first][:, [i]], other[~first][:, [j]], [(algorithm, *names_a[i][1:], *names_b[j][1:])]
        )
    mean_a, mean_b = one.mean(axis=1, keepdims=True), other.mean(axis=1, keepdims=True)
    compare_columns("mean of heads", mean_a, mean_b, [("", -1, -1, -1, -1)])
    if names_a == names_b:
        compare_columns("head", one, other, [(m, x, h, x, h) for m, x, h in names_a])
    return rows


def _best(run: Run, score: str, columns: list[tuple[str, int, int]]) -> int | None:
    """Returns the place of the head that has the largest gain over `swap` on the half that chooses, if one was chosen.

    Of several algorithms it is the one whose head has the largest gain.
    """
    selection = run.table("selection")
    if selection is None:
        return None
    chosen: list[dict[str, Any]] = selection[selection["score"] == score.removesuffix(_OVER)].to_dict("records")  # type: ignore[assignment]
    if not chosen:
        return None
    row = max(chosen, key=lambda one: float(one["chosen_gain"]))
    return columns.index((row["algorithm"], int(row["layer"]), int(row["head"])))


def agreements(runs: Sequence[Run], common: Common) -> pd.DataFrame:
    """Tabulates how well the labels of the same head agree between two runs, such as two seeds.

    Parameters
    ----------
    runs, common
        As `differences`.

    Returns
    -------
    One row for each two runs of equal shape and each head: the mean adjusted Rand index over images, and its interval.
    """
    rows = []
    for (a, b), values in common.agreement.items():
        found = interval(values)
        for i, head in enumerate(columns_of(runs[a], "instance_ari")):
            figures = (int(found.n[i]), found.mean[i], found.low[i], found.high[i])
            rows.append((runs[a].name, runs[b].name, *head, *figures))
    return pd.DataFrame(rows, columns=["run_a", "run_b", "algorithm", "layer", "head", "n", "mean", "low", "high"])


def describe(runs: Sequence[Run], common: Common, table: pd.DataFrame) -> list[str]:
    """Says what the comparison found.

    Parameters
    ----------
    runs, common
        As `differences`.
    table
        What `differences` returns.

    Returns
    -------
    Lines for a person to read.
    """
    lines = [
        f"{len(runs)} runs on the same {counted(len(common.ids), 'image')}, on {common.grid[0]}×{common.grid[1]} "
        "patches, instances that survive on every grid, equal k"
    ]
    if common.other_k:
        lines.append(
            f"{counted(common.other_k, 'image')} left out because k differs between the runs (instances counted on "
            "each run's own grid); give all runs one --k FILE.csv to leave none out"
        )
    shown = table[table.score.isin(["instance_ari", "instance_ari over position"]) & (table.of != "head")]
    records: list[dict[str, Any]] = shown.to_dict("records")  # type: ignore[assignment]
    for row in records:
        a, b = str(row["run_a"]), str(row["run_b"])
        if row["of"] == "best head":
            a += f" (layer {row['layer_a']} head {row['head_a']})"
            b += f" (layer {row['layer_b']} head {row['head_b']})"
        lines.append(
            f"{row['score']}, {row['of']}: {a} {number(row['mean_a'])}, {b} {number(row['mean_b'])}; "
            f"difference {gain(row['difference'])} {gain_interval(row['low'], row['high'])}, "
            f"n = {row['n']}, {p_value(row['p'], enough=row['enough'])}"
        )
    return lines + _head_by_head(table)


def _head_by_head(table: pd.DataFrame) -> list[str]:
    """Says of each two runs of equal heads in how many heads one is surely above the other."""
    lines = []
    heads = table[(table.score == "instance_ari") & (table.of == "head")]
    for (a, b), rows in heads.groupby(["run_a", "run_b"], sort=False):
        sure, few = rows[rows.sure], int((~rows.enough).sum())
        if few == len(rows):
            lines.append(f"instance_ari, head by head: too few images to say where {a} is above {b}")
            continue
        above, below = int((sure.difference > 0).sum()), int((sure.difference < 0).sum())
        told = f"{a} is above {b} in {above} of {counted(len(rows), 'head')} and below in {below}"
        unknown = f"; of {few} too little is known to say" if few else ""
        how = f"(p ≤ {SURE} after Holm's correction over the heads)"
        lines.append(f"instance_ari, head by head: {told}{unknown} {how}")
    return lines

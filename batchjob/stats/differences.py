"""Compares runs by paired differences: of their best heads, of the mean over heads, and head by head."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchjob.config import RULES
from batchjob.errors import counted
from batchjob.metrics import catalogue
from batchjob.metrics.uncertainty import SURE, first_half, holm, informative, interval, is_enough, sign_flip
from batchjob.stats.compare import COMPARED, Common, shape_of_model, takes_k
from batchjob.stats.numbers import gain, gain_interval, number, p_value
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
    "heads_a",
    "heads_b",
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
    For each algorithm that both runs have, or else for the first one of each: a row whose `of` is `best head`, one
    of the `mean of heads`, and a row for each `head` that both have. Both have a head if its layer and its number
    are the same in networks of one shape (`compare.shape_of_model`). The mean is of these heads, or of all heads of
    each run where both have none; `heads_a` and `heads_b` count them. `p` comes from sign flips; `p_holm` is
    corrected over the heads and layers of an algorithm, and NaN in the other rows. `n` counts the images that have
    the score in both runs, and `informative` those of them whose difference is not the most common one (two runs
    that mostly agree differ by zero). `enough` says whether both are enough for a claim. `sure` says whether the
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
    columns = [np.array(columns_of(run, score.removesuffix(_OVER)), object) for run in (a, b)]
    is_same_shape = shape_of_model(a) == shape_of_model(b)
    found = [list(dict.fromkeys(of_run[:, 0])) for of_run in columns]
    common = [(algorithm, algorithm) for algorithm in found[0] if algorithm in found[1]]
    rows: list[tuple[Any, ...]] = []
    for algorithms in common or [(found[0][0], found[1][0])]:
        sides = []
        for run, values, of_run, algorithm in zip((a, b), (one, other), columns, algorithms, strict=True):
            mine = of_run[:, 0] == algorithm
            heads = [(int(layer), int(head)) for _, layer, head in of_run[mine]]
            sides.append(_Side(values[:, mine], heads, _best(run, score, algorithm)))
        name = algorithms[0] if algorithms[0] == algorithms[1] else "|".join(algorithms)
        rows += [
            (a.name, b.name, score, of, name, *row)
            for of, row in _compare_sides(sides[0], sides[1], first, is_same_shape)
        ]
    return rows


@dataclass(frozen=True, slots=True)
class _Side:
    """One run's values of a score by one algorithm."""

    values: Floats  # [n, C]
    heads: list[tuple[int, int]]  # (layer, head) of each column
    best: tuple[int, int] | None  # the head that `stats` chose


def _compare_sides(
    a: _Side, b: _Side, first: NDArray[np.bool_], is_same_shape: bool
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yields (`of`, the rest of a row): of the best heads, of the mean over heads, and of each head."""
    if a.best is not None and b.best is not None:
        x, y = (side.values[~first][:, [side.heads.index(side.best)]] for side in (a, b) if side.best)
        yield from _rows("best head", x, y, [(*a.best, *b.best, 1, 1)])
    shared = [head for head in a.heads if head in b.heads] if is_same_shape else []
    x, y = (side.values[:, [side.heads.index(h) for h in shared]] if shared else side.values for side in (a, b))
    mean_x, mean_y = (values.mean(axis=1, keepdims=True) for values in (x, y))
    yield from _rows("mean of heads", mean_x, mean_y, [(-1, -1, -1, -1, x.shape[1], y.shape[1])])
    if shared:
        yield from _rows("head", x, y, [(*head, *head, 1, 1) for head in shared])


def _rows(
    of: str, x: Floats, y: Floats, heads: list[tuple[int, int, int, int, int, int]]
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yields a row for each column of x and y [n, C] in which an image has both."""
    known = np.isfinite(x) & np.isfinite(y)
    stack = [np.where(known, values, np.nan) for values in (x, y, x - y)]
    left, right, gap = (interval(values) for values in stack)
    p = sign_flip(stack[2])
    corrected = holm(p) if of == "head" else np.full(len(p), np.nan)
    tested = corrected if of == "head" else p  # the other rows have one test each
    for i in np.flatnonzero(gap.n):
        n, telling = int(gap.n[i]), informative(stack[2][:, i])
        enough = is_enough(n, telling)
        figures = (left.mean[i], right.mean[i], gap.mean[i], gap.low[i], gap.high[i], p[i], corrected[i])
        yield of, (*heads[i], n, telling, *figures, enough, bool(enough and tested[i] <= SURE))


def _best(run: Run, score: str, algorithm: str) -> tuple[int, int] | None:
    """Returns the (layer, head) that has the largest gain over `swap` on the half that chooses, if one was chosen."""
    selection = run.table("selection")
    if selection is None:
        return None
    chosen = selection[(selection["score"] == score.removesuffix(_OVER)) & (selection["algorithm"] == algorithm)]
    return (int(chosen["layer"].iloc[0]), int(chosen["head"].iloc[0])) if len(chosen) else None


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


def why_none(common: Common) -> str:
    """Says why no image could be compared."""
    if common.other_file and common.other_k:
        return (
            f"of the images that all of them labelled, {common.other_file:,} are other files or sizes in each, and for "
            f"{common.other_k:,} other k were asked for; give runs of the same files one --k"
        )
    if common.other_file:
        return f"the {counted(common.other_file, 'image')} with ids in common are other files or sizes in each"
    if common.other_k:
        return (
            f"none of the {counted(common.other_k, 'image')} that all of them labelled was asked for the same k in "
            "each; give all runs one --k"
        )
    return "no image is labelled in all of them"


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
        f"patches, instances that survive on every grid, {_k_words(runs)}"
    ]
    if common.other_k:
        lines.append(
            f"{counted(common.other_k, 'image')} left out because k differs between the runs (with k = instances, "
            "each run counts them on its own grid); give all runs one --k FILE.csv to leave none out"
        )
    if common.other_file:
        lines.append(
            f"{counted(common.other_file, 'image')} left out because the runs saw other files or sizes of the same id"
        )
    shown = table[table.score.isin(["instance_ari", "instance_ari over position"]) & (table.of != "head")]
    records: list[dict[str, Any]] = shown.to_dict("records")  # type: ignore[assignment]
    several = shown["algorithm"].nunique() > 1
    for row in records:
        a, b = str(row["run_a"]), str(row["run_b"])
        by = f" by {row['algorithm']}" if several else ""
        of = heads_compared(row)
        if row["of"] == "best head":
            a += f" (layer {row['layer_a']} head {row['head_a']})"
            b += f" (layer {row['layer_b']} head {row['head_b']})"
        lines.append(
            f"{row['score']}, {of}{by}: {a} {number(row['mean_a'])}, {b} {number(row['mean_b'])}; "
            f"difference {gain(row['difference'])} {gain_interval(row['low'], row['high'])}, "
            f"n = {row['n']}, {p_value(row['p'], enough=row['enough'])}"
        )
    return lines + _head_by_head(table)


def heads_compared(row: Mapping[str, Any]) -> str:
    """Names the heads of a row of `differences`: `best head`, `mean of 6 heads`, or `mean of 6 heads and of 2`."""
    if row["of"] != "mean of heads":
        return str(row["of"])
    a, b = int(row["heads_a"]), int(row["heads_b"])
    return f"mean of {counted(a, 'head')}" + (f" and of {b:,}" if a != b else "")


def _k_words(runs: Sequence[Run]) -> str:
    """Says by which k the runs were clustered; `comparable` has seen to it that rules agree."""
    asked = [str(run.options["k"]) for run in runs if takes_k(run)]
    words = []
    if asked:
        if asked[0] in RULES:
            words.append(f"k by {asked[0]}" + (" in each" if len(asked) > 1 else ""))
        else:
            words.append("equal k" if len(asked) > 1 else f"k = {asked[0]}")
    if len(asked) < len(runs) or any("hdbscan" in run.algorithms for run in runs):
        words.append("hdbscan finds its own k")
    return ", ".join(words)


def _head_by_head(table: pd.DataFrame) -> list[str]:
    """Says of each two runs of equal heads in how many heads one is surely above the other."""
    lines = []
    heads = table[(table.score == "instance_ari") & (table.of == "head")]
    several = heads["algorithm"].nunique() > 1
    for (a, b, algorithm), rows in heads.groupby(["run_a", "run_b", "algorithm"], sort=False):
        of = f"instance_ari, head by head{f' by {algorithm}' if several else ''}"
        sure, few = rows[rows.sure], int((~rows.enough).sum())
        if few == len(rows):
            lines.append(f"{of}: too few images to say where {a} is above {b}")
            continue
        above, below = int((sure.difference > 0).sum()), int((sure.difference < 0).sum())
        told = f"{a} is above {b} in {above} of {counted(len(rows), 'head')} and below in {below}"
        unknown = f"; of {few} too little is known to say" if few else ""
        how = f"(p ≤ {SURE} after Holm's correction over the heads)"
        lines.append(f"{of}: {told}{unknown} {how}")
    return lines

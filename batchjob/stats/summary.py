"""Sums the scores of all images up to one row a head, and chooses heads on one half of the images.

A row has the mean, its interval, and for each null model the gain over it and a p-value.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchjob.metrics import catalogue
from batchjob.metrics.nulls import LENDERS, LENT
from batchjob.metrics.uncertainty import (
    SURE,
    Interval,
    first_half,
    holm,
    informative,
    interval,
    is_enough,
    mean_known,
    sign_flip,
)
from batchjob.stats.lent import HALVES, excess
from batchjob.stats.pool import Pool
from batchjob.store.run import Run

Floats = NDArray[np.float64]
_COLUMNS = ["score", "algorithm", "layer", "head", "null", "n", "informative", "mean", "low", "high"]
_COLUMNS += ["null_mean", "gain_n", "gain", "gain_low", "gain_high", "p", "p_holm", "enough", "sure"]
_CHOSEN = ["score", "algorithm", "layer", "head", "null", "chosen_n", "chosen_gain", "n", "informative"]
_CHOSEN += ["mean", "low", "high", "null_mean", "gain", "gain_low", "gain_high", "p", "enough", "sure"]
_COUNTED = ["worse", "better", "too_few", "heads"]


def summarise(run: Run, names: Sequence[str], randoms: Sequence[Run], pool: Pool) -> pd.DataFrame:
    """Sums the scores of all images up, head by head.

    Parameters
    ----------
    run
        A run with scores.zarr.
    names
        The arrays of scores.zarr, nulls (`SCORE.NULL`) among them.
    randoms
        Untrained runs of the same options, for the `random` null.
    pool
        The processes that share the scores.

    Returns
    -------
    One row for each score, algorithm, layer, head and null. `n`, `mean`, `low` and `high` are of the score;
    `null_mean`, `gain` and `p` are of the `gain_n` images that have the null too. A score without a null has one row,
    whose `null` is empty. `informative` counts the images whose value is not the most common one. `p_holm` is corrected
    over the heads and layers of an algorithm and null. `enough` says whether the images that have a gain are enough for
    a claim about it. `sure` says whether the gain may be called more or less than zero: there are enough images, and
    `p_holm` is at most `SURE`. All counts and marks go by it. `seeds` counts the seeds of the untrained runs behind the
    null `random`, and is 0 for the other nulls.
    """
    work = functools.partial(_summarise_score, run, tuple(names), tuple(randoms))
    frames = [frame for frame in pool.map(work, sorted(n for n in names if "." not in n)) if len(frame)]
    summary = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=_COLUMNS)
    return _with_seeds(summary, randoms)


def _with_seeds(table: pd.DataFrame, randoms: Sequence[Run]) -> pd.DataFrame:
    """Adds the column `seeds`. Two untrained runs of one seed are the same network, so they count once."""
    seeds = len({run.options["seed"] for run in randoms})
    return table.assign(seeds=np.where(table["null"] == catalogue.RANDOM, seeds, 0))


def columns_of(run: Run, name: str) -> list[tuple[str, int, int]]:
    """Lists the heads that the C columns of a score's array belong to.

    Parameters
    ----------
    run
        The run that was scored.
    name
        The score's name.

    Returns
    -------
    (algorithm, layer, head) of each column. The algorithm is '' and the head −1 where the score has none.
    """
    dims = catalogue.dims_of(name)
    if "head" not in dims:
        return [("", x, -1) for x in run.layers]
    algorithms = run.algorithms if "algorithm" in dims else ("",)
    return [(m, x, h) for m in algorithms for x in run.layers for h in run.heads]


def _nulls_of(
    run: Run, score: str, shape: tuple[int, ...], names: Sequence[str], randoms: Sequence[Run]
) -> dict[str, Floats]:
    """Returns [n, C] of each null model that is known for a score of this shape, by the null's name."""
    found: dict[str, Floats] = {}
    for null in catalogue.nulls_of(score):
        if f"{score}.{null}" in names:
            found[null] = _read(run, f"{score}.{null}")
    untrained = _random_null(run, score, shape, randoms)
    return found | ({} if untrained is None else {catalogue.RANDOM: untrained})


def _random_null(run: Run, score: str, shape: tuple[int, ...], randoms: Sequence[Run]) -> Floats | None:
    """Returns [n, C]: the mean of a score over untrained runs and over the heads of a layer; None without such runs.

    The heads of a layer are averaged because they are alike before training.
    """
    parts = []
    for other in randoms:
        values = other.read_score(score)
        if values is None or values.shape[1] != shape[1]:
            continue
        if "head" in catalogue.dims_of(score):
            by_layer = values.reshape(len(values), -1, len(run.heads))
            values = np.repeat(mean_known(by_layer, axis=2), len(run.heads), axis=1)
        row_of = {name: row for row, name in enumerate(other.ids)}
        rows = np.array([row_of.get(name, -1) for name in run.ids])
        parts.append(np.where(rows[:, None] >= 0, values[rows], np.nan))
    return mean_known(np.stack(parts), axis=0) if parts else None


def _read(run: Run, score: str) -> Floats:
    values = run.read_score(score)
    assert values is not None, score
    return values


def _test_gains(
    run: Run,
    score: str,
    null: str,
    gains: Floats,
    columns: Sequence[int] | slice = slice(None),
    halves: slice = slice(HALVES),
) -> tuple[Interval, Floats]:
    """Returns the mean gains [n, C] with their intervals, and p. Gains are NaN for photos that are not in `halves`."""
    if null != "swap":
        return interval(gains), sign_flip(gains)
    lent = _read(run, score + LENT).reshape(run.rows, HALVES, -1)[:, :, columns]
    mine = lent[:, halves].sum(axis=1)
    more = excess(gains, lent, halves, _read(run, score + LENDERS)[:, 0].astype(np.int64))
    return interval(gains, mine), sign_flip(gains, mine, more)


def _summarise_score(run: Run, names: Sequence[str], randoms: Sequence[Run], score: str) -> pd.DataFrame:
    values = _read(run, score)
    own, columns = interval(values), columns_of(run, score)
    telling = [informative(values[:, i]) for i in range(values.shape[1])]
    found = _nulls_of(run, score, values.shape, names, randoms)
    rows: list[tuple[Any, ...]] = []
    for null, against in found.items() or [("", np.full_like(values, np.nan))]:
        gains = values - against
        gain, p = _test_gains(run, score, null, gains)
        corrected = _corrected(p, columns)
        null_mean = mean_known(np.where(np.isfinite(gains), against, np.nan), axis=0)
        scored = np.where(np.isfinite(gains), values, np.nan)  # only these images have a part in a claim
        for i, column in enumerate(columns):
            enough = is_enough(int(gain.n[i]), informative(scored[:, i]))
            figures = (null_mean[i], int(gain.n[i]), *_of(gain, i), p[i], corrected[i], enough)
            sure = bool(enough and corrected[i] <= SURE)
            rows.append((score, *column, null, int(own.n[i]), telling[i], *_of(own, i), *figures, sure))
    return pd.DataFrame(rows, columns=_COLUMNS)


def _of(found: Interval, i: int) -> tuple[float, float, float]:
    return float(found.mean[i]), float(found.low[i]), float(found.high[i])


def _corrected(p: Floats, columns: Sequence[tuple[str, int, int]]) -> Floats:
    """Returns [C]: p-values corrected by Holm over the heads and layers of each algorithm."""
    corrected, algorithms = np.full(len(p), np.nan), np.array([m for m, _, _ in columns])
    for algorithm in np.unique(algorithms):
        corrected[algorithms == algorithm] = holm(p[algorithms == algorithm])
    return corrected


def select_heads(run: Run, summary: pd.DataFrame, randoms: Sequence[Run], pool: Pool) -> pd.DataFrame:
    """Chooses the best head of each score and algorithm on one half of the images, and measures it on the other half.

    The best head has the largest mean gain over the score's main null.

    Parameters
    ----------
    run
        A run with scores.zarr.
    summary
        What `summarise` returns.
    randoms
        As in `summarise`.
    pool
        The processes that share the scores.

    Returns
    -------
    One row for each score, algorithm and null. `chosen_n` and `chosen_gain` are of the half that chose; all other
    figures of the head are of the other half; `enough` and `sure` say what may be claimed of it, as in `summarise`, by
    one test. `heads` counts the heads; `worse` and `better` count those whose gain
    over all images is surely below or above zero, and `too_few` those with too few images to say. `seeds` is as in
    `summarise`.
    """
    names = [s.name for s in catalogue.SCORES if s.is_chosen and s.name in set(summary["score"])]
    work = functools.partial(_select_of_score, run, tuple(randoms))
    rows = [row for found in pool.map(work, names) for row in found]
    selection = pd.DataFrame(rows, columns=_CHOSEN)
    counts = [_counts(summary, row) for row in selection.to_dict("records")]
    selection = pd.concat([selection, pd.DataFrame(counts, columns=_COUNTED, dtype=int)], axis=1)
    return _with_seeds(selection, randoms)


def _counts(summary: pd.DataFrame, row: Any) -> tuple[int, int, int, int]:
    """Counts the heads of this score, algorithm and null: (surely worse, surely better, too few images, all)."""
    mine = summary[(summary.score == row["score"]) & (summary.algorithm == row["algorithm"])]
    mine = mine[mine.null == row["null"]]
    sure = mine[mine.sure]
    return int((sure.gain < 0).sum()), int((sure.gain > 0).sum()), int((~mine.enough).sum()), len(mine)


def _select_of_score(run: Run, randoms: Sequence[Run], score: str) -> list[tuple[Any, ...]]:
    values, first = _read(run, score), first_half(run.ids)
    against = {n: v for n in catalogue.nulls_of(score) if (v := run.read_score(f"{score}.{n}")) is not None}
    main = catalogue.main_null(score)
    if main not in against:
        return []
    if (untrained := _random_null(run, score, values.shape, randoms)) is not None:
        against[catalogue.RANDOM] = untrained
    columns = columns_of(run, score)
    chosen_by = values[first] - against[main][first]
    rows: list[tuple[Any, ...]] = []
    for algorithm in dict.fromkeys(m for m, _, _ in columns):
        mine = np.array([i for i, c in enumerate(columns) if c[0] == algorithm])
        gains = mean_known(chosen_by[:, mine], axis=0)
        if not np.isfinite(gains).any():
            continue
        best = int(mine[np.nanargmax(gains)])
        chosen = (int(np.isfinite(chosen_by[:, best]).sum()), float(np.nanmax(gains)))
        for null, base in against.items():
            held = np.stack([values[:, best], base[:, best]], axis=1)
            held[first | ~np.isfinite(held).all(axis=1)] = np.nan
            sides = interval(held)
            if sides.n[0]:
                gains = held[:, :1] - held[:, 1:]
                gain, p = _test_gains(run, score, null, gains, [best], halves=slice(1, HALVES))
                counts = (int(sides.n[0]), informative(held[:, 0]))
                enough = is_enough(*counts)
                figures = (*_of(sides, 0), float(sides.mean[1]), *_of(gain, 0), float(p[0]))
                claims = (enough, bool(enough and p[0] <= SURE))
                rows.append((score, *columns[best], null, *chosen, *counts, *figures, *claims))
    return rows


def agreement_table(run: Run, sums: dict[str, NDArray[np.float64]]) -> pd.DataFrame:
    """Tabulates how well each two heads of a layer, and each two algorithms, agree.

    Parameters
    ----------
    run
        The run whose labels were compared.
    sums
        As `Scored.agreement`, over all images.

    Returns
    -------
    One row for each pair: the mean adjusted Rand index over `n` images and its normal 95 % interval.
    """
    rows = []
    for kind, (n, total, squares) in sums.items():
        names: Sequence[Any] = run.heads if kind == "heads" else run.algorithms
        outer: Sequence[Any] = run.algorithms if kind == "heads" else run.layers
        inner: Sequence[Any] = run.layers if kind == "heads" else run.heads
        mean = total / np.maximum(n, 1)
        error = np.sqrt(np.clip(squares / np.maximum(n, 1) - mean**2, 0, None) / np.maximum(n - 1, 1))
        for a, x in enumerate(outer):
            for b, y in enumerate(inner):
                for i in range(len(names)):
                    for j in range(i + 1, len(names)):
                        place = (a, b, i, j)
                        algorithm, layer, head = (x, y, -1) if kind == "heads" else ("", x, y)
                        spread = 1.96 * error[place] if n[place] > 1 else np.nan
                        bounds = (mean[place], mean[place] - spread, mean[place] + spread)
                        who = (str(names[i]), str(names[j]))
                        rows.append((kind, algorithm, layer, head, *who, int(n[place]), *bounds))
    return pd.DataFrame(
        rows, columns=["between", "algorithm", "layer", "head", "first", "second", "n", "mean", "low", "high"]
    )

"""From every image's scores to one row a head: means, intervals, nulls, gains, p-values; and the head chosen fairly."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchjob.metrics import catalogue
from batchjob.metrics.uncertainty import Interval, first_half, holm, interval, sign_flip
from batchjob.stats.stream import Pool
from batchjob.store.run import Run

Floats = NDArray[np.float64]
HALF = 0.5  # what an AUC is by chance


def summarise(view: Run, names: Sequence[str], randoms: Sequence[Run], pool: Pool) -> pd.DataFrame:
    """One row for each score, algorithm, layer, head and null: n, mean, interval; the null's mean, the gain, its p.

    `names` are the arrays in scores.zarr, nulls among them; `randoms` are untrained runs of the same architecture. A
    score without a null has one row, null empty. p_holm is corrected over the heads and
    layers of an algorithm and null.
    """
    scores = sorted(n for n in names if "." not in n)
    work = functools.partial(_summarise_score, view, tuple(names), tuple(randoms))
    frames = [frame for frame in pool.map(work, scores) if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=_COLUMNS)


_COLUMNS = ["score", "algorithm", "layer", "head", "null", "n", "mean", "low", "high"]
_COLUMNS += ["null_mean", "gain", "gain_low", "gain_high", "p", "p_holm"]


def columns_of(view: Run, name: str) -> list[tuple[str, int, int]]:
    """(algorithm, layer, head) of each of a score's columns; '' and −1 where it has none."""
    dims = catalogue.dims_of(name)
    if "head" not in dims:
        return [("", x, -1) for x in view.layers]
    algorithms = view.algorithms if "algorithm" in dims else ("",)
    return [(m, x, h) for m in algorithms for x in view.layers for h in view.heads]


def nulls_of(view: Run, score: str, values: Floats, names: Sequence[str], randoms: Sequence[Run]) -> dict[str, Floats]:
    """null -> [n, C], every null model that is at hand for a score, image by image."""
    found: dict[str, Floats] = {}
    for null in catalogue.nulls_of(score):
        if null == "half":
            found[null] = np.where(np.isfinite(values), HALF, np.nan)
        elif f"{score}.{null}" in names and (against := view.read_score(f"{score}.{null}")) is not None:
            found[null] = against
    untrained = random_null(view, score, values.shape, randoms)
    return found | ({} if untrained is None else {"random": untrained})


def random_null(view: Run, score: str, shape: tuple[int, ...], randoms: Sequence[Run]) -> Floats | None:
    """[n, C]: the mean over untrained runs and over the heads of a layer, which are alike before training; or None."""
    parts = []
    for other in randoms:
        values = other.read_score(score)
        if values is None or values.shape[1] != shape[1]:
            continue
        if values.shape[1] % len(view.heads) == 0 and "head" in catalogue.dims_of(score):
            by_layer = values.reshape(len(values), -1, len(view.heads))
            values = np.repeat(_mean_known(by_layer, axis=2), len(view.heads), axis=1)
        row_of = {name: row for row, name in enumerate(other.ids)}
        rows = np.array([row_of.get(name, -1) for name in view.ids])
        parts.append(np.where(rows[:, None] >= 0, values[rows], np.nan))
    return _mean_known(np.stack(parts), axis=0) if parts else None


def _known(view: Run, score: str) -> Floats:
    values = view.read_score(score)
    assert values is not None
    return values


def _mean_known(values: Floats, axis: int) -> Floats:
    known = np.isfinite(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _summarise_score(view: Run, names: Sequence[str], randoms: Sequence[Run], score: str) -> pd.DataFrame:
    values = _known(view, score)
    own = interval(values)
    columns = columns_of(view, score)
    rows = []
    found = nulls_of(view, score, values, names, randoms)
    if not found:
        rows = [_row(score, "", c, own, i, None, np.nan, np.nan, np.nan) for i, c in enumerate(columns)]
    for null, against in found.items():
        gains = values - against
        gain, p = interval(gains), sign_flip(gains)
        corrected = np.full(len(p), np.nan)
        algorithms = np.array([m for m, _, _ in columns])
        for algorithm in np.unique(algorithms):
            corrected[algorithms == algorithm] = holm(p[algorithms == algorithm])
        for i, column in enumerate(columns):
            known = np.isfinite(gains[:, i])
            null_mean = float(against[known, i].mean()) if known.any() else np.nan
            rows.append(_row(score, null, column, own, i, gain, null_mean, p[i], corrected[i]))
    return pd.DataFrame(rows, columns=_COLUMNS)


def _row(
    score: str,
    null: str,
    column: tuple[str, int, int],
    own: Interval,
    i: int,
    gain: Interval | None,
    null_mean: float,
    p: float,
    corrected: float,
) -> tuple[Any, ...]:
    gains = (np.nan,) * 3 if gain is None else (gain.mean[i], gain.low[i], gain.high[i])
    return (score, *column, null, int(own.n[i]), own.mean[i], own.low[i], own.high[i], null_mean, *gains, p, corrected)


def select_heads(view: Run, names: Sequence[str], pool: Pool) -> pd.DataFrame:
    """The best head of each score and algorithm, chosen on one half of the images, with the other half's figures.

    Best is the largest mean gain over the score's first null. `worse` and `better` count the heads whose gain over all
    images has an interval below and above zero.
    """
    work = functools.partial(_select_of_score, view, tuple(names))
    return pd.DataFrame(
        [
            row
            for rows in pool.map(work, [s.name for s in catalogue.SCORES if s.is_chosen and s.name in names])
            for row in rows
        ]
    )


def _select_of_score(view: Run, names: Sequence[str], score: str) -> list[dict[str, Any]]:
    first = first_half(view.ids)
    rows: list[dict[str, Any]] = []
    values = _known(view, score)
    against = nulls_of(view, score, values, names, ())
    if not against:
        return []
    null, base = next(iter(against.items()))
    columns = columns_of(view, score)
    gains = values - base
    whole = interval(gains)
    for algorithm in dict.fromkeys(m for m, _, _ in columns):
        mine = np.array([i for i, c in enumerate(columns) if c[0] == algorithm])
        chosen_on = _mean_known(gains[first][:, mine], axis=0)
        if not np.isfinite(chosen_on).any():
            continue
        best = int(mine[np.nanargmax(chosen_on)])
        held_out = np.stack([values[~first, best], base[~first, best], gains[~first, best]], axis=1)
        held_out = held_out[np.isfinite(held_out).all(axis=1)]
        if not len(held_out):
            continue
        found = interval(held_out)
        rows.append(
            {
                "score": score,
                "algorithm": algorithm,
                "null": null,
                "layer": columns[best][1],
                "head": columns[best][2],
                "chosen_n": int(np.isfinite(gains[first, best]).sum()),
                "chosen_gain": float(np.nanmax(chosen_on)),
                "n": len(held_out),
                "mean": found.mean[0],
                "low": found.low[0],
                "high": found.high[0],
                "null_mean": found.mean[1],
                "gain": found.mean[2],
                "gain_low": found.low[2],
                "gain_high": found.high[2],
                "p": float(sign_flip(held_out[:, 2:])[0]),
                "worse": int((whole.high[mine] < 0).sum()),
                "better": int((whole.low[mine] > 0).sum()),
                "heads": len(mine),
            }
        )
    return rows


def agreement_table(view: Run, sums: dict[str, NDArray[np.float64]]) -> pd.DataFrame:
    """Mean adjusted Rand index between each two heads of a layer, each two algorithms, with a normal 95 % interval."""
    rows = []
    for kind, (n, total, squares) in sums.items():
        names: Sequence[Any] = view.heads if kind == "heads" else view.algorithms
        outer: Sequence[Any] = view.algorithms if kind == "heads" else view.layers
        inner: Sequence[Any] = view.layers if kind == "heads" else view.heads
        mean = total / np.maximum(n, 1)
        error = np.sqrt(np.clip(squares / np.maximum(n, 1) - mean**2, 0, None) / np.maximum(n - 1, 1))
        for a, x in enumerate(outer):
            for b, y in enumerate(inner):
                for i in range(len(names)):
                    for j in range(i + 1, len(names)):
                        place = (a, b, i, j)
                        algorithm, layer, head = (x, y, -1) if kind == "heads" else ("", x, y)
                        spread = 1.96 * error[place]
                        bounds = (mean[place], mean[place] - spread, mean[place] + spread)
                        who = (str(names[i]), str(names[j]))
                        rows.append((kind, algorithm, layer, head, *who, int(n[place]), *bounds))
    return pd.DataFrame(
        rows, columns=["between", "algorithm", "layer", "head", "first", "second", "n", "mean", "low", "high"]
    )

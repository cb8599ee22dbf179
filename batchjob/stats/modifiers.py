"""Tabulates how well heads separate two instances by their overlap, distance and size, from the table of pairs."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchjob.errors import counted
from batchjob.metrics.uncertainty import AN_EXAMPLE, FEWEST_IMAGES, first_half, resampled_ratios
from batchjob.stats.numbers import gain as signed
from batchjob.stats.numbers import gain_interval
from batchjob.stats.pool import Pool
from batchjob.store.run import Run

Floats = NDArray[np.float64]

# The lower bounds of the bins of each modifier. The last bin has no upper bound.
_BINS: dict[str, tuple[float, ...]] = {
    "box_iou": (0.0, 1e-9, 0.1, 0.3),  # the first bin: boxes that do not overlap
    "distance": (0.0, 3.0, 5.0, 7.0, 10.0),  # patches between the centroids
    "smaller": (2.0, 4.0, 8.0, 16.0, 32.0),  # patches of the smaller instance
    "size_ratio": (1.0, 1.5, 3.0),  # patches of the larger instance over those of the smaller
}
COLUMNS = ["modifier", "low", "high", "algorithm", "layer", "head", "pairs", "images", "pair_ari"]
COLUMNS += ["pair_ari_low", "pair_ari_high", "position", "gain", "gain_low", "gain_high", "correlation"]


def modifier_table(run: Run, pool: Pool) -> pd.DataFrame:
    """Averages `pair_ari` and its gain over position in bins of each modifier.

    Only the half of the images counts that did not choose the best head.

    Parameters
    ----------
    run
        A run whose table of pairs `Tables` has written.
    pool
        The processes that share the layers and modifiers.

    Returns
    -------
    One row for each modifier, bin and head; a bin without pairs has none. The 95 % intervals resample images, because
    the pairs of one image are not independent. `correlation` is Spearman's, between the modifier and the gain over
    all pairs; it is the same in the rows of all bins.
    """
    path = run.folder / "stats" / "pairs.parquet"
    if not pq.read_metadata(path).num_rows:
        return pd.DataFrame(columns=COLUMNS)
    tasks = [(m, x, modifier) for m in run.algorithms for x in run.layers for modifier in _BINS]
    frames = list(pool.map(functools.partial(_one_layer, path, run.heads), tasks))
    whole = pd.concat([pd.DataFrame(columns=COLUMNS), *(f for f in frames if len(f))], ignore_index=True)
    return whole.sort_values(["algorithm", "layer", "head"], kind="stable", ignore_index=True)


def _one_layer(path: Path, heads: Sequence[int], task: tuple[str, int, str]) -> pd.DataFrame:
    """Makes the rows of all heads of a layer for one modifier; the heads share the resampled images."""
    algorithm, layer, modifier = task
    names = [f"{algorithm}/{layer}/{head}" for head in heads]
    columns = ["larger", "smaller"] if modifier == "size_ratio" else [modifier]
    table = pq.read_table(
        path, columns=["image_id", *columns, *(f"{k}/{n}" for k in ("ari", "position") for n in names)]
    )
    ids = table.column("image_id").combine_chunks().dictionary_encode()
    table = table.filter(pa.array(~first_half(ids.dictionary.to_pylist())[ids.indices.to_numpy()]))
    image = table.column("image_id").combine_chunks().dictionary_encode().indices.to_numpy()
    values = table.column(columns[0]).to_numpy().astype(np.float64)
    if modifier == "size_ratio":
        values = values / table.column("smaller").to_numpy()
    ari, position = (
        np.stack([table.column(f"{k}/{n}").to_numpy() for n in names], axis=1) for k in ("ari", "position")
    )
    ari, position = ari.astype(np.float64), position.astype(np.float64)
    gain = ari - position
    known = np.isfinite(gain).all(axis=1) & np.isfinite(values)
    correlation = _rank_correlation(values[known], gain[known])
    rows: list[tuple[float | int | str, ...]] = []
    for low, high in zip(_BINS[modifier], [*_BINS[modifier][1:], np.inf], strict=True):
        inside = known & (values >= low) & (values < high)
        if not inside.any():
            continue
        used, where = np.unique(image[inside], return_inverse=True)
        count = np.bincount(where).astype(np.float64)
        stacked = np.concatenate([ari[inside], gain[inside]], axis=1)
        sums = np.zeros((len(used), stacked.shape[1]))
        np.add.at(sums, where, stacked)
        drawn = resampled_ratios(sums, np.broadcast_to(count[:, None], sums.shape))
        bounds = np.nanpercentile(drawn, [2.5, 97.5], axis=0) if len(used) > 1 else np.full((2, drawn.shape[1]), np.nan)
        for i, head in enumerate(heads):
            own, over = bounds[:, i], bounds[:, len(heads) + i]
            figures = (ari[inside, i].mean(), *own, position[inside, i].mean(), gain[inside, i].mean(), *over)
            counts = (int(inside.sum()), len(used))
            rows.append((modifier, low, high, algorithm, layer, head, *counts, *figures, correlation[i]))
    return pd.DataFrame(rows, columns=COLUMNS)


def _rank_correlation(values: Floats, gains: Floats) -> Floats:
    """Returns [C]: Spearman's correlation of values [n] with each column of gains [n, C]; NaN if one is constant."""
    middle = (len(values) + 1) / 2
    x, y = pd.Series(values).rank().to_numpy() - middle, pd.DataFrame(gains).rank().to_numpy() - middle
    spread = np.sqrt((x**2).sum() * (y**2).sum(axis=0))
    return np.where(spread > 0, x @ y / np.where(spread > 0, spread, 1), np.nan)


def describe(table: pd.DataFrame, layer: int, head: int, algorithm: str) -> list[str]:
    """Says how one head's gain depends on each modifier.

    Parameters
    ----------
    table
        What `modifier_table` returns.
    layer, head
        Numbers of the head and its layer.
    algorithm
        A name in the table.

    Returns
    -------
    One line a modifier, with an interval where a bin has `FEWEST_IMAGES`. None where no bin has `AN_EXAMPLE` images.
    """
    mine = table[(table.layer == layer) & (table["head"] == head) & (table.algorithm == algorithm)]
    of = f"{algorithm}: " if table.algorithm.nunique() > 1 else ""
    lines = []
    for modifier, of_it in mine.groupby("modifier", sort=False):
        if of_it["images"].max() < AN_EXAMPLE:
            continue
        bins = [_bin(row) for row in of_it.to_dict("records")]
        rank = of_it["correlation"].iloc[0]
        said = f" (rank correlation {signed(rank, 2)})" if np.isfinite(rank) else ""
        line = f"{of}pair_ari over position by {modifier}{said}: "
        lines.append((line + "; ".join(bins)).replace("-", "−"))
    return lines


def _bin(row: Mapping[Any, Any]) -> str:
    """Writes a bin: `3 to 5 +0.12 [+0.02, +0.21] (80 pairs, 31 photos)`."""
    parts = [_bound(row["low"], row["high"]), signed(row["gain"], 2)]
    if row["images"] >= FEWEST_IMAGES:
        parts.append(gain_interval(row["gain_low"], row["gain_high"], 2))
    return f"{' '.join(parts)} ({counted(row['pairs'], 'pair')}, {counted(row['images'], 'photo')})"


def _bound(low: float, high: float) -> str:
    return f"from {low:g}" if np.isinf(high) else f"{0 if low < 1e-6 else low:g} to {high:g}" if high > 1e-6 else "none"

"""Null models: what position alone, locality alone, or nothing at all would score. Each meets its own scores below."""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.codes import NO_LABEL

Floats = NDArray[np.float64]

POSITION_SEEDS = 20  # one seed alone is noise: two objects side by side give −0.02 to 1.0
LOCALITY_SEEDS = 4  # of k-means on a head's mean attention; its rows differ more than positions do


def position_labels(
    grid: tuple[int, int], k: int, *, n_init: int, seed: int = 0, keep: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """uint8 [S, P]: k-means of the (y, x) coordinates with `POSITION_SEEDS` seeds from `seed` on; 255 outside `keep`.

    Computed once for each grid, mask, k, n_init and seed in a process: it does not depend on the image.
    """
    mask = b"" if keep is None or keep.all() else np.packbits(keep).tobytes()
    return _position_labels(grid, mask, int(k), n_init, seed)


@functools.lru_cache(maxsize=4096)
def _position_labels(grid: tuple[int, int], mask: bytes, k: int, n_init: int, seed: int) -> NDArray[np.uint8]:
    patches = grid[0] * grid[1]
    keep = np.ones(patches, bool)
    if mask:
        keep = np.unpackbits(np.frombuffer(mask, np.uint8), count=patches).astype(bool)
    y, x = np.divmod(np.arange(patches), grid[1])
    return cluster_rows(np.stack([y, x], axis=1).astype(np.float64), k, n_init, seed, POSITION_SEEDS, keep)


def cluster_rows(
    rows: Floats, k: int, n_init: int, seed: int, seeds: int, keep: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """uint8 [seeds, P]: scikit-learn's k-means of rows [P, D], for `seeds` seeds from `seed` on; 255 outside `keep`."""
    from sklearn.cluster import KMeans

    keep = np.ones(len(rows), bool) if keep is None else keep
    labels = np.full((seeds, len(rows)), NO_LABEL, np.uint8)
    inside = rows[keep]
    k = min(max(k, 1), len(np.unique(inside, axis=0)))
    for i in range(seeds):
        labels[i, keep] = KMeans(k, n_init=n_init, random_state=seed + i).fit(inside).labels_ if k > 1 else 0
    return labels


def locality_rows(sums: Floats, counts: Floats, grid: tuple[int, int]) -> Floats:
    """[C, P, P]: each head's mean attention by offset as the attention of every image, rows renormalised at the edges.

    `sums` [C, 2·rows − 1, 2·columns − 1] of attention and `counts` of pairs by (dy, dx); offset (0, 0) in the middle.
    """
    means = sums / np.maximum(counts, 1)
    index = offset_index(grid)
    rows = means.reshape(len(means), -1)[:, index]
    total = rows.sum(axis=2, keepdims=True)
    return np.asarray(rows / np.where(total > 0, total, 1))


@functools.lru_cache(maxsize=8)
def offset_index(grid: tuple[int, int]) -> NDArray[np.int64]:
    """[P, P]: where the offset from query to key lies in a flattened (2·rows − 1) × (2·columns − 1) table."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    dy, dx = y[None, :] - y[:, None] + grid[0] - 1, x[None, :] - x[:, None] + grid[1] - 1
    return np.asarray(dy * (2 * grid[1] - 1) + dx)


def offset_sums(rows: NDArray[np.floating[Any]], grid: tuple[int, int]) -> Floats:
    """[C, 2·rows − 1, 2·columns − 1]: attention [C, P, P] summed by the offset from query to key."""
    height, width = 2 * grid[0] - 1, 2 * grid[1] - 1
    index = offset_index(grid).ravel()
    flat = np.asarray(rows, np.float64).reshape(len(rows), -1)
    sums = [np.bincount(index, weights=r, minlength=height * width) for r in flat]
    return np.asarray(sums, np.float64).reshape(-1, height, width)


def shuffle(labels: NDArray[np.uint8], *, row: int, seed: int) -> NDArray[np.uint8]:
    """[C, P]: each labelling's labels permuted over the image's labelled patches, with the image's own seed."""
    random = np.random.default_rng((seed, row, 1))
    keep = (labels != NO_LABEL).all(axis=0)
    shuffled = labels.copy()
    shuffled[:, keep] = random.permuted(labels[:, keep], axis=1)
    return shuffled

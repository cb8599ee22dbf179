"""Computes the position null: near-optimal k-means of the patches' coordinates, whatever the patches show."""

import functools
import multiprocessing

import numpy as np
from numpy.typing import NDArray

from batchjob.clustering.search import best_partitions
from batchjob.machine import usable_cores

SEEDS = 20  # one seed is not enough: for two objects side by side, the index ranges from −0.02 to 1.0 between seeds


def position_labels(
    grid: tuple[int, int], k: int, *, seed: int = 0, keep: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """Clusters the patches by their (y, x) coordinates with k-means, once for each of `SEEDS` seeds.

    The labels do not depend on the image. A process therefore computes them once for each grid, mask, k and seed.

    Parameters
    ----------
    grid
        (rows, columns) of the P patches.
    k
        How many clusters.
    seed
        The first seed; the others follow it.
    keep
        bool [P], false for patches of padding; None keeps all.

    Returns
    -------
    uint8 [SEEDS, P]: a labelling for each seed, 255 outside `keep`.
    """
    mask = b"" if keep is None or keep.all() else np.packbits(keep).tobytes()
    return _position_labels(grid, mask, int(k), seed)


@functools.lru_cache(maxsize=4096)
def _position_labels(grid: tuple[int, int], mask: bytes, k: int, seed: int) -> NDArray[np.uint8]:
    patches = grid[0] * grid[1]
    keep = np.ones(patches, bool)
    if mask:
        keep = np.unpackbits(np.frombuffer(mask, np.uint8), count=patches).astype(bool)
    y, x = np.divmod(np.arange(patches), grid[1])
    places = np.broadcast_to(np.stack([y, x], axis=1).astype(np.float32), (SEEDS, patches, 2))
    seeds = seed + np.arange(SEEDS, dtype=np.int64)
    masks = np.broadcast_to(keep, (SEEDS, patches))
    threads = 1 if multiprocessing.parent_process() else usable_cores()  # each process of a pool has its core
    return best_partitions(places, np.full(SEEDS, k), seeds, mask=masks, threads=threads).labels

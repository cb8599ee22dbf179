"""The position null: near-optimal k-means of where the patches are, whatever they show."""

import functools
import multiprocessing

import numpy as np
from numpy.typing import NDArray

from batchjob.clustering.search import best_partitions
from batchjob.machine import usable_cores

SEEDS = 20  # one seed alone is noise: two objects side by side give −0.02 to 1.0


def position_labels(
    grid: tuple[int, int], k: int, *, seed: int = 0, keep: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """k-means of the patches' (y, x) coordinates with `SEEDS` seeds.

    Computed once for each grid, mask, k and seed in a process: it does not depend on the image.

    Parameters
    ----------
    grid
        (rows, columns) of the P patches.
    k
        Clusters.
    seed
        The first of the seeds.
    keep
        [P] False for patches of padding.

    Returns
    -------
    uint8 [S, P]; 255 outside `keep`.
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
    places = np.broadcast_to(np.stack([y, x], axis=1).astype(np.float32), (SEEDS, patches, 2))  # small whole numbers
    seeds = seed + np.arange(SEEDS, dtype=np.int64)
    masks = np.broadcast_to(keep, (SEEDS, patches))
    threads = 1 if multiprocessing.parent_process() else usable_cores()  # each process of a pool has its core
    return best_partitions(places, np.full(SEEDS, k), seeds, mask=masks, threads=threads).labels

"""Which colour a cluster gets: few, far apart for all eyes, and the same for the same object in every map."""

import colorsys

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from batchjob.codes import NOISE

# Okabe & Ito, "Color Universal Design" (2008), ordered so that neighbours differ in lightness too, which keeps small
# numbers of clusters apart in black and white; then P. Tol's "muted" scheme (SRON/EPS/TN/09-002).
# fmt: off
_BASE = (
    "#56b4e9", "#d55e00", "#f0e442", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#332288",
    "#ddcc77", "#882255", "#44aa99", "#aa4499", "#999933", "#117733", "#88ccee", "#cc6677",
)
# fmt: on
# Outlines of objects, by category: bright, since they lie on photos, with a dark rim.
OBJECT_COLOURS = ("#ffd400", "#00e0ff", "#ff4fa3", "#7dff5a", "#ff8a1f", "#c79bff")
_NOISE_COLOUR = (0.30, 0.30, 0.30)
MAP_COLOURS = "magma"  # perceptually uniform, monotone in lightness: reads the same in black and white
_GOLDEN = 0.6180339887498949


def cluster_colours(count: int) -> NDArray[np.float64]:
    """Returns RGB in [0, 1], [count, 3]; the first 16 are safe for colour-blind eyes, the rest spread over the hues."""
    colours = [tuple(int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)) for text in _BASE[:count]]
    for extra in range(len(colours), count):
        colours.append(colorsys.hls_to_rgb((extra * _GOLDEN) % 1.0, (0.38, 0.56, 0.74)[extra % 3], 0.55))
    return np.array(colours, dtype=np.float64).reshape(count, 3)


def label_colours(count: int) -> NDArray[np.float64]:
    """Returns a table [256, 4] from a label's byte to RGBA: clusters opaque, noise dark, "none" transparent."""
    table = np.zeros((256, 4))
    shown = min(count, NOISE)
    table[:shown, :3], table[:shown, 3] = cluster_colours(shown), 1.0
    table[NOISE] = (*_NOISE_COLOUR, 1.0)
    return table


def match_colours(maps: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Renumbers partitions [N, rows, columns] so that equal numbers mean the same place in every map.

    Every map is assigned to the running vote of all maps by the largest overlap (Hungarian assignment on the
    intersection over union), twice; numbers are then ordered by area, the largest first. 254 and 255 stay.
    """
    flat = maps.reshape(len(maps), -1)
    present = flat[flat < NOISE]
    if not present.size:
        return maps.copy()
    count = max(len(np.unique(row[row < NOISE])) for row in flat)
    votes = np.zeros((count, flat.shape[1]))
    matched = flat
    for known in (False, True):  # the first pass starts from whichever map came first; the second forgets that
        matched, tally = flat.copy(), np.zeros_like(votes)
        for row, source in enumerate(flat):
            for old, new in _assignment(source, votes if known else tally):
                matched[row, source == old] = new
                tally[new, source == old] += 1
        votes = tally
    order = np.argsort(-votes.sum(axis=1), kind="stable")
    rank = np.arange(256, dtype=np.uint8)
    rank[order] = np.arange(count, dtype=np.uint8)
    return np.asarray(rank[matched].reshape(maps.shape))


def _assignment(source: NDArray[np.uint8], votes: NDArray[np.float64]) -> list[tuple[int, int]]:
    names = np.unique(source[source < NOISE])
    masks = (source[None] == names[:, None]).astype(np.float64)  # [clusters, P]
    share = votes / max(votes.max(), 1.0)
    both = masks @ share.T
    union = masks.sum(1)[:, None] + share.sum(1)[None] - both
    rows, columns = linear_sum_assignment(both / np.maximum(union, 1e-9), maximize=True)
    return [(int(names[r]), int(c)) for r, c in zip(rows, columns, strict=True)]

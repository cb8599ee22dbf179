"""Chooses the colours of clusters: far apart for all eyes, and the same for the same region in every map."""

import colorsys
import functools

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
# Of the outlines of objects, by category. They are bright because they are drawn on photos, with a dark rim. Found by a
# search for colours far apart in CIELAB: the first eight for protan and deutan eyes too, the others for most eyes.
# fmt: off
OBJECT_COLOURS = (
    "#ffcc00", "#aa55ff", "#00ffff", "#dd8877", "#ff2211", "#99aaff", "#aaff88", "#ee3399", "#00ff00", "#778844",
    "#ff8822", "#00ffbb", "#22aacc", "#009900", "#ffaadd", "#ffdd99", "#bbff00", "#ee4455", "#ff00dd", "#009977",
)
# fmt: on
_UNLIKE = 60.0  # a difference of colours, in units of CIELAB, at which thin lines are not taken for each other
_NOISE_COLOUR = (0.30, 0.30, 0.30)
MAP_COLOURS = "magma"  # perceptually uniform and monotone in lightness, so that it works in black and white too
_GOLDEN = 0.6180339887498949


def cluster_colours(count: int) -> NDArray[np.float64]:
    """Returns colours as RGB in [0, 1], [count, 3]: 16 for colour-blind eyes too, then others spread over the hues."""
    colours = [tuple(int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)) for text in _BASE[:count]]
    for extra in range(len(colours), count):
        colours.append(colorsys.hls_to_rgb((extra * _GOLDEN) % 1.0, (0.38, 0.56, 0.74)[extra % 3], 0.55))
    return np.array(colours, dtype=np.float64).reshape(count, 3)


@functools.cache
def object_likeness() -> NDArray[np.float64]:
    """Returns how alike two colours of objects are, [n, n]: 1 for the same, 0 for those that are clearly different."""
    rgb = np.array([[int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)] for text in OBJECT_COLOURS])
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # sRGB, D65
    x, y, z = np.cbrt(rgb**2.2 @ to_xyz.T / to_xyz.sum(axis=1)).T
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=2)
    return np.asarray(np.clip(1 - apart / _UNLIKE, 0, 1))


@functools.cache
def label_colours() -> NDArray[np.float64]:
    """Returns the RGBA of each label, [256, 4]: clusters are opaque, noise is dark, no label is transparent."""
    table = np.zeros((256, 4))
    table[:NOISE, :3], table[:NOISE, 3] = cluster_colours(NOISE), 1.0
    table[NOISE] = (*_NOISE_COLOUR, 1.0)
    table.setflags(write=False)
    return table


def match_colours(maps: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Renumbers the clusters of maps [N, rows, columns] so that equal numbers cover about the same patches in all maps.

    Each map votes for the number of each patch. Its own clusters get the numbers that overlap most with the votes so
    far, by Hungarian assignment on the intersection over union. A second pass uses the votes of all maps. The numbers
    are then ordered by area, the largest first. 254 and 255 stay.
    """
    flat = maps.reshape(len(maps), -1)
    present = flat[flat < NOISE]
    if not present.size:
        return maps.copy()
    count = max(len(np.unique(row[row < NOISE])) for row in flat)
    votes = np.zeros((count, flat.shape[1]))
    matched = flat
    for known in (False, True):  # the first pass depends on the order of the maps, the second hardly does
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

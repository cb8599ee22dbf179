"""Scores of CLS attention maps against masks and boxes: Jaccard and CorLoc, as DINO and LOST define them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.metrics.clusters import box_iou

Floats = NDArray[np.float64]
BOX_MASS = 0.6  # CorLoc takes the box of the patches that hold this share of a map


def normalise(maps: NDArray[np.floating[Any]], keep: NDArray[np.bool_] | None = None) -> Floats:
    """Scales maps so that they sum to 1 over the patches that count, and sets the other patches to 0.

    Parameters
    ----------
    maps
        [C, P] or [P], not negative.
    keep
        bool [P], False for patches that do not count; by default all count.

    Returns
    -------
    float64 [C, P]. A map of zeros stays zeros.
    """
    maps = np.atleast_2d(maps).astype(np.float64)
    if keep is not None:
        maps = maps * keep
    total = maps.sum(axis=1, keepdims=True)
    return np.asarray(maps / np.where(total > 0, total, 1))


def mass_mask(maps: Floats, share: float) -> NDArray[np.bool_]:
    """Finds the fewest patches of each map that hold at least a share of its mass; of equal patches the earlier ones.

    Keeps the same set as DINO's `visualize_attention.py`, which drops the smallest values until 1 − share is gone.

    Parameters
    ----------
    maps
        [C, P], each of sum 1.
    share
        From 0 to 1.

    Returns
    -------
    bool [C, P].
    """
    order = np.argsort(-maps, axis=1, kind="stable")
    held = np.cumsum(np.take_along_axis(maps, order, axis=1), axis=1)
    # a sum of exact tenths may end a hair below the share it stands for
    needed = (held < share - 1e-9).sum(axis=1) + 1
    mask = np.zeros(maps.shape, bool)
    np.put_along_axis(mask, order, np.arange(maps.shape[1])[None, :] < needed[:, None], axis=1)
    return mask


def jaccard(mask: NDArray[np.bool_], coverage: NDArray[np.floating[Any]]) -> Floats:
    """Computes the intersection over union of each patch mask with each instance.

    A mask is constant on a patch and `coverage` is exact, so this equals the IoU at unlimited resolution with the masks
    up-sampled by nearest neighbour.

    Parameters
    ----------
    mask
        bool [C, P].
    coverage
        [m, P] share of each patch that an instance covers, from 0 to 1.

    Returns
    -------
    [C, m] from 0 to 1.
    """
    both = mask.astype(np.float64) @ np.asarray(coverage, np.float64).T
    either = mask.sum(axis=1)[:, None] + coverage.sum(axis=1)[None, :] - both
    return np.asarray(both / np.where(either > 0, either, 1))


def corloc(found: Floats, boxes: NDArray[np.floating[Any]]) -> Floats:
    """Tells whether the box of a mask's largest connected component has IoU ≥ 0.5 with the box of any instance.

    Parameters
    ----------
    found
        [C, 4] from `component_boxes`.
    boxes
        [m, 4] of the instances: left, top, right, bottom, in patches.

    Returns
    -------
    [C] of 0 and 1; NaN without boxes.
    """
    if not len(boxes):
        return np.full(len(found), np.nan)
    return np.asarray((box_iou(found[:, None, :], boxes[None, :, :]).max(axis=1) >= 0.5).astype(np.float64))


def component_boxes(mask: NDArray[np.bool_], grid: tuple[int, int]) -> Floats:
    """Finds the box of each mask's largest 4-connected component; of equal components the first in row-major order.

    Parameters
    ----------
    mask
        bool [C, P].
    grid
        (rows, columns) of the P patches.

    Returns
    -------
    float64 [C, 4]: left, top, right, bottom, in patches; zeros for an empty mask.
    """
    from scipy import ndimage

    cross = np.zeros((3, 3, 3), bool)  # neighbours lie in one map, never in the next one of the stack
    cross[1] = ndimage.generate_binary_structure(2, 1)
    parts, count = ndimage.label(mask.reshape(-1, *grid), structure=cross)
    boxes = np.zeros((len(mask), 4))
    if not count:
        return boxes
    size = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    slices = ndimage.find_objects(parts)
    best: dict[int, int] = {}
    for part, (stack, _, _) in enumerate(slices):
        c = stack.start
        if c not in best or size[part] > size[best[c]]:
            best[c] = part
    for c, part in best.items():
        _, y, x = slices[part]
        boxes[c] = x.start, y.start, x.stop, y.stop
    return boxes

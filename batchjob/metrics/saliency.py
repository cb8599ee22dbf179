"""Scores of CLS attention maps against masks and boxes: Jaccard and CorLoc, as DINO and LOST define them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.metrics.clusters import box_iou

Floats = NDArray[np.float64]
MASSES = (0.6, 0.8, 0.9)  # t of jaccard_t; CorLoc takes the first


def normalise(maps: NDArray[np.floating[Any]], keep: NDArray[np.bool_] | None = None) -> Floats:
    """float64 [C, P]: maps whose sum is 1 over the patches that `keep` [P] names (all by default), 0 elsewhere."""
    maps = np.atleast_2d(maps).astype(np.float64)
    if keep is not None:
        maps = maps * keep
    total = maps.sum(axis=1, keepdims=True)
    return np.asarray(maps / np.where(total > 0, total, 1))


def mass_mask(maps: Floats, share: float) -> NDArray[np.bool_]:
    """bool [C, P]: the fewest patches of each map [C, P] (sum 1) that hold at least `share` of its mass.

    Of equal patches the earlier ones are taken. The same set as DINO's `visualize_attention.py` keeps, which drops the
    smallest values until 1 − share is gone.
    """
    order = np.argsort(-maps, axis=1, kind="stable")
    held = np.cumsum(np.take_along_axis(maps, order, axis=1), axis=1)
    # a sum of exact tenths may end a hair below the share it stands for
    needed = (held < share - 1e-9).sum(axis=1) + 1
    mask = np.zeros(maps.shape, bool)
    np.put_along_axis(mask, order, np.arange(maps.shape[1])[None, :] < needed[:, None], axis=1)
    return mask


def jaccard(mask: NDArray[np.bool_], coverage: NDArray[np.floating[Any]]) -> Floats:
    """[C, m]: intersection over union of patch masks [C, P] with instances, given as `coverage` [m, P] of each patch.

    The mask is constant on a patch, so this is the IoU at unlimited resolution with masks up-sampled by nearest.
    """
    both = mask.astype(np.float64) @ np.asarray(coverage, np.float64).T
    either = mask.sum(axis=1)[:, None] + coverage.sum(axis=1)[None, :] - both
    return np.asarray(both / np.where(either > 0, either, 1))


def corloc(mask: NDArray[np.bool_], grid: tuple[int, int], boxes: NDArray[np.floating[Any]]) -> Floats:
    """[C]: 1 where the box of the mask's largest connected component has IoU ≥ 0.5 with any of `boxes` [m, 4], else 0.

    Boxes are (left, top, right, bottom) in patches. 4-neighbours; of equal components the first in row-major order.
    """
    found = component_boxes(mask, grid)
    if not len(boxes):
        return np.full(len(mask), np.nan)
    return np.asarray((box_iou(found[:, None, :], boxes[None, :, :]).max(axis=1) >= 0.5).astype(np.float64))


def component_boxes(mask: NDArray[np.bool_], grid: tuple[int, int]) -> Floats:
    """[C, 4]: left, top, right, bottom (in patches) of each mask's largest 4-connected component; zeros for none."""
    from scipy import ndimage

    cross = np.zeros((3, 3, 3), bool)  # the stack's maps are not each other's neighbours
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

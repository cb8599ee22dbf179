"""Scores of one image's clusters: NumPy functions over a stack of C labellings (algorithms × layers × heads).

Labels are uint8 [C, P]: 255 for a patch without a label, and 254 for noise, which counts as one further cluster.
`owner` [P] is the instance of each patch, −1 for none. `category` [m] is the category of each of m instances. A table
[C, K, m] counts the patches by cluster and instance (`agreement.contingency`). docs/metrics.md defines the scores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.codes import NO_LABEL
from batchjob.metrics.agreement import ami, ari, contingency

Labels = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Pairs:
    """The n pairs of instances of one category in one image, and what may decide whether clusters separate them."""

    first: NDArray[np.int64]  # [n] number of one instance
    second: NDArray[np.int64]  # [n] number of the other instance
    category: NDArray[np.int32]  # [n]
    distance: Floats  # [n] between the centroids of the owned patches, in patches
    box_iou: Floats  # [n] intersection over union of the two boxes
    smaller: Floats  # [n] patches that the smaller instance owns
    larger: Floats  # [n] patches that the larger instance owns


def instance_scores(labels: Labels, owner: Labels, category: Labels) -> dict[str, Floats]:
    """Scores whether clusters separate objects of one category: `instance_ari` and `instance_ami`.

    Parameters
    ----------
    labels
        uint8 [C, P] or [P].
    owner
        [P] instance of each patch, −1 for none.
    category
        [m] category of each instance.

    Returns
    -------
    score -> [C], at most 1; NaN where no category has two instances.
    """
    table = contingency(labels, owner, max(len(category), 1))
    indices = {"instance_ari": ari, "instance_ami": ami}
    return {name: within_categories(index, table, category) for name, index in indices.items()}


def within_categories(index: Callable[[Floats], Floats], table: Floats, category: Labels) -> Floats:
    """Averages an index over the categories that have two instances or more.

    Parameters
    ----------
    index
        `ari` or `ami`: it gives [C] of a table [C, K, instances of one category].
    table
        [C, K, m] patches by cluster and instance.
    category
        [m] category of each instance.

    Returns
    -------
    [C]; NaN where no category has two instances.
    """
    groups = [np.flatnonzero(category == c) for c in np.unique(category)]
    values = [index(table[:, :, members]) for members in groups if len(members) >= 2]
    return np.mean(values, axis=0) if values else np.full(len(table), np.nan)


def image_ari(table: Floats) -> Floats:
    """[C]: the adjusted Rand index over all labelled patches, of a table [C, K, m + 1] of clusters and instances.

    The first column counts the patches of no instance, which are one further group. The result is NaN for an image
    without instances (m = 0), in which there is nothing to find.
    """
    return ari(table) if table.shape[2] > 1 else np.full(len(table), np.nan)


def pair_ari(table: Floats, first: NDArray[np.int64], second: NDArray[np.int64]) -> Floats:
    """Computes the adjusted Rand index for each of n pairs of instances, over the patches of the two.

    Parameters
    ----------
    table
        [C, K, m] patches by cluster and instance.
    first, second
        [n] numbers of the two instances of each pair.

    Returns
    -------
    [C, n], at most 1.
    """
    both = np.stack([table[:, :, first], table[:, :, second]], axis=-1)  # [C, K, n, 2]
    return ari(both.swapaxes(1, 2))


def twins(category: Labels) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lists every two instances of one category: the numbers [n] and [n] of n pairs, from the categories [m]."""
    category = np.asarray(category)
    first, second = np.triu_indices(len(category), 1)
    same = category[first] == category[second]
    return first[same], second[same]


def instance_pairs(owner: Labels, category: Labels, boxes: NDArray[np.floating[Any]], grid: tuple[int, int]) -> Pairs:
    """Lists every two instances of one category, with what may decide whether clusters separate them.

    Parameters
    ----------
    owner
        [P] instance of each patch, −1 for none.
    category
        [m] category of each instance.
    boxes
        [m, 4] left, top, right, bottom, in any one unit.
    grid
        (rows, columns) of the P patches.

    Returns
    -------
    n pairs; n may be 0.
    """
    category = np.asarray(category)
    first, second = twins(category)
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    owned = owner >= 0
    size = np.bincount(owner[owned], minlength=len(category)).astype(np.float64)
    centre = np.stack(
        [np.bincount(owner[owned], v[owned], minlength=len(category)) / np.maximum(size, 1) for v in (y, x)]
    )
    return Pairs(
        first=first,
        second=second,
        category=category[first].astype(np.int32),
        distance=np.hypot(*(centre[:, first] - centre[:, second])),
        box_iou=box_iou(boxes[first], boxes[second]),
        smaller=np.minimum(size[first], size[second]),
        larger=np.maximum(size[first], size[second]),
    )


def box_iou(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> Floats:
    """Computes the intersection over union of boxes; 0 where both are empty.

    Parameters
    ----------
    a, b
        [..., 4] each: left, top, right, bottom, in one unit. The two shapes are broadcast.

    Returns
    -------
    [...] from 0 to 1.
    """
    width = np.clip(np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0]), 0, None)
    height = np.clip(np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1]), 0, None)
    both = width * height
    either = _area(a) + _area(b) - both
    return np.asarray(both / np.where(either > 0, either, 1))


def _area(box: NDArray[np.floating[Any]]) -> Floats:
    return np.asarray((box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]))


def coherence(labels: Labels, grid: tuple[int, int]) -> Floats:
    """Computes the share of neighbouring labelled patches (4-neighbours) with equal labels.

    Parameters
    ----------
    labels
        uint8 [C, P] or [P].
    grid
        (rows, columns) of the P patches.

    Returns
    -------
    [C] from 0 to 1; NaN where no two neighbours are labelled.
    """
    maps = np.atleast_2d(labels).reshape(-1, *grid)
    equal, total = np.zeros(len(maps)), np.zeros(len(maps))
    for a, b in ((maps[:, 1:], maps[:, :-1]), (maps[:, :, 1:], maps[:, :, :-1])):
        known = (a != NO_LABEL) & (b != NO_LABEL)
        equal += ((a == b) & known).sum(axis=(1, 2))
        total += known.sum(axis=(1, 2))
    return np.where(total > 0, equal / np.maximum(total, 1), np.nan)


def cluster_sizes(labels: Labels) -> dict[str, Floats]:
    """Describes the sizes of the clusters of labels [C, P] or [P], [C] each.

    `clusters` is their number, in which noise counts as one. `largest_cluster` and `smallest_cluster` are their shares
    of the labelled patches, NaN where no patch is labelled.
    """
    labels = np.atleast_2d(labels)
    sizes = contingency(labels, np.zeros(labels.shape[1], np.int64), 1)[:, :, 0]
    total = np.maximum(sizes.sum(axis=1), 1)
    found = (sizes > 0).sum(axis=1)
    smallest = np.where(sizes > 0, sizes, np.inf).min(axis=1)
    return {
        "clusters": found.astype(np.float64),
        "largest_cluster": np.where(found > 0, sizes.max(axis=1) / total, np.nan),
        "smallest_cluster": np.where(found > 0, np.where(found > 0, smallest, 0) / total, np.nan),
    }


def agreement(first: Labels, second: Labels) -> Floats:
    """Computes the adjusted Rand index between every labelling of one stack and every labelling of another.

    Parameters
    ----------
    first, second
        uint8 [C, P] and [D, P]. A patch that either of two labellings leaves out does not count for them.

    Returns
    -------
    [C, D], at most 1.
    """
    a, b = _one_hot(first), _one_hot(second)  # [C, K, P], [D, J, P]
    table = a.reshape(-1, a.shape[2]) @ b.reshape(-1, b.shape[2]).T
    table = table.reshape(a.shape[0], a.shape[1], b.shape[0], b.shape[1])
    return ari(table.transpose(0, 2, 1, 3).astype(np.float64))


def _one_hot(labels: Labels) -> NDArray[np.float32]:
    labels = np.atleast_2d(labels)
    values = np.unique(labels[labels != NO_LABEL])
    return np.asarray(labels[:, None, :] == values[None, :, None], np.float32)

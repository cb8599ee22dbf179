"""`instance_ari_truth` in NumPy: the specification that the engines and `on_device` follow."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.metrics.clusters import instance_scores

Floats = NDArray[np.float64]
MAX_STEPS = 300
NOISE = 1e-6  # of the longest row's square: distances that are this close are equal


def clusters_of(
    owner: NDArray[np.integer[Any]], count: int, keep: NDArray[np.bool_] | None = None
) -> NDArray[np.int16]:
    """int16 [P]: one cluster an instance, and the rest of the patches as one more.

    Parameters
    ----------
    owner
        [P] instance of each patch, −1 for none.
    count
        How many instances there are, m: the rest has the number m.
    keep
        [P] False for patches of padding, which become −1.
    """
    start = np.where(owner < 0, count, owner)
    return np.where(keep, start, -1).astype(np.int16) if keep is not None else start.astype(np.int16)


def settle(rows: Floats, start: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Where Lloyd's algorithm ends from given clusters.

    Every row goes to the nearest mean, of equally near ones to the first cluster's; an empty cluster stays empty.

    Parameters
    ----------
    rows
        [P, D].
    start
        [P] cluster of each row; −1 for rows that take no part.

    Returns
    -------
    int64 [P].
    """
    labels, inside = np.array(start, np.int64), np.flatnonzero(np.asarray(start) >= 0)
    rows = rows[inside] - rows[inside].mean(axis=0)
    noise = NOISE * np.square(rows).sum(axis=1).max()
    for _ in range(MAX_STEPS):
        away = np.full((int(labels.max()) + 1, len(inside)), np.inf)
        for cluster in np.unique(labels[inside]):
            mean = rows[labels[inside] == cluster].mean(axis=0)
            away[cluster] = np.square(rows - mean).sum(axis=1)
        nearest = (away <= away.min(axis=0) + noise).argmax(axis=0)
        if (nearest == labels[inside]).all():
            break
        labels[inside] = nearest
    return labels


def instance_ari_truth(
    rows: NDArray[np.floating[Any]],
    owner: NDArray[np.integer[Any]],
    category: NDArray[np.integer[Any]],
    keep: NDArray[np.bool_] | None = None,
) -> Floats:
    """[C]: `instance_ari` of the clusters that k-means ends in when each instance is given to it as a cluster.

    Parameters
    ----------
    rows
        [C, P, D] of C heads, such that Euclidean distances between them are those that k-means minimises.
    owner
        [P] instance of each patch, −1 for none. The swap null takes another photo's, for the start and the score.
    category
        [m] of the instances.
    keep
        [P] False for patches of padding.

    Returns
    -------
    NaN where no category has two instances.
    """
    start = clusters_of(owner, len(category), keep)
    labels = np.stack([settle(np.asarray(of_head, np.float64), start) for of_head in rows])
    return instance_scores(np.where(labels < 0, 255, labels), np.where(start < 0, -1, owner), category)["instance_ari"]

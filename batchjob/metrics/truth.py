"""`instance_ari_truth` in NumPy: the specification that `clustering.from_labels` and `on_device` follow."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.codes import NO_LABEL
from batchjob.metrics.clusters import instance_scores

Floats = NDArray[np.float64]
MAX_STEPS = 300
EQUALLY_NEAR = 1e-6  # of the longest row's square: distances that differ by less are equal


def clusters_of(
    owner: NDArray[np.integer[Any]], count: int, keep: NDArray[np.bool_] | None = None
) -> NDArray[np.int16]:
    """Makes a cluster of each instance, and one more of all patches that no instance owns.

    Parameters
    ----------
    owner
        [P] instance of each patch, −1 for none.
    count
        m, the number of instances: the patches of no instance become cluster m.
    keep
        bool [P], False for patches of padding. None: all patches are image.

    Returns
    -------
    int16 [P], −1 for padding.
    """
    start = np.where(owner < 0, count, owner)
    return np.where(keep, start, -1).astype(np.int16) if keep is not None else start.astype(np.int16)


def settle(rows: Floats, start: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Carries given clusters to a fixed point of Lloyd's algorithm.

    Every row goes to the nearest mean; of equally near means, to that of the lowest cluster number. A cluster that has
    lost all its rows stays empty.

    Parameters
    ----------
    rows
        [P, D]
    start
        [P] cluster of each row; −1 for rows that take no part.

    Returns
    -------
    int64 [P], with the numbers of `start`.
    """
    labels, inside = np.array(start, np.int64), np.flatnonzero(np.asarray(start) >= 0)
    rows = rows[inside] - rows[inside].mean(axis=0)
    noise = EQUALLY_NEAR * np.square(rows).sum(axis=1).max()
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
    """Computes `instance_ari` of the clusters in which k-means ends when it starts from the instances themselves.

    Parameters
    ----------
    rows
        [C, P, D] of C heads. k-means takes the Euclidean distances between them.
    owner
        [P] instance of each patch, −1 for none. The `swap` null gives another photo's, for the start and the score.
    category
        [m] category of each instance.
    keep
        bool [P], False for patches of padding. None: all patches are image.

    Returns
    -------
    float64 [C]; NaN where no category has two instances.
    """
    start = clusters_of(owner, len(category), keep)
    labels = np.stack([settle(np.asarray(of_head, np.float64), start) for of_head in rows])
    return instance_scores(np.where(labels < 0, NO_LABEL, labels), np.where(start < 0, -1, owner), category)[
        "instance_ari"
    ]

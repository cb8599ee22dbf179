"""Lloyd's algorithm from given clusters, on the Gram matrix of one problem, in compiled code. Letters: P rows."""

import numpy as np
from numpy.typing import NDArray

from batchjob.clustering.jit import compiled

MAX_STEPS = 300  # as in scikit-learn
EQUALLY_NEAR = 1e-6  # of the longest row's square: distances that differ by less are equal


@compiled
def settle(gram: NDArray[np.float32], labels: NDArray[np.int32]) -> None:
    """Carries clusterings to fixed points of Lloyd's algorithm.

    Every row goes to the nearest mean; of equally near means, to that of the lowest cluster number. A cluster that has
    lost all its rows stays empty.

    Parameters
    ----------
    gram
        float [P, P] of the centred rows.
    labels
        int32 [S, P], read and written: S clusterings. One whose first label is negative stays as it is.
    """
    count = len(gram)
    most = 0.0
    for p in range(count):
        most = max(most, gram[p, p])
    noise = gram.dtype.type(EQUALLY_NEAR * most)
    least, nearest = np.empty(count, gram.dtype), np.empty(count, np.int32)
    for s in range(len(labels)):
        label = labels[s]
        k = 0
        for p in range(count):
            k = max(k, label[p] + 1)
        if label[0] < 0:
            continue
        sums, away = np.zeros((k, count), gram.dtype), np.empty((k, count), gram.dtype)  # Σ of G over each cluster
        size = np.zeros(k, np.int64)
        for i in range(count):
            size[label[i]] += 1
            own, row = sums[label[i]], gram[i]
            for p in range(count):
                own[p] += row[p]
        for _ in range(MAX_STEPS):
            for p in range(count):
                least[p] = np.inf
            for c in range(k):
                if size[c] == 0:
                    continue
                norm = 0.0
                for p in range(count):
                    norm += sums[c, p] if label[p] == c else 0.0
                fixed, twice = gram.dtype.type(norm / size[c] ** 2), gram.dtype.type(2.0 / size[c])
                own, to = sums[c], away[c]
                for p in range(count):
                    to[p] = fixed - twice * own[p]
                    least[p] = min(least[p], to[p])
            for c in range(k - 1, -1, -1):  # downwards, so that the lowest number is written last
                if size[c] > 0:
                    to = away[c]
                    for p in range(count):
                        nearest[p] = c if to[p] <= least[p] + noise else nearest[p]
            moved = False
            for i in range(count):
                old, new = label[i], nearest[i]
                if old == new:
                    continue
                moved = True
                left, joined, row = sums[old], sums[new], gram[i]
                for p in range(count):
                    left[p] -= row[p]
                    joined[p] += row[p]
                size[old] -= 1
                size[new] += 1
                label[i] = new
            if not moved:
                break

"""k-means++ on a Gram matrix, in compiled code. Letters: R starts, P rows, K clusters."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.clustering.draws import draw, seed_stream, uniform
from batchjob.clustering.jit import compiled, inner


@inner
def _start(
    gram: NDArray[Any], square: NDArray[Any], labels: NDArray[np.int32], k: int, state: NDArray[np.uint64]
) -> bool:
    """Writes labels by greedy k-means++ (Arthur and Vassilvitskii, SODA 2007), with as many candidates as scikit-learn.

    False where there are fewer clusters, because every row was equal, but for rounding, to a centre already drawn.
    """
    count = len(square)
    trials = 2 + int(math.log(k))
    closest, best, nearer = np.empty_like(square), np.empty_like(square), np.empty_like(square)
    running = np.empty(count, np.float64)
    centre = int(uniform(state) * count)
    row = gram[centre]
    for p in range(count):
        closest[p] = max(square[p] + square[centre] - 2 * row[p], 0)
        labels[p] = 0
    noise = 0.0
    for p in range(count):
        noise = max(noise, square[p] * (1e-5 if gram.itemsize == 4 else 1e-12))
    for cluster in range(1, k):
        total = 0.0
        most = closest[0] * 0
        for p in range(count):
            total += closest[p]
            running[p] = total
            most = max(most, closest[p])
        if most <= noise:
            return False
        least = np.inf
        for _ in range(trials):
            drawn = draw(running, state)
            row, own = gram[drawn], square[drawn]
            cost = closest[0] * 0
            for p in range(count):
                nearer[p] = min(max(square[p] + own - 2 * row[p], 0), closest[p])
                cost += nearer[p]
            if cost < least:
                least = cost
                best, nearer = nearer, best
        for p in range(count):
            labels[p] = cluster if best[p] < closest[p] else labels[p]
            closest[p] = best[p]
    return True


@compiled
def draw_starts(gram: NDArray[Any], k: int, seed: int, labels: NDArray[np.int32]) -> bool:
    """Draws starts by greedy k-means++.

    Parameters
    ----------
    gram
        float [P, P].
    k
        K.
    seed
        Each start draws from a stream of its own, so that the first starts are the same for any R.
    labels
        int32 [R, P], written: from 0 to K − 1.

    Returns
    -------
    False where a start has fewer clusters, because every row was equal, to the rounding of `gram`, to a centre already
    drawn.
    """
    square, state = np.empty(len(gram), gram.dtype), np.zeros(1, np.uint64)
    for p in range(len(gram)):
        square[p] = gram[p, p]
    told_apart = True
    for start in range(len(labels)):
        seed_stream(state, seed, start)
        told_apart &= _start(gram, square, labels[start], k, state)
    return told_apart

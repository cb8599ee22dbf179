"""Near-optimal k-means of one problem on its Gram matrix, compiled: starts, single moves, swaps of centres.

With S[c, p] = Σ_{i in c} G[i, p] kept up to date, the squared distance from row p to the mean of cluster c is
G[p, p] − 2 S[c, p] / n_c + q_c / n_c², where q_c = Σ_{p in c} S[c, p]: no centroids are needed, and moving a row from
cluster to cluster costs two sums over P numbers. Rows are centred, so that float32 keeps its digits.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchjob.clustering.jit import compiled, inner

CANDIDATES = 4  # rows that are drawn for a swap, of which the best is tried
PASSES = 6  # over all rows, after a swap: most that are worth keeping show it by then
MAX_PASSES = 100
PATIENCE = 100  # swaps in a row without success that end a start
MAX_STARTS = 8
FOUND_AGAIN = 2
SAME = 1e-6  # two inertias that are relatively this close are of one optimum


class Clustering(NamedTuple):
    """P rows in K clusters, and the sums that moves keep up to date."""

    label: NDArray[np.int32]  # [P]
    sums: NDArray[Any]  # S [K, P]
    norm: NDArray[np.float64]  # q [K]
    size: NDArray[np.int64]  # n [K]


class Near(NamedTuple):
    """For every row [P] its nearest and second nearest mean: numbers and squared distances less G[p, p]."""

    first: NDArray[np.int32]
    second: NDArray[np.int32]
    to_first: NDArray[Any]
    to_second: NDArray[Any]


@inner
def _uniform(state: NDArray[np.uint64]) -> float:
    """The next number in [0, 1) of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    word = state[0]
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word = word ^ (word >> np.uint64(31))
    return float(word >> np.uint64(11)) * 2.0**-53


@inner
def _seed(state: NDArray[np.uint64], seed: int, start: int) -> None:
    """A stream of its own for every start: the first starts are the same ones, however many follow."""
    state[0] = np.uint64(seed) + np.uint64(start) * np.uint64(0xD1342543DE82EF95)
    _uniform(state)
    state[0] ^= np.uint64(_uniform(state) * 2.0**53)


@inner
def _draw(running: NDArray[np.float64], state: NDArray[np.uint64]) -> int:
    """An index, drawn in proportion to the weights whose running sums are given."""
    low, high = 0, len(running) - 1
    target = _uniform(state) * running[high]
    while low < high:
        middle = (low + high) // 2
        if running[middle] > target:
            high = middle
        else:
            low = middle + 1
    return low


@inner
def _start(gram: NDArray[Any], square: NDArray[Any], c: Clustering, state: NDArray[np.uint64], noise: float) -> bool:
    """Labels by greedy k-means++ (Arthur and Vassilvitskii, SODA 2007, with scikit-learn's number of candidates).

    True where it ran out of rows: each is, to `noise`, equal to a centre already drawn.
    """
    count, k = len(square), len(c.size)
    trials = 2 + int(math.log(k))
    closest, best, nearer = np.empty_like(square), np.empty_like(square), np.empty_like(square)
    running = np.empty(count, np.float64)
    centre = int(_uniform(state) * count)
    row = gram[centre]
    for p in range(count):
        closest[p] = max(square[p] + square[centre] - 2 * row[p], 0)
        c.label[p] = 0
    for cluster in range(1, k):
        total = 0.0
        most = closest[0] * 0
        for p in range(count):
            total += closest[p]
            running[p] = total
            most = max(most, closest[p])
        if most <= noise:
            return True
        least = np.inf
        for _ in range(trials):
            drawn = _draw(running, state)
            row, own = gram[drawn], square[drawn]
            cost = closest[0] * 0
            for p in range(count):
                nearer[p] = min(max(square[p] + own - 2 * row[p], 0), closest[p])
                cost += nearer[p]
            if cost < least:
                least = cost
                best, nearer = nearer, best
        for p in range(count):
            c.label[p] = cluster if best[p] < closest[p] else c.label[p]
            closest[p] = best[p]
    return False


@inner
def _build(gram: NDArray[Any], c: Clustering) -> None:
    """Makes the sums fit the labels."""
    for cluster in range(len(c.size)):
        c.size[cluster], c.norm[cluster] = 0, 0.0
        sums = c.sums[cluster]
        for p in range(len(sums)):
            sums[p] = 0
    for i in range(len(c.label)):
        cluster = c.label[i]
        c.size[cluster] += 1
        sums, row = c.sums[cluster], gram[i]
        for p in range(len(row)):
            sums[p] += row[p]
    for i in range(len(c.label)):
        c.norm[c.label[i]] += c.sums[c.label[i], i]


@inner
def _move(gram: NDArray[Any], c: Clustering, i: int, to: int) -> None:
    """Row i goes to cluster `to`."""
    old = c.label[i]
    c.norm[old] += gram[i, i] - 2 * c.sums[old, i]
    c.norm[to] += gram[i, i] + 2 * c.sums[to, i]
    left, joined, row = c.sums[old], c.sums[to], gram[i]
    for p in range(len(row)):
        left[p] -= row[p]
        joined[p] += row[p]
    c.size[old] -= 1
    c.size[to] += 1
    c.label[i] = to


@inner
def _inertia(total: float, c: Clustering) -> float:
    """The sum of squared distances to the own mean."""
    within = 0.0
    for cluster in range(len(c.size)):
        if c.size[cluster] > 0:
            within += c.norm[cluster] / c.size[cluster]
    return total - within


@inner
def _gains(square: NDArray[Any], c: Clustering, least: NDArray[Any], leaving: NDArray[Any]) -> None:
    """What each row [P] would add to the cheapest other cluster, and what its own cluster would lose with it.

    Taking a row at squared distance d out of a cluster of n rows lowers its inertia by d n / (n − 1); joining one of
    n rows raises it by d n / (n + 1) (Hartigan 1975; Telgarsky and Vattani, AISTATS 2010).
    """
    for p in range(len(square)):
        least[p] = np.inf
    for cluster in range(len(c.size)):
        n = c.size[cluster]
        sums = c.sums[cluster]
        join = square.dtype.type(n / (n + 1.0))
        twice = square.dtype.type(2.0 / (n + 1.0))
        fixed = square.dtype.type(c.norm[cluster] / max(n * (n + 1.0), 1.0))
        leave = square.dtype.type(n / (n - 1.0) if n > 1 else 0.0)
        leave_twice = square.dtype.type(2.0 / (n - 1.0) if n > 1 else 0.0)
        leave_fixed = square.dtype.type(c.norm[cluster] / (n * (n - 1.0)) if n > 1 else 0.0)
        for p in range(len(square)):
            own = c.label[p] == cluster
            joining = join * square[p] + fixed - twice * sums[p]
            going = leave * square[p] + leave_fixed - leave_twice * sums[p]
            leaving[p] = going if own else leaving[p]
            better = (not own) & (joining < least[p])
            least[p] = joining if better else least[p]


@inner
def _settle(gram: NDArray[Any], square: NDArray[Any], c: Clustering, noise: float, passes: int) -> bool:
    """Moves single rows while that lowers the inertia by more than `noise`; True once no row gains by it."""
    least, leaving = np.empty_like(square), np.empty_like(square)
    k = len(c.size)
    for _ in range(passes):
        _gains(square, c, least, leaving)
        moved = False
        for i in range(len(square)):
            if leaving[i] - least[i] <= noise:
                continue
            old = c.label[i]
            n = c.size[old]
            if n < 2:
                continue
            target, cheapest = -1, (square[i] - 2 * c.sums[old, i] / n + c.norm[old] / n**2) * n / (n - 1) - noise
            for cluster in range(k):
                n = c.size[cluster]
                if cluster == old:
                    continue
                price = (
                    0.0 if n == 0 else (square[i] - 2 * c.sums[cluster, i] / n + c.norm[cluster] / n**2) * n / (n + 1)
                )
                if price < cheapest:
                    target, cheapest = cluster, price
            if target >= 0:
                _move(gram, c, i, target)
                moved = True
        if not moved:
            return True
    return False


@inner
def _look(square: NDArray[Any], c: Clustering, near: Near, running: NDArray[np.float64]) -> None:
    """The nearest two means of every row, and the running sums of distances to the nearest."""
    for p in range(len(square)):
        near.to_first[p] = np.inf
        near.to_second[p] = np.inf
    for cluster in range(len(c.size)):
        if c.size[cluster] == 0:
            continue
        fixed = square.dtype.type(c.norm[cluster] / c.size[cluster] ** 2)
        twice = square.dtype.type(2.0 / c.size[cluster])
        sums = c.sums[cluster]
        for p in range(len(square)):
            away = square[p] + fixed - twice * sums[p]
            is_first, is_second = away < near.to_first[p], away < near.to_second[p]
            near.to_second[p] = near.to_first[p] if is_first else (away if is_second else near.to_second[p])
            near.second[p] = near.first[p] if is_first else (cluster if is_second else near.second[p])
            near.to_first[p] = away if is_first else near.to_first[p]
            near.first[p] = cluster if is_first else near.first[p]
    total = 0.0
    for p in range(len(square)):
        near.to_first[p] = max(near.to_first[p], 0)
        near.to_second[p] = max(near.to_second[p], 0)
        total += near.to_first[p]
        running[p] = total


@inner
def _exchange(
    gram: NDArray[Any],
    square: NDArray[Any],
    near: Near,
    running: NDArray[np.float64],
    state: NDArray[np.uint64],
    k: int,
) -> tuple[int, int]:
    """(row, cluster): the best of a few drawn rows to be a centre, and the cluster whose mean it replaces best."""
    loss = np.empty(k, np.float64)
    least, row, replaced = np.inf, 0, 0
    for _ in range(CANDIDATES):
        drawn = _draw(running, state)
        products, own = gram[drawn], square[drawn]
        for cluster in range(k):
            loss[cluster] = 0.0
        kept = 0.0
        for p in range(len(square)):
            away = max(square[p] + own - 2 * products[p], 0)
            nearest = min(away, near.to_first[p])
            kept += nearest
            loss[near.first[p]] += min(away, near.to_second[p]) - nearest
        for cluster in range(k):
            if kept + loss[cluster] < least:
                least, row, replaced = kept + loss[cluster], drawn, cluster
    return row, replaced


@inner
def _swapped(
    gram: NDArray[Any], square: NDArray[Any], near: Near, c: Clustering, trial: Clustering, swap: tuple[int, int]
) -> None:
    """Writes into `trial` the clusters of c with the mean of one of them replaced by a row."""
    row, replaced = swap
    for cluster in range(len(c.size)):
        trial.norm[cluster], trial.size[cluster] = c.norm[cluster], c.size[cluster]
        old, new = c.sums[cluster], trial.sums[cluster]
        for p in range(len(square)):
            new[p] = old[p]
    for p in range(len(square)):
        trial.label[p] = c.label[p]
    products, own = gram[row], square[row]
    for p in range(len(square)):
        away = square[p] + own - 2 * products[p]
        is_gone = near.first[p] == replaced
        label = near.second[p] if is_gone else near.first[p]
        if away < (near.to_second[p] if is_gone else near.to_first[p]):
            label = replaced
        if label != trial.label[p]:
            _move(gram, trial, p, label)


@inner
def _improve(
    gram: NDArray[Any], square: NDArray[Any], c: Clustering, trial: Clustering, state: NDArray[np.uint64], noise: float
) -> None:
    """Swaps centres until `PATIENCE` swaps in a row led nowhere.

    A swap exchanges a mean for a row drawn in proportion to its squared distance (Lattanzi and Sohler, ICML 2019;
    Fränti 2018), lets single moves settle and is kept if the inertia fell.
    """
    count, k = len(square), len(c.size)
    near = Near(np.empty(count, np.int32), np.empty(count, np.int32), np.empty_like(square), np.empty_like(square))
    total = 0.0
    for p in range(count):
        total += square[p]
    running = np.empty(count, np.float64)
    least, failed = _inertia(total, c), 0
    _look(square, c, near, running)
    while failed < PATIENCE and running[count - 1] > 0:
        _swapped(gram, square, near, c, trial, _exchange(gram, square, near, running, state, k))
        _settle(gram, square, trial, noise, PASSES)
        failed += 1
        if _inertia(total, trial) < least - noise:
            for p in range(count):
                c.label[p] = trial.label[p]
            _build(gram, c)
            _settle(gram, square, c, noise, MAX_PASSES)
            least, failed = _inertia(total, c), 0
            _look(square, c, near, running)


@compiled
def search(gram: NDArray[Any], k: int, seed: int, n_init: int, labels: NDArray[np.uint8]) -> tuple[float, float, int]:
    """(inertia, that of one cluster, found) of a Gram matrix [P, P]; labels [P] are numbered by first appearance.

    n_init starts of single moves, the best of which counts; 0 stands for `auto`: starts improved by swaps, until the
    lowest inertia was found `FOUND_AGAIN` times or after `MAX_STARTS`. `found` is how many starts ended at the lowest
    inertia; −1 (and no labels) where rows are too alike to be told apart in the matrix's precision.
    """
    count = len(gram)
    square = np.empty(count, gram.dtype)
    total, most = 0.0, 0.0
    for p in range(count):
        square[p] = gram[p, p]
        total += square[p]
        most = max(most, square[p])
    noise = most * (1e-6 if gram.itemsize == 4 else 1e-13)
    c = Clustering(np.empty(count, np.int32), np.empty((k, count), gram.dtype), np.empty(k), np.empty(k, np.int64))
    trial = Clustering(np.empty(count, np.int32), np.empty((k, count), gram.dtype), np.empty(k), np.empty(k, np.int64))
    state = np.zeros(1, np.uint64)
    best = np.zeros(count, np.int32)
    least, found = np.inf, 0
    for start in range(n_init if n_init > 0 else MAX_STARTS):
        _seed(state, seed, start)
        if _start(gram, square, c, state, 10 * noise):
            return 0.0, total, -1
        _build(gram, c)
        _settle(gram, square, c, noise, MAX_PASSES)
        if n_init == 0:
            _improve(gram, square, c, trial, state, noise)
        _build(gram, c)  # the sums afresh: equal clusters have equal inertia
        inertia = _inertia(total, c)
        if abs(inertia - least) <= least * SAME:
            found += 1
        elif inertia < least:
            found = 1
        if inertia < least:
            least = inertia
            for p in range(count):
                best[p] = c.label[p]
        if n_init == 0 and found >= FOUND_AGAIN:
            break
    number = np.empty(k, np.int64)
    for cluster in range(k):
        number[cluster] = -1
    numbers = 0
    for p in range(count):
        if number[best[p]] < 0:
            number[best[p]] = numbers
            numbers += 1
        labels[p] = number[best[p]]
    return max(least, 0.0), total, found

"""Near-optimal k-means of one problem on its Gram matrix, in compiled code: single moves, and swaps of centres.

The sums S[c, p] = Σ_{i in c} G[i, p] are kept up to date. The squared distance from row p to the mean of cluster c is
then G[p, p] − 2 S[c, p] / n_c + q_c / n_c², where q_c = Σ_{p in c} S[c, p]. No centroids are needed, and moving a row
from cluster to cluster costs two sums over P numbers. Rows are centred, so that float32 keeps its digits.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchjob.clustering.draws import draw, seed_stream
from batchjob.clustering.jit import compiled, inner

CANDIDATES = 4  # rows that are drawn for a swap, of which the best is tried
PASSES = 6  # over all rows after a swap: most swaps that are worth keeping show it by then
MAX_PASSES = 100  # over all rows otherwise
PATIENCE = 60  # a start ends after so many swaps in a row without success
FOUND_AGAIN = 3  # the search ends when so many starts found the lowest inertia
SAME = 1e-6  # inertias with a smaller relative difference belong to one optimum


class Problem(NamedTuple):
    """One problem of P rows, by the products of its rows."""

    gram: NDArray[Any]  # G [P, P]
    square: NDArray[Any]  # [P]: the diagonal of G
    total: float  # the sum of the diagonal: the inertia of a single cluster
    noise: float  # gains of inertia below this are rounding


class Clustering(NamedTuple):
    """P rows in K clusters, with the sums that every move keeps up to date."""

    label: NDArray[np.int32]  # [P]
    sums: NDArray[Any]  # S [K, P]
    norm: NDArray[np.float64]  # q [K]
    size: NDArray[np.int64]  # n [K]


class Near(NamedTuple):
    """The nearest and the second nearest mean of every row, [P] each."""

    first: NDArray[np.int32]  # number of the nearest cluster
    second: NDArray[np.int32]
    to_first: NDArray[Any]  # squared distance to its mean, at least 0
    to_second: NDArray[Any]
    running: NDArray[np.float64]  # running sums of to_first


@inner
def _build(problem: Problem, c: Clustering) -> None:
    """Computes the sums afresh from the labels."""
    for cluster in range(len(c.size)):
        c.size[cluster], c.norm[cluster] = 0, 0.0
        sums = c.sums[cluster]
        for p in range(len(sums)):
            sums[p] = 0
    for i in range(len(c.label)):
        cluster = c.label[i]
        c.size[cluster] += 1
        sums, row = c.sums[cluster], problem.gram[i]
        for p in range(len(row)):
            sums[p] += row[p]
    for i in range(len(c.label)):
        c.norm[c.label[i]] += c.sums[c.label[i], i]


@inner
def _move(problem: Problem, c: Clustering, i: int, to: int) -> None:
    """Moves row i to cluster `to`."""
    gram, old = problem.gram, c.label[i]
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
def _inertia(problem: Problem, c: Clustering) -> float:
    """Adds up the squared distances of all rows to their own means."""
    within = 0.0
    for cluster in range(len(c.size)):
        if c.size[cluster] > 0:
            within += c.norm[cluster] / c.size[cluster]
    return problem.total - within


@inner
def _gains(problem: Problem, c: Clustering, least: NDArray[Any], leaving: NDArray[Any]) -> None:
    """Writes what each row [P] would add to the cheapest other cluster, and what its own cluster would lose with it.

    Taking a row at squared distance d out of a cluster of n rows lowers its inertia by d n / (n − 1); joining one of
    n rows raises it by d n / (n + 1) (Hartigan 1975; Telgarsky and Vattani, AISTATS 2010).
    """
    square = problem.square
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
def _settle(problem: Problem, c: Clustering, passes: int) -> bool:
    """Moves single rows while that lowers the inertia by more than `noise`; True once no row gains by it."""
    square = problem.square
    least, leaving = np.empty_like(square), np.empty_like(square)
    k = len(c.size)
    for _ in range(passes):
        _gains(problem, c, least, leaving)
        moved = False
        for i in range(len(square)):
            if leaving[i] - least[i] <= problem.noise:
                continue
            old = c.label[i]
            n = c.size[old]
            if n < 2:
                continue
            target, cheapest = (
                -1,
                (square[i] - 2 * c.sums[old, i] / n + c.norm[old] / n**2) * n / (n - 1) - problem.noise,
            )
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
                _move(problem, c, i, target)
                moved = True
        if not moved:
            return True
    return False


@inner
def _look(problem: Problem, c: Clustering, near: Near) -> None:
    """Writes into `near` the two nearest means of every row, and the running sums of distances to the nearest."""
    square = problem.square
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
        near.running[p] = total


@inner
def _exchange(problem: Problem, near: Near, state: NDArray[np.uint64], k: int) -> tuple[int, int]:
    """(row, cluster): the best of a few drawn rows as a centre, and the cluster whose mean it should replace."""
    gram, square = problem.gram, problem.square
    loss = np.empty(k, np.float64)
    least, row, replaced = np.inf, 0, 0
    for _ in range(CANDIDATES):
        drawn = draw(near.running, state)
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
def _swapped(problem: Problem, near: Near, c: Clustering, trial: Clustering, swap: tuple[int, int]) -> None:
    """Writes into `trial` the clusters of c after the mean of one was replaced by a row; `swap` is (row, cluster)."""
    gram, square = problem.gram, problem.square
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
            _move(problem, trial, p, label)


@inner
def _improve(problem: Problem, c: Clustering, trial: Clustering, state: NDArray[np.uint64]) -> None:
    """Swaps centres in `c` until `PATIENCE` swaps in a row have not lowered the inertia.

    A swap replaces a mean by a row that is drawn in proportion to its squared distance (Lattanzi and Sohler, ICML 2019;
    Fränti 2018), and moves single rows until none gains by it. It is kept if the inertia fell.
    """
    count, k = len(problem.square), len(c.size)
    first, second, running = np.empty(count, np.int32), np.empty(count, np.int32), np.empty(count, np.float64)
    near = Near(first, second, np.empty_like(problem.square), np.empty_like(problem.square), running)
    _build(problem, c)
    least, failed = _inertia(problem, c), 0
    _look(problem, c, near)
    while failed < PATIENCE and running[count - 1] > 0:
        _swapped(problem, near, c, trial, _exchange(problem, near, state, k))
        _settle(problem, trial, PASSES)
        failed += 1
        if _inertia(problem, trial) < least - problem.noise:
            for p in range(count):
                c.label[p] = trial.label[p]
            _build(problem, c)
            _settle(problem, c, MAX_PASSES)
            # The sums are computed afresh: those that moves kept up to date may make an equally good partition look
            # better, and on a grid, which has many equally good ones, the search would never end.
            _build(problem, c)
            inertia = _inertia(problem, c)
            if inertia < least - problem.noise:
                least, failed = inertia, 0
            _look(problem, c, near)


@inner
def _problem(gram: NDArray[Any]) -> Problem:
    square = np.empty(len(gram), gram.dtype)
    total, most = 0.0, 0.0
    for p in range(len(gram)):
        square[p] = gram[p, p]
        total += square[p]
        most = max(most, square[p])
    return Problem(gram, square, total, most * (1e-6 if gram.itemsize == 4 else 1e-14))


@inner
def _blank(problem: Problem, k: int) -> Clustering:
    count = len(problem.square)
    sums = np.empty((k, count), problem.gram.dtype)
    return Clustering(np.empty(count, np.int32), sums, np.empty(k, np.float64), np.empty(k, np.int64))


@inner
def _number(found: NDArray[np.int32], labels: NDArray[np.uint8], k: int) -> None:
    number, numbers = np.empty(k, np.int64), 0
    for cluster in range(k):
        number[cluster] = -1
    for p in range(len(found)):
        if number[found[p]] < 0:
            number[found[p]] = numbers
            numbers += 1
        labels[p] = number[found[p]]


@compiled
def search(
    gram: NDArray[Any], k: int, seed: int, starts: NDArray[np.int32], swaps: bool, labels: NDArray[np.uint8]
) -> tuple[float, float, int]:
    """Searches for the clusters of the lowest inertia of one problem, from several starts.

    Parameters
    ----------
    gram
        float [P, P] of the centred rows.
    k
        K, at most 254.
    seed
        Of the draws of swaps.
    starts
        int32 [R, P]: labels from 0 to K − 1 of each start.
    swaps
        Whether centres are swapped, besides moving single rows. The search then ends early, once `FOUND_AGAIN` starts
        have found the lowest inertia.
    labels
        uint8 [P], written: the best clusters, numbered by first appearance.

    Returns
    -------
    (inertia, inertia of a single cluster, number of starts that ended at the lowest inertia).
    """
    count = len(gram)
    problem = _problem(gram)
    c, trial = _blank(problem, k), _blank(problem, k)
    state, best = np.zeros(1, np.uint64), np.zeros(count, np.int32)
    least, found = np.inf, 0
    for start in range(len(starts)):
        for p in range(count):
            c.label[p] = starts[start, p]
        _build(problem, c)
        _settle(problem, c, MAX_PASSES)
        if swaps:
            seed_stream(state, seed, -1 - start)
            _improve(problem, c, trial, state)
        _build(problem, c)  # computed afresh, equal clusters have equal inertia
        inertia = _inertia(problem, c)
        found = found + 1 if abs(inertia - least) <= least * SAME else (1 if inertia < least else found)
        if inertia < least:
            least = inertia
            for p in range(count):
                best[p] = c.label[p]
        if swaps and found >= FOUND_AGAIN:
            break
    _number(best, labels, k)
    return max(least, 0.0), problem.total, found

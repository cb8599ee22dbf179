"""Near-optimal k-means of many small problems on a CPU, from NumPy arrays and without torch.

Every problem is one sequential program on its own Gram matrix: its answer is the same bits in any batch, beside any
other k, and for any number of threads.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchjob.codes import NO_LABEL
from batchjob.config import MAX_K
from batchjob.errors import counted

AUTO = 0  # as n_init: search until two further starts find the lowest inertia, too
MAX_STARTS = 12  # of `AUTO`
CHUNK = 8  # problems that a thread takes at a time
CANCELLED = 1e-3  # an inertia below this share of the total has lost its digits in float32
# In float32, a gain below 1e-6 of the longest row's square counts as noise (`moves`). Where that row is far from all
# others, such gains add up: with an inertia below this share of its square, the search ended 0.1 % and more too high.
FAR = 0.1


class NotFiniteError(ValueError):
    """Problems hold NaN or infinity, so that they have no distances. `problems` are their indices."""

    def __init__(self, problems: Sequence[int]) -> None:
        self.problems = tuple(problems)
        shown = ", ".join(map(str, self.problems[:10])) + (", …" if len(self.problems) > 10 else "")
        hold = "holds" if len(self.problems) == 1 else "hold"
        super().__init__(f"{counted(len(self.problems), 'clustering problem')} {hold} NaN or infinity: {shown}")


@dataclass(frozen=True, slots=True)
class Partitions:
    """The clusters of N problems of P rows.

    `labels` uint8 [N, P] are numbered by first appearance, so that equal partitions are equal arrays; they are 255
    outside the mask. `inertia` float64 [N] is the sum of squared distances to the own mean, in the squared unit of the
    rows. `settled` bool [N] is True where at least two independent starts found the lowest inertia, and where a problem
    has at most k distinct rows.
    """

    labels: NDArray[np.uint8]
    inertia: NDArray[np.float64]
    settled: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Partition:
    """The clusters of one problem, as in `Partitions`: `labels` uint8 [P], `inertia` and `settled`."""

    labels: NDArray[np.uint8]
    inertia: float
    settled: bool


def best_partition(
    rows: ArrayLike, k: int, *, seed: int = 0, n_init: int = AUTO, mask: NDArray[np.bool_] | None = None
) -> Partition:
    """Clusters the rows of one problem by near-optimal k-means.

    Parameters
    ----------
    rows
        [P, D] real numbers in any unit. All but float64 are taken as float32.
    k
        At least 1. With fewer distinct rows there are fewer clusters. A k above 254 is refused where there are more
        than 254 rows, since labels are bytes.
    seed
        Equal seeds and rows give equal bits.
    n_init
        `AUTO` searches until two further independent starts find the lowest inertia, too. Else the number of k-means++
        starts, each improved by moving single rows.
    mask
        bool [P]: rows where it is False take no part and get the label 255. None: all take part.

    Returns
    -------
    The labels, the inertia, and whether the search settled.

    Raises
    ------
    NotFiniteError
        Rows inside the mask hold NaN or infinity.
    ValueError
        The shape of the mask does not fit, or k is out of range.

    Examples
    --------
    >>> y, x = np.divmod(np.arange(36), 6)
    >>> found = best_partition(np.stack([y, x], axis=1), 4)
    >>> found.labels.reshape(6, 6)[[0, -1]].tolist()
    [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]]
    >>> found.inertia, found.settled
    (48.0, True)
    """
    rows = np.asarray(rows)
    mask = None if mask is None else mask[None]
    found = best_partitions(rows[None], np.array([k]), np.array([seed]), n_init=n_init, mask=mask)
    return Partition(found.labels[0], float(found.inertia[0]), bool(found.settled[0]))


def best_partitions(
    rows: NDArray[Any],
    k: NDArray[np.int64],
    seeds: NDArray[np.int64],
    *,
    n_init: int = AUTO,
    mask: NDArray[np.bool_] | None = None,
    threads: int = 1,
) -> Partitions:
    """Clusters N problems by near-optimal k-means.

    Parameters
    ----------
    rows
        [N, P, D] real numbers in any unit. All but float64 are taken as float32.
    k, seeds
        int64 [N]: each problem has its own.
    n_init
        As in `best_partition`.
    mask
        bool [N, P]; as in `best_partition`.
    threads
        How many problems are worked on at a time; the labels do not depend on it. Each thread holds the Gram matrix of
        one problem and about 4 K P numbers.

    Returns
    -------
    The clusters of all problems.

    Raises
    ------
    NotFiniteError, ValueError
        As `best_partition`.
    """
    check_shapes(rows, k, seeds, mask)
    n, p, _ = rows.shape
    rows = np.ascontiguousarray(rows, np.float64 if rows.dtype == np.float64 else np.float32)
    result = Partitions(np.full((n, p), NO_LABEL, np.uint8), np.zeros(n), np.ones(n, np.bool_))
    bad: list[int] = []

    def solve(first: int) -> None:
        for i in range(first, min(first + CHUNK, n)):
            keep = np.arange(p) if mask is None else np.flatnonzero(mask[i])
            if len(keep) == 0:
                continue
            answer = _solve(rows[i], keep, int(k[i]), int(seeds[i]), n_init)
            if answer is None:
                bad.append(i)
                continue
            result.labels[i, keep], result.inertia[i], result.settled[i] = answer

    starts = range(0, n, CHUNK)
    if threads > 1 and len(starts) > 1:
        with ThreadPoolExecutor(min(threads, len(starts))) as pool:  # the compiled code lets go of the lock
            list(pool.map(solve, starts))
    else:
        for first in starts:
            solve(first)
    if bad:
        raise NotFiniteError(sorted(bad))
    return result


def check_shapes(x: Any, k: Any, seeds: Any, mask: Any | None) -> None:
    """Checks the shapes and k of N problems, given as NumPy arrays or as tensors.

    Parameters
    ----------
    x
        [N, P, D].
    k
        [N]. Its values are not read where it is on a GPU, which would be waited for; the kernels there take 0 for 1.
    seeds
        [N].
    mask
        [N, P] or None.

    Raises
    ------
    ValueError
        A shape does not fit, a k is below 1, or a problem could have more than 254 clusters.
    """
    n, p, _ = x.shape
    if tuple(k.shape) != (n,) or tuple(seeds.shape) != (n,) or (mask is not None and tuple(mask.shape) != (n, p)):
        found = f"k {tuple(k.shape)}, seeds {tuple(seeds.shape)}, mask {None if mask is None else tuple(mask.shape)}"
        raise ValueError(f"{n} problems of {p} rows need k [{n}], seeds [{n}], mask [{n}, {p}]; found {found}")
    if n == 0 or getattr(k, "is_cuda", False):
        return
    if int(k.min()) < 1:
        raise ValueError(f"k is at least 1; found {int(k.min())}")
    if min(int(k.max()), p) > MAX_K:  # labels are bytes
        raise ValueError(f"k is at most {MAX_K}; found {int(k.max())}, for problems of {p} rows")


def _solve(
    rows: NDArray[Any], keep: NDArray[np.int64], k: int, seed: int, n_init: int
) -> tuple[NDArray[np.uint8], float, bool] | None:
    """(labels, inertia, settled) of the rows `keep`; None where they hold NaN or infinity."""
    if rows.dtype == np.float32:
        answer = _solve_as(np.float32, rows, keep, min(k, len(keep)), seed, n_init)
        if answer is None or answer[1] >= 0:
            return answer
    if not np.isfinite(rows[keep]).all():
        return None
    different, inverse = np.unique(rows[keep] + 0.0, axis=0, return_inverse=True)
    if len(different) <= k:
        return _number(inverse.ravel()), 0.0, True
    found = _solve_as(np.float64, rows, keep, k, seed, n_init)
    return None if found is None else (found[0], _inertia(rows[keep], found[0]), found[2])


def _solve_as(
    dtype: type[np.floating[Any]], rows: NDArray[Any], keep: NDArray[np.int64], k: int, seed: int, n_init: int
) -> tuple[NDArray[np.uint8], float, bool] | None:
    """As `_solve`, with the Gram matrix in `dtype`; the inertia is −1 where the rounding of float32 leaves doubt."""
    from batchjob.clustering import centred, moves, starts  # numba takes a moment to import

    count, depth = len(keep), rows.shape[1]
    packed = np.empty(-(-count // centred.LANES) * centred.LANES * depth, dtype)
    factor = centred.centre(rows, keep, packed)
    if np.isnan(factor):
        return None
    if factor == 0:
        return np.zeros(count, np.uint8), 0.0, True
    gram = np.empty((count, count), dtype)
    centred.multiply(packed, depth, gram)
    labels = np.empty(count, np.uint8)
    drawn = np.empty((n_init or MAX_STARTS, count), np.int32)
    told_apart = starts.draw_starts(gram, k, seed, drawn)
    if dtype == np.float32 and not told_apart:
        return labels, -1.0, False
    inertia, total, found = moves.search(gram, k, seed, drawn, n_init == AUTO, labels)
    if dtype == np.float32 and inertia < max(CANCELLED * total, FAR * float(gram.diagonal().max())):
        return labels, -1.0, False
    return labels, max(inertia, 0.0) / factor**2, found > 1


def _inertia(rows: NDArray[Any], labels: NDArray[np.uint8]) -> float:
    """The sum of squared distances to the own mean, from differences: from products, a small sum would lose digits."""
    clusters = (rows[labels == cluster].astype(np.float64) for cluster in range(int(labels.max()) + 1))
    return float(sum(((own - own.mean(0)) ** 2).sum() for own in clusters))


def _number(labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Renumbers clusters by first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.uint8)

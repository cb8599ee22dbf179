"""Algorithms that scikit-learn computes one problem after the other, in worker processes where that is faster."""

import atexit
import functools
import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchjob.children import ChildPool
from batchjob.clustering.base import Clusters, check_finite, number_by_appearance
from batchjob.codes import NO_LABEL, NOISE
from batchjob.errors import counted
from batchjob.machine import usable_cores

WORTH_A_POOL = 512  # problems: fewer are done in the seconds that starting workers takes
ALGORITHMS = ("agglomerative", "hdbscan")
CHUNK = 16  # problems in a message to a worker


def solve_each(algorithm: str, x: Tensor, k: Tensor, *, mask: Tensor | None = None, processes: int = 0) -> Clusters:
    """Clusters N problems one after the other.

    Parameters
    ----------
    algorithm
        `agglomerative` (Ward), or `hdbscan`, which finds its own number of clusters and marks noise.
    x
        float [N, P, D].
    k
        int64 [N]; at most the number of distinct rows of a problem is used.
    mask
        bool [N, P], False for rows that take no part. None: all take part.
    processes
        How many worker processes share the problems, and with 1 this process alone works. 0: a process for each core
        that this one may use, or this process alone for fewer than `WORTH_A_POOL` problems.

    Returns
    -------
    The clusters, on the device of `x`.

    Raises
    ------
    NotFiniteError
        Rows inside the mask hold NaN or infinity.
    """
    check_finite(x, mask)
    n, p, _ = x.shape
    rows = x.float().cpu().numpy()
    valid = np.ones((n, p), bool) if mask is None else mask.cpu().numpy()
    jobs = [
        (algorithm, rows[at : at + CHUNK], valid[at : at + CHUNK], k[at : at + CHUNK].tolist())
        for at in range(0, n, CHUNK)
    ]
    processes = processes or (usable_cores() if n >= WORTH_A_POOL else 1)
    answers = list(_pool(processes).map(_solve_chunk, jobs)) if processes > 1 else [_solve_chunk(job) for job in jobs]
    labels = torch.from_numpy(np.concatenate([a[0] for a in answers]) if answers else np.zeros((0, p), np.uint8))
    inertia = torch.from_numpy(np.concatenate([a[1] for a in answers]) if answers else np.zeros(0, np.float32))
    numbered, found = number_by_appearance(labels.to(x.device), NOISE)
    return Clusters(numbered, inertia.to(x.device), found, torch.ones(n, dtype=torch.bool, device=x.device))


def _seconds_a_problem(algorithm: str, patches: int) -> float:
    """Measures how many seconds one problem of so many patches takes on one core, on random rows."""
    rows = np.random.default_rng(0).random((1, patches, patches), dtype=np.float32)
    job = (algorithm, rows, np.ones((1, patches), bool), [5])
    _solve_chunk((algorithm, rows[:, :8, :8], np.ones((1, 8), bool), [2]))  # imports
    start = time.perf_counter()
    _solve_chunk(job)
    return time.perf_counter() - start


def forecast(algorithm: str, problems: int, patches: int) -> str:
    """Says how long problems will take on this machine; for that it solves one now.

    Parameters
    ----------
    algorithm
        As in `solve_each`.
    problems
        How many there are.
    patches
        P, the number of rows of each.

    Returns
    -------
    A sentence.
    """
    one, processes = _seconds_a_problem(algorithm, patches), usable_cores()
    total = one * problems / processes
    unit, seconds = ("hours", 3600) if total >= 5400 else ("minutes", 60) if total >= 90 else ("seconds", 1)
    return (
        f"{algorithm} solves one problem after the other, {1e3 * one:.0f} ms each on a CPU: "
        f"{counted(problems, 'problem')} on {counted(processes, 'CPU')} take{'s' * (problems == 1)} about "
        f"{total / seconds:.1f} {unit}"
    )


@functools.lru_cache(maxsize=1)
def _pool(processes: int) -> ChildPool:
    pool = ChildPool(processes, start=_start_worker)
    atexit.register(pool.shutdown, cancel_futures=True)
    return pool


def _start_worker() -> None:
    torch.set_num_threads(1)


def _solve_chunk(
    job: tuple[str, NDArray[np.float32], NDArray[np.bool_], list[int]],
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    algorithm, rows, valid, wanted = job
    labels = np.full(rows.shape[:2], NO_LABEL, np.uint8)
    inertia = np.zeros(len(rows), np.float32)
    solve = {"agglomerative": _ward, "hdbscan": _hdbscan}[algorithm]
    for i, k in enumerate(wanted):
        x = rows[i, valid[i]].astype(np.float64)
        if len(x):
            labels[i, valid[i]] = found = solve(x, k)
            inertia[i] = _inertia(x, found)
    return labels, inertia


def _ward(x: NDArray[np.float64], k: int) -> NDArray[np.uint8]:
    from sklearn.cluster import AgglomerativeClustering

    k = min(k, len(np.unique(x, axis=0)))
    if k == 1:
        return np.zeros(len(x), np.uint8)
    return np.asarray(AgglomerativeClustering(k, linkage="ward").fit(x).labels_, np.uint8)


def _hdbscan(x: NDArray[np.float64], k: int) -> NDArray[np.uint8]:
    """Labels of HDBSCAN (Campello, Moulavi and Sander, PAKDD 2013) with scikit-learn's defaults; `NOISE` for noise.

    Labels are bytes, so clusters beyond the 254 largest count as noise.
    """
    from sklearn.cluster import HDBSCAN

    del k  # it finds its own number
    if len(x) < 5:  # scikit-learn's smallest cluster
        return np.full(len(x), NOISE, np.uint8)
    found = HDBSCAN(copy=True).fit(x / (np.abs(x).max() or 1.0)).labels_
    labels = np.full(len(x), NOISE, np.uint8)
    sizes = np.bincount(found + 1)[1:]  # without the noise, -1
    for number, cluster in enumerate(np.argsort(-sizes, kind="stable")[:NOISE]):
        labels[found == cluster] = number
    return labels


def _inertia(x: NDArray[np.float64], labels: NDArray[np.uint8]) -> float:
    clusters = [x[labels == c] for c in np.unique(labels) if c != NOISE]
    return float(sum(((rows - rows.mean(0)) ** 2).sum() for rows in clusters))

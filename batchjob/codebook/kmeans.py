"""One large k-means over the rows of all images: a start from a sample, then Lloyd's iteration over all rows.

Each of several processes holds its own rows. Sums are reduced over all processes, so that the centroids are the same,
but for rounding, however the rows are spread. The start is computed from the same gathered rows in the same order in
every process. Letters: n rows of this process, K centroids, D numbers of each.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from batchjob.codebook.nearest import assign, chunks, cluster_sums, count_labels, greedy_starts
from batchjob.codebook.processes import ALONE, Group
from batchjob.codebook.rows import hash_numbers
from batchjob.config import raise_for_fit_engine
from batchjob.errors import UserError, counted

MAX_ITERATIONS = 300
TOLERANCE = 1e-4  # as in scikit-learn: largest summed squared shift of a finished fit, in mean variances
START_ROWS, START_ROWS_A_CLUSTER = 16384, 256
CHECK_ROWS = 4096  # rows of each process on which cuml is compared with torch before a run relies on it


@dataclass(frozen=True, slots=True)
class Problem:
    """One k-means, as one of the processes that fit together sees it."""

    x: Tensor  # float32 [n, D]: this process's rows
    numbers: Tensor  # int64 [n]: their numbers in the dataset
    k: int
    seed: int
    n_init: int
    group: Group = ALONE
    tolerance: float = 0.0  # summed squared shift up to which centroids count as standing still; `fit` sets it


@dataclass(frozen=True, slots=True)
class State:
    """The state of a fit after a number of full iterations: all that is needed to go on from there."""

    centroids: Tensor  # [K, D] float32
    iterations: int
    done: bool = False  # the centroids stand still
    on_host: Tensor | None = None  # `centroids` on the CPU, where they have been copied there


@dataclass(frozen=True, slots=True)
class Fit:
    """A finished fit, over the rows of all processes."""

    centroids: Tensor  # [K, D] float32
    counts: Tensor  # int64 [K]: rows of each cluster
    inertia: float  # sum of squared distances, accumulated in float64
    rows: int
    iterations: int


class Refiner(Protocol):
    """Moves centroids towards the fixed point of Lloyd's iteration. A fit can be interrupted between two calls."""

    name: str

    def advance(self, problem: Problem, centroids: Tensor) -> tuple[Tensor, int]:
        """Moves the centroids by one or more of Lloyd's iterations.

        Parameters
        ----------
        problem
            The k-means, with `tolerance` set.
        centroids
            float32 [K, D], on the device of `problem.x`.

        Returns
        -------
        (centroids float32 [K, D], number of iterations done), the same in every process.
        """
        ...


def fit(problem: Problem, refiner: Refiner, *, start: State | None, keep: Callable[[State], None]) -> Fit:
    """Fits the centroids of all rows of all processes.

    Parameters
    ----------
    problem
        This process's part of the k-means. `problem.tolerance` is set here.
    refiner
        Who computes the iterations.
    start
        The state from which an interrupted fit goes on. None: it begins with a start of its own.
    keep
        Gets the state after every call of the refiner.

    Returns
    -------
    The centroids, with the counts and the inertia of all rows.

    Raises
    ------
    UserError
        All processes together have fewer than k rows.

    Notes
    -----
    `n_init` starts are carried to their fixed points on a uniform sample of the rows, and the best of them goes on with
    all rows (Bradley and Fayyad 1998), so that restarts cost little. As in scikit-learn, a fit ends when the summed
    squared shift of the centroids is at most `TOLERANCE` times the mean variance, or after `MAX_ITERATIONS`.
    """
    k = problem.k
    rows, variance = _size_and_variance(problem)
    if rows < k:
        raise UserError(
            f"{counted(k, 'cluster')} of {counted(rows, 'row')} were asked for; "
            f"give --k {max(rows, 1)} or less, or more images"
        )
    problem = replace(problem, tolerance=TOLERANCE * variance)
    state = _descend(problem, refiner, start or State(_first_centroids(problem, rows), 0), keep)
    counts, inertia = _measure(problem, state.centroids)
    return Fit(state.centroids, counts, inertia, rows, state.iterations)


def _descend(problem: Problem, refiner: Refiner, state: State, keep: Callable[[State], None]) -> State:
    before = state.centroids.cpu()
    while not state.done and state.iterations < MAX_ITERATIONS:
        centroids, steps = refiner.advance(problem, state.centroids)
        now = centroids.cpu()  # the only wait here: `keep` needs it too
        shift = float((now.double() - before.double()).square().sum())
        state = State(centroids, state.iterations + steps, done=shift <= problem.tolerance, on_host=now)
        before = now
        keep(state)
    return state


def _size_and_variance(problem: Problem) -> tuple[int, float]:
    """(number of rows of all processes, mean over features of their variance), by two passes in float64."""
    x, group = problem.x, problem.group
    n = int(sum(group.all(float(len(x)))))
    if n == 0:
        return 0, 0.0
    zero = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    mean = group.sum(sum((part.double().sum(0) for part in chunks(x)), zero.clone())) / n
    square = group.sum(sum(((part.double() - mean).square().sum(0) for part in chunks(x)), zero.clone()))
    return n, float(square.mean()) / n


def _measure(problem: Problem, centroids: Tensor) -> tuple[Tensor, float]:
    """(counts int64 [K], inertia) over the rows of all processes."""
    k, x = problem.k, problem.x
    total = torch.zeros(k + 1, dtype=torch.float64, device=x.device)
    for part in chunks(x):
        labels, squares = assign(part, centroids)
        total[:k] += count_labels(labels, k)
        total[k] += squares.sum(dtype=torch.float64)
    problem.group.sum(total)
    return total[:k].long(), float(total[k])


class TorchRefiner:
    """Lloyd's iteration in torch on any device, one iteration a call; sums are reduced over several processes."""

    name = "batched"

    def advance(self, problem: Problem, centroids: Tensor) -> tuple[Tensor, int]:
        """Does one iteration. A cluster without rows moves to the row farthest from its centroid, as in scikit-learn.

        Parameters
        ----------
        problem, centroids
            As in `Refiner.advance`.

        Returns
        -------
        (centroids float32 [K, D], 1).
        """
        sums, counts = cluster_sums(problem.x, centroids)
        packed = problem.group.sum(torch.cat([sums, counts[:, None]], 1))
        sums, counts = packed[:, :-1], packed[:, -1]
        on_host = counts.tolist()  # the only wait of an iteration without empty clusters
        if not all(on_host):
            sums, counts = _relocate(problem, centroids, sums, on_host)
        moved = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids.double())
        return moved.float(), 1


def _relocate(problem: Problem, centroids: Tensor, sums: Tensor, counts: list[float]) -> tuple[Tensor, Tensor]:
    """Gives each empty cluster one of the farthest rows, which leaves its own cluster; returns the sums and counts."""
    empty = [cluster for cluster, count in enumerate(counts) if count == 0]
    parts = [assign(part, centroids) for part in chunks(problem.x)] or [assign(problem.x, centroids)]
    labels, squares = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    best = squares.topk(min(len(empty), len(squares))).indices
    columns = (squares[best, None], labels[best, None], problem.numbers[best, None], problem.x[best])
    gathered = problem.group.gather(torch.cat([column.double() for column in columns], 1))
    squares_of, donors, numbers = gathered[:, :3].cpu().numpy().T
    order = np.lexsort((numbers, -squares_of))
    for cluster, place in zip(empty, order.tolist(), strict=False):
        donor = int(donors[place])
        if squares_of[place] == 0 or counts[donor] <= 1:
            continue  # there are fewer distinct rows than clusters: the cluster stays empty, and its count says so
        sums[donor] -= gathered[place, 3:]
        counts[donor] -= 1
        sums[cluster], counts[cluster] = gathered[place, 3:], 1
    return sums, torch.tensor(counts, dtype=torch.float64, device=sums.device)


class SklearnRefiner:
    """Lloyd's iteration by scikit-learn (without Elkan's bounds), ten iterations a call, in one process."""

    name = "sklearn"
    steps = 10

    def advance(self, problem: Problem, centroids: Tensor) -> tuple[Tensor, int]:
        """Does up to ten iterations.

        Parameters
        ----------
        problem, centroids
            As in `Refiner.advance`.

        Returns
        -------
        (centroids float32 [K, D], number of iterations done).
        """
        import warnings

        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        model = KMeans(problem.k, init=centroids.cpu().numpy(), n_init=1, max_iter=self.steps, algorithm="lloyd")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters: counted by `fit`
            model.fit(problem.x.cpu().numpy())
        return torch.from_numpy(model.cluster_centers_).to(problem.x), int(model.n_iter_)


class CumlRefiner:
    """Lloyd's iteration by cuML on a GPU, ten iterations a call; several processes work together over NCCL."""

    name = "cuml"

    def __init__(self, device: torch.device, group: Group) -> None:
        from batchjob.clustering import rapids

        self._cuml = rapids.CumlLloyd(device, rank=group.rank, world=group.world)

    def advance(self, problem: Problem, centroids: Tensor) -> tuple[Tensor, int]:
        """Does up to ten iterations.

        Parameters
        ----------
        problem, centroids
            As in `Refiner.advance`.

        Returns
        -------
        (centroids float32 [K, D], number of iterations done).
        """
        tolerance = float(problem.tolerance)
        return self._cuml.advance(problem.x, centroids, k=problem.k, seed=problem.seed, tolerance=tolerance)


def _first_centroids(problem: Problem, total: int) -> Tensor:
    """float32 [K, D]: the best of `n_init` k-means on a uniform sample of the rows; the same bits in every process.

    The sample has about `START_ROWS` rows, or `START_ROWS_A_CLUSTER` · k if that is more, of `total` in all processes.
    They are the rows whose numbers have small hashes, gathered and sorted by number.
    """
    wanted = max(START_ROWS, START_ROWS_A_CLUSTER * problem.k)
    bound = np.uint64(min(2**64 - 1, int(wanted / total * 2**64)))
    hashes = hash_numbers(problem.numbers.cpu().numpy(), problem.seed + 1)
    mine = torch.from_numpy(np.flatnonzero(hashes <= bound)).to(problem.x.device)
    rows = problem.group.gather(problem.x[mine])
    order = torch.argsort(problem.group.gather(problem.numbers[mine]))
    rows = rows[order]
    alone = Problem(rows, problem.numbers.new_zeros(len(rows)), problem.k, problem.seed, 1)
    alone = replace(alone, tolerance=TOLERANCE * _size_and_variance(alone)[1])
    found: list[tuple[float, Tensor]] = []
    generator = torch.Generator().manual_seed(problem.seed & (2**63 - 1))
    for _ in range(problem.n_init):
        centroids = greedy_starts(rows, problem.k, generator)
        state = _descend(alone, TorchRefiner(), State(centroids, 0), lambda _: None)
        found.append((_measure(alone, state.centroids)[1], state.centroids))
    # a GPU's running sums are not the same bits every time (pytorch/pytorch#75240)
    return problem.group.from_first(min(found, key=lambda pair: pair[0])[1])


def open_refiner(name: str, device: torch.device, group: Group) -> tuple[Refiner, str]:
    """Opens the engine of a large k-means, and says why it is the one.

    Parameters
    ----------
    name
        `batched` (torch), `cuml`, `sklearn`, or `auto`: cuml on a GPU where every process has it and it agrees with
        torch on a few thousand rows, else torch.
    device
        Where the rows are.
    group
        The processes that fit together.

    Returns
    -------
    (engine, reason).

    Raises
    ------
    UserError
        The name is unknown, or the engine can't run here.
    """
    raise_for_fit_engine(name)
    if name == "batched":
        return TorchRefiner(), "asked for"
    if name == "auto":
        return _choose_refiner(device, group)
    if name == "sklearn":
        if group.world > 1:
            raise UserError(f"--engine sklearn fits in one process, found {group.world}; use --engine batched")
        return SklearnRefiner(), "asked for"
    return CumlRefiner(device, group), "asked for"


def _choose_refiner(device: torch.device, group: Group) -> tuple[Refiner, str]:
    """(engine, reason): cuml on a GPU where every process has it and it moves centroids as torch does, else torch."""
    plain = TorchRefiner()
    if device.type != "cuda":
        return plain, "torch on any device, equal centroids for any number of processes"
    if group.largest(float(importlib.util.find_spec("cuml") is None)):
        return plain, "in torch, since cuml is not installed (make env GPU=1)"
    refiner, refusal = _try_cuml(device, group)
    if group.largest(float(bool(refusal))) or refiner is None:
        return plain, f"in torch, since cuml {refusal or 'fails in another process'}"
    return refiner, f"quicker on large problems; its centroids agreed with torch's on {CHECK_ROWS:,} rows"


def _try_cuml(device: torch.device, group: Group) -> tuple[Refiner | None, str]:
    """(cuml, why it can't be relied on): compares ten of its iterations with torch's, from the same start.

    The reason is the rest of a sentence, and empty where both agree.
    """
    try:
        refiner = CumlRefiner(device, group)
        generator = torch.Generator().manual_seed(group.rank)
        centres = 4 * torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
        rows = centres.repeat(CHECK_ROWS // 8, 1) + torch.randn(CHECK_ROWS, 32, generator=generator)
        numbers = torch.arange(CHECK_ROWS) + group.rank * CHECK_ROWS
        problem = Problem(rows.to(device), numbers.to(device), 8, 0, 1, group)
        start = (centres + 0.5).to(device)
        found, steps = refiner.advance(problem, start)
        expected = start
        for _ in range(steps):
            expected, _ = TorchRefiner().advance(problem, expected)
        away = float((found - expected).abs().max())
    except Exception as error:  # a library of another version, or a driver, may raise anything
        return None, f"does not work here ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
    return refiner, "" if away < 1e-2 else f"ends {away:.2g} from torch's centroids, on rows of unit spread"

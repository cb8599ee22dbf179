"""The worker processes of the statistics, and the blocks of rows that they are given."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

from batchjob.children import ChildPool
from batchjob.store.run import Run

ROWS_AT_ONCE = 512  # rows of one task: an inner chunk of the store
Item = TypeVar("Item")
Result = TypeVar("Result")


class Pool:
    """Worker processes. With one job there are none: the calling process does the work itself."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        # spawned: zarr's own threads do not survive a fork
        self._pool = ChildPool(jobs, start=_one_thread) if jobs > 1 else None

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Calls a function with each item in the worker processes.

        At most three items a process are taken from `items` ahead of the results. This bounds the memory.

        Parameters
        ----------
        work
            The function. It has to be one that pickle can send to another process.
        items
            Its arguments, one a call.

        Yields
        ------
        The results, in the order of the items.
        """
        if self._pool is None:
            yield from map(work, items)
            return
        waiting: list[Future[Result]] = []
        for item in items:
            waiting.append(self._pool.submit(work, item))
            if len(waiting) >= 3 * self.jobs:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()

    def __enter__(self) -> Self:
        # one thread here too: on k-means of a few hundred coordinates, more threads mostly wait for each other
        self._limit = _one_thread()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._limit.restore_original_limits()
        if self._pool is not None:
            self._pool.__exit__(kind, error, tb)


def choose_jobs(rows: int) -> int:
    """Returns how many processes to start for so many rows: one for each full task, at most one a usable core."""
    return max(1, min(len(os.sched_getaffinity(0)), rows // ROWS_AT_ONCE))


def blocks(run: Run) -> list[tuple[int, int]]:
    """Splits the rows of a run into tasks; returns (first row, one past the last row) of each."""
    return [(start, min(start + ROWS_AT_ONCE, run.rows)) for start in range(0, run.rows, ROWS_AT_ONCE)]


def _one_thread() -> Any:
    import threadpoolctl

    return threadpoolctl.threadpool_limits(1)  # every core has its own process

"""Worker processes for the statistics, and the blocks of rows that are their tasks."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

from batchjob.children import ChildPool
from batchjob.store.run import Run

ROWS_AT_ONCE = 512  # of one task; an inner chunk of the store
Item = TypeVar("Item")
Result = TypeVar("Result")


class Pool:
    """Worker processes; none at all for one job, everything inline."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        # spawned: zarr's own threads do not survive a fork
        self._pool = ChildPool(jobs, start=_one_thread) if jobs > 1 else None

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results of all items in order.

        Only a few items are taken from `items` ahead of the results, so that memory stays bounded.

        Parameters
        ----------
        work
            A function that can be sent to another process.
        items
            What it is called with.
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
        # here too: threads that share k-means of some hundred coordinates mostly spin until the others are done
        self._limit = _one_thread()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._limit.restore_original_limits()
        if self._pool is not None:
            self._pool.__exit__(kind, error, tb)


def choose_jobs(rows: int) -> int:
    """Processes worth starting for so many rows: all cores for many, one for a few."""
    return max(1, min(len(os.sched_getaffinity(0)), rows // ROWS_AT_ONCE))


def blocks(run: Run) -> list[tuple[int, int]]:
    """(first row, past the last row) of each task."""
    return [(start, min(start + ROWS_AT_ONCE, run.rows)) for start in range(0, run.rows, ROWS_AT_ONCE)]


def _one_thread() -> Any:
    import threadpoolctl

    return threadpoolctl.threadpool_limits(1)  # every core has its own process

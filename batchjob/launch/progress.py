"""How far all processes of an attempt are, and which one of them reports it."""

import math
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from batchjob.files import work_folder
from batchjob.launch.shares import Share
from batchjob.plan import Plan
from batchjob.store import lifecycle as store
from batchjob.store.claims import Claims


class SharedProgress:
    """Counts the images that all processes of an attempt have labelled: each keeps its own count in a file.

    One process at a time may report the sum: the one that holds a lock. The next one gets the lock when that process
    ends or dies. In a job array, whose tasks have a log each, one process of each task reports.
    """

    def __init__(self, run: Path, attempt: str, share: Share, plan: Plan, partitions: Sequence[int]) -> None:
        """Counts what is labelled already, and writes this process's first count.

        Parameters
        ----------
        run
            The folder of the run.
        attempt
            The attempt's name, see `shares.attempt_of`; empty for a process that is alone.
        share
            This process's share.
        plan
            The run's plan.
        partitions
            The attempt's list of partitions, as `shares.agreed_partitions` returned it.
        """
        self._folder = work_folder(run, f"progress/{attempt or f'alone-{socket.gethostname()}-{os.getpid()}'}")
        self._own = self._folder / str(share.index)
        self._before = plan.row_count - sum(
            _images(plan, partition) for partition in partitions
        )  # published before the attempt
        self._count = sum(
            _images(plan, partition) for partition in share.of(partitions) if store.is_done(run, partition)
        )
        self._reporter = Claims(self._folder)
        self._task = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
        self._may_report = False
        self._said, self._known, self._last = 0, 0, -math.inf
        self.total = plan.row_count
        self.done = self.post(0)

    def post(self, images: int) -> int:
        """Adds to this process's count. Returns the images labelled by all; the counts of others are up to 1 s old."""
        self._count += images
        if time.monotonic() - self._last > 1:
            self._last = time.monotonic()
            self._folder.mkdir(parents=True, exist_ok=True)  # another process may have finished the run
            self._own.write_text(f"{self._count}\n")
            self._said = self._count
            counts = [
                path.read_text(errors="replace").strip() for path in self._folder.iterdir() if path.name.isdigit()
            ]
            self._known = self._before + sum(int(count) for count in counts if count.isdigit())
        self.done = self._known + self._count - self._said
        return self.done

    def may_report(self) -> bool:
        """Whether this process is the one that reports."""
        self._may_report = self._may_report or self._reporter.take(self._task)
        return self._may_report

    def close(self) -> None:
        """Writes the last count, and lets another process report."""
        self._last = -math.inf
        self.post(0)
        self._reporter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _images(plan: Plan, partition: int) -> int:
    start, stop = plan.rows_of(partition)
    return stop - start

"""The background thread that publishes partitions while the next one is computed."""

import os
import queue
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from batchjob.files import clear_disk_errors, new_scratch, work_folder
from batchjob.plan import Plan
from batchjob.store.claims import Claims
from batchjob.store.encode import Encoder, read_root
from batchjob.store.partitions import marker_path, publish

Failure = tuple[str, str, str]  # image id, cause, message


class Writer:
    """Publishes partitions from a background thread: `with Writer(run, plan) as w: w.write(i, arrays, failures)`.

    The end of the block waits until what was handed over is published, even where an error ended it. Where a write
    failed, the next call raises its error.
    """

    def __init__(self, run: Path, plan: Plan) -> None:
        """Makes a scratch folder and opens the claims.

        Parameters
        ----------
        run
            The folder of a run whose stores were made.
        plan
            The run's plan.

        Raises
        ------
        UserError
            RUN is not a run of this schema, or can't be written.
        WorkLeft
            The disk is full.
        """
        self._run, self._plan = Path(run), plan
        read_root(self._run)  # a store of another schema is refused before any work
        self._encoder = Encoder(plan)
        with clear_disk_errors(self._run, f"cannot write to {run}"):
            self._scratch = new_scratch(self._run)
            self._claims = Claims(work_folder(self._run, ""))
        self._queue: queue.Queue[tuple[int, Mapping[str, NDArray[Any]], Sequence[Failure]] | None] = queue.Queue(1)
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._publish_all, name="store-writer")
        self._began = time.monotonic()
        self.busy_s = 0.0  # of the thread's processor time

    def claim(self, partition: int) -> bool:
        """Claims a partition; False where it is published, or another process has claimed it."""
        if self.is_done(partition) or not self._claims.take(partition):
            return False
        if self.is_done(partition):  # published between the two looks
            self._claims.release(partition)
            return False
        self._began = time.monotonic()
        return True

    def is_done(self, partition: int) -> bool:
        """Whether any process has published the partition."""
        return marker_path(self._run, partition).exists()

    def release(self, partition: int) -> None:
        """Gives up a claimed partition that was not written."""
        self._claims.release(partition)

    def write(self, partition: int, arrays: Mapping[str, NDArray[Any]], failures: Sequence[Failure] = ()) -> None:
        """Hands over the arrays of a partition. Waits until the one before is published, but not for this one.

        Parameters
        ----------
        partition
            The number of a partition that this process has claimed.
        arrays
            Every array of the store by name, rows in order; they must not be changed afterwards.
        failures
            (image id, cause, message) of each image that failed.

        Raises
        ------
        ValueError
            An array is missing or of another shape.
        WorkLeft, UserError
            An earlier partition could not be written.
        """
        self._raise_failure()
        self._encoder.check(partition, arrays)
        self._queue.join()  # one at a time: a kill costs at most one partition that was computed already
        self._raise_failure()
        self._queue.put((partition, arrays, failures))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.join()
        self._claims.close()
        with clear_disk_errors(self._run, f"cannot clean up in {self._run}"):
            self._scratch.rmdir()
        if kind is None:
            self._raise_failure()

    def _publish_all(self) -> None:
        while (item := self._queue.get()) is not None:
            partition, arrays, failures = item
            try:
                start = time.thread_time()
                with clear_disk_errors(self._run, f"cannot publish partition {partition} in {self._run}"):
                    publish(
                        self._run,
                        partition,
                        self._encoder.encode(partition, arrays),
                        {
                            "rows": list(self._plan.rows_of(partition)),
                            "failures": [list(f) for f in failures],
                            "worker": f"{socket.gethostname()}:{os.getpid()}",
                            "job": f"slurm-{os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else "",
                            "seconds": round(time.monotonic() - self._began, 3),
                            "time": round(time.time(), 3),
                        },
                        self._scratch,
                    )
                self._claims.release(partition)
                self.busy_s += time.thread_time() - start
            except BaseException as error:  # raised in the thread that called
                self._failed = error
            finally:
                self._queue.task_done()

    def _raise_failure(self) -> None:
        if self._failed is not None:
            raise self._failed

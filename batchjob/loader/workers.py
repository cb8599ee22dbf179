"""Runs the decoding processes: chunks of rows come in order, even where a file crashes the process that reads it."""

import atexit
import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from batchjob.errors import UserError
from batchjob.loader import fork_server
from batchjob.loader.chunks import Chunk, Range, Recipe, Rows
from batchjob.loader.shared_pixels import PixelPool

MOST_FAILURES = 2  # a row that has ended so many workers is given up
MOST_VAIN_RESTARTS = 5  # in succession, without a chunk in between and without a row to blame
POLL_S = 1.0  # how often the workers are looked at while none has a chunk ready
PREFETCH_BYTES = 2**30  # the most that decoded images may take
CHUNK_BYTES = 2**24
CHUNK_ROWS = 16
SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True, slots=True)
class Sizing:
    """How many rows go to a worker at once, and how many such chunks each worker has ahead."""

    rows_per_chunk: int
    prefetch_factor: int  # chunks that each worker has ahead
    slots: int  # chunks that the pool holds
    bytes_in_flight: int  # the size of the pool


def sizing(*, row_bytes: int, batch_size: int, workers: int) -> Sizing:
    """Chooses the rows of a chunk and how far to decode ahead: two batches, as far as `PREFETCH_BYTES` allow.

    Parameters
    ----------
    row_bytes
        Of one decoded image.
    batch_size
        Images of a batch.
    workers
        Decoding processes; 0 for this process alone.

    Raises
    ------
    UserError
        `PREFETCH_BYTES` don't hold one image for each worker and one more.
    """
    lanes = max(1, workers)
    if (lanes + 1) * row_bytes > PREFETCH_BYTES:
        raise UserError(
            f"--workers {workers} need {(lanes + 1) * row_bytes / 2**20:.0f} MB for an image each; give fewer: "
            f"{PREFETCH_BYTES / 2**20:.0f} MB are used at most"
        )
    rows = max(
        1, min(batch_size, CHUNK_ROWS, CHUNK_BYTES // row_bytes, PREFETCH_BYTES // ((2 * lanes + 1) * row_bytes))
    )
    wanted = -(-2 * batch_size // (lanes * rows))
    chunks_that_fit = PREFETCH_BYTES // (rows * row_bytes)
    factor = max(1, min(max(2, wanted), (chunks_that_fit - 1) // lanes))
    slots = lanes * factor + 1  # a chunk's slot is filled again only when the next chunk has been asked for
    return Sizing(rows, factor, slots, slots * rows * row_bytes)


class Chunks:
    """Decodes ranges of rows in chunks, in order. Worker processes live until `close`, and are replaced when they die.

    A row fails for good when it has ended `MOST_FAILURES` workers, by a crash or by taking more than `stall_s` seconds.
    """

    def __init__(self, recipe: Recipe, *, workers: int, batch_size: int, stall_s: float) -> None:
        """Sets aside the memory for the pixels; starts no process yet.

        Parameters
        ----------
        recipe
            Where rows are read, and how they are decoded.
        workers, batch_size
            As `sizing`.
        stall_s
            As `Loader`.

        Raises
        ------
        UserError
            As `sizing`.
        """
        geometry = recipe.geometry
        self._recipe, self._workers, self._stall_s = recipe, workers, stall_s
        image = (3, geometry.height, geometry.width)
        self.sizing = sizing(row_bytes=math.prod(image), batch_size=batch_size, workers=workers)
        self._pool = PixelPool((self.sizing.slots, self.sizing.rows_per_chunk, *image))
        self._batch_size = batch_size
        self._tasks = _Tasks(self.sizing.slots)
        self._given_up: dict[int, tuple[str, str]] = {}
        self._failures: dict[int, int] = {}
        self._vain_restarts = 0
        self._interrupted = threading.Event()
        self._loader: DataLoader[Chunk] | None = None
        self._stream: Iterator[Chunk] | None = None
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._marks: Any = None

    def read(self, ranges: list[Range]) -> Iterator[tuple[Chunk, Tensor]]:
        """Lets the workers begin with these ranges; returns an iterator over their chunks and pixels.

        The pixels are uint8 [n, 3, H, W], and are overwritten when the next chunk is asked for. A chunk lies within one
        batch of one range. A `read` that is under way ends.
        """
        self._tasks.left = deque(
            (low, min(low + self.sizing.rows_per_chunk, stop, first + self._batch_size))
            for start, stop in ranges
            for first in range(start, stop, self._batch_size)
            for low in range(first, min(first + self._batch_size, stop), self.sizing.rows_per_chunk)
        )
        self._interrupted.clear()
        self._stream = None
        try:
            self._stream = self._start() if self._tasks.left else None
        except (RuntimeError, OSError, EOFError) as error:
            self._judge(error)
        return self._follow()

    def _follow(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Yields what `read` promises; another thread may iterate over it."""
        while self._tasks.left and not self._interrupted.is_set():
            try:
                if self._stream is None:
                    self._stream = self._start()
                chunk = next(self._stream)
            except (RuntimeError, OSError, EOFError) as error:
                self._judge(error)
                continue
            self._vain_restarts = 0
            self._tasks.left.popleft()
            yield chunk, self._pool.pixels[chunk.slot, : len(chunk.status)]

    def interrupt(self) -> None:
        """Makes a `read` in another thread end, within about `POLL_S` seconds."""
        self._interrupted.set()

    def close(self) -> None:
        """Ends the workers."""
        # Called by hand: the garbage collector may close the stream's pipes before it ends the threads that use them.
        workers: Any = getattr(self._loader, "_iterator", None)
        if hasattr(workers, "_shutdown_workers"):
            workers._shutdown_workers()
            # DataLoader leaves these threads behind. One that removes its queue's semaphores while Python exits stops
            # half-way, and Python then warns of leaked semaphores.
            for thread in [getattr(queue, "_thread", None) for queue in workers._index_queues]:
                if thread is not None:
                    thread.join(timeout=5)
        self._loader = self._stream = None
        self._kill_workers()
        atexit.unregister(self._abandon)

    def _abandon(self) -> None:
        self.interrupt()
        self._kill_workers()

    def _start(self) -> Iterator[Chunk]:
        """Returns the chunks of the remaining tasks, decoded by the present workers or by new ones."""
        before = set(multiprocessing.active_children())
        try:
            if self._loader is None:
                self._loader = self._new_loader()
            return iter(self._loader)
        finally:  # also where the start fails half-way; processes of other packages are of another class
            new = [p for p in multiprocessing.active_children() if p not in before]
            self._processes += [p for p in new if isinstance(p, ForkServerProcess)]

    def _new_loader(self) -> DataLoader[Chunk]:
        own = torch.Generator()  # not torch's common one: another thread may be drawing weights from it
        if not self._workers:
            rows = Rows(self._recipe, self._pool, {}, None)
            return _Loader(rows, batch_size=None, sampler=self._tasks, collate_fn=_as_it_is, generator=own)
        atexit.register(self._abandon)  # else Python would wait for ever for workers that ignore its SIGTERM
        context = fork_server.start()
        self._marks = context.RawArray("d", [0.0, -1.0, 0.0] * self._workers)  # pid, row in hand, since
        return _Loader(
            Rows(self._recipe, self._pool, dict(self._given_up), self._marks),
            batch_size=None,
            sampler=self._tasks,
            num_workers=self._workers,
            prefetch_factor=self.sizing.prefetch_factor,
            collate_fn=_as_it_is,
            generator=own,
            persistent_workers=True,
            multiprocessing_context=context,
            worker_init_fn=_enter_worker,
            timeout=POLL_S,
        )

    def _judge(self, error: RuntimeError | OSError | EOFError) -> None:
        """Ends the workers if one died or stalled, and counts a failure against the row it held.

        Workers that are only slow go on. Raises UserError, or the error itself, where no row is to blame and starting
        again would not help.
        """
        if self._workers and self._marks is None:  # the start failed before there were workers
            self._raise(error)
        dead = self._dead(within_s=2.0 if isinstance(error, OSError | EOFError) else 0.0)
        marks = [tuple(self._marks[3 * i : 3 * i + 3]) for i in range(self._workers)]
        now = time.monotonic()
        is_wait = "timed out" in str(error)
        stalled = [int(row) for _, row, since in marks if row >= 0 and now - since > self._stall_s] if is_wait else []
        if not dead and not stalled:
            if not is_wait:
                self._raise(error)
            if self._stream is None:  # the workers are still at an earlier read, and DataLoader would wait for them
                self._kill_workers()
                self.close()
            return
        blamed = [
            (int(row), "killed_worker", _how_died(dead[pid])) for pid, row, _ in marks if row >= 0 and pid in dead
        ]
        blamed += [(row, "timeout", f"no end within {self._stall_s:g} s") for row in stalled]
        for row, cause, how in blamed:
            self._failures[row] = self._failures.get(row, 0) + 1
            if self._failures[row] >= MOST_FAILURES:
                self._given_up[row] = (cause, f"given up after {MOST_FAILURES} tries: {how}")
        self._vain_restarts += not blamed
        if self._vain_restarts >= MOST_VAIN_RESTARTS:
            how = ", ".join(sorted({_how_died(code) for code in dead.values()}))
            raise UserError(
                f"decoding processes end before they have an image in hand ({how}), {MOST_VAIN_RESTARTS} times "
                "in a row; give fewer --workers, or --workers 0 to decode in this process"
            ) from error
        self._kill_workers()
        self.close()

    def _raise(self, error: RuntimeError | OSError | EOFError) -> NoReturn:
        if "No space left" in str(error):
            raise UserError(
                f"{SHARED_MEMORY} is full, and decoding processes need a few bytes of it; make room, or enlarge it "
                "(docker: --shm-size=1g)"
            ) from error
        raise error

    def _dead(self, *, within_s: float) -> dict[int | None, int]:
        """Returns exit codes by pid, after a wait for the first: a pipe may break before its process is dead."""
        until = time.monotonic() + within_s
        while not (dead := {p.pid: p.exitcode for p in self._processes if p.exitcode is not None}):
            if time.monotonic() >= until:
                break
            time.sleep(0.02)
        return dead

    def _kill_workers(self) -> None:
        for process in self._processes:
            if process.exitcode is None:
                process.kill()  # they ignore SIGTERM
        for process in self._processes:
            process.join(timeout=5)  # one that hangs in the kernel stays behind
        self._processes.clear()


class _Loader(DataLoader[Chunk]):
    def check_worker_number_rationality(self) -> None:
        """Does nothing where torch would warn, since more workers than cores may be intended."""


class _Tasks:
    """A sampler of the ranges that are left when the workers start."""

    def __init__(self, slots: int) -> None:
        self.left: deque[Range] = deque()
        self._slots = slots

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Yields (start, stop, slot of the pool)."""
        return ((start, stop, i % self._slots) for i, (start, stop) in enumerate(tuple(self.left)))

    def __len__(self) -> int:
        return len(self.left)


def _end_with_the_job() -> None:
    """Ends this process when the job's process ends.

    torch watches the parent, which is the fork server here, and that lives as long as its children.
    """
    job = multiprocessing.parent_process()
    if job is not None:
        job.join()
        os._exit(1)


def _enter_worker(worker: int) -> None:
    threading.Thread(target=_end_with_the_job, daemon=True).start()
    for number in fork_server.SCHEDULER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # short of memory, the kernel ends a worker, which is replaced, rather than the job


def _how_died(exit_code: int) -> str:
    if exit_code >= 0:
        return f"its process ended with {exit_code}"
    name = {int(s): s.name for s in signal.Signals}.get(-exit_code, f"signal {-exit_code}")
    hint = " (out of memory?)" if name in ("SIGKILL", "SIGBUS") else ""
    return f"its process was killed by {name}{hint}"


def _as_it_is(chunk: Any) -> Any:
    return chunk

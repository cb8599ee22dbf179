"""A pool of processes that end with the process that started them and leave signals to it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Literal

# Slurm and a terminal send these to every process of a step, so children leave them to the process that started them.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class ChildPool(ProcessPoolExecutor):
    """A pool of processes. They are killed where its block is left by an error, or where their parent dies."""

    def __init__(
        self, processes: int, *, start: Callable[[], object] | None = None, method: Literal["spawn", "fork"] = "spawn"
    ) -> None:
        """Makes the pool; its processes start when the first tasks come.

        Parameters
        ----------
        processes
            How many at most.
        start
            What each process runs before its first task.
        method
            spawn where the parent may hold threads or a CUDA context; fork starts faster.
        """
        context = multiprocessing.get_context(method)
        super().__init__(processes, mp_context=context, initializer=_begin, initargs=(start,))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Hands over a task as the base class does. Processes that start here inherit that the signals are blocked.

        Parameters
        ----------
        fn, args, kwargs
            A function and its arguments, which must be picklable.

        Returns
        -------
        The future result.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:  # tasks take up to minutes, and nobody wants their results
            for process in list((self._processes or {}).values()):
                process.kill()
        self.shutdown(cancel_futures=True)


def _begin(start: Callable[[], object] | None) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    if start is not None:
        start()


def _end_with(sentinel: int) -> None:
    """Ends this process when its parent is gone; it would wait for a next task for ever, and keep its memory."""
    wait([sentinel])
    os._exit(1)

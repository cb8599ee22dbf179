"""Processes of a pool that end with the process that started them, whatever ends it, and leave signals to it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Literal

# Slurm and a terminal send these to every process of a step; who started the pool decides
_NOT_OURS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class ChildPool(ProcessPoolExecutor):
    """A pool whose processes run `start` first; they are killed where its block is left by an error.

    `method`: spawn where the parent may hold threads or a CUDA context, else fork, which starts at once.
    """

    def __init__(
        self, processes: int, *, start: Callable[[], object] | None = None, method: Literal["spawn", "fork"] = "spawn"
    ) -> None:
        context = multiprocessing.get_context(method)
        super().__init__(processes, mp_context=context, initializer=_begin, initargs=(start,))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """As the base class's, which starts processes here: they inherit that the signals are blocked."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_OURS)
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
    """Ends this process when its parent is gone: waiting for its next task it would wait for ever, memory and all."""
    wait([sentinel])
    os._exit(1)

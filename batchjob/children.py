"""Child processes: they don't run the user's script; those of a pool leave signals to their parent and end with it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import context as contexts
from multiprocessing import spawn
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Literal

# Slurm and a terminal send these to every process of a step, so children leave them to the process that started them.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
Method = Literal["forkserver", "spawn", "fork"]


def context_of(method: Method) -> contexts.BaseContext:
    """Returns a context of `multiprocessing` whose processes don't import the `__main__` of the one that starts them.

    By default a new process runs the user's script again, in case it is given something that the script defines. A
    script without `if __name__ == "__main__":` then starts the whole job in each worker. Ours are given functions of
    `batchjob` only. A forked process imports nothing anyway.
    """
    own = {"forkserver": _ForkServerContext, "spawn": _SpawnContext, "fork": contexts.ForkContext}
    return own[method]()


_starting = threading.local()  # each thread's own, so that processes which others start meanwhile are as they were
_all_preparation_data = spawn.get_preparation_data


def _preparation_data(name: str) -> dict[str, Any]:
    data = _all_preparation_data(name)
    if getattr(_starting, "is_ours", False):
        for key in ("init_main_from_name", "init_main_from_path"):
            data.pop(key, None)
    return data


spawn.get_preparation_data = _preparation_data


def _start(kind: type[contexts.SpawnProcess | contexts.ForkServerProcess], started: BaseProcess) -> Any:
    _starting.is_ours = True
    try:
        return kind._Popen(started)
    finally:
        _starting.is_ours = False


class _SpawnProcess(contexts.SpawnProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:  # the name by which `start` calls it
        return _start(contexts.SpawnProcess, process_obj)


class _ForkServerProcess(contexts.ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:
        return _start(contexts.ForkServerProcess, process_obj)


class _SpawnContext(contexts.SpawnContext):
    Process = _SpawnProcess


class _ForkServerContext(contexts.ForkServerContext):
    Process = _ForkServerProcess


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
        super().__init__(processes, mp_context=context_of(method), initializer=_begin, initargs=(start,))

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

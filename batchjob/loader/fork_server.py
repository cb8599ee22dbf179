"""Starts the process that decoding workers are forked from: it has no threads, no CUDA, and blocks some signals."""

import signal
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext

from batchjob.children import context_of

SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def start() -> BaseContext:
    """Starts the server if it isn't running, and returns the context that starts workers by it, without waiting.

    The server's imports take seconds; the first start of a worker waits for them. The server and Python's resource
    tracker start with TERM, USR1 and INT blocked, and their children inherit that. A scheduler sends TERM and USR1 to
    every process of a step, and a terminal sends INT, but workers have to go on until the loop has stored its batch.
    """
    context = context_of("forkserver")
    context.set_forkserver_preload(["batchjob.loader.workers"])
    for server in (resource_tracker, forkserver):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*SCHEDULER_SIGNALS, signal.SIGINT))
        try:
            server.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context

"""The process that decoding workers are forked from: without threads or CUDA, deaf to a scheduler's signals."""

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def start() -> ForkServerContext:
    """Starts the server if it isn't running, and returns at once; its imports take seconds, which a start awaits.

    Blocked signals stay blocked in children: TERM and USR1, which a scheduler sends to every process of a step, and a
    terminal's INT reach the server and the resource tracker as little as the workers, which go on until the loop has
    stored its batch.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["batchjob.loader.workers"])
    for server in (resource_tracker, forkserver):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*SCHEDULER_SIGNALS, signal.SIGINT))
        try:
            server.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context

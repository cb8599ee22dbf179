"""Silence for C libraries that write to the terminal by themselves: libtiff tells each bad code of a damaged file."""

import contextlib
import os
import threading
from collections.abc import Iterator

_MOST_BYTES = 4096  # of what they wrote are kept
_one_at_a_time = threading.Lock()


class Said:
    """What was written to the standard error, its first line."""

    def __init__(self) -> None:
        self.line = ""


@contextlib.contextmanager
def quiet() -> Iterator[Said]:
    """Takes what is written to file descriptor 2 meanwhile; the caller's `Said` has its first line at the end.

    Python's own lines of other threads are taken too, so nothing else should be told while it holds.
    """
    said = Said()
    with _one_at_a_time, contextlib.ExitStack() as stack:
        try:
            terminal = os.dup(2)
        except OSError:  # closed: nothing to keep silent
            yield said
            return
        stack.callback(os.close, terminal)
        taken = os.memfd_create("stderr")
        stack.callback(os.close, taken)
        os.dup2(taken, 2)
        try:
            yield said
        finally:
            os.dup2(terminal, 2)
            lines = os.pread(taken, _MOST_BYTES, 0).decode("utf-8", "replace").splitlines()
            said.line = lines[0].strip() if lines else ""

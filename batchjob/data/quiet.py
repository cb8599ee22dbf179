"""Keeps C libraries from writing to the terminal: libtiff reports every bad code of a damaged file there."""

import contextlib
import os
import threading
from collections.abc import Iterator

_MOST_BYTES = 4096  # the most that is kept of what a library wrote
_one_at_a_time = threading.Lock()


class Said:
    """What was written to standard error: `line` is its first line, once the `with` block of `quiet` has ended."""

    def __init__(self) -> None:
        self.line = ""


@contextlib.contextmanager
def quiet() -> Iterator[Said]:
    """Catches what is written to file descriptor 2 inside the `with` block; at its end, `Said` has the first line.

    This includes what other threads write there, so no message to the user should be written meanwhile.
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

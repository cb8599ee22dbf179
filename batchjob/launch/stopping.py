"""Whether somebody wants this process to end: a signal came, or the process that started it is gone."""

import contextlib
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

PARENT = "BATCHJOB_PARENT"  # set by our own launcher: its process id
_NAMES = {
    signal.SIGUSR1: "SIGUSR1 (the time limit is near, or a preemption)",
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "SIGINT",
}


class Stop:
    """True when called, once SIGUSR1, SIGTERM or SIGINT came; a second SIGINT interrupts at once.

    What is being labelled is dropped, what was handed to the writer is published, and the command ends 75. A partition
    is seconds on a GPU and at most 256 images elsewhere, so finishing it is not worth a grace that may be too short.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._parent = int(os.environ.get(PARENT, "0"))
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        if self._parent and os.getppid() != self._parent:
            self.reason = self.reason or "the process that started this one is gone"
        return bool(self.reason)

    def __enter__(self) -> Self:
        for number in _NAMES:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = _NAMES[signal.Signals(number)]
        with contextlib.suppress(OSError):  # whoever read it may be gone
            os.write(sys.stderr.fileno(), f"batchjob: {self.reason}: stopping after this batch\n".encode())

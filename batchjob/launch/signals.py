"""What the signals that end a command do, from its first moment to its last."""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from batchjob.children import SIGNALS

AGAIN_S = 0.01  # after which a signal comes again that Python dropped
_NUMBER = "batchjob_signal"  # the attribute of an error that a signal raised
WORK_LEFT = 75  # the exit code of a command that goes on where it stopped when it is run again
PARENT = "BATCHJOB_PARENT"  # set by our own launcher: its process id
_MEANINGS = {signal.SIGUSR1: " (the time limit is near, or a preemption)"}


def exit_at_once() -> None:
    """Makes signals end the process with code 75 and without a word, until something else takes them over."""
    sys.unraisablehook = functools.partial(_heed_again, sys.unraisablehook)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)


def ignore() -> None:
    """Ignores signals from now on: Python takes long to end, and a signal would replace the work's exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turns signals inside the block into a KeyboardInterrupt with the signal's name; ignored ones stay ignored.

    Any error that follows a signal is raised as the interrupt too, since libraries in C report an interrupt as a
    failure of their own. Does nothing in a thread that is not the main one.
    """
    came: list[str] = []

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        came.append(signal.Signals(number).name)
        _raise(KeyboardInterrupt(came[-1]), number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    hook = sys.unraisablehook
    sys.unraisablehook = functools.partial(_heed_again, hook)
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    except Exception as error:  # a library may turn our interrupt into a failure of its own, of any kind
        if came:
            raise KeyboardInterrupt(came[-1]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


class Stop:
    """Notes signals inside its block; a call says whether this process should end. A second SIGINT interrupts at once.

    It should end once a signal came, or once the launcher that started it is gone. The partition that is being labelled
    is then dropped, the one that was handed to the writer is published, and the command ends with code 75. A partition
    takes seconds on a GPU and has at most 256 images on a CPU, so waiting for it is not worth missing a deadline.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._parent = int(os.environ.get(PARENT, "0"))
        self._before: dict[signal.Signals, Any] = {}
        self._hook = sys.unraisablehook

    def __call__(self) -> bool:
        if self._parent and os.getppid() != self._parent:
            self.reason = self.reason or "the process that started this one is gone"
        return bool(self.reason)

    def __enter__(self) -> Self:
        self._hook = sys.unraisablehook
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            sys.unraisablehook = functools.partial(_heed_again, self._hook)
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            sys.unraisablehook = self._hook

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            _raise(KeyboardInterrupt(), number)
        name = signal.Signals(number)
        self.reason = name.name + _MEANINGS.get(name, "")
        with contextlib.suppress(OSError):  # whoever read it may be gone
            os.write(sys.stderr.fileno(), f"batchjob: {self.reason}: stopping after this batch\n".encode())


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    _raise(SystemExit(WORK_LEFT), number)


def _raise(error: BaseException, number: int) -> NoReturn:
    vars(error)[_NUMBER] = number
    raise error


def _heed_again(hook: Callable[[Any], object], lost: "sys.UnraisableHookArgs") -> None:
    """Sends a signal again whose error Python drops, since its handler ran inside a `__del__` or another callback.

    Where the block that turns signals into errors ends before that, the signal does what it did before the block.
    """
    number = vars(lost.exc_value).get(_NUMBER) if lost.exc_value else None
    if number is None:
        hook(lost)
        return
    timer = threading.Timer(AGAIN_S, os.kill, (os.getpid(), number))  # after the callback, which can't raise anything
    timer.daemon = True
    timer.start()

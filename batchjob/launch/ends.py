"""How a command ends: its exit code, and one line for what is not a defect of the program."""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from batchjob.errors import UserError, WorkLeft, printable
from batchjob.files import errno_of

WORK_LEFT = 75
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ENDS = {
    number: end
    for numbers, end in (
        (
            (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
            (WORK_LEFT, "free some space or quota; what is published is safe, the same command goes on"),
        ),
        (
            (errno.EROFS, errno.EACCES, errno.EPERM),
            (2, "it must be writable, and DATA readable: change its permissions, or give another RUN"),
        ),
        ((errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP), (2, "give another name")),
        ((errno.EMFILE, errno.ENFILE), (WORK_LEFT, "allow more open files (ulimit -n), or give fewer --workers")),
        ((errno.EIO, errno.ESTALE, errno.ENODEV), (WORK_LEFT, "look after the disk; the same command goes on")),
    )
    for number in numbers
}


def at_once() -> None:
    """Signals end the process with 75 and nothing else, until `code_of` takes them over."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)


def ignore_signals() -> None:
    """From now on the exit code is what the work was worth: Python takes long to end, and a signal would replace it."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def code_of(work: Callable[[], int], *, only_shows: bool = False) -> int:
    """Runs a command and returns its exit code: its own, 2 where the input is wrong, 75 where work is left. A signal, a
    full disk and a reader that went away leave work. Other errors are defects and pass.

    Parameters
    ----------
    work
        The command; returns its exit code.
    only_shows
        Whether it only shows something: then a reader that went away leaves no work.

    Returns
    -------
        The exit code; what is wrong was said in one line on stderr.
    """
    code = WORK_LEFT
    try:
        with _interruptible():
            code = work()
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
    except UserError as error:
        return _say(error, 2)
    except WorkLeft as error:
        return _say(error, WORK_LEFT)
    except KeyboardInterrupt as error:
        # Where it passed an `exec` of a string (imports are full of them), Python ends by SIGINT whatever code it is
        # given, unless another `exec` comes after (run_eval_code_obj in CPython's pythonrun.c).
        exec("")
        return _say(f"interrupted ({error or 'SIGINT'}); the same command goes on where it stopped", WORK_LEFT)
    except BrokenPipeError:
        _mute(sys.stdout, sys.stderr)
        return 0 if only_shows else code
    except OSError as error:
        number = errno_of(error)
        if number not in _ENDS:
            raise
        code, remedy = _ENDS[number]
        try:
            sys.stdout.flush()
        except OSError:  # it is stdout that is full, and Python's own last flush would make the code 120
            _mute(sys.stdout)
        file = f": {os.fsdecode(error.filename)}" if error.filename else ""
        return _say(f"{os.strerror(number)}{file}; {remedy}", code)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(WORK_LEFT)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM, SIGINT and SIGUSR1 are a KeyboardInterrupt inside, unless whoever started us wants them ignored.

    An error that follows a signal counts as the interrupt: libraries in C take one for a failure of their own.
    """
    came: list[str] = []

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        came.append(signal.Signals(number).name)
        raise KeyboardInterrupt(came[-1])

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
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


def _mute(*streams: Any) -> None:
    """What these streams still buffer goes nowhere, so that Python's own last flush does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(nowhere, stream.fileno())


def _say(message: object, code: int) -> int:
    try:
        print(f"batchjob: {printable(message)}", file=sys.stderr, flush=True)
    except OSError:
        _mute(sys.stderr)
    return code

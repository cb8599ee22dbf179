"""How a command ends: its exit code, and one line for an error that is not a defect of the program."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any

from batchjob.errors import UserError, WorkLeft, printable
from batchjob.files import FORBIDDEN, FULL, errno_of
from batchjob.launch.signals import WORK_LEFT, interruptible

_ENDS = {  # number of an OSError -> (exit code, what to do)
    number: end
    for numbers, end in (
        (FULL, (WORK_LEFT, "free some space or quota; what is published is safe, the same command goes on")),
        (FORBIDDEN, (2, "it must be writable, and DATA readable: change its permissions, or give another RUN")),
        ((errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP), (2, "give another name")),
        ((errno.EMFILE, errno.ENFILE), (WORK_LEFT, "allow more open files (ulimit -n), or give fewer --workers")),
        ((errno.EIO, errno.ESTALE, errno.ENODEV), (WORK_LEFT, "look after the disk; the same command goes on")),
    )
    for number in numbers
}


def code_of(work: Callable[[], int], *, only_shows: bool = False) -> int:
    """Runs a command and returns its exit code.

    The code is the command's own, 2 where the input is wrong, and 75 where work is left: after a signal, on a full
    disk, or where the reader of the output went away. Any other error is a defect and is raised.

    Parameters
    ----------
    work
        The command; returns its exit code.
    only_shows
        Whether the command only shows something. No work is left then where the reader went away: the code is 0.

    Returns
    -------
    The exit code; what is wrong was said in one line on stderr.
    """
    code = WORK_LEFT
    try:
        with interruptible():
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
        mute(sys.stdout, sys.stderr)
        return 0 if only_shows else code
    except OSError as error:
        number = errno_of(error)
        if number not in _ENDS:
            raise
        code, remedy = _ENDS[number]
        try:
            sys.stdout.flush()
        except OSError:  # it is stdout that is full, and Python's own last flush would make the code 120
            mute(sys.stdout)
        file = f": {os.fsdecode(error.filename)}" if error.filename else ""
        return _say(f"{os.strerror(number)}{file}; {remedy}", code)


def mute(*streams: Any) -> None:
    """Sends what these streams still buffer, and what is written to them from now on, nowhere.

    Python's own last flush can't fail then.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(nowhere, stream.fileno())


def _say(message: object, code: int) -> int:
    try:
        print(f"batchjob: {printable(message)}", file=sys.stderr, flush=True)
    except OSError:
        mute(sys.stderr)
    return code

"""Reads the bytes of an image from its file, or says why that is not possible."""

import errno
import os
import stat

MAX_FILE_BYTES = 2**30


class ReadFailure(Exception):
    """Says why an image has no pixels: `cause` is a name of `STATUS`, `message` a sentence for failures.csv."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(cause, message)
        self.cause = cause
        self.message = message


def read_file(path: bytes, planned: tuple[int, int] | None = None) -> bytes:
    """Reads a file. Its kind is checked before it is opened, since opening a FIFO would block for ever.

    Parameters
    ----------
    path
        As bytes, since a name need not be UTF-8.
    planned
        The size in bytes and the time of change in ns that the file must have; None for any.

    Raises
    ------
    ReadFailure
        The file is missing, can't be read, is not a regular file, is larger than `MAX_FILE_BYTES`, or has changed.
    """
    try:
        return _read_file(path, planned)
    except OSError as error:
        raise ReadFailure(_cause_of(error, path), one_line(error.strerror or error)) from None


def escape(name: bytes) -> str:
    r"""Returns the name as text; bytes that are not UTF-8 become \xNN."""
    return name.decode("utf-8", "backslashreplace")


def one_line(what: object) -> str:
    """Returns the text with line breaks and unprintable characters escaped, cut to 300 characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(what))
    return text if len(text) <= 300 else text[:299] + "…"


def _read_file(path: bytes, planned: tuple[int, int] | None) -> bytes:
    _check_regular(os.stat(path))
    # O_NONBLOCK: should a FIFO have taken the file's place since, opening it returns at once
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        _check_regular(os.fstat(fd))
        data = file.readall()
        found = os.fstat(fd)  # after reading, since it may be written meanwhile
    if planned is not None:
        raise_for_change(found, planned)
    return data


def raise_for_change(found: os.stat_result, planned: tuple[int, int], what: str = "the file") -> None:
    """Raises ReadFailure where a file is not the one that was planned.

    Parameters
    ----------
    found
        What the file is now.
    planned
        Its size in bytes and time of change in ns when the run was planned, −1 where it could not be seen.
    what
        What the message calls the file.
    """
    if (found.st_size, found.st_mtime_ns) == planned:
        return
    if planned[0] < 0:
        raise ReadFailure("changed", f"{what} could not be seen when the run was planned")
    how = f"had {planned[0]} bytes, has {found.st_size}" if found.st_size != planned[0] else "was written again"
    raise ReadFailure("changed", f"{what} {how} since the run was planned")


def _check_regular(found: os.stat_result) -> None:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    if not stat.S_ISREG(found.st_mode):
        raise ReadFailure("unreadable", f"is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}, not a file")
    if found.st_size > MAX_FILE_BYTES:
        raise ReadFailure("too_large", f"{found.st_size} bytes; at most {MAX_FILE_BYTES} are read")


def _cause_of(error: OSError, path: bytes) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.lexists(path):
        return "missing"
    return "unreadable"  # also for a link to nothing: the link itself is there

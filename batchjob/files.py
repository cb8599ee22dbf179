"""Files that appear whole or not at all, whatever kills the process; errors of a disk as one line.

A file is written aside on the same file system, fsynced and renamed to its place; then its folder is fsynced.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from batchjob.errors import UserError, WorkLeft

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_LEFT_AFTER_S = 3600
LOCK = "done/lock"  # below RUN; where it is there, RUN was made by this program, even without a plan.json


@contextlib.contextmanager
def clear_disk_errors(run: Path, doing: str) -> Iterator[None]:
    """Turns errors of a full, read-only or forbidden file system inside the block into one line; others pass.

    Parameters
    ----------
    run
        The folder of the run, which the line names.
    doing
        What was tried, such as `cannot finish RUN`: the line begins with it.

    Raises
    ------
    WorkLeft
        The disk or the quota is full.
    UserError
        Something can't be written.
    """
    try:
        yield
    except OSError as error:
        number = errno_of(error)
        what = f"{doing}: {os.strerror(number) if number else error}"
        if number in FULL:
            raise WorkLeft(
                f"{what} ({_free(run)}); nothing published is lost; free some space or quota for {run}, then go on "
                f"with: batchjob run, on the same RUN"
            ) from error
        if number in FORBIDDEN:
            raise UserError(f"{what}; {run} must be writable: choose another RUN or change its permissions") from error
        raise


def errno_of(error: OSError) -> int:
    """Returns the error's number, 0 where it has none.

    NumPy's own error for an array that was written in part, which has no number, counts as a full disk.
    """
    if error.errno is None and re.fullmatch(r"\d+ requested and \d+ written", str(error)):
        return errno.ENOSPC
    return error.errno or 0


@contextlib.contextmanager
def only_one(run: Path, name: str = LOCK) -> Iterator[None]:
    """Holds a lock of RUN inside the block; waits first until the process that holds it ends or dies.

    Parameters
    ----------
    run
        The folder of the run.
    name
        The lock file, relative to RUN.

    Raises
    ------
    UserError
        RUN can't be written.
    """
    try:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # below /proc, say
        raise UserError(f"RUN {run} can't be written: {error.strerror}; give another RUN") from error
    handle = os.open(run / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another command that writes {run}", file=sys.stderr, flush=True)
            fcntl.lockf(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print("this file system has no locks: start no second command on the same RUN", file=sys.stderr)
        yield
    finally:
        os.close(handle)


def work_folder(run: Path, name: str) -> Path:
    """Makes a folder for files that are needed only while a run is in progress.

    Parameters
    ----------
    run
        The folder of the run.
    name
        Relative to RUN/work.

    Returns
    -------
    Its path; it may have been there already.
    """
    folder = run / "work" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def new_scratch(run: Path) -> Path:
    """Makes a folder for this process alone, on the file system of RUN: a file is renamed from there in one step."""
    folder = work_folder(run, "scratch") / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    return folder


def write_file(path: Path, data: bytes, scratch: Path) -> None:
    """Writes a file whole, or leaves what it held before. Does not sync its folder.

    Parameters
    ----------
    path
        The file.
    data
        Its content.
    scratch
        A folder on the same file system; it is made where it is not there.

    Raises
    ------
    OSError
        The file could not be written; no part of it is left.
    """
    aside = scratch / f"{uuid.uuid4().hex[:8]}-{path.name}"
    with removed_if_torn(aside):
        scratch.mkdir(parents=True, exist_ok=True)  # after a jump of the clock it may have been removed as left behind
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)


@contextlib.contextmanager
def removed_if_torn(part: Path) -> Iterator[None]:
    """Removes the file `part` where writing it fails in the block, so that half a file does not keep a disk full."""
    try:
        yield
    except OSError:
        part.unlink(missing_ok=True)
        raise


def checks_of(run: Path, paths: Iterable[str]) -> dict[str, list[int]]:
    """Reads files and takes their checksums.

    Parameters
    ----------
    run
        The folder of the run.
    paths
        Files that are there, relative to RUN.

    Returns
    -------
    [size in bytes, crc32] by path.
    """
    contents = {path: (run / path).read_bytes() for path in paths}
    return {path: [len(data), zlib.crc32(data)] for path, data in contents.items()}


def sync_folder(folder: Path) -> None:
    """Waits until the names in `folder` are on the disk, as far as its file system can promise it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # some network file systems sync names by themselves
            raise
    finally:
        os.close(handle)


def seal_file(path: Path, body: Mapping[str, Any], scratch: Path) -> None:
    """Writes JSON with a checksum of itself, and waits until it is on the disk.

    Parameters
    ----------
    path
        The file.
    body
        Values that JSON can hold.
    scratch
        A folder on the same file system.

    Raises
    ------
    OSError
        The file could not be written.
    """
    write_file(path, seal(body), scratch)
    sync_folder(path.parent)


def unseal_file(path: Path) -> dict[str, Any] | None:
    """Reads what `seal_file` wrote; None where the file is missing, is damaged or can't be read."""
    try:
        return _unseal(path.read_bytes())
    except OSError:
        return None


def clear_work(run: Path) -> None:
    """Removes RUN/work of a finished run, except what other processes still use."""
    drop_scratch(run)
    for name in ("attempts", "progress"):
        shutil.rmtree(run / "work" / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        handle = os.open(run / "work" / "claims", os.O_RDWR)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the whole file: it fails where a process has a claim
            os.unlink(run / "work" / "claims")
        finally:
            os.close(handle)
    with contextlib.suppress(OSError):
        (run / "work").rmdir()


def drop_scratch(run: Path) -> None:
    """Removes the scratch folders of killed processes: this machine's at once, other machines' after an hour."""
    for folder in work_folder(run, "scratch").iterdir():
        host, process, _ = folder.name.rsplit("-", 2)
        if host == socket.gethostname():
            is_left = not Path(f"/proc/{process}").exists()
        else:
            is_left = time.time() - folder.stat().st_mtime > _LEFT_AFTER_S
        if is_left:
            shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        (run / "work" / "scratch").rmdir()  # stays while another job writes
        (run / "work").rmdir()


def seal(body: Mapping[str, Any]) -> bytes:
    """Returns `body` as JSON with a checksum of itself."""
    text = json.dumps(body, sort_keys=True)
    return json.dumps({"crc32": zlib.crc32(text.encode()), "body": body}, sort_keys=True).encode()


def _unseal(data: bytes) -> dict[str, Any] | None:
    """Returns what `seal` was given; None where the bytes are damaged."""
    try:
        sealed = json.loads(data)
        body = sealed["body"]
        whole = zlib.crc32(json.dumps(body, sort_keys=True).encode()) == sealed["crc32"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return body if whole and isinstance(body, dict) else None


def _free(run: Path) -> str:
    place = next(p for p in (run, *run.absolute().parents) if p.exists())
    return f"{shutil.disk_usage(place).free / 1e6:.0f} MB free there"

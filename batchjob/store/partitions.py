"""One partition made visible whole or not at all: durable writes, claims, done-markers, and the check of them.

The order is what survives a kill at any moment: each shard is encoded in memory, written to a scratch folder, fsynced
and renamed over; the folders are fsynced; the done-marker, with size and checksum of each file, comes last.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from batchjob.errors import UserError, WorkLeft

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
_LEFT_AFTER_S = 3600
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing wrong with a published partition; `partition` is -1 for what belongs to the whole store."""

    partition: int
    path: str  # relative to RUN
    reason: str

    def __str__(self) -> str:
        where = "the store's own" if self.partition < 0 else f"partition {self.partition}"
        return f"{where}: {self.path}: {self.reason}"


@contextlib.contextmanager
def explained(run: Path, doing: str) -> Iterator[None]:
    """Turns the errors of a full, read-only or forbidden file system into one line; others pass.

    Raises WorkLeft for a full disk or quota (free some space and go on), UserError for what isn't writable.
    """
    try:
        yield
    except OSError as error:
        what = f"{doing}: {os.strerror(error.errno) if error.errno else error}"
        if error.errno in _FULL:
            raise WorkLeft(
                f"{what} ({_free(run)}); nothing published is lost; free some space or quota for {run}, then go on "
                f"with: batchjob run, on the same RUN"
            ) from error
        if error.errno in _FORBIDDEN:
            raise UserError(f"{what}; {run} must be writable: choose another RUN or change its permissions") from error
        raise


def work_folder(run: Path, name: str) -> Path:
    """RUN/work/`name`, made if need be: what is there only while a run is in progress."""
    folder = run / "work" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def new_scratch(run: Path) -> Path:
    """A folder of this process alone, on the file system of RUN, so that a rename out of it is atomic."""
    folder = work_folder(run, "scratch") / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    return folder


def write_file(path: Path, data: bytes, scratch: Path) -> None:
    """`path` holds `data`, or what it held before: written aside, fsynced, renamed. Its folder is not synced."""
    aside = scratch / f"{uuid.uuid4().hex[:8]}-{path.name}"
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """The names in `folder` are on the disk, as far as its file system can promise it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # some network file systems sync names by themselves
            raise
    finally:
        os.close(handle)


def publish(run: Path, partition: int, files: Mapping[str, bytes], facts: Mapping[str, Any], scratch: Path) -> None:
    """Puts the files (paths relative to RUN) of one partition in place, its done-marker last."""
    marker_path(run, partition).unlink(missing_ok=True)  # a repair: while it is half done it is not done
    for path, data in files.items():
        write_file(run / path, data, scratch)
    for folder in sorted({(run / path).parent for path in files}):
        sync_folder(folder)
    body = {"partition": partition, "files": {p: [len(d), zlib.crc32(d)] for p, d in files.items()}, **facts}
    write_file(marker_path(run, partition), _seal(body), scratch)
    sync_folder(run / "done")


def unpublish(run: Path, partition: int) -> None:
    """The partition counts as missing from now on, and the next `run` labels it again."""
    marker_path(run, partition).unlink(missing_ok=True)
    sync_folder(run / "done")


def marker_path(run: Path, partition: int) -> Path:
    """RUN/done/PARTITION.json."""
    return run / "done" / f"{partition:06d}.json"


def published(run: Path) -> list[int]:
    """The partitions that have a done-marker, ascending; reads names only."""
    with contextlib.suppress(FileNotFoundError), os.scandir(run / "done") as entries:
        names = [entry.name for entry in entries]
        return sorted(int(n.removesuffix(".json")) for n in names if n.endswith(".json") and n[0].isdigit())
    return []


def read_marker(run: Path, partition: int) -> dict[str, Any] | None:
    """What the done-marker says, None if it is missing or damaged."""
    try:
        return _unseal(marker_path(run, partition).read_bytes())
    except FileNotFoundError:
        return None


def check_partition(run: Path, partition: int, *, contents: bool) -> list[Damage]:
    """What is wrong with a published partition; without `contents` only sizes are looked at."""
    marker = read_marker(run, partition)
    if marker is None:
        return [Damage(partition, f"done/{partition:06d}.json", "the done-marker is unreadable")]
    return check_files(run, partition, marker["files"], contents=contents)


def check_files(run: Path, partition: int, files: Mapping[str, Sequence[int]], *, contents: bool) -> list[Damage]:
    """What is wrong with files (path relative to RUN -> [size, crc32])."""
    damages = []
    for path, (size, checksum) in files.items():
        try:
            found = (run / path).stat().st_size
            if found == 0 < size:
                damages.append(Damage(partition, path, f"empty, {size} bytes were published"))
            elif found != size:
                damages.append(Damage(partition, path, f"{found} bytes, {size} were published"))
            elif contents and zlib.crc32((run / path).read_bytes()) != checksum:
                damages.append(Damage(partition, path, "its checksum differs from the published one"))
        except FileNotFoundError:
            damages.append(Damage(partition, path, "missing"))
        except OSError as error:
            damages.append(Damage(partition, path, f"unreadable: {os.strerror(error.errno or 0)}"))
    return damages


def check_all(run: Path, partitions: Iterable[int], *, contents: bool) -> list[Damage]:
    """`check_partition` of many, in order, eight at a time: file systems of clusters are slow one by one."""
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda i: check_partition(run, i, contents=contents), partitions)
        return [damage for damages in found for damage in damages]


class Claims:
    """Which partitions this process works on, known to every process of every job on the RUN.

    A claim is a byte-range lock on RUN/work/claims: the kernel (for a network file system, its server) lets it go when
    the process dies, so no claim outlives its owner and none must be cleaned up. Not shared with forked children.
    """

    def __init__(self, folder: Path) -> None:
        """`folder`: RUN/work, for the claims of partitions."""
        self._file = os.open(folder / "claims", os.O_RDWR | os.O_CREAT, 0o666)
        self._works = True

    def take(self, partition: int) -> bool:
        """True if the partition is ours now; False while another process has it."""
        try:
            if self._works:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, partition)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                return False
            self._works = False
            print("this file system has no locks: start no second job on the same RUN", file=sys.stderr)
        return True

    def release(self, partition: int) -> None:
        """Others may take the partition."""
        if self._works:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, partition)

    def close(self) -> None:
        """All claims are let go."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def seal_file(path: Path, body: Mapping[str, Any], scratch: Path) -> None:
    """Writes `body` as JSON with a checksum of itself, durably."""
    write_file(path, _seal(body), scratch)
    sync_folder(path.parent)


def unseal_file(path: Path) -> dict[str, Any] | None:
    """The inverse of `seal_file`; None if it is missing or damaged."""
    try:
        return _unseal(path.read_bytes())
    except FileNotFoundError:
        return None


def drop_scratch(run: Path) -> None:
    """Removes what killed processes left: those of this machine that are gone, others' after an hour."""
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


def _seal(body: Mapping[str, Any]) -> bytes:
    text = json.dumps(body, sort_keys=True)
    return json.dumps({"crc32": zlib.crc32(text.encode()), "body": body}, sort_keys=True).encode()


def _unseal(data: bytes) -> dict[str, Any] | None:
    try:
        sealed = json.loads(data)
        body = sealed["body"]
        whole = zlib.crc32(json.dumps(body, sort_keys=True).encode()) == sealed["crc32"]
    except (ValueError, KeyError, TypeError):
        return None
    return body if whole and isinstance(body, dict) else None


def _free(run: Path) -> str:
    place = next(p for p in (run, *run.absolute().parents) if p.exists())
    return f"{shutil.disk_usage(place).free / 1e6:.0f} MB free there"

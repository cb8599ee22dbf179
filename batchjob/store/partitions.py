"""Publishes a partition whole or not at all, and checks its files against its done-marker.

A kill at any moment does no harm, thanks to the order. Each shard is encoded in memory, written to a scratch folder,
fsynced and renamed to its place. Then the folders are fsynced. The done-marker, which has the size and checksum of each
file, comes last.
"""

import contextlib
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchjob.files import seal, sync_folder, unseal_file, write_file

_MARKER = re.compile(r"[0-9]{6,}\.json")  # not the copies and hidden files that people and tools leave there


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is not as it was published; `partition` is -1 for one that belongs to the whole store."""

    partition: int
    path: str  # relative to RUN
    reason: str

    def __str__(self) -> str:
        where = "the store's own" if self.partition < 0 else f"partition {self.partition}"
        return f"{where}: {self.path}: {self.reason}"


def publish(run: Path, partition: int, files: Mapping[str, bytes], facts: Mapping[str, Any], scratch: Path) -> None:
    """Puts the files of a partition in place, the done-marker last.

    Parameters
    ----------
    run
        The folder of the run.
    partition
        The number of the partition.
    files
        The content of each file by path relative to RUN.
    facts
        What else the done-marker holds.
    scratch
        A folder of this process on the same file system.

    Raises
    ------
    OSError
        A file could not be written; the partition counts as missing.
    """
    marker_path(run, partition).unlink(missing_ok=True)  # while a repair is under way, the partition is missing
    for path, data in files.items():
        write_file(run / path, data, scratch)
    for folder in sorted({(run / path).parent for path in files}):
        sync_folder(folder)
    body = {"partition": partition, "files": {p: [len(d), zlib.crc32(d)] for p, d in files.items()}, **facts}
    write_file(marker_path(run, partition), seal(body), scratch)
    sync_folder(run / "done")


def unpublish(run: Path, partition: int) -> None:
    """Makes a partition count as missing, so that the next `run` labels it again.

    Parameters
    ----------
    run
        The folder of the run.
    partition
        The number of the partition, which may be missing already.

    Raises
    ------
    OSError
        RUN can't be written.
    """
    marker_path(run, partition).unlink(missing_ok=True)
    sync_folder(run / "done")


def marker_path(run: Path, partition: int) -> Path:
    """Names the done-marker of a partition.

    Parameters
    ----------
    run
        The folder of the run.
    partition
        The number of the partition.

    Returns
    -------
    RUN/done/PARTITION.json, the number with six digits or more.
    """
    return run / "done" / f"{partition:06d}.json"


def published(run: Path) -> list[int]:
    """Lists the partitions that have a done-marker, ascending; reads no file."""
    with contextlib.suppress(FileNotFoundError), os.scandir(run / "done") as entries:
        names = [entry.name for entry in entries]
        return sorted(int(n.removesuffix(".json")) for n in names if _MARKER.fullmatch(n))
    return []


def read_marker(run: Path, partition: int) -> dict[str, Any] | None:
    """Reads the done-marker of a partition.

    Parameters
    ----------
    run
        The folder of the run.
    partition
        The number of the partition.

    Returns
    -------
    What it holds: `files` with [size, crc32] by path, and the facts; None where it is missing, damaged or of another
    partition.
    """
    body = unseal_file(marker_path(run, partition))
    return body if body is not None and body.get("partition") == partition else None


def check_partition(run: Path, partition: int, *, contents: bool) -> list[Damage]:
    """Finds what is wrong with a published partition.

    Parameters
    ----------
    run
        The folder of the run.
    partition
        The number of the partition.
    contents
        Whether every byte is read; else only sizes are looked at.

    Returns
    -------
    A Damage for each file, or for the done-marker; none where all is as it was published.
    """
    marker = read_marker(run, partition)
    if marker is None:
        return [Damage(partition, f"done/{partition:06d}.json", "the done-marker is unreadable")]
    return check_files(run, partition, marker["files"], contents=contents)


def check_files(run: Path, partition: int, files: Mapping[str, Sequence[int]], *, contents: bool) -> list[Damage]:
    """Finds the files that are not as they were published.

    Parameters
    ----------
    run, contents
        As in `check_partition`.
    partition
        The partition that they belong to; -1 for the whole store.
    files
        [size in bytes, crc32] by path relative to RUN.

    Returns
    -------
    A Damage for each file that is missing, unreadable or different.
    """
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
    """Checks many partitions, eight at a time, since each access takes long on the file system of a cluster.

    Parameters
    ----------
    run, contents
        As in `check_partition`.
    partitions
        Numbers of published partitions.

    Returns
    -------
    What `check_partition` finds in each, in the order of the partitions.
    """
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda i: check_partition(run, i, contents=contents), partitions)
        return [damage for damages in found for damage in damages]

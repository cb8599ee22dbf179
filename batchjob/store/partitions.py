"""One partition made visible whole or not at all: its files, its done-marker, and the check of them.

The order is what survives a kill at any moment: each shard is encoded in memory, written to a scratch folder, fsynced
and renamed over; the folders are fsynced; the done-marker, with size and checksum of each file, comes last.
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

_MARKER = re.compile(r"[0-9]{6,}\.json")  # not what people or tools leave beside: copies, hidden files


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing wrong with a published partition; `partition` is -1 for what belongs to the whole store."""

    partition: int
    path: str  # relative to RUN
    reason: str

    def __str__(self) -> str:
        where = "the store's own" if self.partition < 0 else f"partition {self.partition}"
        return f"{where}: {self.path}: {self.reason}"


def publish(run: Path, partition: int, files: Mapping[str, bytes], facts: Mapping[str, Any], scratch: Path) -> None:
    """Puts the files of one partition in place, its done-marker last.

    Parameters
    ----------
    run
        The folder of the run.
    partition
        Its number.
    files
        Path relative to RUN -> content.
    facts
        What else the done-marker holds.
    scratch
        A folder of this process on the same file system.

    Raises
    ------
    OSError
        A file could not be written; the partition counts as missing.
    """
    marker_path(run, partition).unlink(missing_ok=True)  # a repair: while it is half done it is not done
    for path, data in files.items():
        write_file(run / path, data, scratch)
    for folder in sorted({(run / path).parent for path in files}):
        sync_folder(folder)
    body = {"partition": partition, "files": {p: [len(d), zlib.crc32(d)] for p, d in files.items()}, **facts}
    write_file(marker_path(run, partition), seal(body), scratch)
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
        return sorted(int(n.removesuffix(".json")) for n in names if _MARKER.fullmatch(n))
    return []


def read_marker(run: Path, partition: int) -> dict[str, Any] | None:
    """What the done-marker says, None if it is missing, damaged or another partition's."""
    body = unseal_file(marker_path(run, partition))
    return body if body is not None and body.get("partition") == partition else None


def check_partition(run: Path, partition: int, *, contents: bool) -> list[Damage]:
    """Finds what is wrong with a published partition.

    Parameters
    ----------
    run
        The folder of the run.
    partition
        Its number.
    contents
        Whether every byte is read; else only sizes are looked at.

    Returns
    -------
        One Damage a file; nothing where all is as it was published.
    """
    marker = read_marker(run, partition)
    if marker is None:
        return [Damage(partition, f"done/{partition:06d}.json", "the done-marker is unreadable")]
    return check_files(run, partition, marker["files"], contents=contents)


def check_files(run: Path, partition: int, files: Mapping[str, Sequence[int]], *, contents: bool) -> list[Damage]:
    """Finds what is wrong with files.

    Parameters
    ----------
    run
        The folder of the run.
    partition
        What they belong to; -1 for the whole store.
    files
        Path relative to RUN -> [size, crc32].
    contents
        Whether every byte is read; else only sizes are looked at.

    Returns
    -------
        One Damage a file that is not as it was published.
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
    """Checks many partitions, in order, eight at a time: file systems of clusters are slow one by one.

    Parameters
    ----------
    run
        The folder of the run.
    partitions
        Their numbers.
    contents
        Whether every byte is read; else only sizes are looked at.

    Returns
    -------
        What `check_partition` finds in each.
    """
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda i: check_partition(run, i, contents=contents), partitions)
        return [damage for damages in found for damage in damages]

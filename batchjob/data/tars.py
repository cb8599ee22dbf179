"""Indexes tars as image shards: expands braced ranges, reads WebDataset samples, finds where each picture begins."""

import contextlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from batchjob.data.folders import suffix_of
from batchjob.data.index import IndexBuilder
from batchjob.data.shards import LINK, LOST, SPARSE, Shard
from batchjob.errors import UserError

MAX_JSON_BYTES = 2**20
ID_FIELDS = ("id", "image_id")  # the first of them that a sample's JSON has is the image's id
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BLOCK = 512
# what tarfile raises besides its own errors for numbers, maps and names that no program writes
_BAD_HEADER = (ValueError, LookupError, OverflowError, MemoryError, RecursionError, OSError)


@dataclass(frozen=True, slots=True)
class _Member:
    """A regular file or a link of a tar.

    `start` is its first byte; `size` is in bytes, or `LINK` or `SPARSE` where it has no bytes of its own.
    """

    name: bytes
    start: int
    size: int

    @property
    def key(self) -> bytes:
        """WebDataset's sample key: the path up to the first dot of the file's name."""
        folder, slash, file = self.name.rpartition(b"/")
        return folder + slash + file.partition(b".")[0]

    @property
    def extension(self) -> bytes:
        """What follows the key, in lower case, its first dot included."""
        return self.name[len(self.key) :].lower()


@dataclass(slots=True)
class _Reading:
    """What was noticed while one tar was read."""

    cut: str = ""  # in what way the tar ends early; empty for a whole one
    second_pictures: int = 0  # left out, since the first picture of a sample counts
    behind: int = 0  # bytes behind the end mark that are not another tar
    last: _Member | None = field(default=None)  # with bytes of its own


def expand(pattern: str) -> list[str]:
    """Returns the names that a braced pattern stands for: `{000..041}` and `{a,b}`, as a shell expands them."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if i % 2 == 0 else _choices(part) for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def add_tars(builder: IndexBuilder, paths: list[str], extensions: frozenset[bytes], limit: int) -> Iterator[str]:
    """Adds the pictures of tars to an index, in order.

    Parameters
    ----------
    builder
        Made for `tar`.
    paths
        As `add_parquet`.
    extensions
        Of pictures, in lower case, with their dot.
    limit
        As `add_parquet`.

    Yields
    ------
    A remark for each tar that is cut off or has something left out, and "" after each sample, for the progress bar.

    Raises
    ------
    UserError
        A file is not a tar.
    """
    common = os.path.commonpath([os.path.dirname(p) for p in paths])
    for number, path in enumerate(paths):
        tar = Shard.at(path, os.path.relpath(path, common))
        builder.shards.append(tar)
        reading = _Reading()
        with open(path, "rb") as file:
            for _, sample in itertools.groupby(_members(path, reading), key=lambda m: m.key):
                _add_sample(builder, list(sample), extensions, number, file.fileno(), reading)
                if limit and len(builder) >= limit:
                    return
                yield ""
        if reading.second_pictures:
            yield f"{path}: {reading.second_pictures} pictures left out, each the second of its sample (equal stem)"
        if reading.behind:
            yield f"{path}: {reading.behind} bytes behind its end mark are not a tar; left out"
        if reading.cut:
            yield f"{path} {reading.cut}"
            inside = reading.last is not None and reading.last.start + reading.last.size > tar.size
            if not (inside and reading.last is not None and suffix_of(reading.last.name) in extensions):
                builder.add(b"(cut off)", place=(number, 0, LOST))


def _add_sample(
    builder: IndexBuilder, sample: list[_Member], extensions: frozenset[bytes], number: int, fd: int, reading: _Reading
) -> None:
    pictures = [m for m in sample if m.extension in extensions]
    if pictures:
        reading.second_pictures += len(pictures) - 1
        picture = pictures[0]
        own = next((_json_id(m, fd) for m in sample if m.extension == b".json"), "")
        builder.add(picture.key, id=own, place=(number, picture.start, picture.size))
        return
    for m in sample:  # no picture has the plain key: those with dots in their names, as `IMG.2020.jpg`, are samples
        if suffix_of(m.name) in extensions:
            builder.add(os.path.splitext(m.name)[0], place=(number, m.start, m.size))


class _Header(tarfile.TarInfo):
    """A member's header. It refuses negative sizes, which would lead back to the header for ever (CVE-2025-8194)."""

    def _block(self, count: int) -> int:
        if not 0 <= count < 2**62:
            raise tarfile.InvalidHeaderError(f"a size of {count}")  # type: ignore[attr-defined]
        return int(super()._block(count))  # type: ignore[misc]


def _members(path: str, reading: _Reading) -> Iterator[_Member]:
    """Yields the files and links of a tar, in order; `reading.cut` says in the end whether the tar is whole.

    Where several tars were written into one file, one after another, all of them are read, as by `tar --ignore-zeros`.
    """
    if os.path.getsize(path) == 0:
        reading.cut = "is empty"
        return
    with open(path, "rb") as file:
        start: int | None = 0
        while start is not None and not reading.cut:
            end = yield from _members_of_one(path, file, start, reading)
            start = None if reading.cut else _after_zeros(file, end)


def _members_of_one(path: str, file: BinaryIO, start: int, reading: _Reading) -> Generator[_Member, None, int]:
    """Yields the members of the tar that begins at byte `start`; returns the byte where its end mark begins."""
    size = os.fstat(file.fileno()).st_size
    file.seek(start)
    try:
        tar = tarfile.open(fileobj=file, mode="r:", tarinfo=_Header, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    except (tarfile.ReadError, *_BAD_HEADER) as error:
        file.seek(0)
        zipped = file.read(2) == b"\x1f\x8b"
        remedy = "unzip it: a compressed tar has no offsets" if zipped else "make it one, or leave it out"
        raise UserError(f"{path} is asked for as a tar and is not one ({error}); {remedy}") from None
    with tar:
        try:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every member it has seen
                name = info.name.encode("utf-8", "surrogateescape").removeprefix(b"./")
                if os.path.basename(name).startswith(b"."):
                    continue
                if info.issym() or info.islnk():
                    yield _Member(name, 0, LINK)
                elif info.isreg():
                    reading.last = _Member(name, info.offset_data, info.size)
                    yield _Member(name, 0, SPARSE) if info.issparse() else reading.last
        except tarfile.ReadError:
            reading.cut = f"is cut off after {size} bytes"
            return size
        except _BAD_HEADER:
            reading.cut = f"is damaged at byte {tar.offset}"
            return size
        end: int = tar.offset
    file.seek(end)
    mark = file.read(_BLOCK)
    if len(mark) < _BLOCK:
        reading.cut = f"is cut off after {size} bytes: it has no end mark"
    elif mark.count(0) != len(mark) and start and end == start:  # what follows the first tar has no member
        reading.behind = size - start
        return size
    elif mark.count(0) != len(mark):
        reading.cut = f"is damaged at byte {end}"
    return end


def _after_zeros(file: BinaryIO, start: int) -> int | None:
    """Returns the byte where the first block from `start` on begins that is not all zeros; None where all are."""
    file.seek(start)
    while block := file.read(_BLOCK):
        if block.count(0) != len(block):
            return start
        start += _BLOCK
    return None


def _json_id(member: _Member, fd: int) -> str:
    if not 0 < member.size <= MAX_JSON_BYTES:
        return ""
    with contextlib.suppress(ValueError, RecursionError):  # what does not parse as JSON gives no id
        values = json.loads(os.pread(fd, member.size, member.start))
        if isinstance(values, dict):
            return next((str(values[f]) for f in ID_FIELDS if isinstance(values.get(f), str | int)), "")
    return ""


def _choices(inside: str) -> list[str]:
    found = _RANGE.fullmatch(inside)
    if not found:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    first, last = found.groups()
    low, high = int(first), int(last)
    width = len(first) if first.startswith("0") or last.startswith("0") else 0
    return [str(i).zfill(width) for i in range(low, high + 1 if high >= low else high - 1, 1 if high >= low else -1)]

"""Reads images out of image shards, which are files of many images: tars and Parquet files."""

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from batchjob.data.reading import MAX_FILE_BYTES, ReadFailure, one_line, raise_for_change
from batchjob.errors import UserError

OPEN_TARS = 64  # the most that a process keeps open: a thousand shards would exceed the usual limit of 1024 files
IMAGE_COLUMNS = ("image", "img")  # the first of them that holds images is a Parquet file's column of images
ROWS_AT_ONCE = 16  # images of a Parquet file that are in memory at once
PAGE_BYTES = 2**20  # read at once from a column of a Parquet file

# These stand in place of the size of a member that has no bytes of its own in the tar.
LINK, SPARSE, LOST = -1, -2, -3
_NO_BYTES = {
    LINK: ("unreadable", "is a link inside {tar}; pack the file itself"),
    SPARSE: ("unreadable", "is a sparse file inside {tar}; pack it plainly"),
    LOST: ("missing", "{tar} is cut off: what followed its last whole member is lost"),
}
Place = tuple[int, int, int]  # the shard's number, and two numbers that depend on the kind: see the readers


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar or Parquet file of the index, with its size and time of change when it was indexed."""

    path: str
    name: str  # the ids of its rows begin with it
    size: int  # bytes
    mtime_ns: int

    @classmethod
    def at(cls, path: str, name: str) -> "Shard":
        """Makes the shard of a file as it is now.

        Parameters
        ----------
        path
            Absolute.
        name
            What the ids of its rows begin with.
        """
        found = os.stat(path)
        return cls(path, name, found.st_size, found.st_mtime_ns)

    def raise_for_change(self, found: os.stat_result) -> None:
        """Raises ReadFailure where the file is not the one that was indexed."""
        raise_for_change(found, (self.size, self.mtime_ns), self.path)


class Reader(Protocol):
    """Reads the bytes of images out of shards."""

    def read(self, place: Place) -> bytes:
        """Reads the bytes of one image. Raises ReadFailure, and nothing else whatever the disk holds."""

    def close(self) -> None:
        """Closes the files that `read` opened."""


def open_reader(kind: str, shards: Sequence[Shard]) -> Reader:
    """Makes the reader of some shards, which opens none of them yet.

    Parameters
    ----------
    kind
        `tar` or `parquet`.
    shards
        In the order of the numbers that a `Place` begins with.
    """
    return _TarReader(shards) if kind == "tar" else _ParquetReader(shards)


def raise_for_changes(shards: Sequence[Shard]) -> None:
    """Raises UserError where a shard has changed since it was indexed, since the places of its images may be wrong.

    A shard that is gone is passed over here: each of its rows says so when it is read.
    """
    for shard in shards:
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(os.fsencode(shard.path))
            if (found.st_size, found.st_mtime_ns) != (shard.size, shard.mtime_ns):
                raise UserError(f"{shard.path} has changed since it was planned; plan anew, into another RUN")


class _TarReader:
    """Reads tars by offset. A place is (tar, first byte, size in bytes or `LINK`, `SPARSE`, `LOST`)."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, place: Place) -> bytes:
        """Reads the bytes of one image, as `Reader` says."""
        number, start, size = place
        tar = self._shards[number]
        if size in _NO_BYTES:
            cause, message = _NO_BYTES[size]
            raise ReadFailure(cause, message.format(tar=tar.path))
        _raise_for_size(size)
        with _told(tar):
            data = _read_at(self._descriptor(number), start, size)
            tar.raise_for_change(os.fstat(self._descriptor(number)))
        if len(data) < size:
            raise ReadFailure("truncated", f"{tar.path} is cut off inside it, after {len(data)} of {size} bytes")
        return data

    def close(self) -> None:
        """Closes the tars that `read` opened."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            if len(self._open) >= OPEN_TARS:
                os.close(self._open.popitem(last=False)[1])
            self._open[number] = os.open(os.fsencode(self._shards[number].path), os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(number)
        return self._open[number]


class _ParquetReader:
    """Reads the image column of Parquet files. A place is (file, row group, row of the group).

    It goes through a row group once, from its first row to its last. Only a few images are in memory at a time, since a
    group may be larger than the memory. A row before those in memory makes it begin its group again.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._number = self._group = -1  # of the file and the row group that are open
        self._file: Any = None
        self._leaf = ""
        self._batches: Iterator[Any] = iter(())
        self._images: Any = ()  # the rows in memory
        self._first = self._behind = 0  # the first row in memory, and the row behind the last
        self._broken = ""  # why the group can't be read from row `_behind` on

    def read(self, place: Place) -> bytes:
        """Reads the bytes of one image, as `Reader` says."""
        number, group, row = place
        shard = self._shards[number]
        with _told(shard):
            if number != self._number:
                self._open(number)
            if group != self._group or row < self._first:
                self._start(group)
            while row >= self._behind:
                self._go_on(shard)
        image = self._images[row - self._first]
        if not image.is_valid:
            where = f"row {row} of row group {group} of {shard.path}"
            raise ReadFailure("not_an_image", f"null in place of an image, in {where}")
        _raise_for_size(image.as_buffer().size)
        data: bytes = image.as_buffer().to_pybytes()
        return data

    def close(self) -> None:
        """Closes the file that `read` opened."""
        if self._file is not None:
            self._file.close(force=True)
        self._file, self._number, self._group = None, -1, -1
        self._batches, self._images = iter(()), ()

    def _open(self, number: int) -> None:
        self.close()
        shard = self._shards[number]
        shard.raise_for_change(os.stat(os.fsencode(shard.path)))
        self._file = open_parquet(shard.path)
        self._leaf = leaf_of_images(self._file.schema_arrow) or ""
        self._number = number

    def _start(self, group: int) -> None:
        self._group, self._first, self._behind, self._broken = group, 0, 0, ""
        self._batches = self._file.iter_batches(
            batch_size=ROWS_AT_ONCE, row_groups=[group], columns=[self._leaf], use_threads=False
        )

    def _go_on(self, shard: Shard) -> None:
        """Replaces the rows in memory by the next rows of the group."""
        if self._broken:
            raise ReadFailure("truncated", self._broken)
        self._images = ()
        try:
            images = next(self._batches).column(0)
        except parquet_errors() as error:
            if isinstance(error, OSError) and error.errno is not None:
                self._group = -1  # the disk's fault, which may pass
                raise
            shard.raise_for_change(os.stat(os.fsencode(shard.path)))
            reason = one_line(error) or "rows are missing"
            self._broken = f"{shard.path} is damaged in row group {self._group}: {reason}"
            raise ReadFailure("truncated", self._broken) from None
        shard.raise_for_change(os.stat(os.fsencode(shard.path)))
        if "." in self._leaf:  # the bytes of a struct; null where the struct is
            images = images.flatten()[0]
        self._images = images.dictionary_decode() if hasattr(images, "dictionary_decode") else images
        self._first, self._behind = self._behind, self._behind + len(images)


def open_parquet(path: str) -> Any:
    """Opens a Parquet file as a `pyarrow.parquet.ParquetFile` that reads no further than it is asked to."""
    import pyarrow
    from pyarrow import parquet

    source = pyarrow.OSFile(os.fsencode(path))  # as bytes: pyarrow refuses a text that is not UTF-8
    return parquet.ParquetFile(source, pre_buffer=False, buffer_size=PAGE_BYTES)


def parquet_errors() -> tuple[type[Exception], ...]:
    """Returns what pyarrow raises for a damaged file or a bad disk, and StopIteration for missing rows."""
    import pyarrow

    return StopIteration, OSError, ValueError, MemoryError, pyarrow.ArrowException


def leaf_of_images(schema: Any) -> str | None:
    """Returns the column of images in an Arrow schema, such as `image`, or `image.bytes` of a struct; None for none."""
    from pyarrow import types

    for name in IMAGE_COLUMNS:
        at = schema.get_field_index(name)
        kind = schema.field(at).type if at >= 0 else None
        if kind is None:
            continue
        if types.is_dictionary(kind):
            kind = kind.value_type
        if _is_bytes(kind):
            return name
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type):
            return f"{name}.bytes"
    return None


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    kinds = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(is_of_kind(kind) for is_of_kind in kinds)


@contextlib.contextmanager
def _told(shard: Shard) -> Iterator[None]:
    """Turns the errors of the disk into a ReadFailure."""
    try:
        yield
    except FileNotFoundError:
        raise ReadFailure("missing", f"{shard.path} is gone") from None
    except OSError as error:
        raise ReadFailure("unreadable", f"{shard.path}: {one_line(error.strerror or error)}") from None


def _raise_for_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ReadFailure("too_large", f"{size} bytes; at most {MAX_FILE_BYTES} are read")


def _read_at(fd: int, start: int, size: int) -> bytes:
    parts: list[bytes] = []
    got = 0
    while got < size:
        part = os.pread(fd, size - got, start + got)
        if not part:
            break
        parts.append(part)
        got += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)

"""Where each image of DATA lies: arrays of bytes and offsets, memory-mapped, a few dozen bytes a row."""

import contextlib
import json
import os
from array import array
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from batchjob.data.reading import MAX_FILE_BYTES, ReadFailure, one_line, raise_for_change, read_file
from batchjob.errors import UserError

VERSION = 2
_STATS_AT_ONCE = 16  # file systems of clusters are slow one by one
_STATS_PENDING = 1024  # the pool holds a future for each
OPEN_TARS = 64  # file descriptors a process keeps: a thousand shards would meet the usual limit of 1024

# What `size` says of a member that has no bytes of its own in the tar.
LINK, SPARSE, LOST = -1, -2, -3
_NO_BYTES = {
    LINK: ("unreadable", "is a link inside {tar}; pack the file itself"),
    SPARSE: ("unreadable", "is a sparse file inside {tar}; pack it plainly"),
    LOST: ("missing", "{tar} is cut off: what followed its last whole member is lost"),
}


@dataclass(frozen=True, slots=True)
class Tar:
    """A tar of the index, and what it looked like when its offsets were taken."""

    path: str
    name: str  # how ids begin
    size: int
    mtime_ns: int


class Texts:
    """Byte strings end to end, and where each begins."""

    def __init__(self, data: NDArray[np.uint8], offsets: NDArray[np.uint64]) -> None:
        self.data = data
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> bytes:
        return self.data[int(self.offsets[i]) : int(self.offsets[i + 1])].tobytes()


class ImageIndex:
    """The rows of a run, in order: what each is called and where its bytes are.

    `save` writes it as a folder and `load` maps that folder, so that handing it to a worker costs the folder's name.
    """

    def __init__(
        self,
        meta: dict[str, Any],
        names: Texts,
        ids: Texts | None,
        places: NDArray[np.int64] | None,
        stamps: NDArray[np.int64] | None,
    ) -> None:
        self.meta = meta
        self.root = os.fsencode(meta["root"])
        self.annotations: str = meta["annotations"]
        self.remarks: list[str] = meta["remarks"]  # what was left out or lost, for the user
        self.tars = [Tar(**tar) for tar in meta["tars"]]
        self._names = names
        self._ids = ids
        self._places = places  # [rows, 3]: tar, first byte, size
        self._stamps = stamps  # of files, [rows, 2]: size and time of change in ns when planned; -1 if it wasn't seen
        self._folder: Path | None = None
        self._open_tars: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._folder is not None:
            return ImageIndex.load, (self._folder,)
        return ImageIndex, (self.meta, self._names, self._ids, self._places, self._stamps)

    def id(self, i: int) -> str:
        """The row's original id: the path below the root, or the tar's name and key, or what a list or JSON gives."""
        own = b"" if self._ids is None else self._ids[i]
        if own:
            return own.decode("utf-8", "backslashreplace")
        name = escape(self._names[i])
        return name if self._places is None else f"{self.tars[int(self._places[i, 0])].name}/{name}"

    def ids(self, start: int = 0, stop: int | None = None) -> list[str]:
        """The ids of rows [start, stop)."""
        return [self.id(i) for i in range(start, len(self) if stop is None else stop)]

    def coco_id(self, i: int) -> str:
        """What an annotation file calls the image: the file's name without folders, or the id a list or JSON gives."""
        if self._ids is not None and self._ids[i]:
            return self.id(i)
        return escape(self._names[i].rpartition(b"/")[2])

    def where(self, i: int) -> str:
        """The file, or the tar and the member, for messages."""
        if self._places is None:
            return escape(os.path.join(self.root, self._names[i]))
        return f"{self.tars[int(self._places[i, 0])].path}: {escape(self._names[i])}"

    def read(self, i: int) -> bytes:
        """The image's bytes; raises ReadFailure, and nothing else for whatever the disk holds."""
        if self._places is None:
            planned = None if self._stamps is None else (int(self._stamps[i, 0]), int(self._stamps[i, 1]))
            return read_file(os.path.join(self.root, self._names[i]), planned)
        number, start, size = (int(v) for v in self._places[i])
        tar = self.tars[number]
        if size in _NO_BYTES:
            cause, message = _NO_BYTES[size]
            raise ReadFailure(cause, message.format(tar=tar.path))
        if size > MAX_FILE_BYTES:
            raise ReadFailure("too_large", f"{size} bytes; at most {MAX_FILE_BYTES} are read")
        try:
            data = _read_at(self._descriptor(number), start, size)
            raise_for_change(os.fstat(self._descriptor(number)), (tar.size, tar.mtime_ns), tar.path)
        except FileNotFoundError:
            raise ReadFailure("missing", f"{tar.path} is gone") from None
        except OSError as error:
            raise ReadFailure("unreadable", f"{tar.path}: {one_line(error.strerror or error)}") from None
        if len(data) < size:
            raise ReadFailure("truncated", f"{tar.path} is cut off inside it, after {len(data)} of {size} bytes")
        return data

    def check(self) -> None:
        """Raises UserError where DATA is gone or a tar has changed: its offsets would point anywhere."""
        if not self.tars and not os.path.isdir(self.root):
            raise UserError(f"{escape(self.root)} was planned and is not a folder now; bring it back, or plan anew")
        for tar in self.tars:
            with contextlib.suppress(FileNotFoundError):  # its rows will say so
                found = os.stat(os.fsencode(tar.path))
                if (found.st_size, found.st_mtime_ns) != (tar.size, tar.mtime_ns):
                    raise UserError(f"{tar.path} has changed since it was planned; plan anew, into another RUN")

    def close(self) -> None:
        """Closes the tars that `read` opened."""
        while self._open_tars:
            os.close(self._open_tars.popitem()[1])

    def save(self, folder: Path) -> None:
        """Writes the index as `folder`; `load` maps it. The JSON comes last: without it the folder is not an index."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, texts in (("names", self._names), ("ids", self._ids)):
            if texts is not None:
                (folder / f"{name}.bin").write_bytes(texts.data.tobytes())
                np.save(folder / f"{name}.npy", texts.offsets)
        if self._places is not None:
            np.save(folder / "places.npy", self._places)
        if self._stamps is not None:
            np.save(folder / "stamps.npy", self._stamps)
        (folder / "index.json").write_text(json.dumps(self.meta, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The index that `save` wrote, mapped, not read: memory is the page cache's, shared by all processes."""
        meta = json.loads((folder / "index.json").read_text())
        if meta["version"] != VERSION:
            raise UserError(f"{folder} is an index of version {meta['version']}, known is {VERSION}; plan anew")
        index = cls(
            meta,
            _load_texts(folder, "names"),
            _load_texts(folder, "ids") if meta["has_ids"] else None,
            np.load(folder / "places.npy", mmap_mode="r") if meta["tars"] else None,
            None if meta["tars"] else np.load(folder / "stamps.npy", mmap_mode="r"),
        )
        index._folder = folder
        return index

    def _descriptor(self, number: int) -> int:
        if number not in self._open_tars:
            if len(self._open_tars) >= OPEN_TARS:
                os.close(self._open_tars.popitem(last=False)[1])
            self._open_tars[number] = os.open(os.fsencode(self.tars[number].path), os.O_RDONLY | os.O_CLOEXEC)
        self._open_tars.move_to_end(number)
        return self._open_tars[number]


class IndexBuilder:
    """Collects rows; `build` gives the index. Costs the names' bytes and some 20 more a row."""

    def __init__(self) -> None:
        self._names, self._name_offsets = bytearray(), array("Q", [0])
        self._ids, self._id_offsets = bytearray(), array("Q", [0])
        self._places = array("q")
        self._hashes = array("q")
        self.tars: list[Tar] = []

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, name: bytes, *, id: str = "", place: tuple[int, int, int] | None = None) -> None:
        """One row; `id` where it isn't the name, `place` = (number in `tars`, first byte, size) in a tar."""
        self._names += name
        self._name_offsets.append(len(self._names))
        self._ids += id.encode("utf-8", "backslashreplace")
        self._id_offsets.append(len(self._ids))
        if place is not None:
            self._places.extend(place)
        self._hashes.append(hash(id or (escape(name), place[0] if place else 0)))

    def build(self, root: bytes, *, annotations: str = "", remarks: list[str] | None = None) -> ImageIndex:
        """The index; raises UserError where two rows have one id."""
        meta = {
            "version": VERSION,
            "root": os.fsdecode(root),
            "annotations": annotations,
            "remarks": remarks or [],
            "tars": [asdict(tar) for tar in self.tars],
            "has_ids": bool(self._ids),
        }
        names = Texts(np.frombuffer(self._names, np.uint8), np.frombuffer(self._name_offsets, np.uint64))
        index = ImageIndex(
            meta,
            names,
            Texts(np.frombuffer(self._ids, np.uint8), np.frombuffer(self._id_offsets, np.uint64))
            if self._ids
            else None,
            np.frombuffer(self._places, np.int64).reshape(-1, 3) if self.tars else None,
            None if self.tars else _stamps(root, names),
        )
        _refuse_duplicates(index, np.frombuffer(self._hashes, np.int64))
        return index


def escape(name: bytes) -> str:
    r"""The name as text; bytes that are not UTF-8 become \xNN."""
    return name.decode("utf-8", "backslashreplace")


def _refuse_duplicates(index: ImageIndex, hashes: NDArray[np.int64]) -> None:
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(np.diff(hashes[order]) == 0)
    pairs = [(int(order[i]), int(order[i + 1])) for i in again[:1000]]
    equal = sorted((a, b) for a, b in pairs if index.id(a) == index.id(b))
    if equal:
        a, b = equal[0]
        first, second = one_line(index.where(a)), one_line(index.where(b))
        if index._names[a] == index._names[b] and index._places is None:
            raise UserError(
                f"{first} is named twice ({len(equal)} such pairs), in rows {a + 1} and {b + 1} of the data; "
                "leave one of them out"
            )
        raw = " (in one of them \\xNN are the characters, in the other a byte that is not UTF-8)"
        raise UserError(
            f"id {index.id(a)!r} is given to two images, {first} and {second}{raw if first == second else ''}"
            f" ({len(equal)} such pairs); every image needs an id of its own: rename one, or leave it out"
        )


def _stamps(root: bytes, names: Texts) -> NDArray[np.int64]:
    """[rows, 2]: size and time of change (ns) of each file, -1 for what can't be seen."""

    def stamp(i: int) -> tuple[int, int]:
        try:
            found = os.stat(os.path.join(root, names[i]))
        except (OSError, ValueError):
            return -1, -1
        return found.st_size, found.st_mtime_ns

    found = np.empty((len(names), 2), np.int64)
    with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
        for start in range(0, len(names), _STATS_PENDING):
            rows = range(start, min(start + _STATS_PENDING, len(names)))
            found[rows.start : rows.stop] = list(pool.map(stamp, rows))
    return found


def _texts(data: bytearray, offsets: "array[int]") -> Texts:
    return Texts(np.frombuffer(data, np.uint8), np.frombuffer(offsets, np.uint64))


def _load_texts(folder: Path, name: str) -> Texts:
    offsets = np.load(folder / f"{name}.npy", mmap_mode="r")
    data = np.memmap(folder / f"{name}.bin", np.uint8, "r") if offsets[-1] else np.empty(0, np.uint8)
    return Texts(data, offsets)


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

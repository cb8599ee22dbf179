"""The index of DATA: where each image lies, as memory-mapped arrays that take a few dozen bytes a row."""

import itertools
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from batchjob.data.reading import escape, one_line, read_file
from batchjob.data.shards import Place, Shard, open_reader, raise_for_changes
from batchjob.errors import UserError

VERSION = 3
MOST_CLASSES = 65_536  # a column of more values does not hold classes
_STATS_AT_ONCE = 16  # threads: the file system of a cluster takes long to answer each call
_STATS_PENDING = 1024  # the pool holds a future for each


class _Texts:
    """Byte strings: string i is `data[offsets[i] : offsets[i + 1]]`."""

    def __init__(self, data: NDArray[np.uint8], offsets: NDArray[np.uint64]) -> None:
        self.data = data
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> bytes:
        return self.data[int(self.offsets[i]) : int(self.offsets[i + 1])].tobytes()


class ImageIndex:
    """The rows of a run, in order: the name of each image, and where its bytes are.

    `save` writes the index as a folder, and `load` maps that folder. An index that was loaded is pickled as the name of
    its folder, so that a worker gets it at no cost.
    """

    def __init__(
        self,
        meta: dict[str, Any],
        names: _Texts,
        ids: _Texts | None,
        where: NDArray[np.int64],
        codes: Mapping[str, NDArray[np.int32]],
    ) -> None:
        """Takes over what `IndexBuilder.build` made or `load` mapped.

        Parameters
        ----------
        meta
            What index.json holds, as `IndexBuilder.build` writes it.
        names
            Of the rows: the path below the root, or the name inside the shard.
        ids
            Of the rows that have an id beside their name, "" for the others; None where no row has one.
        where
            With shards [rows, 3], the `Place` of each image; without [rows, 2], the size in bytes and the time of
            change in ns of each file when it was planned, −1 where it could not be seen.
        codes
            Column → [rows] the number of each row's value among `meta["columns"][column]`.
        """
        self.meta = meta
        self.root = os.fsencode(meta["root"])
        self.annotations: str = meta["annotations"]
        self.remarks: list[str] = meta["remarks"]  # lines for the user: what was left out or lost
        self.shards = [Shard(**shard) for shard in meta["shards"]]
        self.columns: tuple[str, ...] = tuple(meta["columns"])  # what is known of every image, such as its class
        self.bytes_a_worker: int = meta["bytes_a_worker"]  # memory that reading takes at most, besides the image itself
        self._names = names
        self._ids = ids
        self._where = where
        self._codes = codes
        self._folder: Path | None = None
        self._reader = open_reader(meta["kind"], self.shards)

    def __len__(self) -> int:
        return len(self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._folder is not None:
            return ImageIndex.load, (self._folder,)
        return ImageIndex, (self.meta, self._names, self._ids, self._where, self._codes)

    def id(self, i: int) -> str:
        """Returns the original id of row i: its path below the root, its shard and name, or what a list or JSON says.

        Bytes that are not UTF-8 are written as `\\xNN`.
        """
        own = b"" if self._ids is None else self._ids[i]
        if own:
            return own.decode("utf-8", "backslashreplace")
        name = escape(self._names[i])
        return f"{self.shards[int(self._where[i, 0])].name}/{name}" if self.shards else name

    def ids(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Returns the ids of consecutive rows.

        Parameters
        ----------
        start, stop
            The rows [start, stop); None for `stop`: to the last row.
        """
        return [self.id(i) for i in range(start, len(self) if stop is None else stop)]

    def column(self, name: str, start: int = 0, stop: int | None = None) -> list[str]:
        """Returns what a column says of consecutive rows, "" where it says nothing.

        Parameters
        ----------
        name
            One of `columns`.
        start, stop
            As `ids`.
        """
        values = self.meta["columns"][name]
        return [values[code] for code in self._codes[name][start:stop].tolist()]

    def where(self, i: int) -> str:
        """Returns the path of image i, or its shard and its name in it, for messages."""
        if not self.shards:
            return escape(os.path.join(self.root, self._names[i]))
        return f"{self.shards[int(self._where[i, 0])].path}: {escape(self._names[i])}"

    def file(self, i: int) -> str:
        """Returns the path of the file that holds image i: the photo, or its shard. It is for the system's calls."""
        if self.shards:
            return self.shards[int(self._where[i, 0])].path
        return os.fsdecode(os.path.join(self.root, self._names[i]))

    def read(self, i: int) -> bytes:
        """Reads the bytes of image i. Raises ReadFailure, and nothing else whatever the disk holds."""
        numbers = tuple(int(v) for v in self._where[i])
        if self.shards:
            place: Place = (numbers[0], numbers[1], numbers[2])
            return self._reader.read(place)
        return read_file(os.path.join(self.root, self._names[i]), (numbers[0], numbers[1]))

    def check(self) -> None:
        """Raises UserError where the folder of DATA is gone, or a shard has changed since it was planned."""
        if not self.shards and not os.path.isdir(self.root):
            raise UserError(f"{escape(self.root)} was planned and is not a folder now; bring it back, or plan anew")
        raise_for_changes(self.shards)

    def close(self) -> None:
        """Closes the shards that `read` opened."""
        self._reader.close()

    def save(self, folder: Path) -> None:
        """Writes the index as a folder, index.json last: without that file the folder is not an index."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, texts in (("names", self._names), ("ids", self._ids)):
            if texts is not None:
                (folder / f"{name}.bin").write_bytes(texts.data.tobytes())
                np.save(folder / f"{name}.npy", texts.offsets)
        np.save(folder / "where.npy", self._where)
        for name, codes in self._codes.items():
            np.save(folder / f"column_{name}.npy", codes)
        (folder / "index.json").write_text(json.dumps(self.meta, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Maps the index that `save` wrote; all processes share its pages. Raises UserError for another version."""
        meta = json.loads((folder / "index.json").read_text())
        if meta["version"] != VERSION:
            raise UserError(f"{folder} is an index of version {meta['version']}, known is {VERSION}; plan anew")
        index = cls(
            meta,
            _load_texts(folder, "names"),
            _load_texts(folder, "ids") if meta["has_ids"] else None,
            np.load(folder / "where.npy", mmap_mode="r"),
            {name: np.load(folder / f"column_{name}.npy", mmap_mode="r") for name in meta["columns"]},
        )
        index._folder = folder
        return index


def sizes_in_bytes(folder: Path) -> NDArray[np.int64] | None:
    """Reads from a saved index how large each image's file or tar member was when it was planned.

    Parameters
    ----------
    folder
        What `ImageIndex.save` wrote.

    Returns
    -------
    [rows], −1 where it could not be seen; None where there is no index, or the images lie in Parquet files.
    """
    meta, where = folder / "index.json", folder / "where.npy"
    kind = json.loads(meta.read_text())["kind"] if meta.exists() else ""
    column = {"": 0, "tar": 2}.get(kind)
    if column is None or not where.exists():
        return None
    found: NDArray[np.int64] = np.load(where, mmap_mode="r")[:, column]
    return found


class IndexBuilder:
    """Collects rows, of which `build` makes the index.

    A row takes the bytes of its name and id and 24 more, 48 in shards, and 4 for each column.
    """

    def __init__(self, kind: str = "", *, columns: tuple[str, ...] = ()) -> None:
        """Begins without rows.

        Parameters
        ----------
        kind
            Of the shards, `tar` or `parquet`; empty where every image is a file of its own.
        columns
            Names of what rows may say beside their names, such as `class`.
        """
        self._names, self._name_offsets = bytearray(), array("Q", [0])
        self._ids, self._id_offsets = bytearray(), array("Q", [0])
        self._places = array("q")
        self._hashes = array("q")
        self._kind = kind
        self._values: dict[str, dict[str, int]] = {name: {"": 0} for name in columns}
        self._codes = {name: array("i") for name in columns}
        self._many: set[str] = set()  # columns of more than `MOST_CLASSES` values
        self.shards: list[Shard] = []
        self.bytes_a_worker = 0

    def __len__(self) -> int:
        return len(self._hashes)

    def add(
        self, name: bytes, *, id: str = "", place: Place | None = None, values: Mapping[str, str] | None = None
    ) -> None:
        """Adds one row.

        Parameters
        ----------
        name
            The path below the root, or the name inside the shard.
        id
            Where it differs from the name; else empty.
        place
            Where the bytes lie in a shard; None where the image is a file of its own.
        values
            Column → text, for the columns that say something of this row.
        """
        self._names += name
        self._name_offsets.append(len(self._names))
        self._ids += id.encode("utf-8", "backslashreplace")
        self._id_offsets.append(len(self._ids))
        if place is not None:
            self._places.extend(place)
        self._hashes.append(hash(id or (escape(name), place[0] if place else 0)))
        for column, known in self._values.items():
            value = (values or {}).get(column, "")
            if len(known) > MOST_CLASSES and value not in known:
                self._many.add(column)
            else:
                self._codes[column].append(known.setdefault(value, len(known)))

    def names(self) -> Iterator[bytes]:
        """Yields the names of the rows, in order."""
        return (bytes(self._names[a:b]) for a, b in itertools.pairwise(self._name_offsets))

    def set_column(self, column: str, values: Sequence[str]) -> None:
        """Fills a column for all rows at once.

        Parameters
        ----------
        column
            One of the builder's.
        values
            Of all rows, in order; none at all leave the column empty.
        """
        known = self._values[column]
        self._codes[column] = array("i", (known.setdefault(value, len(known)) for value in values))

    def build(self, root: bytes, *, annotations: str = "", remarks: list[str] | None = None) -> ImageIndex:
        """Makes the index of all rows that were added.

        A column that says nothing is left out. A column of more than `MOST_CLASSES` values is left out with a remark.

        Parameters
        ----------
        root
            The folder that the names of files are relative to.
        annotations
            Paths of the annotations that belong to DATA, joined by commas; empty for none.
        remarks
            Lines for the user: what was left out or lost.

        Raises
        ------
        UserError
            Two rows have one id.
        """
        remarks = list(remarks or [])
        remarks += [f"the column {name} has over {MOST_CLASSES:,} values: not classes; left out" for name in self._many]
        columns = [name for name, values in self._values.items() if len(values) > 1 and name not in self._many]
        meta = {
            "version": VERSION,
            "root": os.fsdecode(root),
            "annotations": annotations,
            "remarks": remarks,
            "kind": self._kind,
            "shards": [asdict(shard) for shard in self.shards],
            "columns": {name: list(self._values[name]) for name in columns},
            "bytes_a_worker": self.bytes_a_worker,
            "has_ids": bool(self._ids),
        }
        names = _Texts(np.frombuffer(self._names, np.uint8), np.frombuffer(self._name_offsets, np.uint64))
        ids = _Texts(np.frombuffer(self._ids, np.uint8), np.frombuffer(self._id_offsets, np.uint64))
        index = ImageIndex(
            meta,
            names,
            ids if self._ids else None,
            np.frombuffer(self._places, np.int64).reshape(-1, 3) if self.shards else _stamps(root, names),
            {name: np.frombuffer(self._codes[name], np.int32) for name in columns},
        )
        _refuse_duplicates(index, np.frombuffer(self._hashes, np.int64))
        return index


def _refuse_duplicates(index: ImageIndex, hashes: NDArray[np.int64]) -> None:
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(np.diff(hashes[order]) == 0)
    pairs = [(int(order[i]), int(order[i + 1])) for i in again[:1000]]
    equal = sorted((a, b) for a, b in pairs if index.id(a) == index.id(b))
    if equal:
        a, b = equal[0]
        first, second = one_line(index.where(a)), one_line(index.where(b))
        if index._names[a] == index._names[b] and not index.shards:
            raise UserError(
                f"{first} is named twice ({len(equal)} such pairs), in rows {a + 1} and {b + 1} of the data; "
                "leave one of them out"
            )
        raw = " (in one of them \\xNN are the characters, in the other a byte that is not UTF-8)"
        raise UserError(
            f"id {index.id(a)!r} is given to two images, {first} and {second}{raw if first == second else ''}"
            f" ({len(equal)} such pairs); every image needs an id of its own: rename one, or leave it out"
        )


def _stamps(root: bytes, names: _Texts) -> NDArray[np.int64]:
    """Returns [rows, 2], the size in bytes and the time of change in ns of each file, −1 where it can't be seen."""

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


def _load_texts(folder: Path, name: str) -> _Texts:
    offsets = np.load(folder / f"{name}.npy", mmap_mode="r")
    data = np.memmap(folder / f"{name}.bin", np.uint8, "r") if offsets[-1] else np.empty(0, np.uint8)
    return _Texts(data, offsets)

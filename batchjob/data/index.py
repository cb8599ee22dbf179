"""Where each image of DATA lies: arrays of bytes and offsets, memory-mapped, a few dozen bytes a row."""

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
MOST_CLASSES = 65_536  # of a column: more values are not classes
_STATS_AT_ONCE = 16  # file systems of clusters are slow one by one
_STATS_PENDING = 1024  # the pool holds a future for each


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
        where: NDArray[np.int64],
        codes: Mapping[str, NDArray[np.int32]],
    ) -> None:
        """`where` holds a place in a shard for each row [rows, 3], or without shards what a file looked like [rows, 2].

        That is its size and time of change in ns when it was planned, −1 if it was not seen. `codes` holds for each
        column the number of each row's value among `meta["columns"]`.
        """
        self.meta = meta
        self.root = os.fsencode(meta["root"])
        self.annotations: str = meta["annotations"]
        self.remarks: list[str] = meta["remarks"]  # what was left out or lost, for the user
        self.shards = [Shard(**shard) for shard in meta["shards"]]
        self.columns: tuple[str, ...] = tuple(meta["columns"])  # what is known of every image: its class, its label
        self.bytes_a_worker: int = meta["bytes_a_worker"]  # that reading takes at worst beside the image in hand
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
        """The row's original id: the path below the root, or the tar's name and key, or what a list or JSON gives."""
        own = b"" if self._ids is None else self._ids[i]
        if own:
            return own.decode("utf-8", "backslashreplace")
        name = escape(self._names[i])
        return f"{self.shards[int(self._where[i, 0])].name}/{name}" if self.shards else name

    def ids(self, start: int = 0, stop: int | None = None) -> list[str]:
        """The ids of rows [start, stop)."""
        return [self.id(i) for i in range(start, len(self) if stop is None else stop)]

    def column(self, name: str, start: int = 0, stop: int | None = None) -> list[str]:
        """What a column says of rows [start, stop); "" where it says nothing."""
        values = self.meta["columns"][name]
        return [values[code] for code in self._codes[name][start:stop].tolist()]

    def where(self, i: int) -> str:
        """The file, or the shard and the name in it, for messages."""
        if not self.shards:
            return escape(os.path.join(self.root, self._names[i]))
        return f"{self.shards[int(self._where[i, 0])].path}: {escape(self._names[i])}"

    def read(self, i: int) -> bytes:
        """The image's bytes; raises ReadFailure, and nothing else for whatever the disk holds."""
        numbers = tuple(int(v) for v in self._where[i])
        if self.shards:
            place: Place = (numbers[0], numbers[1], numbers[2])
            return self._reader.read(place)
        return read_file(os.path.join(self.root, self._names[i]), (numbers[0], numbers[1]))

    def check(self) -> None:
        """Raises UserError where DATA is gone or a shard has changed."""
        if not self.shards and not os.path.isdir(self.root):
            raise UserError(f"{escape(self.root)} was planned and is not a folder now; bring it back, or plan anew")
        raise_for_changes(self.shards)

    def close(self) -> None:
        """Closes the shards that `read` opened."""
        self._reader.close()

    def save(self, folder: Path) -> None:
        """Writes the index as `folder`; `load` maps it. The JSON comes last: without it the folder is not an index."""
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
        """The index that `save` wrote, mapped, not read: memory is the page cache's, shared by all processes."""
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


class IndexBuilder:
    """Collects rows; `build` gives the index. Costs the names' bytes and some 20 more a row.

    `kind` is that of the shards, `tar` or `parquet`; `columns` are what rows say beside their names.
    """

    def __init__(self, kind: str = "", *, columns: tuple[str, ...] = ()) -> None:
        self._names, self._name_offsets = bytearray(), array("Q", [0])
        self._ids, self._id_offsets = bytearray(), array("Q", [0])
        self._places = array("q")
        self._hashes = array("q")
        self._kind = kind
        self._values: dict[str, dict[str, int]] = {name: {"": 0} for name in columns}
        self._codes = {name: array("i") for name in columns}
        self._many: set[str] = set()  # columns of too many values
        self.shards: list[Shard] = []
        self.bytes_a_worker = 0

    def __len__(self) -> int:
        return len(self._hashes)

    def add(
        self, name: bytes, *, id: str = "", place: Place | None = None, values: Mapping[str, str] | None = None
    ) -> None:
        """One row; `id` where it isn't the name, `place` in a shard, `values` of the columns that say something."""
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
        """The names of the rows, in order."""
        return (bytes(self._names[a:b]) for a, b in itertools.pairwise(self._name_offsets))

    def set_column(self, column: str, values: Sequence[str]) -> None:
        """Says a column for all rows at once; no values leave it empty."""
        known = self._values[column]
        self._codes[column] = array("i", (known.setdefault(value, len(known)) for value in values))

    def build(self, root: bytes, *, annotations: str = "", remarks: list[str] | None = None) -> ImageIndex:
        """The index; raises UserError where two rows have one id. A column that says nothing is left out.

        So is one of more than `MOST_CLASSES` values, with a remark.
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
        names = Texts(np.frombuffer(self._names, np.uint8), np.frombuffer(self._name_offsets, np.uint64))
        ids = Texts(np.frombuffer(self._ids, np.uint8), np.frombuffer(self._id_offsets, np.uint64))
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


def _load_texts(folder: Path, name: str) -> Texts:
    offsets = np.load(folder / f"{name}.npy", mmap_mode="r")
    data = np.memmap(folder / f"{name}.bin", np.uint8, "r") if offsets[-1] else np.empty(0, np.uint8)
    return Texts(data, offsets)

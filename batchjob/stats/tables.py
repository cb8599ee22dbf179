"""Writes scores to disk block by block: arrays in scores.zarr, one tidy table of all scores, and the table of pairs."""

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

from batchjob.metrics import catalogue
from batchjob.metrics.nulls import LENDERS, LENT, SWAPS
from batchjob.metrics.uncertainty import first_half
from batchjob.stats.lent import HALVES, attribute
from batchjob.stats.pool import ROWS_AT_ONCE
from batchjob.stats.stream import Scored
from batchjob.store import lifecycle as store
from batchjob.store.run import Run

_DIMS = {4: ("algorithm", "layer", "head"), 3: ("layer", "head"), 2: ("layer",)}
_NO_HEAD = -1  # the head, in the tidy table, of scores that belong to a layer
_TIDY = pa.schema(
    [
        ("image_id", pa.dictionary(pa.int32(), pa.string())),
        ("algorithm", pa.dictionary(pa.int8(), pa.string())),
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("score", pa.dictionary(pa.int16(), pa.string())),
        ("value", pa.float32()),
    ]
)


class Tables:
    """Writes RUN/scores.zarr, RUN/stats/scores.parquet and RUN/stats/pairs.parquet; with `csv`, the tables as CSV too.

    Used in a `with` block, whose end closes the files. `written` has the names of the scores so far; `counts` and
    `agreement` are the sums of those of all blocks.
    """

    def __init__(self, run: Run, scratch: Path, *, csv: bool) -> None:
        """Opens the files.

        Parameters
        ----------
        run
            The run that is scored.
        scratch
            An empty folder for sums that grow with the run and stay out of the memory.
        csv
            Whether to write CSV files beside the tables.
        """
        self._run, self._ids, self._scratch = run, run.ids, scratch
        self._folder = run.folder / "stats"
        self._folder.mkdir(exist_ok=True)
        self._group = _open_scores(run, self._ids)
        self._names = [n for names in catalogue.labelling_arrays().values() for n in names]
        self._tidy = pq.ParquetWriter(self._folder / "scores.parquet", _TIDY, compression="zstd")
        self._tidy_csv = pa_csv.CSVWriter(self._folder / "scores.csv", _plain(_TIDY)) if csv else None
        self._pairs = pq.ParquetWriter(self._folder / "pairs.parquet", _pair_schema(run), compression="zstd")
        self._pairs_csv = pa_csv.CSVWriter(self._folder / "pairs.csv", _pair_schema(run)) if csv else None
        # [n, SWAPS] who lent to whom in `stats` and while labelling; for each score [n, HALVES, C] what that added, and
        # which of the two it was (`stats.lent`)
        self._lenders = [np.full((run.rows, SWAPS), -1, np.int32) for _ in range(2)]
        self._lent: dict[str, tuple[NDArray[np.float32], int]] = {}
        self.written: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.agreement: dict[str, NDArray[np.float64]] = {}

    def add(self, scored: Scored) -> None:
        """Appends a block. Blocks have to come in the order of their rows."""
        for name, values in scored.arrays.items():
            if name not in self.written:
                self.written.add(name)
                if name not in self._names:
                    score, _, null = name.partition(".")
                    meaning = f"{score} of the null model '{null}'" if null else score
                    self._array(name, _DIMS[values.ndim], values.shape[1:], np.float32(np.nan), meaning)
            if name not in self._names:  # labelling has stored those itself
                array: Any = self._group[name]
                array[scored.start : scored.start + len(values)] = values
        for table in self._tidy_tables(scored):
            self._tidy.write_table(table)
            if self._tidy_csv is not None:
                self._tidy_csv.write_table(table.cast(_plain(_TIDY)))
        table = self._pair_table(scored)
        if table.num_rows:
            self._pairs.write_table(table)
            if self._pairs_csv is not None:
                self._pairs_csv.write_table(table)
        for which, found in enumerate(scored.lent):
            self._lenders[which][scored.start : scored.start + len(found.lenders)] = found.lenders
            for score, sums in found.sums.items():
                if score not in self._lent:
                    shape = (self._run.rows, *sums.shape[1:])
                    self._lent[score] = _on_disk(self._scratch / (score + LENT), shape), which
                self._lent[score][0][found.rows] += sums.astype(np.float32)
        self.counts += scored.counts
        for kind, sums in scored.agreement.items():
            self.agreement[kind] = self.agreement.get(kind, 0) + sums

    def _write_lent(self) -> None:
        half = (~first_half(self._ids)).astype(np.int8)
        sizes = dict(zip(("algorithm", "layer", "head"), self._run.shape, strict=True))
        for score, (sums, which) in self._lent.items():
            lenders = self._lenders[which]
            own, null = (np.asarray(self._run.read_score(name)) for name in (score, f"{score}.swap"))
            attribute(sums, lenders, np.isfinite(own) & np.isfinite(null), half)
            dims = ("half", *catalogue.dims_of(score))
            shape = (HALVES, *(sizes[dim] for dim in dims[1:]))
            meaning = f"what the photo's objects add to the swap null of {score} of other photos"
            array = self._array(score + LENT, dims, shape, np.float32(0), meaning)
            for start in range(0, self._run.rows, ROWS_AT_ONCE):
                part = slice(start, start + ROWS_AT_ONCE)
                array[part] = sums[part].reshape(-1, *shape)
            meaning = f"how many photos lent their objects for the swap null of {score}"
            self._array(score + LENDERS, (), (), np.uint8(0), meaning)[:] = (lenders >= 0).sum(axis=1)

    def _array(self, name: str, dims: Sequence[str], shape: Sequence[int], fill: np.generic, meaning: str) -> Any:
        """Creates an array of scores.zarr with these dimensions beside the image, and with the dtype of `fill`."""
        return self._group.create_array(
            name,
            shape=(self._run.rows, *shape),
            chunks=(min(ROWS_AT_ONCE, self._run.rows), *shape),
            dtype=fill.dtype,
            fill_value=fill,
            dimension_names=("image", *dims),
            attributes={"meaning": meaning},
            overwrite=True,
        )

    def _tidy_tables(self, scored: Scored) -> list[pa.Table]:
        tables = []
        layers, heads = np.array(self._run.layers, np.int16), np.array(self._run.heads, np.int16)
        algorithms = [*self._run.algorithms, ""]
        for name, values in scored.arrays.items():
            where = np.nonzero(np.isfinite(values))
            count = len(where[0])
            if not count:
                continue
            has_algorithm, has_head = values.ndim == 4, values.ndim >= 3
            algorithm = where[1] if has_algorithm else np.full(count, len(algorithms) - 1)
            ids = pa.array(self._ids[scored.start : scored.start + len(values)])
            columns = [
                pa.DictionaryArray.from_arrays(pa.array(where[0].astype(np.int32)), ids),
                pa.DictionaryArray.from_arrays(pa.array(algorithm.astype(np.int8)), pa.array(algorithms)),
                pa.array(layers[where[2 if has_algorithm else 1]]),
                pa.array(heads[where[-1]] if has_head else np.full(count, _NO_HEAD, np.int16)),
                pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int16)), pa.array([name])),
                pa.array(values[where].astype(np.float32)),
            ]
            tables.append(pa.Table.from_arrays(columns, schema=_TIDY))
        return [pa.concat_tables(tables).unify_dictionaries()] if tables else []

    def _pair_table(self, scored: Scored) -> pa.Table:
        schema = _pair_schema(self._run)
        columns: dict[str, list[Any]] = {name: [] for name in schema.names}
        labellings = schema.names[len(schema.names) - len(_labellings(self._run)) * 2 :]
        for row, table in scored.pairs:
            pairs = table.pairs
            columns["image_id"].append(np.full(len(pairs.first), self._ids[row], object))
            for name in ("category", "first", "second", "distance", "box_iou", "smaller", "larger"):
                columns[name].append(getattr(pairs, name))
            for name, values in zip(labellings, [*table.ari, *table.position], strict=True):
                columns[name].append(values)
        flat = {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in columns.items()}
        arrays = [pa.array(flat[f.name]).cast(f.type) for f in schema]
        return pa.Table.from_arrays(arrays, schema=schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for writer in (self._tidy, self._tidy_csv, self._pairs, self._pairs_csv):
            if writer is not None:
                writer.close()
        if kind is None:
            self._write_lent()
            store.consolidate_scores(self._run.folder)


def _on_disk(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Maps zeros in a new file. Its space is taken at once, since writing to such a map on a full disk kills."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, math.prod(shape) * 4))
    return np.memmap(path, np.float32, "r+", shape=shape)


def _labellings(run: Run) -> list[str]:
    return [f"{m}/{x}/{h}" for m in run.algorithms for x in run.layers for h in run.heads]


def _pair_schema(run: Run) -> pa.Schema:
    """Returns the columns of the table of pairs.

    A pair has one row, with columns `ari/ALGORITHM/LAYER/HEAD` and `position/ALGORITHM/LAYER/HEAD`. One row a head
    would repeat the pair's distance and sizes in each.
    """
    modifiers = [("category", pa.int32()), ("first", pa.int32()), ("second", pa.int32())]
    modifiers += [(name, pa.float32()) for name in ("distance", "box_iou", "smaller", "larger")]
    scores = [(f"{kind}/{name}", pa.float32()) for kind in ("ari", "position") for name in _labellings(run)]
    return pa.schema([("image_id", pa.string()), *modifiers, *scores])


def _plain(schema: pa.Schema) -> pa.Schema:
    return pa.schema([(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in schema])


def _open_scores(run: Run, ids: Sequence[str]) -> zarr.Group:
    """Opens RUN/scores.zarr to write to. Makes it with its coordinates where labelling computed no scores."""
    group = zarr.open_group(str(run.folder / "scores.zarr"), mode="a", zarr_format=3, use_consolidated=False)
    labelled = {n for names in catalogue.labelling_arrays().values() for n in names}
    for name, array in list(group.arrays()):  # `writing_stats` has removed those that it knew to be an earlier `stats`'
        dims: Any = getattr(array.metadata, "dimension_names", None) or ("",)
        if dims[0] == "image" and name not in labelled and name != "image_id":
            del group[name]
    coordinates: dict[str, tuple[str, Any]] = {
        "image_id": ("image", np.array(ids, object)),
        "algorithm": ("algorithm", np.array(run.algorithms, object)),
        "layer": ("layer", np.array(run.layers, np.int16)),
        "head": ("head", np.array(run.heads, np.int16)),
    }
    for name, (dim, values) in coordinates.items():
        if name in group:
            continue
        dtype = "str" if values.dtype == object else values.dtype
        array = group.create_array(name, shape=values.shape, dtype=dtype, dimension_names=(dim,))
        array[:] = values
    return group

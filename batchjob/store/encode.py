"""Makes the files of a Zarr store as bytes in memory: the store's metadata, and the shards of one partition."""

import functools
import json
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from batchjob import config
from batchjob.codes import SCHEMA, STATUS
from batchjob.errors import UserError
from batchjob.plan import Plan
from batchjob.store.arrays import ArraySpec, layout, shard_paths, shards_of

_ROWS_OF_IDS = 65536  # image ids of one chunk


class IndexLike(Protocol):
    """What the store reads of an image index: how many images, their ids, and the columns that the data have."""

    columns: tuple[str, ...]  # names, such as that of the class

    def __len__(self) -> int: ...
    def id(self, row: int, /) -> str: ...
    def column(self, name: str, start: int, stop: int, /) -> list[str]:
        """Reads a column of consecutive images.

        Parameters
        ----------
        name
            One of `columns`.
        start, stop
            The range of rows [start, stop).

        Returns
        -------
        The text of each image; empty for one that has none.
        """


class Encoder:
    """Encodes the arrays of a partition as the bytes of its shards; Zarr does it, with a store in memory."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._specs = plan, layout(plan)
        self._files: dict[str, Buffer] = {}
        store = MemoryStore(store_dict=self._files)
        self._arrays = {name: _make_array(store, name, spec) for name, spec in self._specs.items()}

    def check(self, partition: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Checks the arrays of a partition before they are encoded.

        Parameters
        ----------
        partition
            The number of the partition.
        arrays
            Arrays by name.

        Raises
        ------
        ValueError
            An array of the store is missing, is not known, or has another shape.
        """
        if set(arrays) != set(self._specs):
            raise ValueError(f"arrays {sorted(arrays)} were handed over, the store has {sorted(self._specs)}")
        start, stop = self._plan.rows_of(partition)
        for name, spec in self._specs.items():
            rows = stop - start if spec.dims[0] == "image" else len(shards_of(spec, self._plan, partition))
            if arrays[name].shape != (rows, *spec.shape[1:]):
                raise ValueError(f"{name} is {arrays[name].shape}, partition {partition} has {(rows, *spec.shape[1:])}")

    def encode(self, partition: int, arrays: Mapping[str, NDArray[Any]]) -> dict[str, bytes]:
        """Encodes the arrays of a partition.

        Parameters
        ----------
        partition
            The number of the partition.
        arrays
            Every array of the store by name, rows in order.

        Returns
        -------
        The content of each file by path relative to RUN.
        """
        for name, spec in self._specs.items():
            shards = shards_of(spec, self._plan, partition)
            first = shards.start * spec.rows_per_shard
            if len(shards):
                self._arrays[name][first : first + len(arrays[name])] = arrays[name]
        files = {}
        for path in shard_paths(self._specs, self._plan, partition):
            files[path] = self._files.pop(path.split("/", 1)[1]).to_bytes()
        return files


def _make_array(store: MemoryStore, name: str, spec: ArraySpec, notes: Mapping[str, Any] | None = None) -> Any:
    attributes: dict[str, Any] = {"meaning": spec.meaning, **(notes or {})}
    return zarr.create_array(
        store,
        name=name,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=spec.chunks,
        shards=spec.shards,
        fill_value=spec.fill,
        compressors=ZstdCodec(level=1) if spec.compressed else None,
        dimension_names=spec.dims,
        attributes=attributes,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},  # so that each shard is a file, whatever is in it
    )


def static_files(plan: Plan, index: IndexLike) -> dict[str, bytes]:
    """Encodes what the stores hold before anything is labelled: metadata, coordinates, image ids.

    Parameters
    ----------
    plan
        The run's plan.
    index
        The run's images.

    Returns
    -------
    The content of each file by path relative to RUN.
    """
    specs = layout(plan)
    notes: dict[str, dict[str, Any]] = {"status": {"codes": dict(STATUS)}, "category": {"categories": plan.categories}}
    files: dict[str, bytes] = {}
    for store_name in sorted({spec.store for spec in specs.values()}):
        held: dict[str, Buffer] = {}
        store = MemoryStore(store_dict=held)
        group = zarr.create_group(store, zarr_format=3, attributes=_attributes(plan))
        for name, spec in specs.items():
            if spec.store == store_name:
                _make_array(store, name, spec, notes.get(name, {}))
        _coordinate(group, "layer", "layer", np.asarray(plan.layers, "int16"))
        _coordinate(group, "head", "head", np.asarray(plan.heads, "int16"))
        _coordinate(group, "algorithm", "algorithm", np.asarray(plan.options.algorithms, object))
        if store_name == "labels" and plan.kept_rows:
            _coordinate(group, "kept_image", "kept_image", np.asarray(plan.kept_rows, "int64"))
        meaning = "path below the root of the data, or the shard's name and the key in it"
        _texts(group, "image_id", plan.row_count, meaning, lambda a, b: [index.id(row) for row in range(a, b)])
        if store_name == "labels":
            _id_bytes(group, plan.row_count, index)
        if store_name == "labels" and index.columns:
            named = {_coordinate_of(column, specs): column for column in index.columns}
            group.attrs["coordinates"] = " ".join(named)
            for name, column in named.items():
                meaning = "what the data say of each image: the name of its folder, or its column of this name"
                _texts(group, name, plan.row_count, meaning, functools.partial(index.column, column))
        files.update({f"{store_name}.zarr/{key}": value.to_bytes() for key, value in held.items()})
    return files


def _coordinate_of(column: str, specs: Mapping[str, ArraySpec]) -> str:
    """The name of a column's coordinate: its own, unless an array has it."""
    return f"image_{column}" if column in specs else column


def _texts(group: zarr.Group, name: str, rows: int, meaning: str, values: Callable[[int, int], list[str]]) -> None:
    """Writes a text for each image; `values` gives those of rows [start, stop)."""
    array = group.create_array(
        name,
        shape=(rows,),
        dtype="str",
        chunks=(min(_ROWS_OF_IDS, rows),),
        dimension_names=("image",),
        compressors=ZstdCodec(level=1),
        attributes={"meaning": meaning},
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    for start in range(0, rows, _ROWS_OF_IDS):
        stop = min(start + _ROWS_OF_IDS, rows)
        array[start:stop] = np.asarray(values(start, stop), object)


def _id_bytes(group: zarr.Group, rows: int, index: IndexLike) -> None:
    """Writes the image ids once more as bytes, since not every reader of Zarr knows strings."""
    names = [index.id(row).encode() for row in range(rows)]
    width = max([1, *map(len, names)])
    array = group.create_array(
        "image_id_bytes",
        shape=(rows, width),
        dtype="uint8",
        chunks=(min(_ROWS_OF_IDS, rows), width),
        dimension_names=("image", "id_byte"),
        compressors=ZstdCodec(level=1),
        attributes={"meaning": "image_id as UTF-8, ended by zeros, for readers that know no strings"},
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    for start in range(0, rows, _ROWS_OF_IDS):
        part = names[start : start + _ROWS_OF_IDS]
        array[start : start + len(part)] = np.array(part, f"S{width}").view(np.uint8).reshape(len(part), width)


def _coordinate(group: zarr.Group, name: str, dim: str, values: NDArray[Any]) -> None:
    array = group.create_array(
        name,
        shape=values.shape,
        dtype="str" if values.dtype == object else values.dtype,
        chunks=values.shape,
        dimension_names=(dim,),
        compressors=None,
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    array[:] = values


def _attributes(plan: Plan) -> dict[str, Any]:
    """What a reader needs to know in ten years. It does not depend on when or where the run was made."""
    return {
        "schema_version": SCHEMA,
        "title": "self-attention of a vision model, clustered head by head",
        "rows": plan.row_count,
        "rows_per_partition": plan.rows_per_partition,
        "plan_digest": plan.digest,
        "options": config.to_json(plan.options),
        "model": plan.model.to_json(),
        "weights": dict(getattr(plan, "weights", {})),
        "precision": getattr(plan, "precision", ""),
        "versions": dict(getattr(plan, "versions", {})),
        "batchjob": dict(getattr(plan, "versions", {})).get("batchjob", ""),
    }


def consolidated_root(run: Path, name: str, added: Mapping[str, bytes], *, left_out: Collection[str] = ()) -> bytes:
    """Makes the zarr.json of a store that holds the metadata of all its arrays, which xarray reads in one go.

    Parameters
    ----------
    run
        The folder of the run.
    name
        The store's folder, such as `labels.zarr`.
    added
        Files by path relative to RUN that are not written yet; their arrays are listed too.
    left_out
        Metadata files, relative to RUN, of arrays that are not listed.

    Returns
    -------
    The content of RUN/`name`/zarr.json.
    """
    folder = run / name
    paths = {str(p.relative_to(run)) for p in [folder / "zarr.json", *folder.glob("*/zarr.json")]} - set(left_out)
    metadata = {path: (run / path).read_bytes() for path in paths}
    metadata |= {path: data for path, data in added.items() if path.endswith("/zarr.json")}
    held = {
        path.removeprefix(f"{name}/"): default_buffer_prototype().buffer.from_bytes(data)
        for path, data in sorted(metadata.items())
        if path.startswith(f"{name}/")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata", UserWarning)  # xarray reads it; zarr 3 calls it new
        zarr.consolidate_metadata(MemoryStore(store_dict=held), zarr_format=3)
    return held["zarr.json"].to_bytes()


class DamagedRoot(UserError):
    """RUN/labels.zarr/zarr.json is not the JSON that was written."""


def read_root(run: Path) -> dict[str, Any]:
    """Reads RUN/labels.zarr/zarr.json. Raises UserError where RUN is not a run of this schema, DamagedRoot if torn."""
    path = run / "labels.zarr" / "zarr.json"
    try:
        root = json.loads(path.read_text())
        attributes = root["attributes"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError) as error:
        if not path.parent.is_dir():
            raise UserError(
                f"{run} is not a run: it has no labels.zarr; make one with: batchjob run DATA {run}"
            ) from error
        raise DamagedRoot(f"{path} is damaged; it is mended by the command that batchjob show {run} prints") from error
    found = attributes.get("schema_version")
    if found != SCHEMA:
        raise UserError(
            f"{run}/labels.zarr has schema {found}, this version of batchjob reads schema {SCHEMA}; "
            f"use batchjob {attributes.get('batchjob', 'of that time')}, or another RUN"
        )
    return dict(root)

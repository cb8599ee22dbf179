"""Indexes Parquet files as image shards: finds the name of each row, and what its other columns say of it."""

import json
import os
from collections.abc import Iterator
from typing import Any

from batchjob.data.index import IndexBuilder
from batchjob.data.reading import one_line
from batchjob.data.shards import IMAGE_COLUMNS, Shard, leaf_of_images, open_parquet, parquet_errors
from batchjob.errors import UserError, counted

COLUMNS = ("class", "label", "category")  # kept, under their own names
_PAGES_AT_ONCE = 3  # in memory is a page as it is stored, unpacked and taken apart; it may be a whole row group


def add_parquet(builder: IndexBuilder, paths: list[str], limit: int) -> Iterator[str]:
    """Adds the rows of Parquet files to an index, in order.

    A row is named by the path in its struct of bytes and path, if every row of the file has another path; else by its
    number in the file.

    Parameters
    ----------
    builder
        Made for `parquet` and `COLUMNS`.
    paths
        Absolute, in the order of the rows.
    limit
        The most rows that the builder shall have; 0 for all.

    Yields
    ------
    A remark for each column that can't hold classes, and "" after each row, for the progress bar.

    Raises
    ------
    UserError
        A file is not a whole Parquet file, or has no column of images.
    """
    common = os.path.commonpath([os.path.dirname(p) for p in paths])
    for number, path in enumerate(paths):
        builder.shards.append(Shard.at(path, os.path.relpath(path, common)))
        file = _open(path, builder.shards[-1].size)
        leaf = _leaf(path, file.schema_arrow)
        columns = [name for name in COLUMNS if file.schema_arrow.get_field_index(name) >= 0]
        left_out = {name for name in columns if not _is_of_classes(file.schema_arrow.field(name).type)}
        for name in sorted(left_out):
            yield f"{path}: the column {name} is of {file.schema_arrow.field(name).type}, not of classes; left out"
        names = _paths(path, file, leaf)
        classes = _names_of_classes(file.schema_arrow)
        row = 0
        for group in range(file.num_row_groups):
            # the bytes of all columns: asked for those of one column of a damaged file, pyarrow ends the process
            group_bytes = int(file.metadata.row_group(group).total_byte_size)
            builder.bytes_a_worker = max(builder.bytes_a_worker, _PAGES_AT_ONCE * group_bytes)
            known = _read_columns(path, file, group, [name for name in columns if name not in left_out], classes)
            for i in range(file.metadata.row_group(group).num_rows):
                own = names[row] if names else str(row).encode()
                builder.add(own, place=(number, group, i), values={column: known[column][i] for column in known})
                if limit and len(builder) >= limit:
                    return
                row += 1
                yield ""


def _open(path: str, size: int) -> Any:
    try:
        file = open_parquet(path)
        rows = file.metadata.num_rows
    except parquet_errors() as error:
        raise UserError(
            f"{path} is not a whole Parquet file ({one_line(error)}); get it again, or leave it out"
        ) from None
    if rows > size:
        raise UserError(
            f"{path} is damaged: it says that it has {counted(rows, 'row')} in {size:,} bytes; get it again"
        )
    return file


def _leaf(path: str, schema: Any) -> str:
    if leaf := leaf_of_images(schema):
        return leaf
    there = ", ".join(f"{field.name} ({one_line(field.type)[:40]})" for field in list(schema)[:8]) or "none"
    wanted = " or ".join(IMAGE_COLUMNS)
    raise UserError(
        f"{path} has no column of images: its columns are {there}; one named {wanted} must hold the bytes of image "
        "files, or structs of bytes and path"
    )


def _paths(path: str, file: Any, leaf: str) -> list[bytes]:
    """Returns the path of every row; an empty list where a row has none, or two rows have the same."""
    column = leaf.partition(".")[0]
    kind = file.schema_arrow.field(column).type
    if "." not in leaf or kind.get_field_index("path") < 0 or str(kind.field("path").type) not in _TEXTS:
        return []
    found: list[bytes] = []
    seen: set[bytes] = set()
    for group in range(file.num_row_groups):
        for value in _read(path, file, group, f"{column}.path"):
            if not value or value in seen:
                return []
            seen.add(value)
            found.append(value)
    return found


_TEXTS = ("string", "large_string", "string_view")


def _read(path: str, file: Any, group: int, column: str) -> list[Any]:
    """Reads the values of one column of a row group; a text comes as its bytes, which need not be UTF-8."""
    import pyarrow
    from pyarrow import types

    try:
        array = file.read_row_group(group, columns=[column], use_threads=False).column(0).combine_chunks()
    except parquet_errors() as error:
        raise UserError(f"{path} is damaged in its column {column} ({one_line(error)}); get it again") from None
    if "." in column:
        array = array.flatten()[0]
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if str(array.type) in _TEXTS:
        array = array.cast(pyarrow.large_binary())
    values: list[Any] = array.to_pylist()
    rows = file.metadata.row_group(group).num_rows
    if len(values) != rows:
        raise UserError(
            f"{path} is damaged in its column {column}: {len(values)} of {counted(rows, 'row')}; get it again"
        )
    return values


def _read_columns(
    path: str, file: Any, group: int, columns: list[str], classes: dict[str, list[str]]
) -> dict[str, list[str]]:
    """Returns column → values of a row group as text, "" for null."""
    found = {}
    for column in columns:
        values = _read(path, file, group, column)
        found[column] = [_text(value, classes.get(column, [])) for value in values]
    return found


def _text(value: Any, names: list[str]) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, float) and value.is_integer():  # pandas makes floats of numbers with gaps
        value = int(value)
    if value is None or value != value:
        return ""
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else str(value)


def _is_of_classes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in _TEXTS or types.is_integer(kind) or types.is_boolean(kind) or types.is_floating(kind)


def _names_of_classes(schema: Any) -> dict[str, list[str]]:
    """Returns column → names of its numbers, as the Hugging Face hub writes them into the metadata of the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: [str(text) for text in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and isinstance(feature.get("names"), list)
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}

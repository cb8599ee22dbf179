"""Reads lists of images, a path on each line or CSV. Whatever would hide an image is refused with its line."""

import csv
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchjob.errors import UserError, counted

LISTS = (".txt", ".lst", ".list", ".csv", ".tsv")
PATH_COLUMNS = ("path", "file", "file_name", "filename", "file_path", "filepath", "image", "image_path")
ID_COLUMNS = ("image_id", "id")


def read_list(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (path as it is written, id or "") of each row.

    Raises UserError where the list is not UTF-8 text or not strict CSV, or has no column of paths.
    """
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = _check_text(path, file)
        yield from _lines(lines) if path.suffix.lower() not in (".csv", ".tsv") else _table(path, lines)


def _lines(file: Iterator[str]) -> Iterator[tuple[str, str]]:
    for line in file:
        name = line.rstrip("\r\n")
        if name.strip():
            yield name, ""


def _check_text(path: Path, file: Iterator[str]) -> Iterator[str]:
    """Yields the lines. Raises UserError at a NUL, which no path contains and UTF-16 has in every second byte."""
    for number, line in enumerate(file, start=1):
        if "\0" in line:
            raise UserError(f"line {number} of {str(path)!r} holds NUL: it is not UTF-8 text; save the list as UTF-8")
        yield line


def _table(path: Path, file: Iterator[str]) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(sys.maxsize)  # a run-length mask in a column beside the path may be long
    reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    header = [name.strip().lower() for _, row in itertools.islice(_rows(path, reader), 1) for name in row]
    column = next((header.index(name) for name in PATH_COLUMNS if name in header), -1)
    if column < 0:
        if other := next((sign for sign in (";", "\t", "|", ",") if len(header) == 1 and sign in header[0]), ""):
            wanted = "tabs" if path.suffix.lower() == ".tsv" else "commas"
            raise UserError(f"the list {str(path)!r} has {other!r} between its columns; save it with {wanted}")
        raise UserError(
            f"the list {str(path)!r} has the columns {', '.join(header) or '(none)'}; "
            f"one of them must be named {', '.join(PATH_COLUMNS)}"
        )
    own = next((header.index(name) for name in ID_COLUMNS if name in header), -1)
    for first_line, row in _rows(path, reader):
        if row:
            if len(row) <= max(column, own):
                raise UserError(
                    f"line {first_line} of {str(path)!r} has {len(row)} of {counted(len(header), 'column')}"
                )
            yield row[column], row[own] if own >= 0 else ""


def _rows(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yields (first line, fields) of each row. Raises UserError where a quote is left open or is inside a field."""
    while True:
        first_line = reader.line_num + 1
        try:
            yield first_line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = "opens a quote that nothing closes" if "end of data" in str(error) else f"is not CSV ({error})"
            raise UserError(
                f"line {first_line} of {str(path)!r} {reason}; correct it: quotes around whole fields, doubled inside"
            ) from None

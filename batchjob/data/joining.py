"""Finds the annotated image that each row of the data is: the longest common end of both paths decides."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from batchjob.data.folders import EXTENSIONS
from batchjob.errors import UserError

Parts = tuple[str, ...]


def join_names(rows: Sequence[str], keys: Sequence[str], source: str) -> NDArray[np.int64]:
    """Finds the annotated file name that belongs to each row.

    Equal paths are joined first. Of those left, the paths with the longest common end are joined, in whole names of
    folders. Then both steps are repeated without extensions, since rows of tars have none. Folders may be separated by
    slashes or backslashes. A key belongs to at most one row, and an empty key to none.

    Parameters
    ----------
    rows
        The ids of the images.
    keys
        The file names of the annotations.
    source
        What an error message calls the annotations.

    Returns
    -------
    int64 [rows], the number of each row's file name among `keys`; −1 where it has none.

    Raises
    ------
    UserError
        Two keys fit one row equally well, or two rows fit one key equally well.
    """
    found = np.full(len(rows), -1, np.int64)
    row_parts, key_parts = [_path_parts(name) for name in rows], [_path_parts(name) for name in keys]
    open_keys = {j for j, parts in enumerate(key_parts) if parts}
    forms: tuple[Callable[[Parts], Parts], ...] = (lambda parts: parts, _without_extension)
    for form in forms:
        groups: dict[str, tuple[list[tuple[int, Parts]], list[tuple[int, Parts]]]] = defaultdict(lambda: ([], []))
        for i in np.flatnonzero(found < 0).tolist():
            parts = form(row_parts[i])
            groups[parts[-1] if parts else ""][0].append((i, parts))
        for j in sorted(open_keys):
            parts = form(key_parts[j])
            if parts[-1] in groups:
                groups[parts[-1]][1].append((j, parts))
        for own, others in groups.values():
            for i, j in _match(own, others, (rows, keys, source)) if others else ():
                found[i] = j
                open_keys.discard(j)
    return found


def join_ids(rows: Sequence[str], ids: Sequence[str], source: str) -> NDArray[np.int64]:
    """Finds the id that each row's file is named by, for annotations without any file name.

    Folders, extensions and zeros in front of a number don't count, so that `val/000139.jpg` is image 139.

    Parameters
    ----------
    rows, source
        As `join_names`.
    ids
        Of the images in the annotations.

    Returns
    -------
    int64 [rows], the number of each row's id among `ids`; −1 where it has none.

    Raises
    ------
    UserError
        As `join_names`.
    """
    return join_names([_bare(row) for row in rows], [_bare(key) for key in ids], source)


def _path_parts(name: str) -> Parts:
    """Splits a path at slashes and backslashes; letters with accents get one spelling (Unicode's NFC)."""
    text = unicodedata.normalize("NFC", name).replace("\\", "/")
    return tuple(part for part in text.split("/") if part not in ("", "."))


def have_same_folders(row: str, key: str) -> bool:
    """Says whether one of two paths that were joined is the end of the other; if not, their folders differ in name.

    Parameters
    ----------
    row
        The id of an image.
    key
        The file name of its annotations; extensions don't count.
    """
    a, b = _without_extension(_path_parts(row)), _without_extension(_path_parts(key))
    shared = min(len(a), len(b))
    return a[-shared:] == b[-shared:]


def _match(
    rows: list[tuple[int, Parts]], keys: list[tuple[int, Parts]], names: tuple[Sequence[str], Sequence[str], str]
) -> list[tuple[int, int]]:
    """Returns pairs (row, key): compares whole paths first, then ends of both that get ever shorter."""
    pairs: list[tuple[int, int]] = []
    deepest = max(min(max(len(p) for _, p in rows), max(len(p) for _, p in keys)), 1)
    for length in (0, *range(deepest, 0, -1)):  # 0: the whole path
        by_end: dict[Parts, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for side, members in enumerate((rows, keys)):
            for number, parts in members:
                if len(parts) >= length:
                    by_end[parts[-length:]][side].append(number)
        for own, others in by_end.values():
            if own and others:
                if len(own) > 1 or len(others) > 1:
                    _refuse(own, others, names)
                pairs.append((own[0], others[0]))
        done_rows, done_keys = {i for i, _ in pairs}, {j for _, j in pairs}
        rows = [(i, p) for i, p in rows if i not in done_rows]
        keys = [(j, p) for j, p in keys if j not in done_keys]
        if not rows or not keys:
            break
    return pairs


def _refuse(own: list[int], others: list[int], names: tuple[Sequence[str], Sequence[str], str]) -> None:
    rows, keys, source = names
    first, key = rows[own[0]], keys[others[0]]
    if len(others) > 1:
        raise UserError(
            f"--annotations {source}: the image {first!r} could be {key!r} or {keys[others[1]]!r}; "
            "give every image one entry whose file_name says its folder"
        )
    raise UserError(
        f"--annotations {source}: the entry {key!r} could be the image {first!r} or {rows[own[1]]!r}; "
        "give file names with folders"
    )


def _without_extension(parts: Parts) -> Parts:
    if not parts:
        return parts
    stem, suffix = os.path.splitext(parts[-1])
    return (*parts[:-1], stem) if suffix.lower().encode("utf-8", "replace") in EXTENSIONS else parts


def _bare(name: str) -> str:
    parts = _without_extension(_path_parts(name))
    return (parts[-1].lstrip("0") or "0" if parts[-1].isdigit() else parts[-1]) if parts else ""

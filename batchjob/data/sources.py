"""DATA to an index of rows: a folder, a COCO root, tars, a list. Nothing is decoded, nothing but tars is opened."""

import csv
import glob
import itertools
import os
import resource
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Never

from tqdm import tqdm

from batchjob.data.index import ImageIndex, IndexBuilder, escape
from batchjob.data.tars import add_tars, expand
from batchjob.errors import UserError, nearest

__all__ = ["EXTENSIONS", "ImageIndex", "index_images"]

# .heic is not read; it is listed all the same, so that such a photo gets a row that says so.
EXTENSIONS = frozenset(
    b".jpg .jpeg .jpe .jfif .png .webp .tif .tiff .bmp .gif .avif .jp2 .ppm .pgm .pnm .heic .heif".split()
)
LISTS = (".txt", ".lst", ".list", ".csv", ".tsv")
PATH_COLUMNS = ("path", "file", "file_name", "filename", "file_path", "filepath", "image", "image_path")
ID_COLUMNS = ("image_id", "id")


def index_images(data: str, *, split: str = "", limit: int = 0, progress: bool = False) -> ImageIndex:
    """The rows of DATA in their order: by the path's bytes in a folder, as given in tars and lists.

    `split` names a folder of a COCO root; `limit` keeps the first rows, 0 = all. Raises UserError.
    """
    raise_for_missing(data)
    if not os.path.lexists(data) and "{" in data:
        return _index_tars(data, expand(data), limit=limit, progress=progress)
    if not os.path.lexists(data) and (matches := sorted(glob.glob(data, recursive=True))):
        return _index_tars(data, matches, limit=limit, progress=progress)
    if os.path.isdir(data):
        return _index_folder(os.fsencode(os.path.abspath(data)), split=split, limit=limit, progress=progress)
    if split:
        raise UserError(f"--split {split} is of a COCO root, and {data!r} is a file; leave it out")
    suffix = os.path.splitext(data)[1].lower()
    if suffix == ".tar":
        return _index_tars(data, [data], limit=limit, progress=progress)
    if suffix in LISTS:
        return _index_list(Path(data), limit=limit, progress=progress)
    if suffix.encode() in EXTENSIONS:
        folder, name = os.path.split(os.path.abspath(data))
        builder = IndexBuilder()
        builder.add(os.fsencode(name))
        return builder.build(os.fsencode(folder))
    raise UserError(
        f"DATA {data!r} is a {suffix or 'nameless'} file; give a folder, a .tar (not compressed), "
        f"a list ({', '.join(LISTS)}) or an image"
    )


def raise_for_missing(data: str) -> None:
    """Raises UserError where there is nothing at DATA, which may be a pattern of tars."""
    is_pattern = not os.path.lexists(data) and ("{" in data or glob.glob(data, recursive=True))
    if not os.path.exists(data) and not is_pattern:
        raise UserError(f"DATA {data!r} is not a file or a folder; give a folder, a COCO root, a .tar or a list")


def _index_folder(root: bytes, *, split: str, limit: int, progress: bool) -> ImageIndex:
    annotations = _instance_files(root)
    is_coco = bool(annotations)
    below = b""
    if split:
        below = _split_folder(root, split)
        annotations = {name: path for name, path in annotations.items() if name == split}
    others: Counter[str] = Counter()
    builder = IndexBuilder()
    rows = _walk(root, below, skip=b"annotations" if is_coco and not split else b"", others=others)
    with _bar(progress) as bar:
        for name in rows:
            builder.add(name)
            _tick(bar, builder)
            if limit and len(builder) >= limit:
                break
    if not len(builder):
        raise UserError(f"DATA {escape(os.path.join(root, below))!r} has no image; {_what_else(others)}")
    return builder.build(root, annotations=",".join(annotations.values()))


def _index_tars(data: str, paths: list[str], *, limit: int, progress: bool) -> ImageIndex:
    paths = [os.path.abspath(path) for path in paths]
    if not all(path.lower().endswith(".tar") for path in paths):
        raise UserError(f"DATA {data!r} is a range of other than .tar files; give a folder, a list or .tar files")
    absent = [path for path in paths if not os.path.isfile(path)]
    if absent:
        some = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
        raise UserError(f"{len(absent)} of {len(paths)} tars of {data!r} are not there: {some}; correct the range")
    builder = IndexBuilder()
    remarks: list[str] = []
    with _bar(progress) as bar:
        for remark in add_tars(builder, paths, EXTENSIONS, limit):
            _tick(bar, builder)
            if remark:
                remarks.append(remark)
                bar.write(remark, file=sys.stderr)
    if not len(builder):
        raise UserError(f"DATA {data!r} has no image in {len(paths)} tars; images are known by their extension")
    return builder.build(os.fsencode(os.path.dirname(paths[0])), remarks=remarks)


def _index_list(path: Path, *, limit: int, progress: bool) -> ImageIndex:
    builder = IndexBuilder()
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file, _bar(progress) as bar:
        lines = _check_text(path, file)
        rows = _lines(lines) if path.suffix.lower() not in (".csv", ".tsv") else _table(path, lines)
        for name, own in rows:
            builder.add(os.fsencode(name), id=own)
            _tick(bar, builder)
            if limit and len(builder) >= limit:
                break
    if not len(builder):
        raise UserError(f"the list {str(path)!r} names no image; give one path a line")
    return builder.build(os.fsencode(os.path.abspath(path.parent)))


def _lines(file: Iterator[str]) -> Iterator[tuple[str, str]]:
    for line in file:
        name = line.rstrip("\r\n")
        if name.strip():
            yield name, ""


def _check_text(path: Path, file: Iterator[str]) -> Iterator[str]:
    """The lines; raises UserError at one with NUL, which UTF-16 has at every other place and no path has."""
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
        raise UserError(
            f"the list {str(path)!r} has the columns {', '.join(header) or '(none)'}; "
            f"one of them must be named {', '.join(PATH_COLUMNS)}"
        )
    own = next((header.index(name) for name in ID_COLUMNS if name in header), -1)
    for first_line, row in _rows(path, reader):
        if row:
            if len(row) <= max(column, own):
                raise UserError(f"line {first_line} of {str(path)!r} has {len(row)} of {len(header)} columns")
            yield row[column], row[own] if own >= 0 else ""


def _rows(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of each row. Raises UserError where a quote is left open or stands amid a field."""
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


def _walk(root: bytes, below: bytes, *, skip: bytes, others: Counter[str]) -> Iterator[bytes]:
    """The images' paths below `root`, in the order of their bytes; hidden files and folders are left out.

    Holds the names of the folders it is in, not of those it has left. Links to folders are followed, but not in a
    loop. A folder with an image's extension and no image inside comes as if it were one: its row says what it is.
    """
    found = 0
    stack = [(below, _list_folder(root, below, others), _identity(root, below), 0)]
    while stack:
        folder, names, _, before = stack[-1]
        if not names:
            stack.pop()
            if found == before and stack and _suffix(folder) in EXTENSIONS:
                found += 1
                yield folder
            continue
        name = names.pop()
        path = folder + b"/" + name if folder else name
        if not name.endswith(b"/"):
            found += 1
            yield path
        elif path[:-1] != skip:
            path = path[:-1]
            identity = _identity(root, path)
            if all(identity != above[2] for above in stack):
                stack.append((path, _list_folder(root, path, others), identity, found))


def _list_folder(root: bytes, below: bytes, others: Counter[str]) -> list[bytes]:
    """Names of images, and of folders with a slash, the first of them last."""
    names = []
    folder = os.path.join(root, below)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if _is_folder(entry):
                    names.append(entry.name + b"/")
                elif _suffix(entry.name) in EXTENSIONS:
                    names.append(entry.name)
                else:
                    others[escape(_suffix(entry.name))] += 1
    except OSError as error:
        raise UserError(
            f"the folder {escape(folder)!r} can't be listed ({error.strerror}); make it readable, or move it away"
        ) from None
    names.sort(reverse=True)
    return names


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links: a row that can't be read
        return False


def _identity(root: bytes, below: bytes) -> tuple[int, int]:
    try:
        found = os.stat(os.path.join(root, below))
    except OSError as error:
        folder = escape(os.path.join(root, below))
        raise UserError(f"the folder {folder!r} can't be read ({error.strerror}); make it readable") from None
    return found.st_dev, found.st_ino


def _split_folder(root: bytes, split: str) -> bytes:
    for below in (split, f"images/{split}"):
        if os.path.isdir(os.path.join(root, os.fsencode(below))):
            return os.fsencode(below)
    known: list[str] = []
    for base in (root, os.path.join(root, b"images")):
        if os.path.isdir(base):
            known += [
                escape(e.name) for e in os.scandir(base) if e.is_dir() and e.name not in (b"annotations", b"images")
            ]
    way_out = nearest(split, known) if known else "it has no folders; leave --split out"
    raise UserError(f"--split {split!r} is not a folder of {escape(root)!r}; {way_out}")


def _instance_files(root: bytes) -> dict[str, str]:
    """Split -> `instances_SPLIT.json` of a COCO root, for the splits that have a folder of images."""
    folder = os.path.join(os.fsdecode(root), "annotations")
    if not os.path.isdir(folder):
        return {}
    found = {}
    for name in sorted(os.listdir(folder)):
        split = name.removeprefix("instances_").removesuffix(".json")
        is_there = any(os.path.isdir(os.path.join(os.fsdecode(root), base, split)) for base in ("", "images"))
        if name == f"instances_{split}.json" and is_there:
            found[split] = os.path.join(folder, name)
    return found


def _suffix(name: bytes) -> bytes:
    return os.path.splitext(name)[1].lower()


def _what_else(others: Counter[str]) -> str:
    if others[".tar"]:
        return f"it has {others['.tar']} tars: name them, as in 'shard-{{000000..000041}}.tar'"
    known = " ".join(sorted(e.decode() for e in EXTENSIONS))
    there = ", ".join(f"{n} {suffix or 'without extension'}" for suffix, n in others.most_common(3))
    return f"found: {there or 'nothing'}; read are {known}"


def _bar(progress: bool) -> "tqdm[Never]":
    return tqdm(desc="planning", unit=" images", disable=not progress, mininterval=0.5)


def _tick(bar: "tqdm[Never]", builder: IndexBuilder) -> None:
    count = len(builder)
    if count % 1000 == 0 and not bar.disable:
        bar.set_postfix_str(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB", refresh=False)
    bar.update(count - bar.n)

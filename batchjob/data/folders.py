"""Lists a folder as DATA: its images in order, the splits and annotations of a COCO root, and folders as classes."""

import os
import re
from collections import Counter
from collections.abc import Iterator

from batchjob.data.reading import escape
from batchjob.errors import UserError, nearest

# HEIC and JPEG XL count also where their packages are not installed: the row of such a photo says that one is missing.
EXTENSIONS = frozenset(
    b".jpg .jpeg .jpe .jfif .png .webp .tif .tiff .bmp .gif .avif .jp2 .ppm .pgm .pnm .heic .heif .hif .jxl".split()
)
_SPLIT = re.compile(rb"(train|trainval|training|val|valid|validation|dev|test|testing|eval)[-_]?\d*", re.IGNORECASE)


def walk(
    root: bytes, below: bytes, *, skip: bytes, others: Counter[str], wanted: frozenset[bytes] = EXTENSIONS
) -> Iterator[bytes]:
    """Yields the files of the `wanted` extensions in a folder at any depth, in the order of their paths' bytes.

    Hidden files and folders are left out. Links to folders are followed, but not in a loop. A folder that has a wanted
    extension, and no wanted file inside, is yielded like a file: its row then says that it is a folder. The memory
    holds the names in one folder of each depth at a time.

    Parameters
    ----------
    root
        The folder that all paths here are relative to.
    below
        The folder that is listed; empty for `root` itself.
    skip
        A folder that is left out; empty for none.
    others
        Counts the other files by extension.
    wanted
        Extensions in lower case, with their dot.

    Yields
    ------
    Paths relative to `root`.

    Raises
    ------
    UserError
        A folder can't be listed; leaving it out would be a gap that is not noticed.
    """
    found = 0
    stack = [(below, _list_folder(root, below, others, wanted), _identity(root, below), 0)]
    while stack:
        folder, names, _, before = stack[-1]
        if not names:
            stack.pop()
            if found == before and stack and suffix_of(folder) in wanted:
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
                stack.append((path, _list_folder(root, path, others, wanted), identity, found))


def _list_folder(root: bytes, below: bytes, others: Counter[str], wanted: frozenset[bytes]) -> list[bytes]:
    """Returns the names of wanted files, and of folders with a slash behind them, in descending order."""
    names = []
    folder = os.path.join(root, below)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if _is_folder(entry):
                    names.append(entry.name + b"/")
                elif suffix_of(entry.name) in wanted:
                    names.append(entry.name)
                else:
                    others[escape(suffix_of(entry.name))] += 1
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


def split_folder(root: bytes, split: str) -> bytes:
    """Finds the folder of a split: `SPLIT` or `images/SPLIT`.

    Parameters
    ----------
    root
        The folder that was given as DATA.
    split
        Such as `val2017`.

    Returns
    -------
    The folder, relative to `root`.

    Raises
    ------
    UserError
        DATA lacks this folder; the message lists those that it has.
    """
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


def instance_files(root: bytes) -> dict[str, str]:
    """Returns split → path of `annotations/instances_SPLIT.json` of a COCO root, for splits with a folder of images."""
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


def classes_of(names: Iterator[bytes]) -> list[str]:
    """Returns the class of each image by its path, where the folders are plainly classes; else an empty list.

    The folders are classes if every image lies exactly one folder deep (`CLASS/x.jpg`), or exactly two folders deep
    with the first named like a split (`train/CLASS/x.jpg`). There must be at least two classes, and more images than
    classes. A folder that is named like a split is not a class.
    """
    found: list[str] = []
    known: dict[bytes, str] = {}  # one text a class
    depth = -1
    for name in names:
        parts = name.split(b"/")[:-1]
        depth = len(parts) if depth < 0 else depth
        is_split = [_SPLIT.fullmatch(part) is not None for part in parts]
        if len(parts) != depth or is_split not in ([False], [True, False]):
            return []
        found.append(known.setdefault(parts[-1], escape(parts[-1])))
    return found if 2 <= len(known) < len(found) else []


def suffix_of(name: bytes) -> bytes:
    """Returns the extension in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()

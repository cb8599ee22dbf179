"""Makes the index of DATA: a folder, a COCO root, tars, Parquet files or a list. No image is decoded."""

import glob
import os
import resource
import sys
from collections import Counter
from pathlib import Path
from typing import Never

from tqdm import tqdm

from batchjob.data.folders import EXTENSIONS, classes_of, instance_files, split_folder, walk
from batchjob.data.index import ImageIndex, IndexBuilder
from batchjob.data.lists import LISTS, read_list
from batchjob.data.parquet import COLUMNS, add_parquet
from batchjob.data.reading import escape
from batchjob.data.tars import add_tars, expand
from batchjob.errors import UserError, counted, nearest

PARQUET = b".parquet"


def index_images(data: str, *, split: str = "", limit: int = 0, progress: bool = False) -> ImageIndex:
    """Lists the images of DATA as an index.

    Images of a folder are in the order of their paths' bytes. Shards and lists keep the order that they have.

    Parameters
    ----------
    data
        A folder, a COCO root, a file, or a pattern of tars or Parquet files.
    split
        A folder of a COCO root, or what the names of Parquet files in a folder begin with; empty for all.
    limit
        The most rows that are taken, from the first on; 0 for all.
    progress
        Whether a progress bar is shown.

    Raises
    ------
    UserError
        DATA has no image, two images have one id, or something of DATA is missing or can't be read.
    """
    raise_for_missing(data)
    if os.path.isdir(data):
        return _index_folder(os.fsencode(os.path.abspath(data)), split=split, limit=limit, progress=progress)
    raise_for_split(data, split)
    if not os.path.lexists(data):
        named = expand(data) if "{" in data else sorted(glob.glob(data, recursive=True))
        return _index_shards(data, named, limit=limit, progress=progress)
    suffix = os.path.splitext(data)[1].lower()
    if suffix in (".tar", ".parquet"):
        return _index_shards(data, [data], limit=limit, progress=progress)
    if suffix in LISTS:
        return _index_list(Path(data), limit=limit, progress=progress)
    if suffix.encode() in EXTENSIONS:
        folder, name = os.path.split(os.path.abspath(data))
        builder = IndexBuilder()
        builder.add(os.fsencode(name))
        return builder.build(os.fsencode(folder))
    raise UserError(
        f"DATA {data!r} is a {suffix or 'nameless'} file; give a folder, a .tar (not compressed), a .parquet, "
        f"a list ({', '.join(LISTS)}) or an image"
    )


def raise_for_missing(data: str) -> None:
    """Raises UserError where there is nothing at DATA, which may be a pattern of shards."""
    is_pattern = not os.path.lexists(data) and ("{" in data or glob.glob(data, recursive=True))
    if not os.path.exists(data) and not is_pattern:
        raise UserError(
            f"DATA {data!r} is not a file or a folder; give a folder, a COCO root, a .tar, a .parquet or a list"
        )


def raise_for_absent_list(data: str) -> None:
    """Raises UserError where DATA is a list and none of its paths is there; reads it up to the first that is."""
    path, first, count = Path(data), "", 0
    if path.suffix.lower() not in LISTS or not path.is_file():
        return
    folder = os.path.abspath(path.parent)
    for name, _ in read_list(path):
        place, count = os.path.join(folder, name), count + 1
        if os.path.lexists(place):
            return
        first = first or place
    if count:  # an empty list has its own message
        what = f"none of the {count:,} paths" if count > 1 else "the one path"
        raise UserError(
            f"{what} of {data} is there{', such as' if count > 1 else ':'} {escape(os.fsencode(first))}; correct the "
            "list: its paths are relative to the folder that it is in, or begin with /"
        )


def raise_for_split(data: str, split: str) -> None:
    """Checks `--split` against DATA.

    Parameters
    ----------
    data
        As `index_images`.
    split
        As `index_images`; empty passes.

    Raises
    ------
    UserError
        DATA is not a folder, or has neither a folder nor Parquet files of the split.
    """
    if split and not os.path.isdir(data):
        kind = "a file" if os.path.isfile(data) else "a range of files"
        raise UserError(f"--split {split} is of a folder, and {data!r} is {kind}; leave it out")
    if split and os.path.isdir(data):
        root = os.fsencode(os.path.abspath(data))
        if not _parquet_files(root, split):
            split_folder(root, split)


def _index_folder(root: bytes, *, split: str, limit: int, progress: bool) -> ImageIndex:
    annotations = instance_files(root)
    is_coco = bool(annotations)
    below = b""
    if split:
        if shards := _parquet_files(root, split):
            return _index_shards(os.fsdecode(root), shards, limit=limit, progress=progress)
        below = split_folder(root, split)
        annotations = {name: path for name, path in annotations.items() if name == split}
    others: Counter[str] = Counter()
    builder = IndexBuilder(columns=("class",))
    with _bar(progress) as bar:
        for name in walk(root, below, skip=b"annotations" if is_coco and not split else b"", others=others):
            builder.add(name)
            _tick(bar, builder)
            if limit and len(builder) >= limit:
                break
    if not len(builder) and others[PARQUET.decode()]:
        return _index_shards(os.fsdecode(root), _parquet_files(root, below=below), limit=limit, progress=progress)
    if not len(builder):
        raise UserError(f"DATA {escape(os.path.join(root, below))!r} has no image; {_what_else(others)}")
    if not is_coco:
        builder.set_column("class", classes_of(builder.names()))
    return builder.build(root, annotations=",".join(annotations.values()))


def _parquet_files(root: bytes, split: str = "", *, below: bytes = b"") -> list[str]:
    """Returns the Parquet files in the folder `below` of `root`; with `split`, those whose file name begins with it.

    Returns none where `split` is itself a folder of `root`, whose files are listed instead.
    """
    if split and os.path.isdir(os.path.join(root, os.fsencode(split))):
        return []
    names = [os.fsdecode(name) for name in walk(root, below, skip=b"", others=Counter(), wanted=frozenset({PARQUET}))]
    if split and names:
        of_split = [name for name in names if os.path.basename(name).startswith((f"{split}-", f"{split}."))]
        if not of_split:
            known = sorted({os.path.basename(name).partition("-")[0].removesuffix(".parquet") for name in names})
            raise UserError(
                f"--split {split!r} begins no name of {counted(len(names), 'Parquet file')}; {nearest(split, known)}"
            )
        names = of_split
    return [os.path.join(os.fsdecode(root), name) for name in names]


def _index_shards(data: str, paths: list[str], *, limit: int, progress: bool) -> ImageIndex:
    paths = [os.path.abspath(path) for path in paths]
    kinds = {os.path.splitext(path)[1].lower() for path in paths}
    if kinds not in ({".tar"}, {".parquet"}):
        raise UserError(
            f"DATA {data!r} is a range of other than .tar or .parquet files; give a folder, a list, or one kind"
        )
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError(f"DATA {data!r} names {twice} twice; every image needs an id of its own: leave one out")
    absent = [path for path in paths if not os.path.isfile(path)]
    if absent:
        some = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
        are = "is" if len(absent) == 1 else "are"
        raise UserError(
            f"{len(absent)} of {counted(len(paths), 'shard')} of {data!r} {are} not there: {some}; correct the range"
        )
    is_tar = kinds == {".tar"}
    builder = IndexBuilder("tar") if is_tar else IndexBuilder("parquet", columns=COLUMNS)
    rows = add_tars(builder, paths, EXTENSIONS, limit) if is_tar else add_parquet(builder, paths, limit)
    remarks: list[str] = []
    with _bar(progress) as bar:
        for remark in rows:
            _tick(bar, builder)
            if remark:
                remarks.append(remark)
                bar.write(remark, file=sys.stderr)
    if not len(builder):
        what = counted(len(paths), "tar" if is_tar else "Parquet file")
        what += "; images are known by their extension" if is_tar else ""
        raise UserError(f"DATA {data!r} has no image in {what}")
    return builder.build(os.fsencode(os.path.dirname(paths[0])), remarks=remarks)


def _index_list(path: Path, *, limit: int, progress: bool) -> ImageIndex:
    builder = IndexBuilder()
    with _bar(progress) as bar:
        for name, own in read_list(path):
            builder.add(os.fsencode(name), id=own)
            _tick(bar, builder)
            if limit and len(builder) >= limit:
                break
    if not len(builder):
        raise UserError(f"the list {str(path)!r} names no image; give one path a line")
    return builder.build(os.fsencode(os.path.abspath(path.parent)))


def _what_else(others: Counter[str]) -> str:
    if others[".tar"]:
        return f"it has {counted(others['.tar'], 'tar')}: name each, as in 'shard-{{000000..000041}}.tar'"
    known = " ".join(sorted(e.decode() for e in EXTENSIONS))
    there = ", ".join(f"{n} {suffix or 'without extension'}" for suffix, n in others.most_common(3))
    return f"found: {there or 'nothing'}; read are {known}"


def _bar(progress: bool) -> "tqdm[Never]":
    return tqdm(desc="images found", unit="", disable=not progress, mininterval=0.5)


def _tick(bar: "tqdm[Never]", builder: IndexBuilder) -> None:
    count = len(builder)
    if count % 1000 == 0 and not bar.disable:
        bar.set_postfix_str(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB", refresh=False)
    bar.update(count - bar.n)

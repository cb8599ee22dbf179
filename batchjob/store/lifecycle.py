"""The stores of a run: makes, checks, mends, finishes and opens them. docs/store.md draws them."""

import contextlib
import csv
import importlib.util
import io
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchjob.errors import UserError, WorkLeft, counted, printable
from batchjob.files import (
    clear_disk_errors,
    clear_work,
    new_scratch,
    only_one,
    seal_file,
    sync_folder,
    unseal_file,
    write_file,
)
from batchjob.plan import Plan
from batchjob.store import centroids
from batchjob.store.encode import DamagedRoot, IndexLike, consolidated_root, read_root, static_files
from batchjob.store.outputs import check_stats, damaged_arrays, is_of_stats
from batchjob.store.partitions import Damage, check_all, check_files, marker_path, published, read_marker, unpublish

if TYPE_CHECKING:
    import xarray

# how the paths begin that `finish` writes again in any case
_REWRITTEN = ("failures.csv", "labels.zarr/zarr.json", "scores.zarr/zarr.json", "labels.zarr/centroid")
_MADE_ANEW = ("failures.csv", "labels.zarr/centroid")  # those of them that do not depend on what is there
_NO_CHECKSUMS = Damage(-1, "done/store.json", "the checksums of the metadata are unreadable")


@dataclass(frozen=True, slots=True)
class Finished:
    """How many images a finished run has, and how many of them failed."""

    images: int
    causes: Mapping[str, int]  # failed images by cause

    @property
    def failed(self) -> int:
        """How many images failed."""
        return sum(self.causes.values())


def create(run: Path, plan: Plan, index: IndexLike) -> None:
    """Makes the empty stores of a run in one step, by renaming them. Keeps stores of the same plan that are there.

    Parameters
    ----------
    run
        The folder of the run.
    plan
        The run's plan.
    index
        The run's images.

    Raises
    ------
    UserError
        RUN holds labels of another plan or schema, or can't be written.
    """
    with clear_disk_errors(run, f"cannot make the store in {run}"):
        if is_of(run, plan):
            return
        if (run / "labels.zarr").exists():
            for name in ("labels.zarr", "scores.zarr"):  # of a `plan` that was killed before it wrote plan.json
                shutil.rmtree(run / name, ignore_errors=True)
        run.mkdir(parents=True, exist_ok=True)
        (run / "done").mkdir(exist_ok=True)
        scratch = new_scratch(run)
        files = static_files(plan, index)
        for path, data in files.items():
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            write_file(scratch / path, data, scratch)
        _seal_static(run, files, scratch)
        for name in ("scores.zarr", "labels.zarr"):  # labels last: where it is there, all is there
            if (scratch / name).exists() and not (run / name).exists():
                (scratch / name).rename(run / name)
        sync_folder(run)
        scratch.rmdir()


def is_of(run: Path, plan: Plan) -> bool:
    """Finds out whether a folder holds the stores of a plan.

    Parameters
    ----------
    run
        The folder.
    plan
        The plan.

    Returns
    -------
    Whether it does; False where it holds none, or those of another plan without any label.

    Raises
    ------
    UserError
        The folder holds labels of another plan, or a store of another schema.
    """
    if not (run / "labels.zarr").exists():
        return False
    if read_root(run)["attributes"]["plan_digest"] == plan.digest:
        return True
    if published(run):
        raise UserError(
            f"{run}/labels.zarr holds the labels of another plan: DATA or the options are not those that it was made "
            "with; choose another RUN, or restore plan.json if it was lost"
        )
    return False


def mend(run: Path, plan: Plan, index: IndexLike) -> list[Damage]:
    """Writes again the files that belong to the whole store, where one is damaged: metadata, coordinates, image ids.

    Reads every byte of them; they are small.

    Parameters
    ----------
    run, plan, index
        As in `create`.

    Returns
    -------
    What was damaged.
    """
    if not check_static(run, contents=True):
        return []
    with clear_disk_errors(run, f"cannot mend the store in {run}"), only_one(run):
        if damages := check_static(run, contents=True):  # and not only a `finish` that was at work meanwhile
            files, scratch = static_files(plan, index), new_scratch(run)
            for path, data in files.items():
                (run / path).parent.mkdir(parents=True, exist_ok=True)
                write_file(run / path, data, scratch)
            _seal_static(run, files, scratch)
            scratch.rmdir()
    return damages


def missing(run: Path, plan: Plan) -> list[int]:
    """Finds the partitions that are not published whole: without a done-marker, or with a file of another size.

    Parameters
    ----------
    run
        The folder of the run.
    plan
        The run's plan.

    Returns
    -------
    Numbers of partitions, ascending.
    """
    run = Path(run)
    done = published(run)
    damaged = {damage.partition for damage in check_all(run, done, contents=False)}
    return sorted(set(range(plan.partition_count)) - (set(done) - damaged))


def is_done(run: Path, partition: int) -> bool:
    """Finds out whether a partition is published.

    Parameters
    ----------
    run
        The folder of the run.
    partition
        The number of the partition.

    Returns
    -------
    Whether it has its done-marker.
    """
    return marker_path(Path(run), partition).exists()


def failures(run: Path) -> Counter[str]:
    """Counts the failed images of the published partitions by cause."""
    markers = [read_marker(Path(run), partition) for partition in published(Path(run))]
    return Counter(failure[1] for marker in markers if marker for failure in marker["failures"])


def verify(run: Path) -> list[Damage]:
    """Finds everything in a run that is not as it was published, by size and checksum; reads every byte of the run."""
    run = Path(run)
    if (run / "labels.zarr").is_dir():
        with contextlib.suppress(DamagedRoot):  # `check_static` lists it
            read_root(run)
    parts = check_all(run, published(run), contents=True)
    fitted = centroids.check(run) or _lost_centroids(run)
    return check_static(run, contents=True) + parts + fitted + check_stats(run, contents=True)


def forget(run: Path, damages: Sequence[Damage]) -> None:
    """Makes damaged partitions count as missing, and removes other damaged files; the verb `run` makes all of it again.

    Parameters
    ----------
    run
        The folder of the run.
    damages
        What `verify` found.

    Raises
    ------
    UserError
        RUN can't be written.
    """
    with clear_disk_errors(run, f"cannot mark damaged partitions in {run}"):
        for partition in sorted({d.partition for d in damages if d.partition >= 0}):
            unpublish(run, partition)
        for damage in damages:
            if damage.partition < 0 and not (run / damage.path).is_dir():
                (run / damage.path).unlink(missing_ok=True)
            if damage.partition < 0 and is_of_stats(run, damage.path):  # no reader could open the rest of its array
                shutil.rmtree(run / "scores.zarr" / damage.path.split("/")[1], ignore_errors=True)


def forget_failures(run: Path, causes: Collection[str]) -> int:
    """Makes partitions count as missing that have an image which failed for one of these causes.

    Parameters
    ----------
    run
        The folder of the run.
    causes
        Names of `codes.STATUS`.

    Returns
    -------
    How many images failed so.

    Raises
    ------
    UserError
        RUN can't be written.
    """
    found = 0
    with clear_disk_errors(run, f"cannot mark failed images in {run}"):
        for partition in published(run):
            marker = read_marker(run, partition)
            own = sum(cause in causes for _, cause, _ in marker["failures"]) if marker else 0
            if own:
                unpublish(run, partition)
            found += own
    return found


def finish(run: Path) -> Finished:
    """Consolidates the metadata of a run, writes failures.csv, and counts images and failures.

    Raises WorkLeft where partitions are not published, and lists them; also where the metadata is damaged.
    """
    run = Path(run)
    attributes = read_root(run)["attributes"]
    count = -(-int(attributes["rows"]) // int(attributes["rows_per_partition"]))
    done = set(published(run))
    damaged = {d.partition for d in check_all(run, sorted(done), contents=False)}
    holes = sorted(set(range(count)) - (done - damaged))
    static = unseal_file(run / "done" / "store.json")
    again = f"again by the command that batchjob show {run} prints"
    damaged_metadata = f"the metadata of {run} is damaged; it is made {again}"
    others = (
        {path: check for path, check in static["files"].items() if not path.startswith(_REWRITTEN)} if static else {}
    )
    if not others or check_files(run, -1, others, contents=False):
        raise WorkLeft(damaged_metadata)
    if holes:
        shown = ", ".join(map(str, holes[:20])) + (", …" if len(holes) > 20 else "")
        are = "is" if len(holes) == 1 else "are"
        raise WorkLeft(
            f"{len(holes)} of {counted(count, 'partition')} {are} not labelled: {shown}; "
            f"go on with: batchjob label {run}"
        )
    with clear_disk_errors(run, f"cannot finish {run}"), only_one(run):
        static = unseal_file(run / "done" / "store.json") or {"files": others}  # another may have finished meanwhile
        if any(not damage.path.startswith(_MADE_ANEW) for damage in check_static(run, contents=True)):
            raise WorkLeft(damaged_metadata)
        if lost := _lost_centroids(run):
            raise WorkLeft(f"{run / lost[0].path} is missing; it is fitted {again}")
        causes, failed = _failures(run, count)
        files = centroids.store_files(run) | {"failures.csv": failed}
        for name in ("scores.zarr", "labels.zarr"):
            if f"{name}/zarr.json" in static["files"]:  # else `stats` made the store, and has listed its arrays
                files[f"{name}/zarr.json"] = consolidated_root(run, name, files, left_out=damaged_arrays(run))
        _replace(run, others, files)
        clear_work(run)
    return Finished(int(attributes["rows"]), causes)


def consolidate_scores(run: Path) -> None:
    """Lists the arrays that `stats` wrote in the zarr.json of RUN/scores.zarr, since xarray reads no other metadata."""
    path, static = "scores.zarr/zarr.json", unseal_file(run / "done" / "store.json")
    with clear_disk_errors(run, f"cannot write the scores of {run}"):
        files = {path: consolidated_root(run, "scores.zarr", {})}
        if static and path in static["files"]:
            _replace(run, {p: check for p, check in static["files"].items() if p != path}, files)
        else:  # `stats` made the store, which is then not a part of what is published
            _put(run, files)


def open_labels(run: str | PathLike[str], *, chunks: Any = None) -> "xarray.Dataset":
    """Opens RUN/labels.zarr as `xarray.open_zarr` does.

    Parameters
    ----------
    run
        The folder of the run.
    chunks
        None for arrays that are read when they are used; anything else, such as {}, for dask arrays.

    Returns
    -------
    All arrays and coordinates of labels.zarr.

    Raises
    ------
    UserError
        RUN is not a run, has another schema, or `chunks` needs dask and it is not installed.
    """
    if chunks is not None and importlib.util.find_spec("dask") is None:
        raise UserError(f"chunks={chunks!r} needs dask, which is not installed; install it: pip install dask")
    path = Path(run)
    consolidated = "consolidated_metadata" in read_root(path)
    import xarray  # with pandas it takes a second, which `show` and wrong input need not wait for

    labels: xarray.Dataset = xarray.open_zarr(
        path / "labels.zarr", zarr_format=3, consolidated=consolidated, chunks=chunks
    )
    return labels


def _lost_centroids(run: Path) -> list[Damage]:
    """Finds out whether the centroids are missing that `finish` has copied into labels.zarr."""
    static = unseal_file(run / "done" / "store.json")
    was_fitted = static is not None and any(path.startswith("labels.zarr/centroid") for path in static["files"])
    is_lost = was_fitted and not (run / "fit" / "centroids.npz").exists()
    return [Damage(-1, "fit/centroids.npz", "missing")] if is_lost else []


def _is(run: Path, path: str, checks: Mapping[str, Sequence[int]]) -> bool:
    """Says whether a file is as its checksum among `checks` says."""
    return path in checks and not check_files(run, -1, {path: checks[path]}, contents=True)


def _check(data: bytes) -> list[int]:
    return [len(data), zlib.crc32(data)]


def check_static(run: Path, *, contents: bool) -> list[Damage]:
    """Finds what is wrong with the files that belong to the whole store.

    Parameters
    ----------
    run
        The folder of the run.
    contents
        Whether every byte is read; else only sizes are looked at.

    Returns
    -------
    A Damage for each file; their partition is -1.
    """
    static = unseal_file(run / "done" / "store.json")
    if static is None:
        return [_NO_CHECKSUMS]
    damages = check_files(run, -1, static["files"], contents=contents)
    before = static.get("before", {})  # a process that was killed may have left the old or the new content of these
    known = {path: check for path, check in before.items() if check}
    neither = {damage.path for damage in check_files(run, -1, known, contents=contents)}
    return [damage for damage in damages if damage.path not in before or damage.path in neither]


def _replace(run: Path, others: Mapping[str, Sequence[int]], files: Mapping[str, bytes]) -> None:
    """Puts `files` in place, and records their checksums beside those of `others`.

    Records the old and the new checksums before it replaces the files, so that a kill between the two is not taken for
    damage. The next `finish` then does all of it again. It may be stopped in the same place: the old checksums stay
    those of what lies there, which may be the file from before the first attempt.
    """
    static, scratch = unseal_file(run / "done" / "store.json") or {"files": {}}, new_scratch(run)
    checks = dict(others) | {path: _check(data) for path, data in files.items()}
    earlier = static.get("before", {})
    still = {path: check for path, check in earlier.items() if path not in files}
    waiting = {path: check for path, check in earlier.items() if path in files and not _is(run, path, static["files"])}
    before = still | {path: static["files"].get(path) for path in files} | waiting
    seal_file(run / "done" / "store.json", {"files": checks, "before": before}, scratch)
    _put(run, files)
    seal_file(run / "done" / "store.json", {"files": checks, "before": still}, scratch)
    scratch.rmdir()


def _put(run: Path, files: Mapping[str, bytes]) -> None:
    """Writes each file whole. The folder of an array that is not there yet is renamed to its place in one step."""
    scratch = new_scratch(run)
    arrays = {"/".join(path.split("/")[:2]) for path in files if path.count("/") > 1}
    new = [array for array in sorted(arrays) if not (run / array).exists()]
    in_new = [path for path in files if path.startswith(tuple(f"{array}/" for array in new))]
    for path in in_new:
        (scratch / path).parent.mkdir(parents=True, exist_ok=True)
        write_file(scratch / path, files[path], scratch)
    for array in new:
        os.rename(scratch / array, run / array)
    for path in sorted(set(files) - set(in_new)):  # the roots come after what they list
        (run / path).parent.mkdir(parents=True, exist_ok=True)
        write_file(run / path, files[path], scratch)
    for folder in sorted({(run / path).parent for path in files}):
        sync_folder(folder)
    shutil.rmtree(scratch)


def _seal_static(run: Path, files: Mapping[str, bytes], scratch: Path) -> None:
    checks = {path: _check(data) for path, data in files.items()}
    seal_file(run / "done" / "store.json", {"files": checks}, scratch)


def _failures(run: Path, partitions: int) -> tuple[Counter[str], bytes]:
    """The number of failed images by cause, and the content of failures.csv."""
    causes: Counter[str] = Counter()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image_id", "cause", "message"])
    for partition in range(partitions):
        marker = read_marker(run, partition)
        for failure in marker["failures"] if marker else ():
            writer.writerow(printable(text, keep="\n\t") for text in failure)
            causes[failure[1]] += 1
    return causes, text.getvalue().encode()

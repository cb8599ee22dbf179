"""RUN/labels.zarr: made once, written a partition at a time, checked, finished, opened. docs/store.md draws it."""

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

from batchjob.errors import UserError, WorkLeft, printable
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
from batchjob.store.arrays import layout
from batchjob.store.encode import DamagedRoot, IndexLike, consolidated_root, read_root, static_files
from batchjob.store.outputs import check_stats, is_of_stats
from batchjob.store.partitions import Damage, check_all, check_files, marker_path, published, read_marker, unpublish
from batchjob.store.writer import Failure, Writer

if TYPE_CHECKING:
    import xarray

__all__ = [
    "Damage",
    "Failure",
    "Finished",
    "Writer",
    "create",
    "finish",
    "is_done",
    "layout",
    "missing",
    "open_labels",
    "verify",
]

# what `finish` writes again, whatever is there: the roots, and all of the centroids
_REWRITTEN = ("failures.csv", "labels.zarr/zarr.json", "scores.zarr/zarr.json", "labels.zarr/centroid")
_NO_CHECKSUMS = Damage(-1, "done/store.json", "the checksums of the metadata are unreadable")


@dataclass(frozen=True, slots=True)
class Finished:
    """What a finished run holds."""

    images: int
    causes: Mapping[str, int]  # failed images by cause

    @property
    def failed(self) -> int:
        return sum(self.causes.values())


def create(run: Path, plan: Plan, index: IndexLike) -> None:
    """Makes the stores of a run, empty, at once (a rename); what is there already of the same plan is kept.

    Raises UserError where RUN holds a store of another plan or schema, or can't be written.
    """
    with clear_disk_errors(run, f"cannot make the store in {run}"):
        if is_of(run, plan):
            return
        if (run / "labels.zarr").exists():
            for name in ("labels.zarr", "scores.zarr"):  # a plan that was killed before it was saved
                shutil.rmtree(run / name, ignore_errors=True)
        run.mkdir(parents=True, exist_ok=True)
        (run / "done").mkdir(exist_ok=True)
        scratch = new_scratch(run)
        files = static_files(plan, index)
        for path, data in files.items():
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            write_file(scratch / path, data, scratch)
        _seal_static(run, files, scratch)
        for name in ("scores.zarr", "labels.zarr"):  # labels last: it is what says that all is there
            if (scratch / name).exists() and not (run / name).exists():
                (scratch / name).rename(run / name)
        sync_folder(run)
        scratch.rmdir()


def is_of(run: Path, plan: Plan) -> bool:
    """Whether RUN holds a store of this plan. Raises UserError where it holds labels of another plan or schema."""
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
    """Writes again what belongs to the whole store (metadata, coordinates, image ids) and is damaged; what that was.

    Sizes decide here, as in `missing`; `verify` and `forget` find and remove what has the right size only.
    """
    if damages := check_static(run, contents=False):
        with clear_disk_errors(run, f"cannot mend the store in {run}"):
            files, scratch = static_files(plan, index), new_scratch(run)
            for path, data in files.items():
                (run / path).parent.mkdir(parents=True, exist_ok=True)
                write_file(run / path, data, scratch)
            _seal_static(run, files, scratch)
            scratch.rmdir()
    return damages


def missing(run: Path, plan: Plan) -> list[int]:
    """The partitions that are not published whole, ascending: no done-marker, or a file of another size."""
    run = Path(run)
    done = published(run)
    damaged = {damage.partition for damage in check_all(run, done, contents=False)}
    return sorted(set(range(plan.partition_count)) - (set(done) - damaged))


def is_done(run: Path, partition: int) -> bool:
    """Whether the partition has its done-marker."""
    return marker_path(Path(run), partition).exists()


def failures(run: Path) -> Counter[str]:
    """Failed images by cause, over what is published so far."""
    markers = [read_marker(Path(run), partition) for partition in published(Path(run))]
    return Counter(failure[1] for marker in markers if marker for failure in marker["failures"])


def verify(run: Path) -> list[Damage]:
    """Everything that is not as it was published, by size and checksum; reads every byte of the run."""
    run = Path(run)
    if (run / "labels.zarr").is_dir():
        with contextlib.suppress(DamagedRoot):  # it is in the list
            read_root(run)
    parts = check_all(run, published(run), contents=True)
    return check_static(run, contents=True) + parts + centroids.check(run) + check_stats(run, contents=True)


def forget(run: Path, damages: Sequence[Damage]) -> None:
    """The damaged partitions count as missing from now on, and `run` makes them again.

    Raises UserError where RUN is read-only.
    """
    with clear_disk_errors(run, f"cannot mark damaged partitions in {run}"):
        for partition in sorted({d.partition for d in damages if d.partition >= 0}):
            unpublish(run, partition)
        for damage in damages:
            if damage.partition < 0 and not (run / damage.path).is_dir():
                (run / damage.path).unlink(missing_ok=True)
            if damage.partition < 0 and is_of_stats(run, damage.path):  # half an array is not an array to any reader
                shutil.rmtree(run / "scores.zarr" / damage.path.split("/")[1], ignore_errors=True)


def forget_failures(run: Path, causes: Collection[str]) -> int:
    """The partitions with an image that failed for one of `causes` count as missing from now on; how many images."""
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
    """Consolidates the metadata, writes failures.csv and says what the run holds.

    Raises WorkLeft, with the list, where partitions are not published.
    """
    run = Path(run)
    attributes = read_root(run)["attributes"]
    count = -(-int(attributes["rows"]) // int(attributes["rows_per_partition"]))
    done = set(published(run))
    damaged = {d.partition for d in check_all(run, sorted(done), contents=False)}
    holes = sorted(set(range(count)) - (done - damaged))
    static = unseal_file(run / "done" / "store.json")
    others = (
        {path: check for path, check in static["files"].items() if not path.startswith(_REWRITTEN)} if static else {}
    )
    if not others or check_files(run, -1, others, contents=False):
        raise WorkLeft(f"the metadata of {run} is damaged; it is made again by: batchjob run DATA {run}")
    if holes:
        shown = ", ".join(map(str, holes[:20])) + (", …" if len(holes) > 20 else "")
        raise WorkLeft(
            f"{len(holes)} of {count} partitions are not labelled: {shown}; go on with: batchjob label {run}"
        )
    with clear_disk_errors(run, f"cannot finish {run}"), only_one(run):
        static = unseal_file(run / "done" / "store.json") or static  # another process may have finished meanwhile
        causes, failed = _failures(run, count)
        files = centroids.store_files(run) | {"failures.csv": failed}
        for name in ("scores.zarr", "labels.zarr"):
            if (run / name).exists():
                files[f"{name}/zarr.json"] = consolidated_root(run, name, files)
        _replace(run, others, files)
        clear_work(run)
    return Finished(int(attributes["rows"]), causes)


def consolidate_scores(run: Path) -> None:
    """Brings the one-read metadata of RUN/scores.zarr up to date after `stats` wrote arrays: all that xarray reads."""
    path, static = "scores.zarr/zarr.json", unseal_file(run / "done" / "store.json")
    with clear_disk_errors(run, f"cannot write the scores of {run}"):
        files = {path: consolidated_root(run, "scores.zarr", {})}
        if static and path in static["files"]:
            _replace(run, {p: check for p, check in static["files"].items() if p != path}, files)
        else:  # `stats` made it: no part of what is published
            _put(run, files)


def open_labels(run: str | PathLike[str], *, chunks: Any = None) -> "xarray.Dataset":
    """The arrays of RUN/labels.zarr, read lazily; equal to `xarray.open_zarr(RUN/labels.zarr, chunks=chunks)`.

    Raises UserError where RUN is not a run, is of another schema, or `chunks` need dask and there is none.
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


def _check(data: bytes) -> list[int]:
    return [len(data), zlib.crc32(data)]


def check_static(run: Path, *, contents: bool) -> list[Damage]:
    """What is wrong with the files that belong to the whole store; without `contents` only sizes are looked at."""
    static = unseal_file(run / "done" / "store.json")
    if static is None:
        return [_NO_CHECKSUMS]
    damages = check_files(run, -1, static["files"], contents=contents)
    before = static.get("before", {})  # where a process was killed while it replaced files, either content is right
    known = {path: check for path, check in before.items() if check}
    neither = {damage.path for damage in check_files(run, -1, known, contents=contents)}
    return [damage for damage in damages if damage.path not in before or damage.path in neither]


def _replace(run: Path, others: Mapping[str, Sequence[int]], files: Mapping[str, bytes]) -> None:
    """Puts `files` in place and seals them with `others`, whose checks are given.

    Both checksums are recorded before the files are replaced, so that a kill in between is not taken for damage; the
    next `finish` does it all again.
    """
    static, scratch = unseal_file(run / "done" / "store.json") or {"files": {}}, new_scratch(run)
    checks = dict(others) | {path: _check(data) for path, data in files.items()}
    still = {path: check for path, check in static.get("before", {}).items() if path not in files}
    before = still | {path: static["files"].get(path) for path in files}
    seal_file(run / "done" / "store.json", {"files": checks, "before": before}, scratch)
    _put(run, files)
    seal_file(run / "done" / "store.json", {"files": checks, "before": still}, scratch)
    scratch.rmdir()


def _put(run: Path, files: Mapping[str, bytes]) -> None:
    """Each file whole or as it was; an array that is not there yet appears whole, by one rename of its folder."""
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
    """Failed images by cause, and the content of failures.csv."""
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

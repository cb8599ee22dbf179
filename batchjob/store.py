"""RUN/labels.zarr: made once, written a partition at a time, checked, finished, opened. docs/store.md draws it."""

import csv
import io
import json
import queue
import shutil
import socket
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, getpid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xarray
import zarr
from numpy.typing import NDArray

from batchjob.encode import Encoder, IndexLike, static_files
from batchjob.errors import UserError, WorkLeft
from batchjob.layout import (
    SCHEMA_VERSION,
    PlanLike,
    layout,
    partition_count,
    rows_of,
)
from batchjob.publish import (
    Claims,
    Damage,
    check_all,
    check_files,
    drop_scratch,
    explained,
    marker_path,
    new_scratch,
    publish,
    published,
    read_marker,
    seal_file,
    sync_folder,
    unpublish,
    unseal_file,
    write_file,
)

__all__ = ["Damage", "Finished", "Writer", "create", "finish", "is_done", "layout", "missing", "open_labels", "verify"]

Failure = tuple[str, str, str]  # image id, cause, message


@dataclass(frozen=True, slots=True)
class Finished:
    """What a finished run holds."""

    images: int
    causes: Mapping[str, int]  # failed images by cause

    @property
    def failed(self) -> int:
        return sum(self.causes.values())


def create(run: Path, plan: PlanLike, index: IndexLike) -> None:
    """Makes the stores of a run, empty, at once (a rename); what is there already of the same plan is kept.

    Raises UserError where RUN holds a store of another plan or schema, or can't be written.
    """
    with explained(run, f"cannot make the store in {run}"):
        if (run / "labels.zarr").exists():
            found = _root(run)["attributes"]
            if found["plan_digest"] == plan.digest:
                return
            if published(run):
                raise UserError(f"{run}/labels.zarr holds the labels of another plan; choose another RUN")
            for name in ("labels.zarr", "scores.zarr"):  # a plan that was killed before it was saved
                shutil.rmtree(run / name, ignore_errors=True)
        run.mkdir(parents=True, exist_ok=True)
        (run / "done").mkdir(exist_ok=True)
        scratch = new_scratch(run)
        files = static_files(plan, index)
        for path, data in files.items():
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            write_file(scratch / path, data, scratch)
        checks = {path: [len(data), zlib.crc32(data)] for path, data in files.items()}
        seal_file(run / "work" / "store.json", {"files": checks}, scratch)
        for name in ("scores.zarr", "labels.zarr"):  # labels last: it is what says that all is there
            if (scratch / name).exists() and not (run / name).exists():
                (scratch / name).rename(run / name)
        sync_folder(run)
        scratch.rmdir()


class Writer:
    """Publishes partitions from a background thread: `with Writer(run, plan) as w: w.write(i, arrays, failures)`.

    Leaving the block waits for what was handed over, whatever ended it. A failed write is raised by the next call.
    """

    def __init__(self, run: Path, plan: PlanLike, *, worker: str = "") -> None:
        self._run, self._plan = Path(run), plan
        self._worker = worker or f"{socket.gethostname()}:{getpid()}"
        _root(self._run)  # a store of another schema is refused before any work
        self._encoder = Encoder(plan)
        with explained(self._run, f"cannot write to {run}"):
            self._scratch = new_scratch(self._run)
            self._claims = Claims(self._run)
        self._queue: queue.Queue[tuple[int, Mapping[str, NDArray[Any]], Sequence[Failure]] | None] = queue.Queue(1)
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._publish_all, name="store-writer")
        self._began = time.monotonic()
        self.busy_s = 0.0  # of the thread's processor time

    def claim(self, partition: int) -> bool:
        """True if this process may label the partition: it is neither published nor another process's."""
        if is_done(self._run, partition) or not self._claims.take(partition):
            return False
        if is_done(self._run, partition):  # published between the two looks
            self._claims.release(partition)
            return False
        self._began = time.monotonic()
        return True

    def release(self, partition: int) -> None:
        """Gives up a claimed partition that was not written."""
        self._claims.release(partition)

    def write(self, partition: int, arrays: Mapping[str, NDArray[Any]], failures: Sequence[Failure] = ()) -> None:
        """Hands over all arrays of a partition, rows in order; returns before they are published.

        The arrays must not be changed afterwards. Raises ValueError where an array is missing or of another shape.
        """
        self._raise_failure()
        self._encoder.check(partition, arrays)
        self._queue.put((partition, arrays, failures))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.join()
        self._claims.close()
        with explained(self._run, f"cannot clean up in {self._run}"):
            self._scratch.rmdir()
        if kind is None:
            self._raise_failure()

    def _publish_all(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._failed is not None:
                continue  # drained, so that nobody waits on a full queue for ever
            partition, arrays, failures = item
            try:
                start = time.thread_time()
                with explained(self._run, f"cannot publish partition {partition} in {self._run}"):
                    publish(
                        self._run,
                        partition,
                        self._encoder.encode(partition, arrays),
                        {
                            "rows": list(rows_of(self._plan, partition)),
                            "failures": [list(f) for f in failures],
                            "worker": self._worker,
                            "seconds": round(time.monotonic() - self._began, 3),
                            "time": round(time.time(), 3),
                        },
                        self._scratch,
                    )
                self._claims.release(partition)
                self.busy_s += time.thread_time() - start
            except BaseException as error:  # raised in the thread that called
                self._failed = error

    def _raise_failure(self) -> None:
        if self._failed is not None:
            raise self._failed


def missing(run: Path, plan: PlanLike) -> list[int]:
    """The partitions that are not published whole, ascending: no done-marker, or a file of another size."""
    run = Path(run)
    done = published(run)
    damaged = {damage.partition for damage in check_all(run, done, contents=False)}
    return sorted(set(range(partition_count(plan))) - (set(done) - damaged))


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
    _root(run)
    static = unseal_file(run / "work" / "store.json")
    damages = check_files(run, -1, static["files"], contents=True) if static else []
    # finish writes the roots again, with the consolidated metadata: they are read by the line above this one
    damages = [d for d in damages if d.path not in {"labels.zarr/zarr.json", "scores.zarr/zarr.json"}]
    return damages + check_all(run, published(run), contents=True)


def forget(run: Path, damages: Sequence[Damage]) -> None:
    """The damaged partitions count as missing from now on; raises UserError where RUN is read-only."""
    with explained(run, f"cannot mark damaged partitions in {run}"):
        for partition in sorted({d.partition for d in damages if d.partition >= 0}):
            unpublish(run, partition)


def finish(run: Path) -> Finished:
    """Consolidates the metadata, writes failures.csv and says what the run holds.

    Raises WorkLeft, with the list, where partitions are not published.
    """
    run = Path(run)
    attributes = _root(run)["attributes"]
    count = -(-int(attributes["rows"]) // int(attributes["rows_per_partition"]))
    done = set(published(run))
    damaged = {d.partition for d in check_all(run, sorted(done), contents=False)}
    holes = sorted(set(range(count)) - (done - damaged))
    if holes:
        shown = ", ".join(map(str, holes[:20])) + (", …" if len(holes) > 20 else "")
        raise WorkLeft(
            f"{len(holes)} of {count} partitions are not labelled: {shown}; go on with: batchjob label {run}"
        )
    with explained(run, f"cannot finish {run}"):
        causes = _write_failures(run, count)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Consolidated metadata", UserWarning
            )  # xarray reads it; zarr 3 calls it new
            for name in ("labels.zarr", "scores.zarr"):
                if (run / name).exists():
                    zarr.consolidate_metadata(str(run / name), zarr_format=3)
                    sync_folder(run / name)
        drop_scratch(run)
    return Finished(int(attributes["rows"]), causes)


def open_labels(run: str | PathLike[str]) -> xarray.Dataset:
    """The arrays of RUN/labels.zarr, read lazily; equal to `xarray.open_zarr(RUN/labels.zarr)`.

    Raises UserError where RUN is none, or of another schema.
    """
    path = Path(run)
    consolidated = "consolidated_metadata" in _root(path)
    labels: xarray.Dataset = xarray.open_zarr(
        path / "labels.zarr", zarr_format=3, consolidated=consolidated, chunks=None
    )
    return labels


def _write_failures(run: Path, partitions: int) -> Counter[str]:
    causes: Counter[str] = Counter()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image_id", "cause", "message"])
    for partition in range(partitions):
        marker = read_marker(run, partition)
        for failure in marker["failures"] if marker else ():
            writer.writerow(failure)
            causes[failure[1]] += 1
    scratch = new_scratch(run)
    write_file(run / "failures.csv", text.getvalue().encode(), scratch)
    return causes


def _root(run: Path) -> dict[str, Any]:
    path = run / "labels.zarr" / "zarr.json"
    try:
        root = json.loads(path.read_text())
        attributes = root["attributes"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{run} holds no labels.zarr; make it with: batchjob plan DATA {run}") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged; mend it with: batchjob run, on the same RUN") from error
    found = attributes.get("schema_version")
    if found != SCHEMA_VERSION:
        raise UserError(
            f"{run}/labels.zarr has schema {found}, this version of batchjob reads schema {SCHEMA_VERSION}; "
            f"use batchjob {attributes.get('batchjob', 'of that time')}, or another RUN"
        )
    return dict(root)

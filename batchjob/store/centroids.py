"""RUN/fit/: the centroids of a dataset-wide clustering, and the state of an interrupted fit. Imports no torch."""

import os
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from batchjob.errors import UserError, counted
from batchjob.files import clear_disk_errors, removed_if_torn
from batchjob.store.partitions import Damage


@dataclass(frozen=True, slots=True)
class Centroids:
    """The centroids of all layers and heads, and what they are of. L layers, H heads, K clusters, D features."""

    centroids: NDArray[np.float32]  # [L, H, K, D]; NaN where none are fitted yet
    counts: NDArray[np.int64]  # [L, H, K] how many rows of the sample are nearest to each; 0 where none are fitted yet
    inertia: NDArray[np.float64]  # [L, H] sum of squared distances of the sample to the nearest centroid
    iterations: NDArray[np.int64]  # [L, H] of Lloyd's algorithm over the whole sample
    rows: int  # of the sample, the same number in each layer and head
    asked_rows: int  # what `--fit-rows` asks for, which memory may cut
    engine: str
    plan_digest: str

    @classmethod
    def blank(cls, shape: tuple[int, int, int, int], **facts: Any) -> "Centroids":
        """Makes centroids of which none are fitted yet.

        Parameters
        ----------
        shape
            (L, H, K, D).
        facts
            The other fields: rows, asked_rows, engine and plan_digest.

        Returns
        -------
        NaN centroids, and zero counts, inertia and iterations.
        """
        return cls(
            np.full(shape, np.nan, np.float32),
            np.zeros(shape[:3], np.int64),
            np.zeros(shape[:2], np.float64),
            np.zeros(shape[:2], np.int64),
            **facts,
        )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A fit between two iterations: the finished problems, and the state of the current one."""

    finished: Centroids
    layer: int  # of the current problem, its position among the run's layers
    head: int  # the same of the head
    current: NDArray[np.float32]  # [K, D] centroids
    iterations: int  # that led to them
    done: bool  # whether they are final


def save(run: Path, value: Centroids | Checkpoint) -> None:
    """Writes RUN/fit/centroids.npz or RUN/fit/checkpoint.npz, whole or not at all.

    Parameters
    ----------
    run
        The folder of the run.
    value
        Centroids, or a checkpoint; the type decides which file is written.

    Raises
    ------
    WorkLeft
        The disk is full.
    UserError
        RUN can't be written.
    """
    name, values = ("centroids", value) if isinstance(value, Centroids) else ("checkpoint", value.finished)
    arrays: dict[str, Any] = {f.name: getattr(values, f.name) for f in fields(values)}
    if isinstance(value, Checkpoint):
        arrays |= {"at": [value.layer, value.head, value.iterations, int(value.done)], "current": value.current}
    folder = run / "fit"
    part = folder / f"{name}.part{os.getpid()}"
    with clear_disk_errors(run, f"cannot write {part}"), removed_if_torn(part):
        folder.mkdir(exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        part.replace(folder / f"{name}.npz")


def load(run: Path, plan_digest: str) -> Centroids:
    """Reads the fitted centroids of a run.

    Parameters
    ----------
    run
        The folder of the run.
    plan_digest
        The digest of the run's plan.

    Returns
    -------
    The centroids of every layer and head.

    Raises
    ------
    UserError
        There are none, they are damaged, or they belong to another plan.
    """
    arrays = _read(run / "fit" / "centroids.npz")
    if arrays is None:
        raise UserError(f"{run} has no centroids yet; fit them with: batchjob fit {run}")
    found = _from_arrays(arrays)
    if found.plan_digest != plan_digest:
        raise UserError(f"{run}/fit/centroids.npz belongs to another plan; delete {run}/fit and fit again")
    return found


def describe(run: Path) -> str:
    """Says in a few words how far the fit of a run is. Raises UserError where its files are damaged."""
    arrays = _read(run / "fit" / "centroids.npz")
    if arrays is not None:
        found = _from_arrays(arrays)
        heads = found.inertia.size
        return (
            f"{counted(found.counts.shape[2], 'centroid')} for each of {counted(heads, 'head')}, "
            f"from {counted(found.rows, 'row')}, by {found.engine}"
        )
    arrays = _read(run / "fit" / "checkpoint.npz")
    if arrays is None:
        return "not begun"
    done = int((_from_arrays(arrays).counts.sum(-1) > 0).sum())
    of_all, iterations = counted(arrays["counts"][..., 0].size, "head"), counted(int(arrays["at"][2]), "iteration")
    return f"{done} of {of_all} done, and {iterations} of the next"


def is_fitted(run: Path) -> bool:
    """Whether a run has its centroids. A file that can't be read counts as missing, so that they are fitted again."""
    return (run / "fit" / "centroids.npz").exists() and not any("centroids" in d.path for d in check(run))


def check(run: Path) -> list[Damage]:
    """Finds the files of RUN/fit that can't be read. The verb `run` fits again what is removed."""
    damages = []
    for name in ("centroids", "checkpoint"):
        try:
            arrays = _read(run / "fit" / f"{name}.npz")
            if arrays is not None:
                _from_arrays(arrays)
        except (UserError, KeyError, ValueError) as error:
            damages.append(Damage(-1, f"fit/{name}.npz", str(error)))
    return damages


def load_checkpoint(run: Path, wanted: Centroids) -> Checkpoint | None:
    """Reads the state that an interrupted fit goes on from.

    Parameters
    ----------
    run
        The folder of the run.
    wanted
        What is to be fitted.

    Returns
    -------
    The state; None where there is none, or it is of another plan, number of rows or engine than `wanted`.
    """
    try:
        arrays = _read(run / "fit" / "checkpoint.npz")
    except UserError:
        return None  # damaged: the fit begins again
    if arrays is None:
        return None
    finished = _from_arrays(arrays)
    for name in ("rows", "asked_rows", "engine", "plan_digest"):
        if getattr(finished, name) != getattr(wanted, name):
            return None
    layer, head, iterations, done = (int(v) for v in arrays["at"])
    return Checkpoint(finished, layer, head, arrays["current"], iterations, bool(done))


def drop_state(run: Path) -> None:
    """Removes what a finished fit had kept for another attempt: checkpoint, rows and half-written files."""
    for pattern in ("checkpoint.npz", "rows-*", "*.part*"):
        for path in (run / "fit").glob(pattern):
            path.unlink(missing_ok=True)


def store_files(run: Path) -> dict[str, bytes]:
    """Encodes the arrays that a fit adds to labels.zarr: `centroids`, `centroid_rows` and `centroid_inertia`.

    They depend on RUN/fit/centroids.npz alone. Returns the files' contents by path relative to RUN; none where there is
    no fit. Raises UserError where centroids.npz is damaged.
    """
    arrays = _read(run / "fit" / "centroids.npz")
    if arrays is None:
        return {}
    found = _from_arrays(arrays)
    facts = {name: getattr(found, name) for name in ("rows", "asked_rows", "engine")}
    facts["iterations"] = found.iterations.tolist()
    held: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(store_dict=held), zarr_format=3)
    dims = ("algorithm", "layer", "head", "cluster", "feature")
    for name, values, meaning in (
        ("centroids", found.centroids, "means of the rows nearest to them, after the distance's transform"),
        ("centroid_rows", found.counts, "rows of the fit's sample nearest to each centroid"),
        ("centroid_inertia", found.inertia, "sum of squared distances of the fit's sample to the own centroid"),
    ):
        group.create_array(
            name,
            data=values[None],  # one algorithm: k-means
            chunks=(1, *(1 if d in ("layer", "head") else n for d, n in zip(dims[1:], values.shape, strict=False))),
            dimension_names=dims[: values.ndim + 1],
            compressors=ZstdCodec(level=1),
            attributes={"meaning": meaning} | (facts if name == "centroids" else {}),
        )
    return {f"labels.zarr/{path}": data.to_bytes() for path, data in sorted(held.items()) if path != "zarr.json"}


def _from_arrays(arrays: dict[str, Any]) -> Centroids:
    values = {f.name: arrays[f.name] for f in fields(Centroids)}
    for name, kind in (("rows", int), ("asked_rows", int), ("engine", str), ("plan_digest", str)):
        values[name] = kind(values[name])
    return Centroids(**values)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        return None
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        NotImplementedError,  # a flipped bit in the archive's number of the compression
        zipfile.BadZipFile,  # the archive checks each array's CRC
        zlib.error,
    ) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and fit again") from error

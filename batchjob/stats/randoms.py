"""Finds the untrained runs that are the `random` null of a trained run: those that differ in weights and seed alone."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.config import Options
from batchjob.data.index import sizes_in_bytes
from batchjob.errors import UserError, counted
from batchjob.store.run import Run

_MAY_DIFFER = ("weights", "seed")
_INDEX = {  # files of RUN/index, in words
    "k.npy": ("k", "images"),
    "instances_category.npy": ("the category", "objects"),
    "instances_owner.npy": ("the object of a patch", "images"),
}


def match_randoms(runs: Sequence[Run]) -> dict[Path, list[Run]]:
    """Returns, by the folder of each run, the untrained runs that are its `random` null.

    Raises
    ------
    UserError
        If an untrained run is the null of no trained one; the message names the differences to the nearest of them.
    """
    trained = [run for run in runs if not run.is_random]
    found: dict[Path, list[Run]] = {run.folder: [] for run in runs}
    for random in runs if trained else ():
        if not random.is_random:
            continue
        alike = [run for run in trained if not _differences(run, random)]
        if not alike:
            nearest = min(trained, key=lambda run: len(_differences(run, random)))
            gap = "; ".join(_differences(nearest, random))
            raise UserError(
                f"{random.folder} can't be the random null of {nearest.folder}: {gap}; "
                "make it with the same options but --weights random and --seed, or leave it away"
            )
        for run in alike:
            found[run.folder].append(random)
    return found


def _differences(trained: Run, random: Run) -> list[str]:
    """Returns a phrase for each difference but weights and seed; none where the untrained run is the other's null.

    What was asked can be equal and come to something else: `auto`, a file that has changed since. So what it came to is
    compared as well. Arrays are compared only where everything else is equal.
    """
    parts = []
    for f in dataclasses.fields(Options):
        values = [run.options.get(f.name, f.default) for run in (trained, random)]
        if f.name not in _MAY_DIFFER and values[0] != values[1]:
            parts.append(f"--{f.name.replace('_', '-')} is {values[0]!r} there, {values[1]!r} here")
    if parts:  # what follows from the options differs as well
        return parts
    known: dict[str, tuple[object, object]] = {
        "layers": (trained.layers, random.layers),
        "heads": (trained.heads, random.heads),
        "precision": (trained.precision, random.precision),
    }
    known |= {name: (trained.spec.get(name), random.spec.get(name)) for name in {**trained.spec, **random.spec}}
    parts += [f"{name}: {there} there, {here} here" for name, (there, here) in known.items() if there != here]
    if not parts and trained.ids != random.ids:
        parts.append(f"the images are others: {trained.rows:,} there, {random.rows:,} here")
    return parts or [*_other_arrays(trained, random)]


def _other_arrays(trained: Run, random: Run) -> Iterator[str]:
    """Yields a phrase for each array that differs; compares none of RUN/index where a run was copied without it."""
    runs = (trained, random)
    sizes = [sizes_in_bytes(run.folder / "index") for run in runs]
    if sizes[0] is not None and sizes[1] is not None:
        yield from _gap(sizes[0], sizes[1], "the size of the file", "images")
    for name, (what, of) in _INDEX.items():
        paths = [run.folder / "index" / name for run in runs]
        if all(path.exists() for path in paths):
            there, here = (np.load(path, mmap_mode="r") for path in paths)
            yield from _gap(there, here, what, of)
    if missing := np.intersect1d(trained.ok_rows, random.pending_rows).size:
        yield f"{counted(missing, 'image')} labelled there and not yet here"


def _gap(there: NDArray[Any], here: NDArray[Any], what: str, of: str) -> Iterator[str]:
    if there.shape != here.shape:
        yield f"{len(there):,} {of} there, {len(here):,} here"
    elif count := int((there != here).reshape(len(there), -1).any(axis=1).sum()):
        yield f"{what} differs for {count:,} of {len(there):,} {of}"

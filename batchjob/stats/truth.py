"""Computes the objects of all images of a run once, and keeps them in flat files that the processes map into memory."""

import functools
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.codes import OK
from batchjob.data.annotations import Annotations, ImageAnnotations, PatchInstances, instances_on_grid
from batchjob.data.instances import has_twins
from batchjob.metrics.nulls import Donors
from batchjob.metrics.objects import Objects
from batchjob.stats.pool import Pool, blocks
from batchjob.store.part import Part
from batchjob.store.run import Run

# The files and their dtypes, for n images with m objects in all, image after image. Coverage is kept sparse, because
# most objects cover few patches: `covered_*` list only the patches that an object covers at least in part.
_DTYPES = {
    "owner": np.int16,  # [n, P] the image's object that owns each patch, −1 for none
    "count": np.int64,  # [n] objects of each image, −1 where it is not annotated
    "shape": np.int64,  # [n] a number that is equal where the same patches are image and not padding
    "category": np.int32,  # [m]
    "box": np.float32,  # [m, 4] in patches
    "covered_count": np.int64,  # [m] patches that each object covers
    "covered_patch": np.int32,  # [sum of covered_count] the patch
    "covered_share": np.float32,  # [sum of covered_count] the share of it that is covered
}


_OTHER = "with other objects than planned"  # a count of images


@dataclass(frozen=True)
class Truth:
    """The objects of all images of a run, read from the files that `lay_out` wrote."""

    folder: Path
    grid: tuple[int, int]  # (rows, columns) of an image's patches
    seed: int  # of the `swap` null
    are_planned: bool  # whether all images have the objects that they were planned with, so that labelling scored them

    def __reduce__(self) -> tuple[Any, ...]:
        # each process opens the files once and not for every task
        return _open, (self.folder, self.grid, self.seed, self.are_planned)

    @functools.cached_property
    def _files(self) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = {}
        for name, dtype in _DTYPES.items():
            path = self.folder / name
            found[name] = np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
        return found

    @functools.cached_property
    def _starts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns where each image's objects start, and where each object's covered patches start."""
        counts = np.maximum(self._files["count"], 0), self._files["covered_count"]
        objects, covered = (np.concatenate([[0], np.cumsum(c)]) for c in counts)
        return objects, covered

    @functools.cached_property
    def _donors(self) -> Donors:
        counts = np.maximum(self._files["count"], 0)
        return Donors(counts, has_twins(counts, self._files["category"]), self._files["shape"], seed=self.seed)

    def of(self, row: int) -> Objects | None:
        """Returns the objects of a row; None if its image is not labelled, or not annotated at its own size."""
        files, (starts, covered), patches = self._files, self._starts, self.grid[0] * self.grid[1]
        if files["count"][row] < 0:
            return None
        start, stop = int(starts[row]), int(starts[row + 1])
        coverage = np.zeros((stop - start, patches), np.float32)
        for i in range(start, stop):
            inside = slice(int(covered[i]), int(covered[i + 1]))
            coverage[i - start, files["covered_patch"][inside]] = files["covered_share"][inside]
        return Objects(
            owner=np.asarray(files["owner"][row * patches : (row + 1) * patches]),
            category=np.asarray(files["category"][start:stop]),
            boxes=np.asarray(files["box"][4 * start : 4 * stop]).reshape(-1, 4),
            coverage=coverage,
        )

    def donors(self, row: int, keep: NDArray[np.bool_] | None) -> dict[int, Objects]:
        """Returns the objects that the `swap` null lends to an image.

        Parameters
        ----------
        row
            The row of the image.
        keep
            bool [P], false in the image's own padding; None where it has none. Objects lose the patches there.

        Returns
        -------
        The objects of each of the other photos, by its row.
        """
        lent = {int(other): self.of(int(other)) for other in self._donors.of(row)}
        return {other: objects.inside(keep, self.grid) for other, objects in lent.items() if objects is not None}


@functools.lru_cache(maxsize=2)
def _open(folder: Path, grid: tuple[int, int], seed: int, are_planned: bool) -> Truth:
    return Truth(folder, grid, seed, are_planned)


def lay_out(
    run: Run, annotations: Annotations, folder: Path, pool: Pool, *, are_planned: bool
) -> tuple[Truth, Counter[str]]:
    """Writes the objects of all labelled images to files, and counts annotated images and instances.

    Parameters
    ----------
    run
        The run whose images are annotated.
    annotations
        Its annotations.
    folder
        An empty folder for the files.
    pool
        The processes that share the images.
    are_planned
        Whether the annotations are those of the plan. If so, the owner of each patch is read from labels.zarr. Only
        the masks of objects that own a patch are then decoded, for their coverage and boxes.

    Returns
    -------
    The objects, and the counts by name: `annotated`, `not annotated`, `annotated at another size`, `instances`,
    `instances kept`, `with two of a category`, `with other objects than planned`.
    """
    ids, counts = run.ids, Counter[str]()
    tasks = ((*rows, [annotations.image(i) for i in ids[slice(*rows)]]) for rows in blocks(run))
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in _DTYPES}
        for arrays, found in pool.map(functools.partial(_lay_out_block, run, are_planned), tasks):
            counts += found
            for name, values in arrays.items():
                files[name].write(values.astype(_DTYPES[name]).tobytes())
    return Truth(folder, run.geometry.grid, int(run.options["seed"]), not counts[_OTHER]), counts


def _lay_out_block(
    run: Run, are_planned: bool, task: tuple[int, int, list[ImageAnnotations | None]]
) -> tuple[dict[str, NDArray[Any]], Counter[str]]:
    start, stop, annotated = task
    part, counts = run.read(start, stop, only=("objects",)), Counter[str]()
    parts: dict[str, list[Any]] = {name: [] for name in _DTYPES}
    patch = np.array([run.geometry.patch_width, run.geometry.patch_height] * 2, np.float64)
    patches = run.geometry.grid[0] * run.geometry.grid[1]
    for i, image in enumerate(annotated):
        parts["shape"].append([run.geometry.content_shape(int(part.height[i]), int(part.width[i]))])
        planned = None if part.instance is None or part.category is None else (part.instance[i], part.category[i])
        known = planned[0] if planned and are_planned else None
        found = _find(run, part, i, image, counts, known) if part.status[i] == OK else None
        counts[_OTHER] += int(part.status[i] == OK and planned is not None and not _is_same(found, *planned))
        if found is None:
            parts["owner"].append(np.full(patches, -1))
            parts["count"].append([-1])
            continue
        at = np.nonzero(found.coverage)
        parts["owner"].append(found.owner)
        parts["count"].append([len(found.category)])
        parts["category"].append(found.category)
        parts["box"].append((found.boxes / patch).ravel())
        parts["covered_count"].append(np.bincount(at[0], minlength=len(found.category)))
        parts["covered_patch"].append(at[1])
        parts["covered_share"].append(found.coverage[at])
    joined: dict[str, Sequence[Any]] = {name: values or [np.zeros(0)] for name, values in parts.items()}
    return {name: np.concatenate(values) for name, values in joined.items()}, counts


def _find(
    run: Run,
    part: Part,
    i: int,
    image: ImageAnnotations | None,
    counts: Counter[str],
    known: NDArray[np.integer[Any]] | None,
) -> PatchInstances | None:
    """Finds and counts the image's instances; None where it is not annotated, or annotated at another size."""
    height, width = int(part.height[i]), int(part.width[i])
    if image is None or not image.fits(height, width):
        counts["not annotated" if image is None else "annotated at another size"] += 1
        return None
    found = instances_on_grid(image, run.geometry, height, width, known=known)
    counts["annotated"] += 1
    counts["instances"] += found.total
    counts["instances kept"] += len(found.category)
    categories = np.bincount(found.category) if len(found.category) else np.zeros(1, np.int64)
    counts["with two of a category"] += int(categories.max() >= 2)
    return found


def _is_same(
    found: PatchInstances | None, instance: NDArray[np.integer[Any]], category: NDArray[np.integer[Any]]
) -> bool:
    """Whether these are the objects that own the patches [P] of `instance` and `category`, however they are numbered.

    −1 stands for patches of no object.
    """
    owner = np.full(len(instance), -1) if found is None else found.owner
    of_patch = np.full(len(instance), -1) if found is None else np.append(found.category, -1)[owner]
    for ours, theirs in ((owner, instance), (of_patch, category)):
        pairs = np.unique(np.stack([ours, theirs]), axis=1).shape[1]
        if pairs != len(np.unique(ours)) or pairs != len(np.unique(theirs)):
            return False
    return bool(((owner < 0) == (instance < 0)).all())

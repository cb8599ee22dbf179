"""The instances of every image on the patch grid: `plan` stores them beside the index, and labelling scores by them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.children import ChildPool
from batchjob.data.annotations import Annotations, ImageAnnotations, instances_on_grid
from batchjob.geometry import Geometry
from batchjob.machine import usable_cores

_FEW_IMAGES = 1000  # for fewer images, starting processes costs more than the work


def has_twins(counts: NDArray[np.integer[Any]], category: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Tells which photos have two objects of one category.

    Parameters
    ----------
    counts
        [n] number of objects of each photo.
    category
        [sum of counts] the objects' categories, photo after photo.

    Returns
    -------
    bool [n].
    """
    photo = np.repeat(np.arange(len(counts)), counts)
    pairs, times = np.unique(np.stack([photo, category]), axis=1, return_counts=True)
    return np.isin(np.arange(len(counts)), pairs[0, times > 1])


@dataclass(frozen=True, slots=True)
class GridInstances:
    """The owners of the patches of n images, and the categories of their instances, as arrays that can be mapped."""

    owner: NDArray[np.int16]  # [n, P] place among the image's instances, −1 for none
    category: NDArray[np.int32]  # [instances] of all images, image after image
    number: NDArray[np.int32]  # [instances] the number of each among its image's annotations
    start: NDArray[np.int64]  # [n + 1] where an image's instances begin in `category` and `number`
    size: NDArray[np.int32]  # [n, 2] height and width in pixels that were annotated; 0 without annotations

    def save(self, folder: Path) -> None:
        """Writes each field to `folder` as instances_FIELD.npy."""
        for name in self.__slots__:
            np.save(folder / f"instances_{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> "GridInstances":
        """Maps what `save` wrote."""
        return cls(**{name: np.load(folder / f"instances_{name}.npy", mmap_mode="r") for name in cls.__slots__})

    def kinds(self, geometry: Geometry) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
        """Tells of each image what decides which others lend it their objects (`metrics.nulls.Donors`).

        Parameters
        ----------
        geometry
            Tells which patches of an image are padding.

        Returns
        -------
        [n] the number of its objects, bool [n] whether two of them are of one category, and [n] numbers that are equal
        where the same patches are padding.
        """
        counts = np.diff(self.start)
        shapes = [geometry.content_shape(int(height), int(width)) for height, width in self.size]
        return counts, has_twins(counts, self.category), np.array(shapes, np.int64)

    def owners(self, row: int, size: tuple[int, int]) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
        """Looks up which annotation owns each patch of an image, and the category of that annotation.

        Parameters
        ----------
        row
            The image's.
        size
            (height, width) of the image in pixels, after the EXIF rotation. If another size was annotated, no patch has
            an owner.

        Returns
        -------
        int16 [P], the number of the owner among the image's annotations, and int32 [P], its category; −1 in both for a
        patch without an owner.
        """
        owner = np.asarray(self.owner[row])
        of_image = slice(int(self.start[row]), int(self.start[row + 1]))
        if tuple(self.size[row]) != size:
            owner = np.full_like(owner, -1)
        number, category = (np.append(v[of_image], -1) for v in (self.number, self.category))  # −1 finds the last
        return number[owner].astype(np.int16), category[owner].astype(np.int32)


def find_instances(
    annotations: Annotations, ids: Sequence[str], geometry: Geometry, *, needs_sizes: bool = True
) -> GridInstances:
    """Lays the instances of every image on the patch grid, taking the images' sizes from the annotations.

    Uses all cores where there are many images.

    Parameters
    ----------
    annotations
        Of the data set.
    ids
        Of the n images, in the order of the rows.
    geometry
        As `instances_on_grid`.
    needs_sizes
        Whether masks of an image are an error where the annotations do not state its size. If not, such an image counts
        as one without annotations.

    Raises
    ------
    UserError
        The annotations do not state the size of an image that has masks; or as `instances_on_grid`.
    """
    work = functools.partial(_find_one, geometry=geometry, needs_sizes=needs_sizes)
    if len(ids) < _FEW_IMAGES:
        found = [work(annotations.image(name)) for name in ids]
    else:
        from tqdm import tqdm

        found = []
        with (
            ChildPool(usable_cores(), method="fork") as pool,
            tqdm(total=len(ids), desc="instances", unit="image") as bar,
        ):
            for start in range(0, len(ids), _FEW_IMAGES):  # the masks of all images at once would fill the memory
                images = [annotations.image(name) for name in ids[start : start + _FEW_IMAGES]]
                found += pool.map(work, images, chunksize=64)
                bar.update(len(images))
    return GridInstances(
        owner=np.stack([owner for owner, *_ in found]),
        category=np.concatenate([category for _, category, *_ in found]),
        number=np.concatenate([number for _, _, number, _ in found]),
        start=np.concatenate([[0], np.cumsum([len(category) for _, category, *_ in found])]).astype(np.int64),
        size=np.array([size for *_, size in found], np.int32),
    )


def _find_one(
    image: ImageAnnotations | None, geometry: Geometry, *, needs_sizes: bool
) -> tuple[Any, Any, Any, tuple[int, int]]:
    if image is None or not (image.has_size or (image.instances and needs_sizes)):
        nobody = np.full(geometry.grid[0] * geometry.grid[1], -1, np.int16)
        return nobody, np.zeros(0, np.int32), np.zeros(0, np.int32), (0, 0)
    found = instances_on_grid(image, geometry, *image.size)
    return found.owner, found.category, found.index, image.size

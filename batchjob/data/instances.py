"""Every image's instances on the patch grid, laid beside the index by `plan`, for what is scored while labelling."""

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

_FEW_IMAGES = 1000  # below, starting processes costs more than the work


@dataclass(frozen=True, slots=True)
class GridInstances:
    """Owners of the patches of n images and the categories of their instances, as flat arrays that can be mapped."""

    owner: NDArray[np.int16]  # [n, P], −1 for none
    category: NDArray[np.int32]  # of all instances, image after image
    number: NDArray[np.int32]  # of the same: which of its image's annotations each is
    start: NDArray[np.int64]  # [n + 1] where an image's categories start
    size: NDArray[np.int32]  # [n, 2] height and width that were annotated; 0 for an image without annotations

    def save(self, folder: Path) -> None:
        """Writes one .npy file a field."""
        for name in self.__slots__:
            np.save(folder / f"instances_{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> "GridInstances":
        """What `save` wrote, mapped rather than read."""
        return cls(**{name: np.load(folder / f"instances_{name}.npy", mmap_mode="r") for name in cls.__slots__})

    def owners(self, row: int, size: tuple[int, int]) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
        """int16 [P] and int32 [P]: which annotation owns each patch of an image, and its category; −1 = none.

        None does where `size`, the image's (height, width), is not the one that was annotated.
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
    """The instances of the images of these ids, with the sizes that the annotations say; all cores for many images.

    Raises
    ------
    UserError
        Masks of an image whose size nobody says; without `needs_sizes` they are taken for none.
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
            for start in range(0, len(ids), _FEW_IMAGES):  # the outlines of all images at once would fill the memory
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

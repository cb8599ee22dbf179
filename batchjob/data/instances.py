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


def find_instances(annotations: Annotations, ids: Sequence[str], geometry: Geometry) -> GridInstances:
    """The instances of the images of these ids, with the sizes that the annotations say; all cores for many images."""
    images = [annotations.image(name) for name in ids]
    work = functools.partial(_find_one, geometry=geometry)
    if len(images) < _FEW_IMAGES:
        found = [work(image) for image in images]
    else:
        from tqdm import tqdm

        with ChildPool(usable_cores(), method="fork") as pool:
            mapped = pool.map(work, images, chunksize=64)
            found = list(tqdm(mapped, total=len(images), desc="instances", unit="image"))
    counts = [len(category) for _, category, _ in found]
    return GridInstances(
        owner=np.stack([owner for owner, _, _ in found]),
        category=np.concatenate([category for _, category, _ in found]),
        start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        size=np.array([size for _, _, size in found], np.int32),
    )


def _find_one(image: ImageAnnotations | None, geometry: Geometry) -> tuple[Any, Any, tuple[int, int]]:
    if image is None:
        none = np.full(geometry.grid[0] * geometry.grid[1], -1, np.int16)
        return none, np.zeros(0, np.int32), (0, 0)
    found = instances_on_grid(image, geometry, *image.size)
    return found.owner, found.category, image.size

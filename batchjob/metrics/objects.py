"""The objects of one image on its patch grid, and what several scores compute from them in common."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.metrics.agreement import contingency
from batchjob.metrics.clusters import Pairs, instance_pairs
from batchjob.metrics.saliency import BOX_MASS, component_boxes, mass_mask

Floats = NDArray[np.float64]
MIN_PATCHES = 2  # an object that owns fewer patches says nothing about clusters


@dataclass(frozen=True, slots=True)
class Objects:
    """The m objects of an image that own at least `MIN_PATCHES` of its P patches."""

    owner: NDArray[np.integer[Any]]  # [P] the object that owns each patch, 0 to m − 1, or −1 for none
    category: NDArray[np.integer[Any]]  # [m]
    boxes: NDArray[np.floating[Any]]  # [m, 4] left, top, right, bottom in patches
    coverage: NDArray[np.floating[Any]]  # [m, P] share of each patch that the object covers

    @property
    def has_twins(self) -> bool:
        """Whether two objects are of one category: the study's question needs them."""
        return len(np.unique(self.category)) < len(self.category)

    def inside(self, keep: NDArray[np.bool_] | None, grid: tuple[int, int]) -> "Objects":
        """Leaves out patches, such as those of padding: objects lose them, and boxes end where the others do.

        An object that then owns fewer than `MIN_PATCHES` is left out, and the others are numbered anew.

        Parameters
        ----------
        keep
            bool [P], False for the patches that are left out; None keeps all.
        grid
            (rows, columns) of the P patches.

        Returns
        -------
        The objects.
        """
        if keep is None or keep.all():
            return self
        owner, kept = cut(self.owner, len(self.category), keep)
        x, y = (np.append(np.flatnonzero(keep.reshape(grid).any(axis=axis)), -1) for axis in (0, 1))
        low, high = np.array([x[0], y[0]] * 2), np.array([x.max() + 1, y.max() + 1] * 2)
        return Objects(owner, self.category[kept], self.boxes[kept].clip(low, high), self.coverage[kept] * keep)


def cut(
    owner: NDArray[np.integer[Any]], count: int, keep: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Removes patches from an image, and the objects that then own fewer than `MIN_PATCHES`.

    Parameters
    ----------
    owner
        [P] object of each patch, −1 for none.
    count
        How many objects there are.
    keep
        bool [P], False for the patches that are removed.

    Returns
    -------
    [P] object of each patch, −1 for none, numbered anew from 0; and the old numbers of the objects that are left.
    """
    owner = np.where(keep, owner, -1)
    kept = np.flatnonzero(np.bincount(owner[owner >= 0], minlength=count) >= MIN_PATCHES)
    renumber = np.full(count + 1, -1, np.int64)  # the last entry answers for −1
    renumber[kept] = np.arange(len(kept))
    return renumber[owner], kept


class Labelled:
    """Labels uint8 [C, P] of one image, beside the objects against which they are scored: its own or another photo's.

    What several scores need is computed once, when the first of them asks for it.
    """

    def __init__(self, labels: NDArray[np.uint8], grid: tuple[int, int], objects: Objects | None = None) -> None:
        self.labels, self.grid, self._objects = np.atleast_2d(labels), grid, objects

    @property
    def objects(self) -> Objects:
        """The objects against which the labels are scored. Raises ValueError where none were given."""
        if self._objects is None:
            raise ValueError("this score needs objects, and none were given")
        return self._objects

    @cached_property
    def table(self) -> Floats:
        """float64 [C, K, m + 1]: patches by cluster and object; the first column counts the patches of no object."""
        return contingency(self.labels, np.asarray(self.objects.owner, np.int64) + 1, len(self.objects.category) + 1)

    @cached_property
    def pairs(self) -> Pairs:
        """Every two objects of one category."""
        own = self.objects
        return instance_pairs(own.owner, own.category, own.boxes, self.grid)


class Mapped:
    """CLS maps [C, P] of one image, beside the objects against which they are scored: its own or another photo's.

    Each map sums to 1. C = layers × heads, with the heads of a layer next to each other.
    """

    def __init__(self, maps: Floats, grid: tuple[int, int], heads: int, objects: Objects) -> None:
        self.maps, self.grid, self.heads, self.objects = maps, grid, heads, objects
        self._masks: dict[float, NDArray[np.bool_]] = {}
        self._parts: list[Floats] = []  # empty, or one array [C, 4]

    def beside(self, objects: Objects) -> "Mapped":
        """The same maps beside other objects; what depends on the maps alone is computed once for both."""
        other = Mapped(self.maps, self.grid, self.heads, objects)
        other._masks, other._parts = self._masks, self._parts
        return other

    @property
    def largest_part(self) -> Floats:
        """float64 [C, 4]: the box (`component_boxes`) of the largest connected part of each 60 % mask, in patches."""
        if not self._parts:
            self._parts.append(component_boxes(self.mask(BOX_MASS), self.grid))
        return self._parts[0]

    def mask(self, share: float) -> NDArray[np.bool_]:
        """bool [C, P]: the fewest patches of each map that hold `share`, from 0 to 1, of its mass."""
        if share not in self._masks:
            self._masks[share] = mass_mask(self.maps, share)
        return self._masks[share]

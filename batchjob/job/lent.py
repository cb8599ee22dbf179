"""The objects that an image is scored on while it is labelled: its own, and other photos' for the null `swap`."""

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchjob.data.instances import GridInstances
from batchjob.geometry import Geometry
from batchjob.metrics.attention import MAX_PAIRS, PatchPairs, draw_pairs
from batchjob.metrics.nulls import Donors
from batchjob.metrics.objects import cut

_CACHED_DRAWINGS = 8192  # drawn pairs of photos that lend their objects; some 10 kB a photo
# Pairs of each kind and category of a photo that lends. With 2,000 each, 20 photos would cost 25 times the own pairs.
_LENT_PAIRS = 200


class Owned(NamedTuple):
    """The instance that owns each patch [P], −1 for none, and the category of each of the m instances [m]."""

    owner: NDArray[np.signedinteger]
    category: NDArray[np.int32]

    @property
    def has_twins(self) -> bool:
        """Whether two instances are of one category."""
        return len(np.unique(self.category)) < len(self.category)


class LentObjects:
    """The objects of a run's images, and which photos lend theirs to which image. Patches of padding own nothing."""

    def __init__(self, instances: GridInstances, geometry: Geometry, seed: int) -> None:
        """Sorts the photos by what decides who lends to whom.

        Parameters
        ----------
        instances
            What the annotations say of all images.
        geometry
            Tells which patches of an image are padding.
        seed
            The run's seed, for the drawing of photos and pairs.
        """
        self._instances, self._seed = instances, seed
        self._donors = Donors(*instances.kinds(geometry), seed=seed)
        self._lent_pairs = functools.lru_cache(_CACHED_DRAWINGS)(functools.partial(self._draw, limit=_LENT_PAIRS))

    def own(self, row: int, size: tuple[int, int], keep: NDArray[np.bool_] | None) -> Owned:
        """Looks up an image's own objects.

        Parameters
        ----------
        row
            The image's row in the plan.
        size
            Its (height, width) in pixels; one that differs from the annotated size has no objects.
        keep
            [P] which of its patches are not padding; None for all.

        Returns
        -------
        The objects.
        """
        owned = self._owned(row)
        if tuple(self._instances.size[row]) != size:
            return Owned(np.full_like(owned.owner, -1), owned.category[:0])
        return _cut(owned, keep)

    def lent(self, row: int, keep: NDArray[np.bool_] | None) -> list[Owned]:
        """Looks up the objects that other photos lend to an image.

        Parameters
        ----------
        row, keep
            As in `own`.

        Returns
        -------
        The objects of each photo that lends, in the order of `Donors.of`.
        """
        return [_cut(self._owned(int(other)), keep) for other in self._donors.of(row)]

    def own_pairs(self, row: int, size: tuple[int, int], keep: NDArray[np.bool_] | None) -> PatchPairs:
        """Draws pairs of patches of an image's own objects.

        Parameters
        ----------
        row, size, keep
            As in `own`.

        Returns
        -------
        The pairs, always the same for one seed; none of a category that lacks pairs of either kind.
        """
        if tuple(self._instances.size[row]) != size:
            return draw_pairs(self._instances.owner[row], self._instances.category[:0], row=row, seed=self._seed)
        return _within(self._draw(row), keep)

    def lent_pairs(self, row: int, keep: NDArray[np.bool_] | None) -> list[PatchPairs]:
        """Draws pairs of patches of the objects that other photos lend, up to 200 of each kind and category.

        Parameters
        ----------
        row, keep
            As in `own`.

        Returns
        -------
        The pairs of each photo that lends, in the order of `Donors.of`.
        """
        return [_within(self._lent_pairs(int(other)), keep) for other in self._donors.of(row)]

    def _owned(self, row: int) -> Owned:
        of_image = slice(self._instances.start[row], self._instances.start[row + 1])
        return Owned(np.asarray(self._instances.owner[row]), np.asarray(self._instances.category[of_image]))

    def _draw(self, row: int, limit: int = MAX_PAIRS) -> PatchPairs:
        return draw_pairs(*self._owned(row), row=row, seed=self._seed, limit=limit)


def _cut(owned: Owned, keep: NDArray[np.bool_] | None) -> Owned:
    if keep is None or keep.all():
        return owned
    owner, kept = cut(owned.owner, len(owned.category), keep)
    return Owned(owner, owned.category[kept])


def _within(pairs: PatchPairs, keep: NDArray[np.bool_] | None) -> PatchPairs:
    """The pairs whose patches are both in `keep`; drops categories that then lack pairs of either kind."""
    if keep is None:
        return pairs
    inside = keep[pairs.first] & keep[pairs.second]
    kept = [g for g in np.unique(pairs.group) if len(np.unique(pairs.same[inside & (pairs.group == g)])) == 2]
    inside &= np.isin(pairs.group, kept)
    group = np.searchsorted(kept, pairs.group[inside])
    return PatchPairs(pairs.first[inside], pairs.second[inside], pairs.same[inside], group)

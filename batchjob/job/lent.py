"""The objects that each image is scored on while it is labelled: its own, and those of other photos for `swap`."""

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchjob.data.instances import GridInstances
from batchjob.geometry import Geometry
from batchjob.metrics.attention import MAX_PAIRS, PatchPairs, draw_pairs
from batchjob.metrics.nulls import Donors
from batchjob.metrics.objects import cut

_CACHED_DRAWINGS = 8192  # of photos that lend their objects: some 10 kB each
# Pairs of each kind and category of a photo that lends: 20 photos of 2,000 would cost 25 times the image's own pairs.
LENT_PAIRS = 200


class Owned(NamedTuple):
    """Which instance owns each patch [P], −1 for none; and the category of each instance [m]."""

    owner: NDArray[np.signedinteger]
    category: NDArray[np.int32]

    @property
    def has_twins(self) -> bool:
        """Whether two instances are of one category."""
        return len(np.unique(self.category)) < len(self.category)


class LentObjects:
    """What the images of a run own, by their rows in the plan, and who lends to whom. Padding is cut off."""

    def __init__(self, instances: GridInstances, geometry: Geometry, seed: int) -> None:
        self._instances, self._seed = instances, seed
        counts = np.diff(instances.start)
        twins = [len(np.unique(c)) < len(c) for c in np.split(instances.category, instances.start[1:-1])]
        shapes = [geometry.content_shape(int(h), int(w)) for h, w in instances.size]
        self._donors = Donors(counts, np.array(twins, bool), np.array(shapes, np.int64), seed=seed)
        self._lent_pairs = functools.lru_cache(_CACHED_DRAWINGS)(functools.partial(self._draw, limit=LENT_PAIRS))

    def own(self, row: int, size: tuple[int, int], keep: NDArray[np.bool_] | None) -> Owned:
        """An image's objects; none where its (height, width) is not the one that was annotated."""
        owned = self._owned(row)
        if tuple(self._instances.size[row]) != size:
            return Owned(np.full_like(owned.owner, -1), owned.category[:0])
        return _cut(owned, keep)

    def lent(self, row: int, keep: NDArray[np.bool_] | None) -> list[Owned]:
        """The objects of each photo that lends them to an image."""
        return [_cut(self._owned(int(other)), keep) for other in self._donors.of(row)]

    def own_pairs(self, row: int, size: tuple[int, int], keep: NDArray[np.bool_] | None) -> PatchPairs:
        """The pairs of patches of an image's own objects."""
        if tuple(self._instances.size[row]) != size:
            return draw_pairs(self._instances.owner[row], self._instances.category[:0], row=row, seed=self._seed)
        return _within(self._draw(row), keep)

    def lent_pairs(self, row: int, keep: NDArray[np.bool_] | None) -> list[PatchPairs]:
        """Those of each photo that lends its objects to an image."""
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
    """The pairs whose patches are both in `keep`: those of padding take part in nothing."""
    if keep is None:
        return pairs
    inside = keep[pairs.first] & keep[pairs.second]
    kept = [g for g in np.unique(pairs.group) if len(np.unique(pairs.same[inside & (pairs.group == g)])) == 2]
    inside &= np.isin(pairs.group, kept)
    group = np.searchsorted(kept, pairs.group[inside])
    return PatchPairs(pairs.first[inside], pairs.second[inside], pairs.same[inside], group)

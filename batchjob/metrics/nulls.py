"""The `swap` null: which other photos' objects take the place of the image's own."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.codes import NO_LABEL

SWAPS = 20  # other photos for each image
BY_LENDER = ".by_lender"  # behind a score's name: its values with the objects of each photo that lends, not their mean
LENT = ".lent"  # behind a score's name: what a photo's objects add to the null of others (`stats.lent`)
LENDERS = ".lenders"  # behind a score's name: how many photos lent their objects to each photo
FEWEST_ALIKE = 5  # with fewer photos that have the same number of objects, photos with the nearest numbers join them


class Donors:
    """Chooses the photos that lend their objects to an image: others of the run with the same number of objects.

    Where there are too few of these, photos with the nearest numbers join them. An image with two objects of a category
    gets only photos that have such objects too, since the study's question needs them. In a padded run, photos with
    the image's own shape come first: padding of another shape would cut the lent objects.
    """

    def __init__(
        self,
        counts: NDArray[np.integer[Any]],
        twins: NDArray[np.bool_],
        shapes: NDArray[np.integer[Any]] | None = None,
        *,
        seed: int,
    ) -> None:
        """Groups the photos by their shape and their number of objects.

        Parameters
        ----------
        counts
            [n] number of objects of each photo. A photo without objects lends nothing.
        twins
            bool [n]: whether two objects of a photo are of one category.
        shapes
            [n] numbers that are equal for photos with the same patches of padding (`Geometry.content_shape`). None: no
            photo is padded.
        seed
            The run's seed.
        """
        self._counts, self._twins, self._seed = np.asarray(counts), np.asarray(twins, bool), seed
        self._shapes = np.zeros(len(counts), int) if shapes is None else np.asarray(shapes)
        self._groups: dict[tuple[bool, int, int], NDArray[np.intp]] = {}
        for only_twins in (False, True):
            lends = np.flatnonzero((self._counts > 0) & (self._twins | (not only_twins)))
            keys, group = np.unique(
                np.stack([self._shapes[lends], self._counts[lends]], axis=1), axis=0, return_inverse=True
            )
            for place, (shape, count) in enumerate(keys):
                self._groups[only_twins, int(shape), int(count)] = lends[group.ravel() == place]

    def of(self, row: int, limit: int = SWAPS) -> NDArray[np.intp]:
        """Draws the photos that lend their objects to an image; the same ones at every call.

        Parameters
        ----------
        row
            The image's row in the run. It is never among the rows that are returned.
        limit
            The most photos.

        Returns
        -------
        Rows of the run; empty where the image has no objects, or no other photo can lend any.
        """
        random = np.random.default_rng((self._seed, row, 2))
        twins, shape, count = bool(self._twins[row]), int(self._shapes[row]), int(self._counts[row])
        alike = sorted((s != shape, abs(n - count), s, n) for t, s, n in self._groups if t == twins)
        found = np.zeros(0, np.intp)
        for other_shape, away, group_shape, number in alike if count else ():
            if (other_shape or away) and len(found) >= FEWEST_ALIKE:
                break
            group = self._groups[twins, group_shape, number]
            drawn = group[random.choice(len(group), min(limit + 1, len(group)), replace=False)]
            found = np.concatenate([found, drawn[drawn != row]])[:limit]
        return found


def shuffle(labels: NDArray[np.uint8], *, row: int, seed: int) -> NDArray[np.uint8]:
    """Permutes the labels of each labelling over the image's labelled patches: a test of the code, not a null model.

    Parameters
    ----------
    labels
        uint8 [C, P]. A patch that any labelling marks 255 stays as it is.
    row, seed
        The image's row and the run's seed. Equal numbers give equal orders.

    Returns
    -------
    uint8 [C, P].
    """
    random = np.random.default_rng((seed, row, 1))
    keep = (labels != NO_LABEL).all(axis=0)
    shuffled = labels.copy()
    shuffled[:, keep] = random.permuted(labels[:, keep], axis=1)
    return shuffled

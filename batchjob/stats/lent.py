"""What a photo's objects add to the `swap` null of other photos; without it, the error of a gain over `swap` is wrong.

A score depends on the objects, whatever the map: some objects score high with any. They raise the gain of their own
photo, and they lower the gains of the photos that they are lent to. So the mean gain hardly depends on them, but the
spread of the gains does, and a test that takes the gains for independent rejects too seldom. What a photo does to the
sum of all gains is its own gain less what its objects add to the nulls of others (the Hájek projection of a
U-statistic, Hoeffding 1948).

A score S_ij of the map of photo i with the objects of photo j is taken as a_i + b_j and a rest. Photo i's null is the
mean of S_ij over the photos that lend to it. In the sum of all gains, a_i cancels; b_j is counted with photo j.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from batchjob.data.instances import GridInstances
from batchjob.metrics.nulls import BY_LENDER, SWAPS, Donors
from batchjob.metrics.uncertainty import mean_known
from batchjob.store.run import Run

Floats = NDArray[np.float64]
HALVES = 2  # 0: the photos that choose the best head, 1: the others
_COLUMNS = 64  # heads that are computed at once, to bound the memory


class Added(NamedTuple):
    """What the objects of u photos add to the nulls of a block of n photos."""

    lenders: NDArray[np.int32]  # [n, SWAPS] rows of the photos that lent to each photo of the block; −1 fills the rest
    rows: NDArray[np.int32]  # [u] those among them, each once
    sums: dict[str, Floats]  # by score [u, HALVES, C]: what their objects add, by the half of the borrowing photo


class Lent:
    """Adds up what the objects of photos add to the nulls of a block of other photos."""

    def __init__(self, count: int) -> None:
        """Begins with nothing.

        Parameters
        ----------
        count
            Number of photos in the block.
        """
        self._lenders = np.full((count, SWAPS), -1, np.int32)
        self._shares: dict[str, list[tuple[int, int, Floats]]] = defaultdict(list)

    def lend(self, place: int, lenders: NDArray[np.intp]) -> None:
        """Sets which photos lend their objects to a photo.

        Parameters
        ----------
        place
            The photo's place in the block.
        lenders
            [R] the rows of those that lend.
        """
        self._lenders[place, : len(lenders)] = lenders

    def add(self, score: str, place: int, values: Floats, own: Floats, half: int) -> None:
        """Takes one photo's scores with the objects that it was lent.

        Parameters
        ----------
        score
            The score's name.
        place
            The photo's place in the block.
        values
            [R, C] the scores, in the order of the photos that `lend` took; NaN where one is not defined.
        own
            [C] the photo's scores with its own objects. Where one is not defined the photo has no gain, and nothing is
            added.
        half
            In which half of the images the photo is.
        """
        known = np.isfinite(values) & np.isfinite(own)
        share = np.where(known, values - mean_known(values, axis=0), 0) / np.maximum(known.sum(axis=0), 1)
        self._shares[score].append((place, half, share))

    def sums(self) -> Added:
        """Returns what the objects added."""
        rows = np.unique(self._lenders[self._lenders >= 0])
        sums: dict[str, Floats] = {}
        for score, shares in self._shares.items():
            sums[score] = np.zeros((len(rows), HALVES, shares[0][2].shape[1]))
            for place, half, share in shares:
                sums[score][np.searchsorted(rows, self._lenders[place, : len(share)]), half] += share
        return Added(self._lenders, rows, sums)


def planned_donors(run: Run) -> Donors | None:
    """Returns which photos lent their objects to which while a run was labelled; None where labelling lent none."""
    if not any(name.endswith(BY_LENDER) for name in run.score_names):
        return None
    instances = GridInstances.load(run.folder / "index")
    return Donors(*instances.kinds(run.geometry), seed=int(run.options["seed"]))


def attribute(
    added: NDArray[np.floating[Any]],
    lenders: NDArray[np.int32],
    known: NDArray[np.bool_],
    half: NDArray[np.integer[Any]],
) -> None:
    """Counts each photo's objects with that photo alone, in place.

    The sums of `Lent` still contain the mean effect of the objects that each borrower was lent, since a null is a mean
    over them. It is estimated from the sums themselves, and moved to the photos that the objects are of. The sum over
    photos stays the same.

    Parameters
    ----------
    added
        [n, HALVES, C] the sums of all blocks.
    lenders
        [n, R] the rows of the photos that lend to each photo; −1 fills the rest.
    known
        [n, C] whether a photo has a gain.
    half
        [n] the half that each photo is in.
    """
    n, there = len(lenders), lenders >= 0
    weight = np.repeat(1 / np.maximum(there.sum(axis=1), 1), there.sum(axis=1))
    starts = np.concatenate([[0], np.cumsum(there.sum(axis=1))])
    lent = sparse.csr_array((weight, lenders[there], starts), shape=(n, n))  # [borrower, lender], rows sum to 1
    times = np.asarray(lent.sum(axis=0))
    of_half = [sparse.diags_array((half == h).astype(float)) @ lent for h in range(HALVES)]
    for start in range(0, added.shape[2], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        effect = added[:, :, columns].sum(axis=1) / np.where(times > 0, times, 1)[:, None]  # b_j
        lent_effect = np.where(known[:, columns], lent @ effect, 0)  # the mean of b_j over the photos that lend
        for h in range(HALVES):
            added[:, h, columns] += of_half[h].T @ lent_effect
            added[half == h, h, columns] -= lent_effect[half == h]


def excess(gains: Floats, lent: Floats, of: slice, lenders: NDArray[np.integer[Any]]) -> Floats:
    """Estimates by how much the squares of gains less `lent` exceed the variance of the sum of the gains.

    Take S_ij = a_i + b_j + rest, R lenders, and rests of equal variance v. The rest in S_ij is in the gain of photo i,
    and once more in what photo j is found to add. So a photo's square holds (1 + 2/R) v, while it gives (1 + 1/R) v to
    the variance of the sum. In a sum over one half of the photos, b_j does not cancel. It is measured from the mean of
    the R + 1 photos that lend to each other, so its square is too small by one part in R + 1.

    Parameters
    ----------
    gains
        [n, C]; NaN where a photo has no gain, or does not belong to those whose mean is tested.
    lent
        [n, HALVES, C] as `attribute` leaves it.
    of
        The halves that the tested photos are in.
    lenders
        [n] how many photos lent their objects to each photo.

    Returns
    -------
    [C]; negative where the squares are too small.
    """
    known, number = np.isfinite(gains), np.maximum(lenders, 1)[:, None]
    rest = np.where(known, gains - lent.sum(axis=1), 0)
    objects = np.where(known, gains, 0) - lent[:, of].sum(axis=1) - rest
    return np.asarray((rest**2 / (number + 2) - objects**2 / number).sum(axis=0))

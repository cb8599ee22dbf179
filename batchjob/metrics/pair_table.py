"""Drawings of pairs of patches as plain arrays: all that the pair scores of a batch need beside its attention."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchjob.metrics.attention import PatchPairs, patch_distances


@dataclass(frozen=True, slots=True)
class PairTable:
    """n drawings of pairs of patches, one after the other: N pairs in all.

    The pairs of one category of one drawing are a group; there are G groups. The pairs of one group at one distance are
    a bin; there are L bins. All arrays are int64 or float64 and on one device:

    - `image`, `first`, `second`, `same` [N]: the image on which a pair is scored, its two patches, and 1 where both
      belong to one instance.
    - `nearness`, `group`, `bin` [N]: the largest distance less the pair's own, in patches; its group and its bin.
    - `group.ends` [G + 1], `bin.ends` [L + 1]: where each group or bin begins among the sorted pairs, and the end.
    - `group.least`, `bin.least`: the least sum of ranks that the pairs of one instance can have.
    - `group.product`, `bin.product`: pairs of one instance times pairs of two, NaN where either number is 0.
    - `share` [L]: the weight of a bin in its group. `has_bin` [G]: 1 where a group has a bin with pairs of both kinds.
    - `groups`, `groups_with_bin` [n]: 1 divided by the number of groups of a drawing, NaN where there are none.
    - `group_of_drawing`, `bin_of_group`: tables of `members_of`.
    """

    count: int  # n
    arrays: Mapping[str, Tensor]  # empty where there are no pairs

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    @property
    def is_empty(self) -> bool:
        """Whether there are no pairs at all."""
        return not self.arrays

    @classmethod
    def of(cls, pairs: Sequence[PatchPairs], grid: tuple[int, int], image: Sequence[int] | None = None) -> Self:
        """Makes the table of n drawings, on the CPU.

        Parameters
        ----------
        pairs
            n drawings (`attention.draw_pairs`).
        grid
            (rows, columns) of the P patches.
        image
            [n] the number in the batch of the image on which each drawing is scored; by default drawing i is scored on
            image i. The `swap` null scores the pairs of other photos on an image.
        """
        if not any(len(p.group) for p in pairs):
            return cls(len(pairs), {})
        sizes = [int(p.group.max()) + 1 if len(p.group) else 0 for p in pairs]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        first, second, same = (np.concatenate([getattr(p, n) for p in pairs]) for n in ("first", "second", "same"))
        drawing = np.repeat(np.arange(len(pairs)), [len(p.group) for p in pairs])
        group = np.concatenate([p.group + offset for p, offset in zip(pairs, offsets, strict=False)])
        distance = patch_distances(grid)[first, second]
        owner = drawing[np.unique(group, return_index=True)[1]]  # [G]: the drawing of each group
        bins = np.rint(distance**2).astype(np.int64)
        width = int(bins.max()) + 1
        used, dense = np.unique(group * width + bins, return_inverse=True)
        ones = np.bincount(dense, same)
        weight = np.minimum(ones, np.bincount(dense) - ones)
        total = np.bincount(used // width, weight)
        arrays = {
            "image": (np.arange(len(pairs)) if image is None else np.asarray(image))[drawing],
            "first": first,
            "second": second,
            "same": same,
            "nearness": distance.max() - distance,
            "group": group,
            "bin": dense,
            "share": weight / np.maximum(total, 1)[used // width],
            "has_bin": (total > 0).astype(np.float64),
            "groups": _inverse(np.bincount(owner, minlength=len(pairs))),
            "groups_with_bin": _inverse(np.bincount(owner[total > 0], minlength=len(pairs))),
            "group_of_drawing": members_of(owner, len(pairs)),
            "bin_of_group": members_of(used // width, len(total)),
            **_ranks("group", group, same),
            **_ranks("bin", dense, same),
        }
        return cls(len(pairs), {name: torch.from_numpy(_plain(values)) for name, values in arrays.items()})

    def to(self, device: torch.device) -> Self:
        """The table on a device. It is copied in two pieces; a GPU copies from page-locked memory in the background."""
        return self if device.type == "cpu" or self.is_empty else type(self)(self.count, _moved(self, device))


def members_of(owner: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Lists for each owner where its entries are, so that sums by owner can be taken in a fixed order.

    Parameters
    ----------
    owner
        [N] ascending numbers from 0 to `count` − 1.
    count
        How many owners there are, n.

    Returns
    -------
    int64 [most, n]: the places of each owner's entries in `owner`, from the top; N fills the rest. `most` is the
    largest number of entries of one owner.
    """
    starts = np.searchsorted(owner, np.arange(count + 1))
    places = starts[:-1] + np.arange(int(np.diff(starts).max(initial=0)))[:, None]
    return np.where(places < starts[1:], places, len(owner))


def _moved(table: PairTable, device: torch.device) -> dict[str, Tensor]:
    moved: dict[str, Tensor] = {}
    for dtype in (torch.int64, torch.float64):
        names = [name for name, values in table.arrays.items() if values.dtype == dtype]
        host = torch.cat([table[name].ravel() for name in names])
        whole = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
        start = 0
        for name in names:
            moved[name] = whole[start : start + table[name].numel()].view(table[name].shape)
            start += table[name].numel()
    return moved


def _plain(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Contiguous int64 or float64."""
    return np.ascontiguousarray(values, np.float64 if values.dtype.kind == "f" else np.int64)


def _inverse(number: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(number > 0, 1 / np.maximum(number, 1), np.nan)


def _ranks(by: str, group: NDArray[np.int64], positive: NDArray[np.bool_]) -> dict[str, NDArray[np.generic]]:
    """What turns sums of ranks over all sorted pairs into the AUC of each group (Mann and Whitney's U).

    A rank counts all pairs before it, also those of other groups: `.least` takes these away too.
    """
    size, ones = np.bincount(group), np.bincount(group, positive)
    stops = np.cumsum(size)
    both = ones * (size - ones)
    return {
        f"{by}.ends": np.concatenate([[0], stops]),
        f"{by}.least": ones * (stops - size) + ones * (ones - 1) / 2,
        f"{by}.product": np.where(both > 0, both, np.nan),
    }

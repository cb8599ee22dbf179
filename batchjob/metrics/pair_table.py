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
    """n drawings of N pairs in all, end to end, in G groups: the categories of each drawing.

    Arrays by name: `image`, `first`, `second`, `same`, `nearness`, `group`, `bin` [N]; for the AUC by group and by bin
    `.ends` (where each begins and ends among sorted pairs), `.least` (the least sum of ranks) and `.product` (pairs of
    both kinds, NaN where one is missing); `share` of a bin in its group; `members_of` tables for sums by owner.
    """

    count: int  # n
    arrays: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    @property
    def is_empty(self) -> bool:
        """Whether there are no pairs at all."""
        return not self.arrays

    @classmethod
    def of(cls, pairs: Sequence[PatchPairs], grid: tuple[int, int], image: Sequence[int] | None = None) -> Self:
        """The table of these drawings, on the host; `image`: which image each is scored on, by default its own."""
        if not any(len(p.group) for p in pairs):
            return cls(len(pairs), {})
        sizes = [int(p.group.max()) + 1 if len(p.group) else 0 for p in pairs]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        first, second, same = (np.concatenate([getattr(p, n) for p in pairs]) for n in ("first", "second", "same"))
        drawing = np.repeat(np.arange(len(pairs)), [len(p.group) for p in pairs])
        group = np.concatenate([p.group + offset for p, offset in zip(pairs, offsets, strict=False)])
        distance = patch_distances(grid)[first, second]
        owner = drawing[np.unique(group, return_index=True)[1]]  # of each group
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
        """The table on a device, in two copies; to a GPU out of page-locked memory, which nobody waits for."""
        return self if device.type == "cpu" or self.is_empty else type(self)(self.count, _moved(self, device))


def members_of(owner: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """int64 [most, count]: the places of each owner's entries in `owner`, which ascends; its length stands for none."""
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
    """What turns sums of ranks [G] over all pairs into AUCs: Mann and Whitney's U, less what pairs before add."""
    size, ones = np.bincount(group), np.bincount(group, positive)
    stops = np.cumsum(size)
    both = ones * (size - ones)
    return {
        f"{by}.ends": np.concatenate([[0], stops]),
        f"{by}.least": ones * (stops - size) + ones * (ones - 1) / 2,
        f"{by}.product": np.where(both > 0, both, np.nan),
    }

"""What every clustering engine takes and gives, the seeds, and the numbering of clusters. Letters: see the README."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchjob.clustering.search import NotFiniteError

_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Clusters:
    """The clusters of N problems.

    `labels` uint8 [N, P]: numbered by first appearance, so equal partitions are equal arrays; 255 outside the mask,
    `NOISE` for hdbscan's noise. `inertia` float32 [N]: the sum of squared distances to the own centroid. `k` uint8 [N]:
    the clusters found; less than asked for where a problem has fewer distinct rows. `settled` bool [N]: the lowest
    inertia was found from two independent starts at least, or the algorithm has no chance in it. `repeats` uint8
    [N, R, P]: the labels of all R clusterings, where there was more than one.
    """

    labels: Tensor
    inertia: Tensor
    k: Tensor
    settled: Tensor
    repeats: Tensor | None = None


class Engine(Protocol):
    """Who computes k-means: many problems of one shape in, labels out, all on the engine's device."""

    name: str

    def kmeans(
        self, x: Tensor, k: Tensor, seeds: Tensor, *, n_init: int, mask: Tensor | None = None, checks: bool = True
    ) -> Clusters:
        """The best of `n_init` greedy k-means++ starts, each carried to a local optimum, for each of N problems.

        `n_init` 0 stands for `auto`: as near to the best of all partitions as the engine comes at reasonable cost.

        x float [N, P, D], k int64 [N] (any from 1, each problem its own), seeds int64 [N], mask bool [N, P] (False: the
        row takes no part); k and seeds may be on the host. A problem's labels depend on its own rows, k, seed and mask
        alone, bit for bit. Raises NotFiniteError. Without `checks` an engine that need not wait for its device does
        not wait, and the inertia of such a problem is NaN.
        """
        ...


def check_shapes(x: Tensor, k: Tensor, seeds: Tensor, mask: Tensor | None) -> None:
    """Nothing; raises ValueError where x [N, P, D], k [N], seeds [N], mask [N, P] don't fit, or a k is below 1."""
    n, p, _ = x.shape
    if tuple(k.shape) != (n,) or tuple(seeds.shape) != (n,) or (mask is not None and tuple(mask.shape) != (n, p)):
        found = f"k {tuple(k.shape)}, seeds {tuple(seeds.shape)}, mask {None if mask is None else tuple(mask.shape)}"
        raise ValueError(f"{n} problems of {p} rows need k [{n}], seeds [{n}], mask [{n}, {p}]; found {found}")
    if n and not k.is_cuda and int(k.min()) < 1:  # a GPU would be waited for; its kernels take 0 for 1
        raise ValueError(f"k is at least 1; found {int(k.min())}")


def check_finite(x: Tensor, mask: Tensor | None) -> None:
    """Nothing; raises NotFiniteError where rows of x [N, P, D] inside the mask hold NaN or infinity."""
    finite = x.isfinite().all(-1)
    if mask is not None:
        finite |= ~mask
    bad = ~finite.all(-1)
    if bool(bad.any()):
        raise NotFiniteError(bad.nonzero()[:, 0].tolist())


def raise_for_nan(inertia: Tensor | NDArray[np.float32]) -> None:
    """Raises NotFiniteError where an inertia [N] is NaN: how engines that don't wait mark rows that aren't finite."""
    bad = np.flatnonzero(np.isnan(inertia.cpu().numpy() if isinstance(inertia, Tensor) else inertia))
    if len(bad):
        raise NotFiniteError(bad.tolist())


def number_by_appearance(labels: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
    """(uint8 [N, P], uint8 [N]): clusters renumbered by their first patch in row-major order, and how many there are.

    labels integer [N, P]; values of `k_max` and more (`NOISE`, `NO_LABEL`) stay as they are.
    """
    n, p = labels.shape
    wide = labels.long()
    at = torch.arange(p, device=labels.device).expand(n, p)
    first = torch.full((n, 256), p, dtype=torch.int64, device=labels.device)
    first.scatter_reduce_(1, wide, at, "amin")  # whole numbers: the order of writes doesn't matter
    first[:, k_max:] = p
    rank = first.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    numbered = torch.where(wide < k_max, rank.gather(1, wide), wide)
    return numbered.to(torch.uint8), (first < p).sum(1).to(torch.uint8)


def mix(x: Tensor) -> Tensor:
    """int64, same shape: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), equal on every device."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift(x, shift)) * _signed(factor)
    return x ^ _shift(x, 31)


def uniform(seeds: Tensor, counter: int, *, count: int) -> Tensor:
    """float64 [*seeds.shape, count] in [0, 1): draw number `counter`, …, `counter` + count − 1 of each seed."""
    steps = [_signed((counter + i + 1) * 0x9E3779B97F4A7C15 & _WORD) for i in range(count)]
    words = mix(seeds[..., None] + torch.tensor(steps, device=seeds.device))
    return _shift(words, 11).double() * 2.0**-53


def problem_seeds(rows: Tensor, layer: int, heads: Sequence[int], k: Tensor | int, seed: int) -> Tensor:
    """int64 [B * H], head running fastest: from the image's row, the layer, the head, k and the run's seed alone.

    rows int64 [B] are rows of the plan; k is one number or int64 [B * H].
    """
    head = torch.tensor(list(heads), dtype=torch.int64, device=rows.device)
    word = mix(torch.full_like(rows, _signed(seed & _WORD)) + 1)
    word = mix(word + rows)
    word = mix(word + layer)
    word = mix(word[:, None] + head).flatten()
    return mix(word + k)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts are arithmetic; this one is logical

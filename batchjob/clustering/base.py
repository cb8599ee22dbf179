"""What every clustering engine takes and gives, the seeds, and the numbering of clusters.

Letters: N problems of P rows with D numbers each, K clusters, B images, H heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchjob.clustering.search import NotFiniteError, check_shapes
from batchjob.codes import NO_LABEL

_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Clusters:
    """The clusters of N problems.

    `labels` uint8 [N, P] are numbered by first appearance, so that equal partitions are equal arrays; they are 255
    outside the mask, and `NOISE` for hdbscan's noise. `inertia` float32 [N] is the sum of squared distances to the own
    centroid. `k` uint8 [N] is the number of clusters found, less than was asked for where a problem has fewer distinct
    rows. `settled` bool [N] is True where at least two independent starts found the lowest inertia, and where an
    algorithm draws nothing. `repeats` uint8 [N, R, P] are the labels of all R clusterings, or None for a single one.
    """

    labels: Tensor
    inertia: Tensor
    k: Tensor
    settled: Tensor
    repeats: Tensor | None = None


class Engine(Protocol):
    """Who computes k-means, for many problems of one shape at a time."""

    name: str

    def kmeans(
        self, x: Tensor, k: Tensor, seeds: Tensor, *, n_init: int, mask: Tensor | None = None, checks: bool = True
    ) -> Clusters:
        """Clusters the rows of each of N problems by k-means.

        Parameters
        ----------
        x
            float [N, P, D]: P rows of each problem.
        k
            int64 [N], from 1 on, on the CPU or the device. A problem gets at most as many clusters as it has distinct
            rows.
        seeds
            int64 [N], on the CPU or the device.
        n_init
            How many greedy k-means++ starts are carried to a local optimum, of which the best is kept. 0 stands for
            `auto`: as near to the best of all partitions as the engine comes at reasonable cost.
        mask
            bool [N, P], False for rows that take no part. None: all take part.
        checks
            False lets an engine that need not wait for its device raise nothing about rows that are not finite: the
            inertia of their problem is then NaN.

        Returns
        -------
        The clusters, on the device of `x`. Those of a problem depend on its own rows, k, seed and mask alone, and are
        the same bits in any batch.

        Raises
        ------
        NotFiniteError
            Rows inside the mask hold NaN or infinity.
        ValueError
            Shapes do not fit each other, or k is out of range.
        """
        ...


def solve_one_by_one(
    x: Tensor,
    k: Tensor,
    seeds: Tensor,
    mask: Tensor | None,
    *,
    solve: Callable[[Tensor, int, int], tuple[Tensor, float]],
) -> Clusters:
    """Clusters one problem after the other, by a library that takes one at a time.

    Parameters
    ----------
    x, k, seeds, mask
        As in `Engine.kmeans`.
    solve
        Takes the rows [n, D] of one problem that the mask leaves, n ≥ 1, its k and its seed. Gives labels [n], in any
        numbering, and the inertia.

    Returns
    -------
    The clusters. `settled` is False, since the library does not tell how its starts ended.

    Raises
    ------
    NotFiniteError, ValueError
        As `Engine.kmeans`.
    """
    check_shapes(x, k, seeds, mask)
    check_finite(x, mask)
    n, p, _ = x.shape
    labels = torch.full((n, p), NO_LABEL, dtype=torch.uint8, device=x.device)
    inertia = torch.zeros(n, device=x.device)
    for i, (wanted, seed) in enumerate(zip(k.tolist(), seeds.tolist(), strict=True)):
        rows = x[i] if mask is None else x[i, mask[i]]
        if len(rows):
            found, inertia[i] = solve(rows, wanted, seed)
            labels[i, slice(None) if mask is None else mask[i]] = found.to(labels)
    numbered, count = number_by_appearance(labels, NO_LABEL - 1)
    return Clusters(numbered, inertia, count, torch.zeros(n, dtype=torch.bool, device=x.device))


def check_finite(x: Tensor, mask: Tensor | None) -> None:
    """Checks that all numbers are finite, for which it waits for the device.

    Parameters
    ----------
    x
        float [N, P, D].
    mask
        bool [N, P], False for rows that may hold anything. None: all are checked.

    Raises
    ------
    NotFiniteError
        A row inside the mask holds NaN or infinity.
    """
    finite = x.isfinite().all(-1)
    if mask is not None:
        finite |= ~mask
    bad = ~finite.all(-1)
    if bool(bad.any()):
        raise NotFiniteError(bad.nonzero()[:, 0].tolist())


def raise_for_nan(inertia: Tensor | NDArray[np.float32]) -> None:
    """Raises NotFiniteError where an inertia [N] is NaN, with which an engine that does not wait marks a problem."""
    bad = np.flatnonzero(np.isnan(inertia.cpu().numpy() if isinstance(inertia, Tensor) else inertia))
    if len(bad):
        raise NotFiniteError(bad.tolist())


def number_by_appearance(labels: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
    """Renumbers the clusters of each problem by their first row.

    Parameters
    ----------
    labels
        Integer [N, P], from 0 to 255.
    k_max
        Labels from here on (`NOISE`, `NO_LABEL`) do not stand for clusters and stay as they are.

    Returns
    -------
    (labels uint8 [N, P], number of clusters uint8 [N]).
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
    """Applies the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) to int64 words of any shape."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift(x, shift)) * _signed(factor)
    return x ^ _shift(x, 31)


def uniform(seeds: Tensor, counter: int, *, count: int) -> Tensor:
    """Gives uniform random numbers, equal on every device.

    Parameters
    ----------
    seeds
        int64 of any shape: each is a stream of its own.
    counter
        The place in each stream of the first number, from 0.
    count
        How many numbers follow each other.

    Returns
    -------
    float64 [*seeds.shape, count] in [0, 1).
    """
    steps = [_signed((counter + i + 1) * 0x9E3779B97F4A7C15 & _WORD) for i in range(count)]
    words = mix(seeds[..., None] + torch.tensor(steps, device=seeds.device))
    return _shift(words, 11).double() * 2.0**-53


def problem_seeds(rows: Tensor, layer: int, heads: Sequence[int], k: Tensor | int, seed: int) -> Tensor:
    """Makes the seed of each problem from what names it, so that it does not depend on the batch.

    Parameters
    ----------
    rows
        int64 [B]: the images' rows of the plan.
    layer, heads
        The numbers of the layer and of the H heads.
    k
        One number, or int64 [B · H].
    seed
        The run's seed.

    Returns
    -------
    int64 [B · H], the head running fastest, on the device of `rows`.
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

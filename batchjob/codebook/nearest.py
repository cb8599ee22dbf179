"""The arithmetic of a large k-means in torch: nearest centroids, sums right over any number of rows, starts."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 256  # rows whose sum float32 still holds to 1e-6, were they all equal


def assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """(labels int64 [n], squared distances float32 [n]) of rows [n, D] to the nearest of [K, D]; ties to the first.

    The distance is taken to the chosen centroid by differences: no cancellation where a row lies on its centroid.
    """
    half = centroids.square().sum(1) / 2
    labels = _nearest(x, centroids, half)
    return labels, (x - centroids[labels]).square().sum(1)


def cluster_sums(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """(sums float64 [K, D], counts float64 [K]) of one process's rows over their nearest centroids.

    Added in float64 (on a GPU: the float32 sums of at most 256 rows), so that the error does not grow with the number
    of rows; no atomics, so that it is the same bits every time.
    """
    k, width = centroids.shape
    sums = torch.zeros(k, width, dtype=torch.float64, device=x.device)
    counts = torch.zeros(k, dtype=torch.float64, device=x.device)
    half = centroids.square().sum(1) / 2
    for part in chunks(x):
        labels = _nearest(part, centroids, half)
        counts += torch.bincount(labels, minlength=k)
        if x.device.type == "cpu":
            sums.index_add_(0, labels, part.double())
        else:
            sums += block_sums(part, labels, k)
    return sums, counts


def block_sums(x: Tensor, labels: Tensor, k: int) -> Tensor:
    """float64 [K, D]: sums by label, blocks of rows as products with their one-hot labels.

    `index_add_` on a GPU would add in any order, and few GPUs are quick in float64.
    """
    whole = len(x) // _BLOCK * _BLOCK
    sums = torch.zeros(k, x.shape[1], dtype=torch.float64, device=x.device)
    for rows, own in ((x[:whole], labels[:whole]), (x[whole:], labels[whole:])):
        if len(rows):
            size = min(_BLOCK, len(rows))
            hot = torch.nn.functional.one_hot(own.view(-1, size), k).to(x.dtype)  # [blocks, rows, K]
            sums += torch.bmm(hot.transpose(1, 2), rows.reshape(-1, size, x.shape[1])).sum(0, dtype=torch.float64)
    return sums


def chunks(x: Tensor) -> Iterator[Tensor]:
    """The rows in their order, as many at once as suit the device: on a CPU they stay in the cache."""
    size = 2048 if x.device.type == "cpu" else 65536
    for start in range(0, len(x), size):
        yield x[start : start + size]


def _nearest(x: Tensor, centroids: Tensor, half: Tensor) -> Tensor:
    return torch.addmm(half, x, centroids.T, alpha=-1).min(1).indices


def greedy_starts(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """[K, D]: greedy k-means++ (Arthur and Vassilvitskii 2007): of 2 + ln K candidates the one that helps most.

    With fewer distinct rows than k, the last ones repeat.
    """
    trials = 2 + int(math.log(k))
    norms = rows.square().sum(1)
    first = int(torch.rand((), generator=generator, dtype=torch.float64) * len(rows))
    chosen = [first]
    nearest = (rows - rows[first]).square().sum(1)
    for _ in range(1, k):
        cumulated = nearest.double().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64).to(rows.device) * cumulated[-1]
        candidates = torch.searchsorted(cumulated, draws, right=True).clamp(max=len(rows) - 1)
        squares = torch.addmm(norms[:, None] + norms[candidates], rows, rows[candidates].T, alpha=-2)
        squares[squares < 1e-6 * norms[:, None]] = 0  # a copy of a candidate, but for rounding
        squares = torch.minimum(squares, nearest[:, None])  # [n, trials]
        best = int(squares.sum(0, dtype=torch.float64).argmin())
        chosen.append(int(candidates[best]))
        nearest = squares[:, best]
    return rows[chosen].clone()

"""The arithmetic of a large k-means in torch: nearest centroids, sums that stay exact over many rows, and starts."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 256  # so many equal rows can be added in float32 with an error of 1e-6


def assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the nearest centroid of each row; of equally near ones, the first.

    Parameters
    ----------
    x
        float32 [n, D].
    centroids
        float32 [K, D].

    Returns
    -------
    (labels int64 [n], squared distances float32 [n] to the chosen centroids).

    Notes
    -----
    The distance to the chosen centroid is computed from differences, so that no digits cancel where a row lies on it.
    """
    half = centroids.square().sum(1) / 2
    labels = _nearest(x, centroids, half)
    return labels, (x - centroids[labels]).square().sum(1)


def cluster_sums(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Adds up one process's rows by their nearest centroids.

    Parameters
    ----------
    x, centroids
        As in `assign`.

    Returns
    -------
    (sums float64 [K, D], counts float64 [K]).

    Notes
    -----
    Rows are added in float64, on a GPU after float32 sums of at most 256 rows, so that the error does not grow with n.
    No atomic additions are used, so that the bits are the same every time.
    """
    k, width = centroids.shape
    sums = torch.zeros(k, width, dtype=torch.float64, device=x.device)
    counts = torch.zeros(k, dtype=torch.float64, device=x.device)
    half = centroids.square().sum(1) / 2
    for part in chunks(x):
        labels = _nearest(part, centroids, half)
        counts += count_labels(labels, k)
        if x.device.type == "cpu":
            sums.index_add_(0, labels, part.double())
        else:
            sums += _block_sums(part, labels, k)
    return sums, counts


def count_labels(labels: Tensor, k: int) -> Tensor:
    """Counts the labels of each cluster. The host does not wait for a GPU.

    Parameters
    ----------
    labels
        int64 [n], from 0 to k − 1.
    k
        The number of clusters, K.

    Returns
    -------
    int64 [K].
    """
    if labels.device.type == "cpu":
        return torch.bincount(labels, minlength=k)  # a GPU would be waited for: it looks for the largest label
    return (labels[:, None] == torch.arange(k, device=labels.device)).sum(0)


def _block_sums(x: Tensor, labels: Tensor, k: int) -> Tensor:
    """float64 [K, D]: sums of rows by label, as products of blocks of rows with their one-hot labels.

    On a GPU, `index_add_` would add in any order, and few GPUs are quick in float64.
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
    """Yields the rows [n, D] in their order, in chunks [some, D] that on a CPU stay in the cache."""
    size = 2048 if x.device.type == "cpu" else 65536
    for start in range(0, len(x), size):
        yield x[start : start + size]


def _nearest(x: Tensor, centroids: Tensor, half: Tensor) -> Tensor:
    return torch.addmm(half, x, centroids.T, alpha=-1).min(1).indices


def greedy_starts(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Draws k rows as first centroids by greedy k-means++.

    Parameters
    ----------
    rows
        float32 [n, D], n ≥ 1.
    k
        K. With fewer distinct rows than k, some rows are drawn again.
    generator
        Of the CPU, also for rows on a GPU; it is advanced.

    Returns
    -------
    float32 [K, D].

    Notes
    -----
    Arthur and Vassilvitskii 2007. Of 2 + ⌊ln K⌋ candidates for each centroid, the one that lowers the inertia most is
    taken.
    """
    trials = 2 + int(math.log(k))
    norms = rows.square().sum(1)
    first = int(torch.rand((), generator=generator, dtype=torch.float64) * len(rows))
    uniform = torch.rand(k - 1, trials, generator=generator, dtype=torch.float64)
    uniform = uniform.to(rows.device)  # all at once: from here on the host does not wait for a GPU
    chosen = [rows[first : first + 1]]
    nearest = (rows - chosen[0]).square().sum(1)
    for draws in uniform:
        cumulated = nearest.double().cumsum(0)
        candidates = torch.searchsorted(cumulated, draws * cumulated[-1], right=True).clamp(max=len(rows) - 1)
        squares = torch.addmm(norms[:, None] + norms[candidates], rows, rows[candidates].T, alpha=-2)
        squares.masked_fill_(squares < 1e-6 * norms[:, None], 0)  # a copy of a candidate, but for rounding
        squares = torch.minimum(squares, nearest[:, None])  # [n, trials]
        best = squares.sum(0, dtype=torch.float64).argmin(keepdim=True)  # [1]
        chosen.append(rows[candidates[best]])
        nearest = squares.index_select(1, best)[:, 0]
    return torch.cat(chosen)

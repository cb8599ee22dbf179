"""k-means of thousands of small problems at once, in torch, on any device.

Labels and inertia need no centroids, only the Gram matrix G = X Xᵀ of the centred rows [P, P]: a squared distance to a
cluster's mean is G_ii − 2 mean_j G_ij + mean_jl G_jl, so a step of Lloyd's algorithm is one product with the cluster
memberships. All restarts of a problem share one G, and the k-means++ draws (Arthur and Vassilvitskii, SODA 2007, with
the greedy choice of scikit-learn) read their distances from it.

Every product has a fixed shape (a tile of problems, equal P, k and restarts), and every problem draws from its own
counter: so its labels are the same bits whatever else is in the batch, and wherever it stands there.
"""

import math

import torch
from torch import Tensor

from batchjob.clustering.base import NONE, Clusters, check, mix, number_by_appearance, uniform

MAX_STEPS = 300  # of Lloyd's algorithm, as scikit-learn's; a fixed point comes after 6 to 40


class BatchedEngine:
    """Batched k-means in torch; the default on every device."""

    name = "batched"

    def __init__(self, *, budget_bytes: int = 0) -> None:
        self._budget_bytes = budget_bytes

    def kmeans(self, x: Tensor, k: Tensor, seeds: Tensor, *, n_init: int, mask: Tensor | None = None) -> Clusters:
        """See `Engine.kmeans`."""
        check(x, k, seeds, mask)
        n, p, _ = x.shape
        tile = 256 if x.device.type == "cuda" else 8
        budget = self._budget_bytes or (1 << 30 if x.device.type == "cuda" else 1 << 26)
        chunk = max(1, budget // (p * p * 8) // tile) * tile
        labels = torch.full((n, p), NONE, dtype=torch.uint8, device=x.device)
        inertia = torch.zeros(n, dtype=torch.float32, device=x.device)
        seeds = seeds.to(x.device)
        for wanted in sorted(set(k.tolist())):
            of_k = (k == wanted).nonzero()[:, 0].to(x.device)
            for part in of_k.split(chunk):
                keep = None if mask is None else mask[part]
                gram, scale = gram_matrices(x[part], keep, tile)
                found, cost = _solve(gram, keep, min(wanted, p), seeds[part], n_init, tile)
                labels[part] = found
                inertia[part] = cost / scale**2
        if mask is not None:
            labels = torch.where(mask, labels, NONE)
        numbered, found_k = number_by_appearance(labels, NONE - 1)
        return Clusters(numbered, inertia, found_k)


def gram_matrices(x: Tensor, mask: Tensor | None, tile: int) -> tuple[Tensor, Tensor]:
    """(float32 [M, P, P], float32 [M]): X Xᵀ of the centred rows times a power of two near 1 / their size, and that."""
    x = x.float()
    if mask is not None:
        x = torch.where(mask[:, :, None], x, 0)
    exponent = torch.frexp(x.abs().amax((1, 2))).exponent
    scale = torch.ldexp(torch.ones(len(x), device=x.device), -exponent)  # a power of two: nothing is rounded
    x = x * scale[:, None, None]
    if mask is None:
        x = x - x.mean(1, keepdim=True)
    else:
        mean = x.sum(1, keepdim=True) / mask.sum(1).clamp_min(1)[:, None, None]
        x = torch.where(mask[:, :, None], x - mean, 0)
    m, p, d = x.shape
    padded = torch.zeros(-(-m // tile) * tile, p, d, device=x.device)
    padded[:m] = x
    gram = torch.empty(len(padded), p, p, device=x.device)
    for start in range(0, len(padded), tile):
        part = padded[start : start + tile]
        torch.bmm(part, part.mT, out=gram[start : start + tile])
    return gram, scale


def _solve(gram: Tensor, mask: Tensor | None, k: int, seeds: Tensor, n_init: int, tile: int) -> tuple[Tensor, Tensor]:
    m, p = len(seeds), gram.shape[1]
    labels = torch.zeros(len(gram), n_init, p, dtype=torch.uint8, device=gram.device)
    labels[:m] = plus_plus(gram[:m], mask, k, seeds, n_init)
    member = torch.zeros(len(gram), p, device=gram.device)
    member[:m] = 1 if mask is None else mask.float()
    inertia = torch.zeros(len(gram), n_init, device=gram.device)
    for start in range(0, len(gram), tile):
        part = slice(start, start + tile)
        for _ in range(MAX_STEPS):
            new, inertia[part] = lloyd_step(gram[part], member[part], labels[part], k)
            done = bool((new == labels[part]).all())
            labels[part] = new
            if done:
                break
    best = inertia[:m].argmin(1)
    index = torch.arange(m, device=gram.device)
    return labels[index, best], inertia[index, best]


def lloyd_step(gram: Tensor, member: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(uint8 [T, R, P], float32 [T, R]): the nearest mean of each row, and the sum of squared distances to it."""
    t, r, p = labels.shape
    ids = torch.arange(k, device=gram.device, dtype=torch.uint8)
    weights = (labels[:, None] == ids[:, None, None]).float() * member[:, None, None]  # [T, K, R, P]
    size = weights.sum(-1, keepdim=True)
    weights /= size.clamp_min(1)
    inner = torch.bmm(weights.view(t, k * r, p), gram).view(t, k, r, p)  # ⟨row, mean⟩
    norm = (weights * inner).sum(-1, keepdim=True)  # ⟨mean, mean⟩
    distance = torch.where(size > 0, norm - 2 * inner, torch.inf)
    own = torch.diagonal(gram, dim1=1, dim2=2)[:, None] + distance.gather(1, labels[:, None].long())[:, 0]
    if bool((size == 0).any()):  # the first empty cluster moves to the row farthest from its own mean
        empty = (size == 0)[..., 0]
        far = (own * member[:, None]).argmax(-1)  # [T, R]
        at, which = empty.any(1).nonzero(as_tuple=True)
        to, row = empty[at, :, which].float().argmax(-1), far[at, which]
        distance[at, to, which] = gram[at, row, row][:, None] - 2 * gram[at, row]
    best, new = distance.min(1)
    total = ((torch.diagonal(gram, dim1=1, dim2=2)[:, None] + best).clamp_min(0) * member[:, None]).sum(-1)
    return new.to(torch.uint8), total


def plus_plus(gram: Tensor, mask: Tensor | None, k: int, seeds: Tensor, n_init: int) -> Tensor:
    """uint8 [M, R, P]: for each row the nearest of k rows drawn by greedy k-means++, for R = n_init starts."""
    m, p, _ = gram.shape
    trials = 2 + int(math.log(k))  # scikit-learn's number
    streams = mix(seeds[:, None] + torch.arange(n_init, device=gram.device))  # [M, R]
    square = torch.diagonal(gram, dim1=1, dim2=2)[:, None, None]  # [M, 1, 1, P]
    table = gram.reshape(m * p, p)
    base = (torch.arange(m, device=gram.device) * p)[:, None, None]
    member = torch.ones(m, p, device=gram.device) if mask is None else mask.float()
    closest = member[:, None].expand(m, n_init, p)
    labels = torch.zeros(m, n_init, p, dtype=torch.uint8, device=gram.device)
    for c in range(k):
        count = 1 if c == 0 else trials
        drawn = draw(closest, uniform(streams, c * trials, count=count))  # [M, R, L]
        rows = table[base + drawn]  # [M, R, L, P]
        away = (square - 2 * rows + square[:, 0, 0].gather(1, drawn.flatten(1)).view(m, n_init, count, 1)).clamp_min(0)
        away *= member[:, None, None]
        nearer = away if c == 0 else torch.minimum(away, closest[:, :, None])
        best = nearer.sum(-1).argmin(-1)[:, :, None, None].expand(m, n_init, 1, p)
        nearer = nearer.gather(2, best)[:, :, 0]
        if c:
            labels.masked_fill_(nearer < closest, c)
        closest = nearer
    return labels


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """int64 [M, R, L]: indices of rows drawn with probability in proportion to `weights` [M, R, P].

    Weights become whole numbers first: their running sums are then exact, in any order and on any device.
    """
    most = weights.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    running = (weights / most * 2**30).long().cumsum(-1)
    target = (uniforms * running[..., -1:]).long()
    return torch.searchsorted(running, target, right=True).clamp_max(weights.shape[-1] - 1)

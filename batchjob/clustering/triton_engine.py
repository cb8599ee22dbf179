"""k-means by one Triton kernel, behind the same protocol as the batched engine, which takes what doesn't fit a chip."""

import math

import torch
from torch import Tensor

from batchjob.clustering import gram, triton_kernel
from batchjob.clustering.base import check_finite, mix, uniform
from batchjob.clustering.batched import CANCELLED, BatchedEngine, Problems
from batchjob.clustering.lloyd import MAX_STEPS
from batchjob.codes import NO_LABEL

MAX_PATCHES = 256  # a matrix of 128 KiB in fp16
HALF_FROM = 128  # rows (as a power of two) from which fp32 would not fit
MAX_CENTRES = 128  # restarts × clusters, as powers of two


class TritonEngine(BatchedEngine):
    """One program a problem; draws and arithmetic as in the batched engine, the Gram matrix in fp16 above 128 patches.

    Problems of more than 256 patches, of many clusters or of nearly equal rows go to the batched engine.
    """

    name = "triton"

    def _solve(self, problems: Problems, k: int, part: Tensor, tile: int, dtype: torch.dtype) -> Tensor:
        p, r = problems.x.shape[1], problems.n_init
        fits = p <= MAX_PATCHES and _power(r) * _power(k) <= MAX_CENTRES
        if dtype != torch.float32 or not fits:
            return super()._solve(problems, k, part, tile, dtype)
        mask = None if problems.mask is None else problems.mask[part]
        products = self._space.take("gram", (len(part), p, p), part, dtype)
        factor = torch.empty(len(part), device=part.device)
        for start in range(0, len(part), tile):
            padded = torch.arange(start, start + tile, device=part.device).clamp_max_(len(part) - 1)
            one = torch.empty(tile, p, p, device=part.device)  # of a fixed shape: the same bits in any batch
            found = gram.centred_gram(problems.rows(part[padded]), None if mask is None else mask[padded], one)
            products[padded], factor[padded] = one, found
        labels, starved = launch(products, mask, k, problems.seeds[part], r)
        total = torch.diagonal(products, dim1=1, dim2=2).sum(1)
        if not bool(total.isfinite().all()):
            check_finite(problems.x, problems.mask)
        cost = cost_of(products, labels, mask, k)
        problems.labels[part] = labels if mask is None else torch.where(mask, labels, NO_LABEL)
        problems.inertia[part] = cost / factor.square()
        return starved | (cost < CANCELLED * total)


def launch(products: Tensor, mask: Tensor | None, k: int, seeds: Tensor, n_init: int) -> tuple[Tensor, Tensor]:
    """(uint8 [N, P], bool [N]): labels from Gram matrices [N, P, P], and whether a start ran out of rows."""
    n, p, _ = products.shape
    trials = 2 + int(math.log(k))
    draws = 1 + (k - 1) * trials
    restarts = _power(n_init)
    square = torch.diagonal(products, dim1=1, dim2=2)
    scale = torch.ldexp(torch.ones(n, device=products.device), -torch.frexp(square.amax(1)).exponent)
    streams = mix(seeds[:, None] + torch.arange(n_init, device=seeds.device))
    labels = torch.empty(n, p, dtype=torch.uint8, device=products.device)
    starved = torch.empty(n, dtype=torch.int32, device=products.device)
    patches = max(16, _power(p))
    half = patches > HALF_FROM
    triton_kernel.kmeans_kernel[(n,)](
        products,
        scale,
        torch.ones(n, p, device=products.device) if mask is None else mask.float(),
        torch.full((n,), k, dtype=torch.int32, device=products.device),
        torch.full((n,), trials, dtype=torch.int32, device=products.device),
        uniform(streams, 0, count=draws),
        labels,
        starved,
        p,
        draws,
        2e-3 if half else 1e-5,
        MAX_STEPS,
        R=n_init,
        RB=restarts,
        KB=max(_power(k), 16 // restarts),  # a product needs 16 rows
        LB=max(_power(trials), 16 // restarts),
        PB=patches,
        HALF=half,
        num_warps=16 if half else 8,
        enable_fp_fusion=False,  # as torch rounds
    )
    return labels, starved > 0


def cost_of(products: Tensor, labels: Tensor, mask: Tensor | None, k: int) -> Tensor:
    """float32 [N]: sums of squared distances to the own mean, from the Gram matrices in full precision."""
    ones = (labels[:, None] == torch.arange(k, device=labels.device, dtype=torch.uint8)[:, None]).float()  # [N, K, P]
    if mask is not None:
        ones *= mask[:, None]
    within = (ones * torch.bmm(ones, products)).sum(2) / ones.sum(2).clamp_min(1)
    return (torch.diagonal(products, dim1=1, dim2=2).sum(1) - within.sum(1)).clamp_min_(0)


def _power(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()

"""Gram matrices of centred rows in torch, and k-means++ starts that take their distances from them.

Letters: T problems of P rows with D numbers, K clusters, R starts, L candidates of a draw.
"""

import math

import torch
from torch import Tensor

from batchjob.clustering.base import mix, uniform

_SAFE = (1e-24, 1e24)  # sums of squares in this range neither overflow nor become denormal in float32


def centred_gram(x: Tensor, mask: Tensor | None, out: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Writes the Gram matrices X Xᵀ of each problem's centred rows.

    Parameters
    ----------
    x
        float [T, P, D].
    mask
        bool [T, P], False for rows that take no part: their rows and columns of the result are 0. None: all take part.
    out
        float32 or float64 [T, P, P], written. It is NaN for a problem that holds NaN or infinity.
    scratch
        [T, P, D] in the dtype of `out`, overwritten. With None it is allocated, which costs a CPU as much time as a
        step of Lloyd's algorithm.

    Returns
    -------
    [T] in the dtype of `out`: the power of two by which the rows were multiplied. On a CPU it is 1, except for numbers
    so small or large that their squares would leave the range of floats.
    """
    scratch = torch.empty_like(x, dtype=out.dtype) if scratch is None else scratch
    x = x.to(out.dtype)
    if mask is not None:
        x = torch.where(mask[:, :, None], x, 0)
    factor = torch.ones(len(x), dtype=x.dtype, device=x.device)
    if x.is_cuda:  # reading the range would take longer than scaling, and scaling rounds nothing
        factor = torch.ldexp(factor, -torch.frexp(x.abs().amax((1, 2))).exponent)
        _gram(x * factor[:, None, None], mask, out, scratch)
        return factor
    energy = _gram(x, mask, out, scratch)
    if bool(((energy < _SAFE[0]) | ~(energy < _SAFE[1])).any()):
        most = x.abs().amax((1, 2))
        factor = torch.ldexp(factor, -torch.frexp(most).exponent)  # a power of two: it rounds nothing
        _gram(x * factor[:, None, None], mask, out, scratch)
    return factor


def _gram(x: Tensor, mask: Tensor | None, out: Tensor, centred: Tensor) -> Tensor:
    """[T]: the sums of squared lengths of the centred rows; writes `out` [T, P, P] and `centred` [T, P, D]."""
    count = x.shape[1] if mask is None else mask.sum(1).clamp_min(1)[:, None, None]
    torch.sub(x, x.sum(1, keepdim=True) / count, out=centred)  # not mean(): a mask of all True must give the same bits
    if mask is not None:
        centred.mul_(mask[:, :, None])
    half = x.shape[1] // 32 * 16  # the upper right block is the lower left one's mirror image
    torch.bmm(centred, centred[:, :half].mT, out=out[:, :, :half])
    torch.bmm(centred[:, half:], centred[:, half:].mT, out=out[:, half:, half:])
    out[:, :half, half:] = out[:, half:, :half].mT
    return torch.diagonal(out, dim1=1, dim2=2).sum(-1)


def plus_plus(gram: Tensor, member: Tensor | None, k: int, seeds: Tensor, n_init: int) -> tuple[Tensor, Tensor]:
    """Draws rows as centres by greedy k-means++.

    Parameters
    ----------
    gram
        float [T, P, P].
    member
        [T, P] in the dtype of `gram`: 1, or 0 for rows that take no part. None: all take part.
    k
        K, for all problems.
    seeds
        int64 [T].
    n_init
        R, the number of starts.

    Returns
    -------
    (numbers of rows int64 [T, K, R], bool [T]: whether a start ran out of rows, because every row was equal, but for
    rounding, to a centre already drawn).

    Notes
    -----
    Arthur and Vassilvitskii (SODA 2007), with as many candidates of a draw as in scikit-learn.
    """
    t, p, _ = gram.shape
    trials = 2 + int(math.log(k))
    streams = mix(seeds[:, None] + torch.arange(n_init, device=gram.device))  # [T, R]
    uniforms = uniform(streams, 0, count=1 + (k - 1) * trials)  # [T, R, draws]
    square = torch.diagonal(gram, dim1=1, dim2=2).contiguous()  # [T, P]
    offset = (torch.arange(t, device=gram.device) * p)[:, None]
    table = gram.view(t * p, p)
    weights = torch.ones(t, p, dtype=gram.dtype, device=gram.device) if member is None else member
    centres = torch.empty(t, k, n_init, dtype=torch.int64, device=gram.device)
    centres[:, 0] = _draw(weights[:, None].expand(t, n_init, p), uniforms[..., :1])[..., 0]
    closest = _distances(table, square, offset, centres[:, 0, :, None], member)[:, :, 0]  # [T, R, P]
    noise = square.amax(-1)[:, None] * (1e-5 if gram.dtype == torch.float32 else 1e-14)
    starved = torch.zeros(t, n_init, dtype=torch.bool, device=gram.device)
    rows = torch.arange(t * n_init, device=gram.device) * trials
    for c in range(1, k):
        starved |= closest.amax(-1) <= noise
        at = 1 + (c - 1) * trials
        drawn = _draw(closest, uniforms[..., at : at + trials])  # [T, R, L]
        nearer = torch.minimum(_distances(table, square, offset, drawn, member), closest[:, :, None])
        best = nearer.sum(-1).argmin(-1)  # [T, R]
        closest = nearer.view(-1, p).index_select(0, rows + best.view(-1)).view(t, n_init, p)
        centres[:, c] = drawn.view(-1).index_select(0, rows + best.view(-1)).view(t, n_init)
    return centres, starved.any(1)


def _distances(table: Tensor, square: Tensor, offset: Tensor, drawn: Tensor, member: Tensor | None) -> Tensor:
    """[T, R, L, P]: squared distances from every row to the drawn rows [T, R, L]; 0 for rows that take no part."""
    t, r, count = drawn.shape
    flat = drawn.view(t, -1)
    away = table.index_select(0, (flat + offset).view(-1)).view(t, r, count, -1)
    torch.sub(square.gather(1, flat).view(t, r, count, 1), away, alpha=2, out=away)
    away.add_(square[:, None, None]).clamp_min_(0)
    return away if member is None else away.mul_(member[:, None, None])


def _draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """int64 [T, R, L]: rows drawn in proportion to `weights` [T, R, P] by the numbers `uniforms` [T, R, L] in [0, 1).

    Weights are made whole numbers first, so that their running sums are exact, in any order and on any device.
    """
    most = weights.amax(-1, keepdim=True).clamp_min_(1e-28)  # 2^30 over it is still a float
    whole = (weights * (2.0**30 / most)).to(torch.float64).floor_()
    running = whole.cumsum(-1)  # below 2^53 for up to 8 million rows
    target = uniforms * running[..., -1:]
    return torch.searchsorted(running, target, right=True).clamp_max_(weights.shape[-1] - 1)

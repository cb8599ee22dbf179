"""The choice of the number of clusters of each problem, from the problem itself."""

import torch
from torch import Tensor

from batchjob.clustering import gram, lloyd
from batchjob.clustering.algorithms import RULES, affinity, prepare, prepare_vectors
from batchjob.clustering.base import check_finite
from batchjob.clustering.spectral import decompose
from batchjob.errors import UserError, nearest

K_RANGE = (2, 16)  # the numbers of the study lie in it
TILE_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}


def choose_k(
    rule: str,
    x: Tensor,
    seeds: Tensor,
    *,
    distance: str = "euclidean",
    mask: Tensor | None = None,
    k_range: tuple[int, int] = K_RANGE,
    n_init: int = 4,
    are_vectors: bool = False,
) -> Tensor:
    """Chooses the number of clusters of N problems by a rule; of equally good numbers, the smallest.

    Parameters
    ----------
    rule
        `silhouette`: the highest mean silhouette of k-means labels. `eigengap`: the largest step from the k-th to the
        next eigenvalue of the normalised Laplacian.
    x
        float [N, P, P] attention rows that sum to 1, or with `are_vectors` float [N, P, D].
    seeds
        int64 [N], for the k-means of the silhouette.
    distance
        As in `cluster`; the eigengap takes no distance.
    mask
        bool [N, P], False for rows that take no part. None: all take part.
    k_range
        The smallest and the largest number that may be chosen.
    n_init
        k-means++ starts for each k.
    are_vectors
        Whether `x` holds vectors in place of attention rows.

    Returns
    -------
    int64 [N] on the CPU. A problem whose rows are all equal gets 1 by the silhouette.

    Raises
    ------
    UserError
        The rule or the distance is unknown.
    NotFiniteError
        Rows inside the mask hold NaN or infinity.

    References
    ----------
    Rousseeuw 1987 (silhouette); von Luxburg 2007 (eigengap).
    """
    if rule not in RULES:
        raise UserError(f"--k {rule!r} is not a rule; {nearest(rule, list(RULES))}")
    check_finite(x, mask)
    rows = torch.full((len(x),), x.shape[1], device=x.device) if mask is None else mask.sum(1)
    if rule == "eigengap":
        return _eigengap(affinity(x) if are_vectors else x, mask, rows, k_range).cpu()
    points = prepare_vectors(x, distance) if are_vectors else prepare(x, distance, mask)
    return _silhouette(points, mask, seeds.to(x.device), k_range, n_init).cpu()


def _eigengap(x: Tensor, mask: Tensor | None, rows: Tensor, k_range: tuple[int, int]) -> Tensor:
    low, high = k_range
    values, _ = decompose(x, mask, high + 1)  # ascending
    gaps = values.diff(dim=1)  # column k − 1: from the k-th value to the next
    k = torch.arange(1, gaps.shape[1] + 1, device=x.device)
    allowed = (k >= low) & (k < rows[:, None])  # the last eigenvalue has no next
    best = torch.where(allowed, gaps, -torch.inf).argmax(1) + 1
    return torch.where(allowed.any(1), best, rows.clamp(1, low))


def _silhouette(x: Tensor, mask: Tensor | None, seeds: Tensor, k_range: tuple[int, int], n_init: int) -> Tensor:
    n, p, d = x.shape
    tile = max(1, min(16 if x.device.type == "cpu" else 256, TILE_BYTES[x.device.type] // (4 * p * (3 * p + 2 * d))))
    chosen = torch.ones(n, dtype=torch.int64, device=x.device)
    for start in range(0, n, tile):
        part = torch.arange(start, start + tile, device=x.device).clamp_max_(n - 1)
        scores = _tile_scores(x[part], None if mask is None else mask[part], seeds[part], k_range, n_init)
        best = scores.argmax(1) + k_range[0]
        best = torch.where(scores.amax(1) > -torch.inf, best, 1)
        chosen[part] = best
    return chosen


def _tile_scores(x: Tensor, mask: Tensor | None, seeds: Tensor, k_range: tuple[int, int], n_init: int) -> Tensor:
    """float32 [T, 1 + high − low]: the mean silhouette for each k; −inf where k-means finds fewer than k clusters."""
    t, p, _ = x.shape
    products = torch.empty(t, p, p, device=x.device)
    gram.centred_gram(x, mask, products)
    square = torch.diagonal(products, dim1=1, dim2=2)
    member = None if mask is None else mask.float()
    away = (square[:, :, None] + square[:, None, :] - 2 * products).clamp_min_(0).sqrt_()
    torch.diagonal(away, dim1=1, dim2=2).zero_()
    scores = torch.full((t, k_range[1] - k_range[0] + 1), -torch.inf, device=x.device)
    for i, k in enumerate(range(k_range[0], min(k_range[1], p - 1) + 1)):
        ones, _, starved = lloyd.solve_tile(products, member, k, seeds, n_init)
        score = _mean_silhouette(away, ones, member)
        scores[:, i] = torch.where(starved | (ones.sum(-1) == 0).any(1), -torch.inf, score)
    return scores


def _mean_silhouette(away: Tensor, ones: Tensor, member: Tensor | None) -> Tensor:
    """float [T]: the mean silhouette over the rows of each problem, as scikit-learn's `silhouette_score`.

    `away` [T, P, P] are distances, `ones` [T, K, P] is 1 where a row is in a cluster, and `member` [T, P] is 0 for rows
    that take no part.
    """
    size = ones.sum(-1, keepdim=True)  # [T, K, 1]
    sums = torch.bmm(ones, away)  # [T, K, P]
    own_size = (ones * size).sum(1)
    inside = (ones * sums).sum(1) / (own_size - 1).clamp_min(1)
    outside = torch.where((ones > 0) | (size == 0), torch.inf, sums / size.clamp_min(1)).amin(1)
    most = torch.maximum(inside, outside)
    score = torch.where((own_size > 1) & (most > 0) & most.isfinite(), (outside - inside) / most, 0)
    if member is None:
        return score.mean(1)
    return (score * member).sum(1) / member.sum(1).clamp_min(1)

"""Spectral clustering of attention maps: eigenvectors on the device for many problems at once."""

import torch
from torch import Tensor

from batchjob.clustering.base import Clusters, Engine, check_finite
from batchjob.codes import NO_LABEL

TILE_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}  # of Laplacians decomposed at once; depends on their shape alone


def laplacians(rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(float32 [N, P, P], float32 [N, P]): I − D^−½ W D^−½ of the symmetrised attention, and sqrt(D).

    W = (A + Aᵀ) / 2 without its diagonal, D its row sums, as scipy.sparse.csgraph.laplacian has it: a row connected to
    none is a component of its own (eigenvalue 0). Rows outside the mask get the eigenvalue 3, beyond all others.
    """
    weights = (rows + rows.mT).float() / 2
    weights = weights - torch.diag_embed(torch.diagonal(weights, dim1=1, dim2=2))
    if mask is not None:
        weights = torch.where(mask[:, :, None] & mask[:, None, :], weights, 0)
    degree = weights.sum(-1)
    alone = degree <= 0
    root = torch.where(alone, 1, degree).sqrt()
    diagonal = torch.where(alone, 0.0, 1.0)
    if mask is not None:
        diagonal = torch.where(mask, diagonal, 3.0)
    return torch.diag_embed(diagonal) - weights / root[:, :, None] / root[:, None, :], root


def decompose(rows: Tensor, mask: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """(float32 [N, C], float32 [N, P, C]): the `count` smallest eigenvalues, ascending, and their scaled eigenvectors.

    Scaled as scikit-learn's `SpectralClustering`: divided by sqrt(D). Worked on in tiles whose shape depends on P
    alone, so that a problem's numbers don't depend on its batch. Raises NotFiniteError.
    """
    n, p, _ = rows.shape
    check_finite(rows, mask)
    count = min(count, p)
    tile = max(1, TILE_BYTES[rows.device.type] // (4 * p * p * 4))
    values = torch.empty(n, count, device=rows.device)
    vectors = torch.empty(n, p, count, device=rows.device)
    for start in range(0, n, tile):
        part = torch.arange(start, start + tile, device=rows.device).clamp_max_(n - 1)
        if rows.device.type == "cpu":
            part = part[: n - start]  # LAPACK takes them one by one
        laplacian, root = laplacians(rows[part], None if mask is None else mask[part])
        value, vector = torch.linalg.eigh(laplacian)
        here = min(tile, n - start)
        values[start : start + here] = value[:here, :count]
        vectors[start : start + here] = (vector[:, :, :count] / root[:, :, None])[:here]
    return values, vectors


def spectral(
    rows: Tensor, k: Tensor, seeds: Tensor, *, engine: Engine, n_init: int, mask: Tensor | None = None
) -> Clusters:
    """The clusters of the first k eigenvectors of the normalised Laplacian (Shi and Malik, PAMI 2000).

    rows float [N, P, P] attention, k int64 [N], seeds int64 [N]; `inertia` is of the eigenvectors. The attention itself
    is the affinity, so no distance enters.
    """
    n, p, _ = rows.shape
    k = k.cpu().clamp_max(p)
    _, vectors = decompose(rows, mask, int(k.max()) if n else 1)
    labels = torch.full((n, p), NO_LABEL, dtype=torch.uint8, device=rows.device)
    inertia = torch.zeros(n, device=rows.device)
    found = torch.zeros(n, dtype=torch.uint8, device=rows.device)
    settled = torch.ones(n, dtype=torch.bool, device=rows.device)
    for wanted in sorted(set(k.tolist())):
        part = (k == wanted).nonzero()[:, 0].to(rows.device)
        answer = engine.kmeans(
            vectors[part, :, :wanted].contiguous(),
            torch.full((len(part),), wanted),
            seeds.to(rows.device)[part],
            n_init=n_init,
            mask=None if mask is None else mask[part],
        )
        labels[part], inertia[part], found[part] = answer.labels, answer.inertia, answer.k
        settled[part] = answer.settled
    return Clusters(labels, inertia, found, settled)

"""Spectral clustering of attention: eigenvectors of many problems at once, on the device."""

import torch
from torch import Tensor

from batchjob.clustering.base import Clusters, Engine, check_finite
from batchjob.codes import NO_LABEL

TILE_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}  # of Laplacians that are decomposed at once


def _laplacians(rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(float32 [N, P, P], float32 [N, P]): I − D^−½ W D^−½ of the symmetrised attention, and sqrt(D).

    W is (A + Aᵀ) / 2 without its diagonal, and D are its row sums, as in scipy.sparse.csgraph.laplacian. A row that is
    connected to no other is a component of its own (eigenvalue 0). Rows outside the mask get the eigenvalue 3, which is
    above all others.
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
    """Computes the smallest eigenvalues of each problem's normalised Laplacian, with their eigenvectors.

    Parameters
    ----------
    rows
        float [N, P, P] attention.
    mask
        bool [N, P], False for rows that take no part. None: all take part.
    count
        How many eigenvalues, C; at most P are given.

    Returns
    -------
    (float32 [N, C] eigenvalues, ascending; float32 [N, P, C] eigenvectors divided by sqrt(D), as in scikit-learn's
    `SpectralClustering`). The numbers of a problem do not depend on its batch.

    Raises
    ------
    NotFiniteError
        Rows inside the mask hold NaN or infinity.
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
        laplacian, root = _laplacians(rows[part], None if mask is None else mask[part])
        value, vector = torch.linalg.eigh(laplacian)
        here = min(tile, n - start)
        values[start : start + here] = value[:here, :count]
        vectors[start : start + here] = (vector[:, :, :count] / root[:, :, None])[:here]
    return values, vectors


def spectral(
    rows: Tensor, k: Tensor, seeds: Tensor, *, engine: Engine, n_init: int, mask: Tensor | None = None
) -> Clusters:
    """Clusters patches by the first k eigenvectors of the normalised Laplacian (Shi and Malik, PAMI 2000).

    Parameters
    ----------
    rows
        float [N, P, P] attention: it is the affinity of two patches, and no distance is taken.
    k
        int64 [N]; at most P is used.
    seeds, engine, n_init, mask
        For the k-means of the eigenvectors, as in `cluster`.

    Returns
    -------
    The clusters, on the device of `rows`; `inertia` is that of the eigenvectors.

    Raises
    ------
    NotFiniteError
        Rows inside the mask hold NaN or infinity.
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

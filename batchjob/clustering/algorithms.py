"""The algorithms of `--algorithm`, on top of the engines, and the distances of `--distance`."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from batchjob.clustering.base import Clusters, Engine, mix
from batchjob.clustering.search import AUTO
from batchjob.config import ALGORITHMS
from batchjob.errors import UserError, nearest

_DETERMINISTIC = ("agglomerative", "hdbscan")


def prepare(rows: Tensor, distance: str, mask: Tensor | None) -> Tensor:
    """Transforms attention rows so that the Euclidean distance between two of them is the wanted one.

    Parameters
    ----------
    rows
        float [N, P, P], or any [..., P] without a mask; each row is a distribution over the patches.
    distance
        `euclidean`; `cosine`, for which rows get the length 1; or `hellinger`, for which square roots are taken
        (Hellinger 1909).
    mask
        bool [N, P], False for patches of padding: their columns become 0, and the rows are renormalised over the other
        columns. None: every patch is image.

    Returns
    -------
    float32 in the shape of `rows`.

    Raises
    ------
    UserError
        The distance is unknown.
    """
    x = rows.float()
    if mask is not None:
        x = torch.where(mask[:, None, :], x, 0)
        x = x / x.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if distance == "hellinger":
        return x.clamp_min(0).sqrt()
    if distance == "cosine":
        return torch.nn.functional.normalize(x, dim=-1, eps=torch.finfo(torch.float32).tiny)
    if distance != "euclidean":
        raise UserError(
            f"--distance {distance!r} is unknown; {nearest(distance, ['euclidean', 'cosine', 'hellinger'])}"
        )
    return x


def prepare_vectors(vectors: Tensor, distance: str) -> Tensor:
    """Transforms vectors so that the Euclidean distance between two of them is the wanted one.

    Parameters
    ----------
    vectors
        float [..., D].
    distance
        `euclidean`, or `cosine`, for which vectors get the length 1.

    Returns
    -------
    float32 in the shape of `vectors`.

    Raises
    ------
    UserError
        The distance is unknown, or is not for vectors.
    """
    if distance not in ("euclidean", "cosine"):
        raise UserError(f"--distance {distance!r} is not for vectors; {nearest(distance, ['euclidean', 'cosine'])}")
    x = vectors.float()
    return torch.nn.functional.normalize(x, dim=-1, eps=torch.finfo(torch.float32).tiny) if distance == "cosine" else x


def affinity(vectors: Tensor) -> Tensor:
    """float32 [N, P, P]: the cosine of every two vectors [N, P, D], and 0 where it is negative.

    TokenCut (2022) takes the same cosine, with a threshold.
    """
    unit = prepare_vectors(vectors, "cosine")
    return (unit @ unit.mT).clamp_min(0)


def cluster(
    algorithm: str,
    rows: Tensor,
    k: Tensor | int,
    seeds: Tensor,
    *,
    engine: Engine,
    distance: str = "euclidean",
    n_init: int = AUTO,
    mask: Tensor | None = None,
    are_vectors: bool = False,
    checks: bool = True,
) -> Clusters:
    """Clusters the rows of N problems.

    Parameters
    ----------
    algorithm
        One of `config.ALGORITHMS`.
    rows
        float [N, P, P] attention rows that sum to 1, or with `are_vectors` float [N, P, D].
    k
        A number for all problems, or int64 [N]. hdbscan takes no k.
    seeds
        int64 [N], from which all random numbers follow. agglomerative and hdbscan draw none.
    engine
        Who computes k-means, also that of `spectral`.
    distance
        As in `prepare` and `prepare_vectors`. `spectral` takes the attention, or `affinity` of vectors, as it is.
    n_init, mask
        As in `Engine.kmeans`.
    are_vectors
        Whether `rows` are vectors in place of attention rows.
    checks
        As in `Engine.kmeans`, for kmeans; the other algorithms always check.

    Returns
    -------
    The clusters, on the device of `rows`.

    Raises
    ------
    UserError
        The algorithm or the distance is unknown.
    NotFiniteError
        Rows inside the mask hold NaN or infinity.
    """
    k = torch.full((rows.shape[0],), k, dtype=torch.int64) if isinstance(k, int) else k
    if algorithm == "kmeans":
        x = prepare_vectors(rows, distance) if are_vectors else prepare(rows, distance, mask)
        return engine.kmeans(x, k, seeds, n_init=n_init, mask=mask, checks=checks)
    if algorithm == "spectral":
        from batchjob.clustering.spectral import spectral

        return spectral(affinity(rows) if are_vectors else rows, k, seeds, engine=engine, n_init=n_init, mask=mask)
    if algorithm in _DETERMINISTIC:
        from batchjob.clustering.pools import solve_each

        x = prepare_vectors(rows, distance) if are_vectors else prepare(rows, distance, mask)
        return solve_each(algorithm, x, k, mask=mask)
    raise UserError(f"--algorithm {algorithm!r} is unknown; {nearest(algorithm, list(ALGORITHMS))}")


def cluster_repeatedly(
    algorithm: str, rows: Tensor, k: Tensor, seeds: Tensor, *, repeats: int, engine: Engine, **more: Any
) -> Clusters:
    """Clusters from several independent seeds, and takes for each problem the clustering of the lowest inertia.

    Parameters
    ----------
    algorithm, rows, k, seeds, engine
        As in `cluster`. The seeds of the other repeats follow from `seeds`.
    repeats
        How many clusterings, R. An algorithm that draws nothing runs once, and its labels stand for all.
    **more
        Passed on to `cluster`.

    Returns
    -------
    The best clusters; with R above 1, the labels of all clusterings as `repeats`.
    """
    first = cluster(algorithm, rows, k, seeds, engine=engine, **more)
    if repeats == 1:
        return first
    found = [first] * repeats
    if algorithm not in _DETERMINISTIC:
        others = (mix(seeds + number) for number in range(1, repeats))
        found = [first, *(cluster(algorithm, rows, k, other, engine=engine, **more) for other in others)]
    labels = torch.stack([one.labels for one in found], 1)  # [N, R, P]
    best = torch.stack([one.inertia for one in found]).argmin(0)  # the first of equals
    at = torch.arange(len(best), device=best.device)
    picked = (
        torch.stack(values)[best, at] for values in zip(*((f.inertia, f.k, f.settled) for f in found), strict=True)
    )
    return dataclasses.replace(Clusters(labels[at, best], *picked), repeats=labels)

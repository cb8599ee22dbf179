"""What `--algorithm` and `--distance` stand for: algorithms on top of the engines."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from batchjob.clustering.base import Clusters, Engine, mix
from batchjob.clustering.search import AUTO
from batchjob.config import ALGORITHMS
from batchjob.errors import UserError, nearest

DETERMINISTIC = ("agglomerative", "hdbscan")
RULES = ("silhouette", "eigengap")  # that choose k


def prepare(rows: Tensor, distance: str, mask: Tensor | None) -> Tensor:
    """float32 [N, P, P]: attention rows such that Euclidean distance between them is the wanted one.

    rows [N, P, P] are distributions over the patches. Columns outside the mask are dropped and the rest renormalised.
    `hellinger`: square roots (Hellinger 1909); `cosine`: rows of length 1.
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
    """float32 [N, P, D]: vectors such that Euclidean distance between them is the wanted one; `cosine`: of length 1."""
    if distance not in ("euclidean", "cosine"):
        raise UserError(f"--distance {distance!r} is not for vectors; {nearest(distance, ['euclidean', 'cosine'])}")
    x = vectors.float()
    return torch.nn.functional.normalize(x, dim=-1, eps=torch.finfo(torch.float32).tiny) if distance == "cosine" else x


def affinity(vectors: Tensor) -> Tensor:
    """float32 [N, P, P]: the cosine of each two vectors, 0 where it is negative (TokenCut, 2022, thresholds it)."""
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
    """The clusters of each problem by `algorithm`; labels on the device of `rows`.

    rows float [N, P, P]: attention rows that sum to 1, or any vectors [N, P, D] with `are_vectors`; k int or int64 [N];
    seeds int64 [N]; mask bool [N, P]. `spectral` takes attention as the affinity, of vectors `affinity`. Raises
    UserError, and NotFiniteError, for which it may wait for the device; without `checks` see `Engine.kmeans`.
    """
    k = torch.full((rows.shape[0],), k, dtype=torch.int64) if isinstance(k, int) else k
    if algorithm == "kmeans":
        x = prepare_vectors(rows, distance) if are_vectors else prepare(rows, distance, mask)
        return engine.kmeans(x, k, seeds, n_init=n_init, mask=mask, checks=checks)
    if algorithm == "spectral":
        from batchjob.clustering.spectral import spectral

        return spectral(affinity(rows) if are_vectors else rows, k, seeds, engine=engine, n_init=n_init, mask=mask)
    if algorithm in ("agglomerative", "hdbscan"):
        from batchjob.clustering.pools import solve_each

        x = prepare_vectors(rows, distance) if are_vectors else prepare(rows, distance, mask)
        return solve_each(algorithm, x, k, mask=mask)
    raise UserError(f"--algorithm {algorithm!r} is unknown; {nearest(algorithm, list(ALGORITHMS))}")


def cluster_repeatedly(
    algorithm: str, rows: Tensor, k: Tensor, seeds: Tensor, *, repeats: int, engine: Engine, **more: Any
) -> Clusters:
    """`cluster` from `repeats` independent seeds: the one of the lowest inertia, with the labels of all as `repeats`.

    Algorithms without chance run once. `more` is passed on to `cluster`.
    """
    first = cluster(algorithm, rows, k, seeds, engine=engine, **more)
    if repeats == 1:
        return first
    found = [first] * repeats
    if algorithm not in DETERMINISTIC:
        others = (mix(seeds + number) for number in range(1, repeats))
        found = [first, *(cluster(algorithm, rows, k, other, engine=engine, **more) for other in others)]
    labels = torch.stack([one.labels for one in found], 1)  # [N, R, P]
    best = torch.stack([one.inertia for one in found]).argmin(0)  # the first of equals
    at = torch.arange(len(best), device=best.device)
    picked = (
        torch.stack(values)[best, at] for values in zip(*((f.inertia, f.k, f.settled) for f in found), strict=True)
    )
    return dataclasses.replace(Clusters(labels[at, best], *picked), repeats=labels)

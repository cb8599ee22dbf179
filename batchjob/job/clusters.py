"""From one layer's maps to the clusters of every algorithm: k, seeds and masks of each problem looked up."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from batchjob import clustering
from batchjob.clustering import Clusters, Engine, pools
from batchjob.clustering.algorithms import cluster_repeatedly
from batchjob.codebook.features import nearest_centroids
from batchjob.codebook.rows import row_kind
from batchjob.loader.loader import Batch
from batchjob.model.attention import LayerMaps, renormalise
from batchjob.plan import Plan
from batchjob.store import centroids

# `LayerMaps.to_cluster` [B, H, P, D], the maps, the batch -> one an algorithm, problems [B * H], head fastest
FindClusters = Callable[[Tensor, LayerMaps, Batch], list[Clusters]]


def choose_engine(plan: Plan, asked: str, device: torch.device) -> tuple[str, str]:
    """(engine, why) for labelling. In dataset scope `--engine` is who fits, and labelling is the same for all."""
    if plan.options.scope == "dataset":
        return "batched", "each row to the nearest of the fitted centroids, in torch"
    return clustering.choose_engine(asked, device)


def open_clusterer(plan: Plan, run: Path, engine: Engine, device: torch.device) -> FindClusters:
    """What finds the clusters of a batch: for each head those of the P rows, image by image.

    In dataset scope the nearest of the run's centroids instead; raises UserError where there are none yet.
    """
    if plan.options.scope == "dataset":
        return _open_by_centroids(plan, run, device)
    k_of_image = np.load(run / "index" / "k.npy")
    options, heads, vectors = plan.options, plan.heads, plan.vector_size > 0

    def find(rows: Tensor, maps: LayerMaps, batch: Batch) -> list[Clusters]:
        rows = rows.flatten(0, 1)  # [B * H, P, P]
        mask = None if batch.mask is None else batch.mask.repeat_interleave(len(heads), dim=0)
        image = torch.from_numpy(batch.rows).to(device)
        k = torch.from_numpy(k_of_image[batch.rows].astype(np.int64)).repeat_interleave(len(heads)).to(device)
        if options.k in ("silhouette", "eigengap"):
            from batchjob.clustering.choose_k import choose_k

            any_k = clustering.problem_seeds(image, maps.layer, heads, 0, options.seed)
            k = choose_k(options.k, rows, any_k, distance=options.distance, mask=mask, are_vectors=vectors).to(device)
        found = []
        for algorithm in options.algorithms:
            seeds = clustering.problem_seeds(image, maps.layer, heads, k, options.seed)
            found.append(
                cluster_repeatedly(
                    algorithm,
                    rows,
                    k,
                    seeds,
                    repeats=options.repeats,
                    engine=engine,
                    distance=options.distance,
                    n_init=options.starts,
                    mask=mask,
                    are_vectors=vectors,
                )
            )
        return found

    return find


def forecast(plan: Plan, partitions: Sequence[int]) -> list[str]:
    """What the algorithms that solve problem by problem will cost for these partitions, one sentence each; measured."""
    if plan.options.scope == "dataset":
        return []
    images = sum(stop - start for start, stop in (plan.rows_of(partition) for partition in partitions))
    problems = images * len(plan.layers) * len(plan.heads)
    return [
        pools.forecast(m, problems, plan.model.num_patches) for m in plan.options.algorithms if m in pools.ALGORITHMS
    ]


def _open_by_centroids(plan: Plan, run: Path, device: torch.device) -> FindClusters:
    fitted = torch.from_numpy(centroids.load(run, plan.digest).centroids).to(device)  # [L, H, K, D]
    kind = row_kind(plan.options, plan.model.grid, plan.vector_size)

    def find(rows: Tensor, maps: LayerMaps, batch: Batch) -> list[Clusters]:
        own = fitted[plan.layers.index(maps.layer)]
        wanted = renormalise(maps.cls[:, :, None], batch.mask) if kind.queries == "cls" else rows
        return [nearest_centroids(wanted, own, kind, distance=plan.options.distance, mask=batch.mask)]

    return find

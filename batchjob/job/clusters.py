"""From one layer's maps to the clusters of every algorithm; looks up k, the seed and the mask of each problem."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from batchjob import clustering
from batchjob.clustering import Clusters, Engine, pools
from batchjob.clustering.algorithms import cluster_repeatedly
from batchjob.codebook.features import nearest_centroids
from batchjob.codebook.rows import row_kind
from batchjob.config import RULES
from batchjob.job.context import Context
from batchjob.job.upload import DeviceBatch, Prepare, pinned
from batchjob.model.attention import LayerMaps, renormalise
from batchjob.plan import Plan
from batchjob.store import centroids

# rows to cluster [B, H, P, D], the maps that they are of, the batch -> clusters of each algorithm, of the problems
# [B * H], where the head changes fastest
FindClusters = Callable[[Tensor, LayerMaps, DeviceBatch], list[Clusters]]


def find_engine(context: Context) -> tuple[Engine, str]:
    """Chooses the engine that labels: (engine, why). In dataset scope `--engine` is for the fit, and torch labels."""
    plan, device = context.plan, context.device
    if plan.options.scope == "dataset":
        return clustering.open_engine("batched", device), "each row to the nearest of the fitted centroids, in torch"
    return clustering.find_engine(
        context.runtime.engine, device, rows=plan.model.num_patches, n_init=plan.options.starts
    )


def prepare_problems(context: Context) -> Prepare:
    """Returns a function that fills in k and the seeds of a batch's problems in every layer, on the host.

    It fills in neither where a rule chooses k from the rows themselves, nor in dataset scope.
    """
    plan, device = context.plan, context.device
    options, heads = plan.options, len(plan.heads)
    if options.scope == "dataset" or options.k in RULES:
        return lambda batch: None
    k_of_image = np.load(context.run / "index" / "k.npy")

    def prepare(batch: DeviceBatch) -> None:
        k = torch.from_numpy(k_of_image[batch.rows].astype(np.int64)).repeat_interleave(heads)
        rows = torch.from_numpy(batch.rows)
        layers = [clustering.problem_seeds(rows, layer, plan.heads, k, options.seed) for layer in plan.layers]
        batch.k, batch.seeds = pinned(k.to(torch.int32), device), pinned(torch.stack(layers), device)

    return prepare


def open_clusterer(context: Context, engine: Engine) -> FindClusters:
    """Makes the function that finds the clusters of one layer of a batch.

    In image scope it clusters the P rows of each image and head. In dataset scope it finds the nearest of the run's
    centroids to each row.

    Parameters
    ----------
    context
        The run and the device.
    engine
        What solves k-means; dataset scope does not use it.

    Returns
    -------
    A function of rows [B, H, P, D], maps and batch, see `FindClusters`.

    Raises
    ------
    UserError
        Dataset scope, and the run has no centroids yet.
    """
    plan, device = context.plan, context.device
    if plan.options.scope == "dataset":
        return _open_by_centroids(context)
    options, heads, vectors = plan.options, plan.heads, plan.vector_size > 0

    def find(rows: Tensor, maps: LayerMaps, batch: DeviceBatch) -> list[Clusters]:
        rows = rows.flatten(0, 1)  # [B * H, P, P]
        mask = None if batch.mask is None else batch.mask.repeat_interleave(len(heads), dim=0)
        if batch.k is not None and batch.seeds is not None:
            k, seeds = batch.k, batch.seeds[plan.layers.index(maps.layer)]
        else:
            from batchjob.clustering.choose_k import choose_k

            image = torch.from_numpy(batch.rows).to(device)
            any_k = clustering.problem_seeds(image, maps.layer, heads, 0, options.seed)
            k = choose_k(
                options.k,
                rows,
                any_k,
                engine=engine,
                distance=options.distance,
                n_init=options.starts,
                mask=mask,
                are_vectors=vectors,
            ).to(device)
            seeds = clustering.problem_seeds(image, maps.layer, heads, k, options.seed)
        found = []
        for algorithm in options.algorithms:
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
                    checks=False,
                )
            )
        return found

    return find


def forecast(plan: Plan, partitions: Sequence[int]) -> list[str]:
    """Forecasts how long the slow algorithms will take, from measured times.

    Parameters
    ----------
    plan
        The run's plan.
    partitions
        Numbers of the partitions that will be labelled.

    Returns
    -------
    A sentence for each algorithm that solves one problem after the other; none in dataset scope.
    """
    if plan.options.scope == "dataset":
        return []
    images = sum(stop - start for start, stop in (plan.rows_of(partition) for partition in partitions))
    problems = images * len(plan.layers) * len(plan.heads)
    return [
        pools.forecast(m, problems, plan.model.num_patches) for m in plan.options.algorithms if m in pools.ALGORITHMS
    ]


def _open_by_centroids(context: Context) -> FindClusters:
    plan = context.plan
    fitted = torch.from_numpy(centroids.load(context.run, plan.digest).centroids).to(context.device)  # [L, H, K, D]
    kind = row_kind(plan.options, plan.model.grid, plan.vector_size)

    def find(rows: Tensor, maps: LayerMaps, batch: DeviceBatch) -> list[Clusters]:
        own = fitted[plan.layers.index(maps.layer)]
        wanted = renormalise(maps.cls[:, :, None], batch.mask) if kind.queries == "cls" else rows
        return [nearest_centroids(wanted, own, kind, distance=plan.options.distance, mask=batch.mask)]

    return find

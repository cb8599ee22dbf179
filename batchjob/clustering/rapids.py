"""k-means by cuML, one problem a call: at home with large problems. The only file that imports RAPIDS and cupy."""

import importlib
import os
from typing import Any

import torch
import torch.distributed
import torch.utils.dlpack
from torch import Tensor

from batchjob.clustering.base import Clusters, check_finite, check_shapes, number_by_appearance
from batchjob.clustering.batched import AUTO_STARTS
from batchjob.codes import NO_LABEL
from batchjob.errors import UserError

FIRST_POOL_BYTES = 256 << 20
SMALL_ROWS = 1 << 16  # up to here, drawing centres one after the other (greedy) is cheap


class CumlEngine:
    """k-means by `cuml.cluster.KMeans` on a GPU; nothing leaves the device but each inertia.

    A seed does not guarantee equal labels there (rapidsai/cuml#5731).
    """

    name = "cuml"

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise UserError("engine 'cuml' needs an NVIDIA GPU, and none is there; use --engine batched")
        self._device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        try:
            with torch.cuda.device(self._device):
                self._cuml, self._cupy = importlib.import_module("cuml"), importlib.import_module("cupy")
                _make_pool(importlib.import_module("rmm"), self._device.index)
        except ImportError as error:
            raise UserError(
                f"engine 'cuml' can't be imported ({error}); use --engine batched, or: make env GPU=1"
            ) from error

    def kmeans(
        self, x: Tensor, k: Tensor, seeds: Tensor, *, n_init: int, mask: Tensor | None = None, checks: bool = True
    ) -> Clusters:
        """See `Engine.kmeans`; x is on this engine's device."""
        check_shapes(x, k, seeds, mask)
        check_finite(x, mask)
        n, p, _ = x.shape
        labels = torch.full((n, p), NO_LABEL, dtype=torch.uint8, device=x.device)
        inertia = torch.zeros(n, device=x.device)
        with torch.cuda.device(self._device):
            for i, (wanted, seed) in enumerate(zip(k.tolist(), seeds.tolist(), strict=True)):
                keep = slice(None) if mask is None else mask[i]
                if len(x[i, keep]):
                    labels[i, keep], inertia[i] = self._solve(x[i, keep], wanted, seed, n_init or AUTO_STARTS)
        numbered, found = number_by_appearance(labels, NO_LABEL - 1)
        return Clusters(numbered, inertia, found, torch.zeros_like(found, dtype=torch.bool))

    def module(self, name: str) -> Any:
        """cuml or cupy, imported once with the pool in place."""
        return {"cuml": self._cuml, "cupy": self._cupy}[name]

    def _solve(self, rows: Tensor, k: int, seed: int, n_init: int) -> tuple[Tensor, float]:
        scaled, factor = to_unit_spread(rows)
        if len(rows) <= SMALL_ROWS:  # cuML would make k clusters of fewer different rows
            k = min(k, len(torch.unique(scaled, dim=0)))
        torch.cuda.current_stream().synchronize()  # cuML works on a stream of its own
        fit = self._cuml.cluster.KMeans(**arguments(len(rows), k, seed, n_init)).fit(as_array(scaled, self._cupy))
        self._cupy.cuda.runtime.deviceSynchronize()
        return as_tensor(fit.labels_).to(torch.uint8), float(fit.inertia_) / factor**2


class CumlLloyd:
    """Lloyd's iteration over the rows of a whole dataset by cuML, ten iterations a step.

    Alone it is `cuml.cluster.KMeans`. Where a launcher started the processes (also a single one) it is `KMeansMG`,
    which reduces its sums over NCCL: no Dask, only RAFT's bindings, as spark-rapids-ml and NeMo Curator do it.
    """

    name = "cuml"
    steps = 10

    def __init__(self, device: torch.device, *, rank: int, world: int) -> None:
        self._engine = CumlEngine(device)
        self._handle: Any = None  # RAFT's, with the communicator; alone none is needed
        self._nccl: Any = None
        if world > 1 or "RANK" in os.environ:
            self._join(rank, world)

    def _join(self, rank: int, world: int) -> None:
        try:
            nccl = importlib.import_module("raft_dask.common.nccl").nccl
            inject = importlib.import_module("raft_dask.common.comms_utils").inject_comms_on_handle_coll_only
            handle = importlib.import_module("pylibraft.common.handle").Handle(n_streams=0)
        except ImportError as error:
            raise UserError(
                f"engine 'cuml' on several GPUs can't import raft-dask ({error}); use --engine batched, or install it"
            ) from error
        identity = [nccl.get_unique_id() if rank == 0 else None]
        if world > 1:
            torch.distributed.broadcast_object_list(identity)
        self._nccl = nccl()
        self._nccl.init(world, identity[0], rank)
        inject(handle, self._nccl, world, rank, False)
        self._handle = handle

    def advance(self, x: Tensor, centroids: Tensor, *, k: int, seed: int, tolerance: float) -> tuple[Tensor, int]:
        """(centroids [K, D], iterations done, at most ten) over this process's rows x [n, D], read where they lie.

        `tolerance` is the summed squared shift of the centroids below which they stand still.
        """
        model, cupy = self._engine.module("cuml"), self._engine.module("cupy")
        start = as_array(centroids.contiguous(), cupy)
        given = refining(k, tolerance, seed, self.steps) | {"init": start}
        torch.cuda.current_stream().synchronize()  # cuML works on a stream of its own
        if self._handle is None:
            fit = model.cluster.KMeans(**given)
        else:
            fit = importlib.import_module("cuml.cluster.kmeans_mg").KMeansMG(handle=self._handle, **given)
        fit.fit(as_array(x, cupy))
        cupy.cuda.runtime.deviceSynchronize()
        return as_tensor(cupy.asarray(fit.cluster_centers_)).to(centroids), int(fit.n_iter_)


def refining(k: int, tolerance: float, seed: int, steps: int) -> dict[str, Any]:
    """The keyword arguments of a step from given centroids: there is nothing to draw, and `tolerance` is absolute."""
    return {
        "n_clusters": k,
        "n_init": 1,
        "max_iter": steps,
        "tol": max(tolerance, 1e-30),  # 0 is refused
        "random_state": seed & 0x7FFFFFFF,
        "output_type": "cupy",
    }


def arguments(rows: int, k: int, seed: int, n_init: int) -> dict[str, Any]:
    """The keyword arguments of `cuml.cluster.KMeans` for rows of unit spread.

    `tol` is an absolute squared shift of the centres there, so it means something only on rows of known size. Large
    problems get k-means||, which draws the centres in a few passes.
    """
    return {
        "n_clusters": k,
        "init": "k-means++" if rows <= SMALL_ROWS else "scalable-k-means++",
        "n_init": n_init,
        "max_iter": 300,
        "tol": 1e-8,
        "random_state": seed & 0x7FFFFFFF,
        "output_type": "cupy",
    }


def to_unit_spread(rows: Tensor) -> tuple[Tensor, float]:
    """(contiguous float32 [P, D], factor): the rows times a power of two such that their spread is between 1 and 2.

    With a total cost below 1, as attention rows have it, k-means|| would make no round and start from random rows,
    without a word. The power of two rounds nothing.
    """
    rows = rows.float().contiguous()
    most = rows.abs().max()
    if not bool(most > 0):
        return rows, 1.0
    start = torch.frexp(most).exponent  # first to a size whose square is a float
    spread = torch.ldexp(rows, -start).std(0, correction=0).square().mean().sqrt()
    exponent = int(start) + (int(torch.frexp(spread).exponent) - 1 if bool(spread > 0) else 0)
    return torch.ldexp(rows, torch.tensor(-exponent, device=rows.device)), 2.0**-exponent


def as_array(tensor: Tensor, library: Any) -> Any:
    """The tensor as an array of `library` (cupy) over the same memory, by DLPack: nothing is copied."""
    return library.from_dlpack(tensor.detach())


def as_tensor(array: Any) -> Tensor:
    """The array as a tensor over the same memory, by DLPack: nothing is copied."""
    return torch.utils.dlpack.from_dlpack(array)


def _make_pool(rmm: Any, device: int) -> None:
    """cuML's and cupy's allocations come from a pool from now on, unless somebody has set one up already."""
    if isinstance(rmm.mr.get_per_device_resource(device), rmm.mr.CudaMemoryResource):
        pool = rmm.mr.PoolMemoryResource(rmm.mr.CudaMemoryResource(), initial_pool_size=FIRST_POOL_BYTES)
        rmm.mr.set_per_device_resource(device, pool)

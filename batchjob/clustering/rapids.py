"""k-means by cuML, which suits large problems. No other file imports RAPIDS or cupy."""

import functools
import importlib
import os
from typing import Any

import torch
import torch.distributed
import torch.utils.dlpack
from torch import Tensor

from batchjob.clustering.base import Clusters, solve_one_by_one
from batchjob.clustering.batched import AUTO_STARTS
from batchjob.errors import UserError

FIRST_POOL_BYTES = 256 << 20
SMALL_ROWS = 1 << 16  # up to so many rows, drawing one centre after the other is cheap


class CumlEngine:
    """k-means by `cuml.cluster.KMeans` on a GPU, one problem after the other.

    Equal seeds do not guarantee equal labels there (rapidsai/cuml#5731).
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
        """Clusters each problem; only its inertia leaves the device.

        Parameters
        ----------
        x, k, seeds, n_init, mask, checks
            As in `Engine.kmeans`; `x` is on this engine's device, and it always checks.

        Returns
        -------
        The clusters; `settled` is False.
        """
        with torch.cuda.device(self._device):
            solve = functools.partial(self._solve, n_init=n_init or AUTO_STARTS)
            return solve_one_by_one(x, k, seeds, mask, solve=solve)

    def module(self, name: str) -> Any:
        """The module `cuml` or `cupy`, imported once, with the memory pool in place."""
        return {"cuml": self._cuml, "cupy": self._cupy}[name]

    def _solve(self, rows: Tensor, k: int, seed: int, n_init: int) -> tuple[Tensor, float]:
        scaled, factor = _to_unit_spread(rows)
        if len(rows) <= SMALL_ROWS:  # of fewer distinct rows than k, cuML would make k clusters
            k = min(k, len(torch.unique(scaled, dim=0)))
        torch.cuda.current_stream().synchronize()  # cuML works on a stream of its own
        fit = self._cuml.cluster.KMeans(**_arguments(len(rows), k, seed, n_init)).fit(_as_array(scaled, self._cupy))
        self._cupy.cuda.runtime.deviceSynchronize()
        return _as_tensor(fit.labels_).to(torch.uint8), float(fit.inertia_) / factor**2


class CumlLloyd:
    """Lloyd's iteration over the rows of a whole dataset by cuML, ten iterations a call.

    A process that was started alone uses `cuml.cluster.KMeans`. Processes that a launcher started, also a single one,
    use `KMeansMG`, which reduces its sums over NCCL: through RAFT's bindings and without Dask, as spark-rapids-ml and
    NeMo Curator do it.
    """

    name = "cuml"
    steps = 10

    def __init__(self, device: torch.device, *, rank: int, world: int) -> None:
        self._engine = CumlEngine(device)
        self._handle: Any = None  # RAFT's, which holds the communicator; None for a process that is alone
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
        """Does up to ten iterations, over the rows of all processes.

        Parameters
        ----------
        x
            float32 [n, D]: this process's rows, on its GPU; they are not copied.
        centroids
            float32 [K, D].
        k, seed
            K and the problem's seed.
        tolerance
            The summed squared shift of the centroids up to which they count as standing still.

        Returns
        -------
        (centroids float32 [K, D], number of iterations done).
        """
        model, cupy = self._engine.module("cuml"), self._engine.module("cupy")
        start = _as_array(centroids.contiguous(), cupy)
        given = _refining(k, tolerance, seed, self.steps) | {"init": start}
        torch.cuda.current_stream().synchronize()  # cuML works on a stream of its own
        if self._handle is None:
            fit = model.cluster.KMeans(**given)
        else:
            fit = importlib.import_module("cuml.cluster.kmeans_mg").KMeansMG(handle=self._handle, **given)
        fit.fit(_as_array(x, cupy))
        cupy.cuda.runtime.deviceSynchronize()
        return _as_tensor(cupy.asarray(fit.cluster_centers_)).to(centroids), int(fit.n_iter_)


def _refining(k: int, tolerance: float, seed: int, steps: int) -> dict[str, Any]:
    """The keyword arguments of up to `steps` iterations from given centroids; cuML's `tol` is absolute there."""
    return {
        "n_clusters": k,
        "n_init": 1,
        "max_iter": steps,
        "tol": max(tolerance, 1e-30),  # 0 is refused
        "random_state": seed & 0x7FFFFFFF,
        "output_type": "cupy",
    }


def _arguments(rows: int, k: int, seed: int, n_init: int) -> dict[str, Any]:
    """The keyword arguments of `cuml.cluster.KMeans` for so many rows of unit spread.

    cuML's `tol` is an absolute squared shift of the centres, so it has a meaning only for rows of known spread. Large
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


def _to_unit_spread(rows: Tensor) -> tuple[Tensor, float]:
    """(contiguous float32 [P, D], factor): multiplies rows by a power of two that brings their spread into [1, 2).

    The inertia of attention rows is below 1, for which k-means|| would do no round and start from random rows without a
    warning. The power of two rounds nothing.
    """
    rows = rows.float().contiguous()
    most = rows.abs().max()
    if not bool(most > 0):
        return rows, 1.0
    start = torch.frexp(most).exponent  # first to a size whose square is a float
    spread = torch.ldexp(rows, -start).std(0, correction=0).square().mean().sqrt()
    exponent = int(start) + (int(torch.frexp(spread).exponent) - 1 if bool(spread > 0) else 0)
    return torch.ldexp(rows, torch.tensor(-exponent, device=rows.device)), 2.0**-exponent


def _as_array(tensor: Tensor, library: Any) -> Any:
    """The tensor as an array of `library` (cupy) over the same memory, by DLPack."""
    return library.from_dlpack(tensor.detach())


def _as_tensor(array: Any) -> Tensor:
    """The array as a tensor over the same memory, by DLPack."""
    return torch.utils.dlpack.from_dlpack(array)


def _make_pool(rmm: Any, device: int) -> None:
    """Makes cuML and cupy take their memory from a pool from now on, unless one is set up already."""
    if isinstance(rmm.mr.get_per_device_resource(device), rmm.mr.CudaMemoryResource):
        pool = rmm.mr.PoolMemoryResource(rmm.mr.CudaMemoryResource(), initial_pool_size=FIRST_POOL_BYTES)
        rmm.mr.set_per_device_resource(device, pool)

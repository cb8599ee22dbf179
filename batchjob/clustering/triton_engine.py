"""k-means by Triton kernels, one program for each problem, behind the engines' protocol: the default on a GPU."""

import contextlib
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from batchjob.clustering import triton_gram, triton_search
from batchjob.clustering.base import Clusters, raise_for_nan
from batchjob.clustering.lloyd import MAX_STEPS
from batchjob.clustering.search import check_shapes
from batchjob.config import MAX_K

MOST_ROWS = 2048  # of a problem; larger problems go to the torch engine
BLOCK = 64  # rows and columns of a block of a Gram matrix
COLUMNS = 64  # starts × clusters of one product
EXACT_BLOCK = 16  # in place of both, in float64
AUTO_STARTS, AUTO_ROUNDS = 8, 16  # for `--n-init auto`: starts, and exchanges of a mean that each start tries
PROGRAMS_A_PROCESSOR = 4  # at most
CACHE_SHARE = 0.75  # of the second-level cache, for the Gram matrices of the programs that run side by side
EXACT_PROGRAMS = 32  # at most, in float64, which few problems need
SCRATCH_BYTES = 1 << 30  # at most, for the sums of all programs


@dataclass(frozen=True, slots=True)
class _Shape:
    """What one variant of the search kernel is compiled for."""

    starts: int  # R, side by side
    rows: int  # PB, a power of two that holds P
    warps: int


def _shape_of(p: int, n_init: int) -> _Shape:
    """The variant for problems of `p` rows and so many starts. There are eight variants, of which a run uses one."""
    rows = next(size for size in (64, 256, 512, 1024, MOST_ROWS) if p <= size)
    starts = min(8 if n_init > 4 else 4, max(1, 4096 // rows))
    return _Shape(starts, rows, 4 if rows == 64 else 8 if rows <= 512 else 16)


class TritonEngine:
    """k-means by Triton kernels, one program for each problem. It waits for the device only for `checks`."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        card = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        self._processors = 1 if card is None else card.multi_processor_count
        self._cache_bytes = 0 if card is None else card.L2_cache_size

    def kmeans(
        self, x: Tensor, k: Tensor, seeds: Tensor, *, n_init: int, mask: Tensor | None = None, checks: bool = True
    ) -> Clusters:
        """Clusters many problems at once.

        Parameters
        ----------
        x, k, seeds, n_init, mask, checks
            As in `Engine.kmeans`.

        Returns
        -------
        The clusters.

        Raises
        ------
        NotFiniteError, ValueError
            As `Engine.kmeans`; also ValueError for more than `MOST_ROWS` rows a problem.
        """
        check_shapes(x, k, seeds, mask)
        n, p, _ = x.shape
        if p > MOST_ROWS:
            raise ValueError(f"{p} rows a problem; the triton engine takes up to {MOST_ROWS}: use batched")
        most_k = min(p, MAX_K) if k.is_cuda or not n else min(p, int(k.max()))
        found = Clusters(
            labels=torch.empty(n, p, dtype=torch.uint8, device=x.device),
            inertia=torch.empty(n, device=x.device),
            k=torch.empty(n, dtype=torch.uint8, device=x.device),
            settled=torch.empty(n, dtype=torch.bool, device=x.device),
        )
        if n:
            k = k.to(torch.int32).to(x.device, non_blocking=True)
            seeds = seeds.to(x.device, non_blocking=True)
            mask = None if mask is None else mask.contiguous().view(torch.uint8)
            with (
                torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
            ):  # Triton launches on the current device
                self._solve(x.contiguous(), mask, k, seeds, most_k, n_init, found)
        if checks:
            raise_for_nan(found.inertia)
        return found

    def _programs(self, p: int) -> int:
        """How many problems of `p` rows are worked on at a time: as many as the cache holds the Gram matrices of.

        They are at least one for each processor, since idle processors cost more time than the cache saves.
        """
        fit = int(CACHE_SHARE * self._cache_bytes / (4 * p * p))
        return max(self._processors, min(PROGRAMS_A_PROCESSOR * self._processors, fit))

    def _solve(
        self, x: Tensor, mask: Tensor | None, k: Tensor, seeds: Tensor, most_k: int, n_init: int, found: Clusters
    ) -> None:
        """Fills `found`: all problems in float32, then in float64 those whose rows float32 can't tell apart."""
        n, p, d = x.shape
        factor = torch.empty(n, device=x.device)
        gram = torch.empty(n, p, p, device=x.device)
        doubtful = torch.empty(n, dtype=torch.uint8, device=x.device)
        shape = _shape_of(p, n_init or AUTO_STARTS)
        problem = {"x_ptr": x, "mask_ptr": x if mask is None else mask, "factor_ptr": factor, "p": p, "d": d}
        search = problem | {
            "k_ptr": k,
            "seeds_ptr": seeds,
            "labels_ptr": found.labels,
            "inertia_ptr": found.inertia,
            "found_ptr": found.k,
            "settled_ptr": found.settled.view(torch.uint8),
            "doubtful_ptr": doubtful,
            "problems": n,
            "most_k": most_k,
            "n_init": n_init or AUTO_STARTS,
            "rounds": 0 if n_init else AUTO_ROUNDS,
            "max_steps": MAX_STEPS,
            "R": shape.starts,
            "PB": shape.rows,
        }
        for dtype in (torch.float32, torch.float64):
            is_exact = dtype == torch.float64
            mean = torch.empty(n, d, dtype=dtype, device=x.device)
            number = tl.float64 if is_exact else tl.float32
            triton_gram.measure_kernel[(n,)](
                **problem, mean_ptr=mean, BP=64, BD=64, HAS_MASK=mask is not None, NUMBER=number, num_warps=4
            )
            if not is_exact:
                blocks = -(-p // BLOCK)
                triton_gram.gram_kernel[(blocks, blocks, n)](
                    **problem, mean_ptr=mean, gram_ptr=gram, BLOCK=BLOCK, BD=32, HAS_MASK=mask is not None, num_warps=4
                )
            each = dtype.itemsize * most_k * shape.starts * (p + 2) + (8 * p * p if is_exact else 0)
            programs = max(1, min(n, EXACT_PROGRAMS if is_exact else self._programs(p), SCRATCH_BYTES // each))
            triton_search.search_kernel[(programs,)](
                **search,
                mean_ptr=mean,
                gram_ptr=torch.empty(programs, p, p, dtype=dtype, device=x.device) if is_exact else gram,
                numbers_ptr=torch.empty(programs, each // dtype.itemsize, dtype=dtype, device=x.device),
                starts_ptr=torch.empty(programs, shape.starts, p, dtype=torch.uint8, device=x.device),
                noise=1e-14 if is_exact else 1e-5,
                C=(EXACT_BLOCK if is_exact else COLUMNS) // shape.starts,
                B=EXACT_BLOCK if is_exact else BLOCK,
                HAS_MASK=mask is not None,
                NUMBER=number,
                EXACT=is_exact,
                num_warps=shape.warps,
                enable_fp_fusion=False,  # as torch rounds
            )

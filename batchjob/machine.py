"""What this process may use of its machine: a device, cores, memory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from batchjob.errors import UserError, WorkLeft

if TYPE_CHECKING:
    import torch

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_MOST_WORKERS = 16


def choose_device(asked: str) -> "torch.device":
    """The device that `--device` means; each process of a node gets its own GPU.

    Raises UserError without a GPU, WorkLeft in a Slurm job: there it is the node that is wrong, and another may do.
    """
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        if node := os.environ.get("SLURMD_NODENAME"):
            raise WorkLeft(f"--device cuda: torch sees no GPU on {node}; check nvidia-smi and the driver there")
        raise UserError("--device cuda: torch sees no GPU; check nvidia-smi and the driver, or use --device cpu")
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    return torch.device("cuda", local % torch.cuda.device_count())


def visible_gpus(asked: str) -> int:
    """How many GPUs this process may use; 0 with `--device cpu`."""
    import torch

    return 0 if asked == "cpu" else torch.cuda.device_count()


def usable_cores() -> int:
    """Cores that this process may run on: a scheduler or a container may grant fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(asked: str, environment: Mapping[str, str] = os.environ, *, bytes_each: int = 0) -> int:
    """`--workers`, or for auto all cores of this process but one, shared with the node's other ranks, at most 16.

    Where a worker may need `bytes_each`, no more than fit a quarter of the machine's memory.
    """
    if asked != "auto":
        return int(asked)
    ranks = int(environment.get("LOCAL_WORLD_SIZE") or 1)  # torchrun's; under srun the cores are the task's own
    fitting = total_memory_bytes() // (4 * ranks * bytes_each) if bytes_each else _MOST_WORKERS
    return max(1, min(usable_cores() // ranks - 1, _MOST_WORKERS, fitting))


def total_memory_bytes() -> int:
    """The machine's memory, or the limit of this process's cgroup if that is lower.

    It is all memory and not what is free now, so that the same machine always makes the same choices.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        text = Path(path).read_text().strip() if os.path.exists(path) else ""
        if text.isdigit():
            memory = min(memory, int(text))
    return memory

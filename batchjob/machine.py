"""What this process may use of its machine: a device, cores and memory."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from batchjob.errors import UserError, WorkLeft

if TYPE_CHECKING:
    import torch

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_MOST_WORKERS = 16


def choose_device(asked: str, environment: Mapping[str, str] = os.environ) -> "torch.device":
    """Chooses the device that `--device` stands for, and makes it ready.

    Each process of a node gets a GPU of its own. It becomes torch's current device, and multiplies float32 as float32
    (TF32 is switched off).

    Parameters
    ----------
    asked
        `auto`, `cuda` or `cpu`.
    environment
        The environment variables: torchrun and Slurm say in them which process of the node this is.

    Returns
    -------
    The device.

    Raises
    ------
    UserError
        `cuda` was asked for on a machine without a GPU, or with one that torch has no kernels for.
    WorkLeft
        The same inside a Slurm job, or `auto` found no GPU in a job that was given GPUs: the node is at fault, and the
        work may succeed on another one.
    """
    import torch

    node = environment.get("SLURMD_NODENAME")
    if asked == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if asked == "cuda":
            raise_for_no_gpu("--device cuda", environment)
        if given := _gpus_given(environment):
            raise WorkLeft(
                f"this job was given GPUs ({given}) and torch sees none on {node}; check nvidia-smi and the driver "
                "there, or say --device cpu"
            )
        return torch.device("cpu")
    local = int(environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or 0)
    device = torch.device("cuda", local % torch.cuda.device_count())
    if lack := missing_kernels(torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()):
        problem = f"{torch.cuda.get_device_name(device)}{f' of {node}' if node else ''} {lack}"
        raise WorkLeft(problem) if node else UserError(problem)
    torch.cuda.set_device(device)  # Triton and NCCL use the current one
    _use_full_float32()
    return device


def raise_for_no_gpu(asked: str, environment: Mapping[str, str] = os.environ) -> NoReturn:
    """Raises the error for GPUs that were asked for on a machine where torch sees none.

    Parameters
    ----------
    asked
        The option and its value: `--device cuda`, or `--gpus 2`.
    environment
        The environment variables: Slurm says in them which node this is, and which GPUs the job has.

    Raises
    ------
    WorkLeft
        On a node of Slurm for `--device cuda`, and for `--gpus` where the job was given GPUs: the node is at fault, and
        the work may succeed on another one.
    UserError
        Anywhere else.
    """
    node = environment.get("SLURMD_NODENAME")
    if node and (asked == "--device cuda" or _gpus_given(environment)):
        raise WorkLeft(f"{asked}: torch sees no GPU on {node}; check nvidia-smi and the driver there")
    more = ", with which --gpus is the number of processes" if asked.startswith("--gpus") else ""
    raise UserError(f"{asked}: torch sees no GPU; check nvidia-smi and the driver, or use --device cpu{more}")


def _gpus_given(environment: Mapping[str, str]) -> str:
    """`NAME=VALUE` of the variable by which Slurm says that this step or job has GPUs; empty where it has none."""
    names = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
    return next((f"{name}={environment[name]}" for name in names if environment.get(name)), "")


def missing_kernels(capability: tuple[int, int], known: Sequence[str]) -> str:
    """Says what is wrong where torch was not built for a GPU.

    Parameters
    ----------
    capability
        The GPU's compute capability (major, minor).
    known
        The architectures that torch was built for: `sm_86` runs on 8.6 and later 8.x, and `compute_90` on 9.0 and all
        later ones.

    Returns
    -------
    The end of a sentence that begins with the GPU's name; empty where torch has kernels for it.
    """
    major, minor = capability
    found = [
        (kind, int(number[:-1]), int(number[-1])) for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(known))
    ]
    fits = [
        (a, b) for kind, a, b in found if (a == major and b <= minor) or (kind == "compute" and (a, b) <= capability)
    ]
    if fits or not found:
        return ""
    oldest = "{}.{}".format(*min((a, b) for _, a, b in found))
    return (
        f"has compute capability {major}.{minor}, and the installed torch has kernels from {oldest} on; install a "
        "torch that was built for it (older GPUs: the wheels for CUDA 12.6), or use --device cpu"
    )


def _use_full_float32() -> None:
    """Switches off TF32, which rounds the factors of float32 products to 11 bits; some containers switch it on."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def visible_gpus(asked: str) -> int:
    """How many GPUs this process may use under `--device`; 0 with `cpu`."""
    if asked == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def usable_cores() -> int:
    """How many cores this process may run on: a scheduler or a container may grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(asked: str, environment: Mapping[str, str] = os.environ, *, bytes_each: int = 0) -> int:
    """Chooses the number of decoding workers that `--workers` stands for.

    Parameters
    ----------
    asked
        A number, or `auto`: this process's share of the node's cores less one, at most 16.
    environment
        The environment variables: torchrun says in them how many processes share the node's cores.
    bytes_each
        Memory that a worker may need. `auto` takes no more workers than fit this process's share of a quarter of the
        machine's memory. 0: memory sets no limit.

    Returns
    -------
    The number of workers; for `auto` at least 1.
    """
    if asked != "auto":
        return int(asked)
    ranks = int(environment.get("LOCAL_WORLD_SIZE") or 1)  # torchrun's; under srun the cores are the task's own
    fitting = total_memory_bytes() // (4 * ranks * bytes_each) if bytes_each else _MOST_WORKERS
    return max(1, min(usable_cores() // ranks - 1, _MOST_WORKERS, fitting))


def total_memory_bytes() -> int:
    """The machine's memory in bytes, or the limit of this process's cgroup if that is lower.

    It is all memory and not what is free now, so that the same machine always makes the same choices.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        text = Path(path).read_text().strip() if os.path.exists(path) else ""
        if text.isdigit():
            memory = min(memory, int(text))
    return memory

"""The processes that fit together: sums over all of them, and rows gathered from all of them."""

import datetime
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from batchjob.errors import UserError, WorkLeft

# The fastest process waits this long for the slowest to read its images. The launcher notices a process that dies.
TIMEOUT = datetime.timedelta(hours=24)

_LOST = re.compile(r"peer|remote process|connection|socket|broken pipe|timed? ?out|aborted", re.I)
_MISUSED = re.compile(r"duplicate gpu|invalid usage|invalid argument", re.I)


@dataclass(frozen=True, slots=True)
class Group:
    """`world` processes, of which this one has the number `rank`. A process that is alone sends nothing."""

    rank: int = 0
    world: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """Replaces `values` by their sum over all processes, and returns them. The dtype stays."""
        if self.world > 1:
            with _told_of_losses():
                dist.all_reduce(values)
        return values

    def largest(self, value: float) -> float:
        """The largest value of all processes."""
        return max(self.all(value))

    def all(self, value: float) -> list[float]:
        """The values of all processes, in order of rank."""
        values = torch.zeros(self.world, dtype=torch.float64, device=self._device())
        values[self.rank] = value
        return [float(v) for v in self.sum(values).tolist()]

    def gather(self, rows: Tensor) -> Tensor:
        """[N, ...]: the rows [n, ...] of all processes, in order of rank; n may differ, and N is the sum of all n."""
        if self.world == 1:
            return rows
        counts = [int(n) for n in self.all(len(rows))]
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        with _told_of_losses():
            dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    def from_first(self, values: Tensor) -> Tensor:
        """Replaces `values` in every process by those of the first, and returns them."""
        if self.world > 1:
            with _told_of_losses():
                dist.broadcast(values, 0)
        return values

    def barrier(self) -> None:
        """Waits until all processes have called this."""
        self.all(0.0)

    def _device(self) -> torch.device:
        if self.world > 1 and dist.get_backend() == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


@contextmanager
def _told_of_losses() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch's own errors of a lost connection are of this kind
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        named = next((line for line in lines if _LOST.search(line) or _MISUSED.search(line)), lines[0])[:200]
        if _MISUSED.search(str(error)):
            raise UserError(f"NCCL refuses these processes ({named}); give each its own GPU, with --gpus") from error
        if not _LOST.search(str(error)):
            raise
        raise WorkLeft(f"another process of this fit is gone ({named}); go on with the same command") from error


ALONE = Group()


@contextmanager
def join(rank: int, world: int, device: torch.device) -> Iterator[Group]:
    """Joins this process to the others that fit, until the block ends: over NCCL for GPUs, else over gloo.

    The processes meet at MASTER_ADDR:MASTER_PORT, which torchrun sets, or inside srun at the job's first node.

    Parameters
    ----------
    rank, world
        The number of this process, and how many there are. A single process joins nothing.
    device
        Where this process computes.

    Yields
    ------
    The group of the processes.

    Raises
    ------
    UserError
        Nothing says where the processes meet.
    """
    if world == 1:
        yield ALONE
        return
    address, port = _meeting_point(os.environ)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL would put every process of a node on the first GPU
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"tcp://{address}:{port}", rank=rank, world_size=world, timeout=TIMEOUT
    )
    try:
        yield Group(rank, world)
    finally:
        dist.destroy_process_group()


def _meeting_point(environ: Mapping[str, str]) -> tuple[str, int]:
    """(address, port) where the processes of this job meet. Raises UserError where no variable says so."""
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        return environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    if int(environ.get("SLURM_ARRAY_TASK_COUNT", "1")) > 1:
        raise UserError(
            "fit is one job whose processes talk to each other, found a job array; submit it without --array"
        )
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError("several processes fit together, found no MASTER_ADDR; start them with torchrun or srun")
    if "[" not in nodes and "," not in nodes:
        first = nodes
    else:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        first = listed.stdout.split()[0]
    # each step of a job, and each job that shares a node, gets a port of its own
    number = int(environ.get("SLURM_JOB_ID", "0")) * 31 + int(environ.get("SLURM_STEP_ID", "0"))
    return first, 20000 + number % 12000

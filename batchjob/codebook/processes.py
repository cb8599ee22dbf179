"""The processes that fit together: sums and gathered rows over all of them, or over the one that is alone."""

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

# the fastest process waits here for the slowest to finish reading its images; whoever dies is noticed by the launcher
TIMEOUT = datetime.timedelta(hours=24)

_LOST = re.compile(r"peer|remote process|connection|socket|broken pipe|timed? ?out|aborted", re.I)
_MISUSED = re.compile(r"duplicate gpu|invalid usage|invalid argument", re.I)


@dataclass(frozen=True, slots=True)
class Group:
    """`world` processes of which this one is `rank`; alone, nothing is sent anywhere."""

    rank: int = 0
    world: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in `values` itself; float64 comes back as float64."""
        if self.world > 1:
            with _told_of_losses():
                dist.all_reduce(values)
        return values

    def largest(self, value: float) -> float:
        """The largest of all processes' values."""
        return max(self.all(value))

    def all(self, value: float) -> list[float]:
        """Every process's value, in order of rank."""
        values = torch.zeros(self.world, dtype=torch.float64, device=self._device())
        values[self.rank] = value
        return [float(v) for v in self.sum(values).tolist()]

    def gather(self, rows: Tensor) -> Tensor:
        """[sum of n, ...]: all processes' rows [n, ...] below each other in order of rank, the same everywhere."""
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
        """The values of the first process, in every process and in `values` itself."""
        if self.world > 1:
            with _told_of_losses():
                dist.broadcast(values, 0)
        return values

    def barrier(self) -> None:
        """Comes back when all processes are here."""
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
    """The group of this job's processes: NCCL where they compute on GPUs, else gloo; left when the block ends.

    They meet at MASTER_ADDR:MASTER_PORT (torchrun sets both); inside srun at the job's first node.
    """
    if world == 1:
        yield ALONE
        return
    address, port = meeting_point(os.environ)
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


def meeting_point(environ: Mapping[str, str]) -> tuple[str, int]:
    """(address, port) where the processes of this job meet. Raises UserError where nothing says so."""
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
    # steps of one job, and jobs that share a node, each get their own port
    number = int(environ.get("SLURM_JOB_ID", "0")) * 31 + int(environ.get("SLURM_STEP_ID", "0"))
    return first, 20000 + number % 12000

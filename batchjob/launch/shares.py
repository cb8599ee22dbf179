"""Which partitions this process labels: its share of a list of missing partitions, the same for all of an attempt.

An attempt is the processes that one command, job or array started together. They do not talk to each other; they agree
by a file that the first of them writes.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from batchjob.errors import UserError, WorkLeft, counted
from batchjob.files import new_scratch, seal_file, sync_folder, unseal_file, work_folder
from batchjob.store import lifecycle as store
from batchjob.store.writer import Writer

ATTEMPT = "BATCHJOB_ATTEMPT"  # set by our own launcher for its processes


@dataclass(frozen=True, slots=True)
class Share:
    """Every `count`-th missing partition, from the `index`-th on, counted from 0."""

    index: int = 0
    count: int = 1
    source: str = "one process"  # which of the launcher's variables said so, in words

    def of(self, partitions: Sequence[int]) -> list[int]:
        """Returns this share of the partitions. Each partition is in exactly one of the `count` shares."""
        return list(partitions[self.index :: self.count])


def share_of(environment: Mapping[str, str], *, in_batch_body: bool = False) -> Share:
    """Finds which share of the work is this process's.

    RANK and WORLD_SIZE, which torchrun sets, come first. SLURM_PROCID and SLURM_NTASKS count inside an srun step only:
    the body of a batch script has them too, but runs once. Without either, the process is alone. In a job array each
    task has that many shares.

    Parameters
    ----------
    environment
        The process's environment.
    in_batch_body
        Whether this is the body of a batch script, see the function of this name.

    Returns
    -------
    The share.

    Raises
    ------
    UserError
        The variables are not numbers, or contradict each other.
    """
    rank, world, source = 0, 1, "one process"
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world, source = _number(environment, "RANK"), _number(environment, "WORLD_SIZE"), "RANK of WORLD_SIZE"
    elif _in_step(environment) and not in_batch_body:
        rank, world = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_NTASKS")
        source = "SLURM_PROCID of SLURM_NTASKS"
    if not 0 <= rank < world:
        raise UserError(f"{source}: {rank} of {world} is not a rank; check the launcher")
    if "SLURM_ARRAY_TASK_ID" in environment:
        task, tasks = _array_task(environment)
        rank, world, source = task * world + rank, tasks * world, f"array task {task} of {tasks}, {source}"
    return Share(rank, world, source)


def is_launched(environment: Mapping[str, str], *, in_batch_body: bool = False) -> bool:
    """Finds out whether torchrun, srun or our own launcher has started one process for each device already.

    A step of one task, such as the shell of `srun --pty bash`, has all of its GPUs to itself: nothing was started.

    Parameters
    ----------
    environment, in_batch_body
        As in `share_of`.

    Returns
    -------
    Whether it has.
    """
    is_one_of_many = _in_step(environment) and environment.get("SLURM_NTASKS") != "1"
    return "RANK" in environment or (is_one_of_many and not in_batch_body)


def in_batch_body() -> bool:
    """Finds out whether this process descends from a batch script with no srun between the two.

    The variables of a step then do not count: sbatch, called inside a step, hands that step's variables to the new job.
    """
    process = os.getpid()
    try:
        while process > 1:
            command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            if command.startswith("slurmstepd: ["):
                return ".batch]" in command
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return False
    return False


def attempt_of(environment: Mapping[str, str]) -> str:
    """Names the attempt: all of its processes find the same name, and no other attempt has it.

    The name is empty for a process that is alone. A requeued job is a new attempt, with a new list. The tasks of an
    array are one attempt whenever they run, so that a task which is requeued alone goes on with the list of the others.
    """
    get = environment.get
    if "SLURM_ARRAY_TASK_ID" in environment:
        name = f"array-{get('SLURM_ARRAY_JOB_ID', '0')}"
    elif ATTEMPT in environment:
        name = environment[ATTEMPT]
    elif "RANK" in environment and get("LOCAL_WORLD_SIZE") == get("WORLD_SIZE"):
        name = f"local-{socket.gethostname()}-{os.getppid()}-{_start_time(os.getppid())}"
    elif "SLURM_JOB_ID" in environment and ("RANK" in environment or _in_step(environment)):
        step = get("SLURM_STEP_ID", "batch")
        name = f"slurm-{environment['SLURM_JOB_ID']}-{get('SLURM_RESTART_COUNT', '0')}-{step}"
    elif "RANK" in environment:
        restart = get("TORCHELASTIC_RESTART_COUNT", "0")
        name = f"{get('TORCHELASTIC_RUN_ID', '')}-{get('MASTER_ADDR', '')}-{get('MASTER_PORT', '')}-{restart}"
    else:
        return ""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)


def agreed_partitions(run: Path, attempt: str, missing: Callable[[], list[int]]) -> list[int]:
    """Returns the attempt's list of partitions to label. The first process that asks writes it, the others read it.

    All of a list may be labelled and something be missing all the same: damage that was found later, or an attempt's
    name that was used again. The attempt then gets another list.

    Parameters
    ----------
    run
        The folder of the run.
    attempt
        The name that all processes of an attempt share; empty for a process that is alone.
    missing
        Finds the partitions that are missing; called only where a list has to be written, since it takes long.

    Returns
    -------
    Numbers of partitions, the same in every process of the attempt.
    """
    if not attempt:
        return missing()
    folder = work_folder(run, "attempts")
    number, partitions = 0, _read_list(folder / f"{attempt}.0.json")
    while partitions is not None and all(store.is_done(run, partition) for partition in partitions):
        number += 1
        further = _read_list(folder / f"{attempt}.{number}.json")
        if further is None and not (left := missing()):
            return partitions
        if further is None:
            return _publish_list(run, folder / f"{attempt}.{number}.json", left)
        partitions = further
    return partitions if partitions is not None else _publish_list(run, folder / f"{attempt}.0.json", missing())


def claimed(writer: Writer, partitions: Sequence[int], should_stop: Callable[[], bool]) -> Iterator[int]:
    """Yields the partitions that are still missing, each claimed for this process.

    Waits at the end for partitions that another job works on, and takes them over where that job's process dies.

    Parameters
    ----------
    writer
        Claims the partitions.
    partitions
        The numbers of this process's share.
    should_stop
        Whether somebody wants this process to end; asked while it waits.

    Yields
    ------
    The number of a partition.

    Raises
    ------
    WorkLeft
        The process was told to stop while it waited.
    """
    left, told = list(partitions), False
    while left:
        busy = []
        for partition in left:
            if writer.claim(partition):
                yield partition
            elif not writer.is_done(partition):
                busy.append(partition)
        left = busy
        if not busy:
            return
        if not told:
            names = ", ".join(map(str, busy[:10]))
            print(f"waiting for another job that labels partitions {names} of this RUN", file=sys.stderr, flush=True)
            told = True
        for _ in range(10):
            if should_stop():
                raise WorkLeft(f"told to stop while another job labels partitions {busy}; run the same command again")
            time.sleep(0.1)


def _in_step(environment: Mapping[str, str]) -> bool:
    # a step's own count of tasks: an sbatch from inside another step leaves that one's in the environment
    return (
        "SLURM_STEP_ID" in environment
        and "SLURM_PROCID" in environment
        and environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS")) == environment.get("SLURM_NTASKS")
    )


def _array_task(environment: Mapping[str, str]) -> tuple[int, int]:
    task, low = _number(environment, "SLURM_ARRAY_TASK_ID"), _number(environment, "SLURM_ARRAY_TASK_MIN")
    high, step = _number(environment, "SLURM_ARRAY_TASK_MAX"), _number(environment, "SLURM_ARRAY_TASK_STEP")
    tasks = _number(environment, "SLURM_ARRAY_TASK_COUNT")
    if (high - low) // step + 1 != tasks:
        raise UserError(
            f"the job array has {counted(tasks, 'task')} from {low} to {high} in no regular step; "
            f"give --array=0-{tasks - 1}"
        )
    return (task - low) // step, tasks


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{name} is {environment.get(name, 'not set')!r}, a number is needed; check the launcher"
        ) from error


def _start_time(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "0"


def _read_list(path: Path) -> list[int] | None:
    body = unseal_file(path)
    return None if body is None else [int(partition) for partition in body["partitions"]]


def _publish_list(run: Path, path: Path, partitions: list[int]) -> list[int]:
    scratch = new_scratch(run)
    try:
        seal_file(scratch / path.name, {"partitions": partitions}, scratch)
        try:
            os.link(scratch / path.name, path)  # fails if another process was first, and never shows half a list
            sync_folder(path.parent)
        except FileExistsError:
            found = _read_list(path)
            if found is None:  # damaged: the next process that asks writes another
                path.unlink(missing_ok=True)
            partitions = partitions if found is None else found
        (scratch / path.name).unlink()
    finally:
        scratch.rmdir()
    return partitions

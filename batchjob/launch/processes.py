"""One process a device on one machine: starts them, hands on the signal to stop, and makes one end of theirs."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from batchjob.config import Runtime, to_json
from batchjob.errors import UserError, WorkLeft, counted
from batchjob.launch.shares import ATTEMPT
from batchjob.launch.signals import PARENT, WORK_LEFT, Stop
from batchjob.machine import raise_for_no_gpu

_POLL_S = 0.2
_GRACE_S = 10.0


def devices(runtime: Runtime, visible: int) -> list[int]:
    """Chooses the devices to use, one process each.

    Parameters
    ----------
    runtime
        The runtime options. With `--device cpu`, `--gpus N` stands for N processes, and `--gpus all` for one.
    visible
        How many GPUs this machine shows.

    Returns
    -------
    Numbers of GPUs as torch counts the visible ones; on a CPU, numbers from 0 on.

    Raises
    ------
    UserError
        `--gpus` is not a number or a list, or GPUs are asked for that are not there.
    WorkLeft
        The same for a node of Slurm that should have GPUs and shows none.
    """
    on_cpu = runtime.device == "cpu"
    if runtime.gpus == "all":
        if not visible and runtime.device == "cuda":
            raise_for_no_gpu("--device cuda")
        return list(range(visible)) if visible and not on_cpu else [0]
    try:
        asked = [int(number) for number in runtime.gpus.split(",") if number.strip()]
    except ValueError as error:
        raise UserError(f"--gpus {runtime.gpus!r} is not a number or a list; give 2, or 0,2, or all") from error
    if "," not in runtime.gpus:
        asked = list(range(asked[0])) if asked else []
    if asked and not visible and not on_cpu:
        raise_for_no_gpu(f"--gpus {runtime.gpus}")
    wrong = [number for number in asked if number < 0 or (not on_cpu and number >= visible)]
    if not asked or wrong or len(set(asked)) != len(asked):
        raise UserError(
            f"--gpus {runtime.gpus}: this machine shows {counted(visible, 'GPU')}; "
            "give a number, or a list of 0-based ones"
        )
    return asked


def run_on(
    numbers: Sequence[int],
    verb: Literal["fit", "label"],
    run: Path,
    runtime: Runtime,
    *,
    partitions: Sequence[int] | None = None,
) -> None:
    """Runs `batchjob VERB RUN` in one process a device, and waits until all have ended.

    Processes that label share the work and one progress bar; where one dies, the others go on. Processes that fit talk
    to each other; where one ends badly, the others are ended too.

    Parameters
    ----------
    numbers
        The devices, as `devices` chooses them.
    verb
        What each process does.
    run
        The folder of the run.
    runtime
        The runtime options, which are handed on.
    partitions
        The numbers of the partitions to label; None for all that are missing.

    Raises
    ------
    WorkLeft
        A process was stopped or killed.
    SystemExit
        With code 2 where the input is wrong, and 1 for any other error; the process's own line is on stderr.
    """
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in to_json(runtime).items() if name != "gpus"]
    flags += [f"--partition={partition}" for partition in partitions or ()]
    command = [sys.executable, "-m", "batchjob", verb, str(run), *flags]
    environments = _environments(numbers, on_cpu=runtime.device == "cpu", meet=verb == "fit")
    with Stop() as stop, ExitStack() as stack:
        processes = [stack.enter_context(subprocess.Popen(command, env=each)) for each in environments]
        told, alone_since = False, 0.0
        while any(process.poll() is None for process in processes):
            if (stop() or any(process.returncode == 2 for process in processes)) and not told:
                told = True
                for process in processes:
                    process.send_signal(signal.SIGTERM)
            if verb == "fit" and any(process.returncode for process in processes):
                alone_since = alone_since or time.monotonic()
                if time.monotonic() - alone_since > _GRACE_S:  # the others wait for it in a sum, deaf to signals
                    for process in processes:
                        process.kill()
            for process in processes:
                if process.returncode is None:
                    try:
                        process.wait(_POLL_S)
                    except subprocess.TimeoutExpired:
                        break
    _judge(run, [process.returncode for process in processes])


def _environments(numbers: Sequence[int], *, on_cpu: bool, meet: bool) -> list[dict[str, str]]:
    """The environment of each process: its rank, its GPU, and where they meet if they talk to each other."""
    world = str(len(numbers))
    shared = os.environ | {ATTEMPT: f"launch-{uuid.uuid4().hex[:12]}", PARENT: str(os.getpid())}
    shared |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    if meet:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    environments = []
    for rank, number in enumerate(numbers):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        if not on_cpu:
            own["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
        environments.append(shared | own)
    return environments


def _judge(run: Path, codes: Sequence[int]) -> None:
    """Ends as the worst of the processes did; `codes` are their exit codes, those of signals negative."""
    if 2 in codes:
        raise SystemExit(2)
    killed = [f"process {rank} by {signal.Signals(-code).name}" for rank, code in enumerate(codes) if code < 0]
    if killed:
        raise WorkLeft(f"{', '.join(killed)} was killed; what it had published is safe; go on with the same command")
    if any(code not in (0, WORK_LEFT) for code in codes):
        raise SystemExit(1)
    if WORK_LEFT in codes:
        raise WorkLeft(f"stopped; {run} goes on with the same command")

"""All GPUs of one machine, one process each: started, told to stop, and their ends made one."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from batchjob.config import Runtime, to_json
from batchjob.errors import UserError, WorkLeft
from batchjob.launch.shares import ATTEMPT
from batchjob.launch.stopping import PARENT, Stop

_POLL_S = 0.2
_GRACE_S = 10.0
NOBODY: Mapping[str, str] = {}


def devices(runtime: Runtime, visible: int) -> list[int]:
    """Returns the numbers of the GPUs to use, one process each. On a CPU `--gpus N` means N processes, and `all` one.

    Parameters
    ----------
    runtime
        The runtime options, `--gpus` among them.
    visible
        How many GPUs this machine shows.

    Raises
    ------
    UserError
        A GPU was asked for that is not there.
    """
    on_cpu = runtime.device == "cpu" or (runtime.device == "auto" and visible == 0)
    if runtime.gpus == "all":
        return [0] if on_cpu else list(range(visible))
    try:
        asked = [int(number) for number in runtime.gpus.split(",") if number.strip()]
    except ValueError as error:
        raise UserError(f"--gpus {runtime.gpus!r} is not a number or a list; give 2, or 0,2, or all") from error
    if "," not in runtime.gpus:
        asked = list(range(asked[0])) if asked else []
    wrong = [number for number in asked if number < 0 or (not on_cpu and number >= visible)]
    if not asked or wrong or len(set(asked)) != len(asked):
        raise UserError(
            f"--gpus {runtime.gpus}: this machine shows {visible} GPUs; give a number, or a list of 0-based ones"
        )
    return asked


def label_on(run: Path, runtime: Runtime, numbers: Sequence[int], partitions: Sequence[int] | None) -> None:
    """Runs `batchjob label RUN` in a process a device until all have ended; they share the work and one progress bar. A
    process that dies takes nothing of the others' with it.

    Parameters
    ----------
    run
        The folder of the run.
    runtime
        The runtime options, handed on.
    numbers
        The devices.
    partitions
        The partitions to label; None for all that are missing.

    Raises
    ------
    WorkLeft
        A process was stopped or killed.
    UserError
        The input is wrong; the process's own line is on stderr.
    SystemExit
        Anything else; its code is 1.
    """
    _run_on(
        ["label", str(run), *_flags(runtime), *(f"--partition={partition}" for partition in partitions or ())],
        run,
        numbers,
    )


def fit_on(run: Path, runtime: Runtime, numbers: Sequence[int]) -> None:
    """Runs `batchjob fit RUN` in a process a device. They talk to each other: where one ends badly, the others are
    ended.

    Parameters
    ----------
    run
        The folder of the run.
    runtime
        The runtime options, handed on.
    numbers
        The devices.

    Raises
    ------
    WorkLeft
        A process was stopped or killed.
    UserError
        The input is wrong; the process's own line is on stderr.
    SystemExit
        Anything else; its code is 1.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    _run_on(["fit", str(run), *_flags(runtime)], run, numbers, meeting)


def _run_on(arguments: Sequence[str], run: Path, numbers: Sequence[int], meeting: Mapping[str, str] = NOBODY) -> None:
    command = [sys.executable, "-m", "batchjob", *arguments]
    attempt = f"launch-{uuid.uuid4().hex[:12]}"
    is_for_gpu = "--device=cpu" not in arguments
    with Stop() as stop, ExitStack() as stack:
        processes = []
        for rank, number in enumerate(numbers):
            environment = _environment(rank, len(numbers), number, attempt, on_cpu=not is_for_gpu)
            processes.append(stack.enter_context(subprocess.Popen(command, env=environment | dict(meeting))))
        told, alone_since = False, 0.0
        while any(process.poll() is None for process in processes):
            if (stop() or any(process.returncode == 2 for process in processes)) and not told:
                told = True
                for process in processes:
                    process.send_signal(signal.SIGTERM)
            if meeting and any(process.returncode for process in processes):
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


def _judge(run: Path, codes: Sequence[int]) -> None:
    if 2 in codes:
        raise SystemExit(2)
    killed = [f"process {rank} by {signal.Signals(-code).name}" for rank, code in enumerate(codes) if code < 0]
    if killed:
        raise WorkLeft(f"{', '.join(killed)} was killed; what it had published is safe; go on with the same command")
    if any(code not in (0, 75) for code in codes):
        raise SystemExit(1)
    if 75 in codes:
        raise WorkLeft(f"stopped; {run} goes on with the same command")


def _environment(rank: int, world: int, number: int, attempt: str, *, on_cpu: bool) -> dict[str, str]:
    given = dict(os.environ)
    names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, PARENT: os.getpid()}
    given |= {name: str(value) for name, value in names.items()} | {ATTEMPT: attempt}
    if not on_cpu:
        visible = given.get("CUDA_VISIBLE_DEVICES", "")
        given["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
    return given


def _flags(runtime: Runtime) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in to_json(runtime).items() if name != "gpus"]

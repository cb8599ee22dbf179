"""Who fits and labels: this process, or one process a device that it starts; and this process's share of the work."""

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from batchjob.config import Options, Runtime, raise_for_fit_engine
from batchjob.errors import UserError, counted
from batchjob.launch import processes, shares
from batchjob.launch.progress import SharedProgress
from batchjob.launch.signals import Stop
from batchjob.machine import visible_gpus
from batchjob.plan import Plan
from batchjob.store import centroids
from batchjob.store import lifecycle as store

_Say = Callable[[str], None]


def check_runtime(runtime: Runtime, options: Options) -> None:
    """Checks what can be known of the runtime options before a run is planned.

    Parameters
    ----------
    runtime
        The runtime options. Torch is imported only where `--device` or `--gpus` asks for GPUs.
    options
        The result options that the run will have.

    Raises
    ------
    UserError
        GPUs are asked for that are not there, or an engine that does not fit a dataset.
    WorkLeft
        A node of Slurm that should have GPUs has none.
    """
    if options.scope == "dataset":
        raise_for_fit_engine(runtime.engine)
    if runtime.device == "cuda" or runtime.gpus != "all":
        processes.devices(runtime, visible_gpus(runtime.device))


def fit(run: Path, plan: Plan, runtime: Runtime, *, say: _Say) -> None:
    """Fits the centroids of a dataset-scope run, in one process a device. Does nothing if the run has them already.

    Parameters
    ----------
    run, plan, runtime, say
        As in `label`.

    Raises
    ------
    UserError
        This process is a task of a job array, or the input is wrong.
    WorkLeft
        A process was told to stop.
    """
    if plan.options.scope != "dataset" or centroids.is_fitted(run):
        return
    in_body = shares.in_batch_body()
    if numbers := _devices_to_start(runtime, in_batch_body=in_body):
        say(f"fitting in {counted(len(numbers), 'process')}, one a device: {', '.join(map(str, numbers))}")
        processes.run_on(numbers, "fit", run, runtime)
        return
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise UserError(
            "fit is one job whose processes talk to each other, found a job array; submit it without --array"
        )
    with Stop() as stop:
        from batchjob.job.fit import fit as fit_here  # takes seconds, in which a signal is noted already

        share = shares.share_of(os.environ, in_batch_body=in_body)
        fit_here(run, runtime, rank=share.index, world=share.count, should_stop=stop, say=say)


def label(run: Path, plan: Plan, runtime: Runtime, named: Sequence[int] | None, *, say: _Say) -> None:
    """Labels the missing partitions, or the named ones of them.

    Starts one process a device and waits for them, or labels this process's own share where it is one of many or needs
    only the first device.

    Parameters
    ----------
    run
        The folder of the run.
    plan
        The run's plan.
    runtime
        The runtime options.
    named
        Numbers of partitions; None for all that are missing.
    say
        Gets a line for each choice and for progress.

    Raises
    ------
    UserError
        The run does not have a named partition, or the input is wrong.
    WorkLeft
        A process was told to stop, or lost sight of DATA.
    """
    with Stop() as stop:  # before the imports, which take seconds in which a signal would kill
        _label(run, plan, runtime, named, stop=stop, say=say)


def _label(
    run: Path, plan: Plan, runtime: Runtime, named: Sequence[int] | None, *, stop: Callable[[], bool], say: _Say
) -> None:
    count = plan.partition_count
    if wrong := [partition for partition in named or () if not 0 <= partition < count]:
        raise UserError(f"--partition {wrong[0]} is not in {run}, which has {count}; give 0 to {count - 1}")
    in_body = shares.in_batch_body()
    if numbers := _devices_to_start(runtime, in_batch_body=in_body):
        say(f"{counted(len(numbers), 'process')}, one a device: {', '.join(map(str, numbers))}")
        processes.run_on(numbers, "label", run, runtime, partitions=named)
        return

    def missing() -> list[int]:
        found = store.missing(run, plan)
        return found if named is None else [partition for partition in named if partition in found]

    share, attempt = shares.share_of(os.environ, in_batch_body=in_body), shares.attempt_of(os.environ)
    partitions = shares.agreed_partitions(run, attempt, missing)
    own = [partition for partition in share.of(partitions) if not store.is_done(run, partition)]
    if not own:
        say("nothing is missing" if not partitions else f"nothing is left of share {share.index} of {share.count}")
        return
    if share.count > 1:
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        say(f"share {share.index} of {share.count} ({share.source}) on {node}: {counted(len(own), 'partition')}")
    from batchjob.job.label import label as label_here

    with SharedProgress(run, attempt, share, plan, partitions) as shared:
        label_here(run, runtime, own, should_stop=stop, shared=shared, say=say)


def _devices_to_start(runtime: Runtime, *, in_batch_body: bool) -> list[int]:
    """The devices that each get a process; none where this process is one of these, or uses the first device itself."""
    numbers = processes.devices(runtime, visible_gpus(runtime.device))
    is_enough = numbers == [0] or shares.is_launched(os.environ, in_batch_body=in_batch_body)
    return [] if is_enough else numbers

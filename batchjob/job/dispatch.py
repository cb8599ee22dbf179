"""Who fits and labels: this process, or one process a device that it starts; and this process's share of the work."""

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from batchjob.config import Runtime
from batchjob.errors import UserError
from batchjob.launch import processes, shares
from batchjob.launch.progress import SharedProgress
from batchjob.launch.stopping import Stop
from batchjob.machine import visible_gpus
from batchjob.plan import Plan
from batchjob.store import centroids
from batchjob.store import lifecycle as store

Say = Callable[[str], None]


def fit(run: Path, plan: Plan, runtime: Runtime, *, say: Say) -> None:
    """Fits the centroids of a dataset-scope run, by one process a device, unless they are there.

    Parameters
    ----------
    run
        The folder of the run.
    plan
        Its plan.
    runtime
        The runtime options.
    say
        Gets a line for each choice and for progress.
    """
    if plan.options.scope != "dataset" or centroids.is_fitted(run):
        return
    numbers = processes.devices(runtime, visible_gpus(runtime.device))
    in_body = shares.in_batch_body()
    if numbers != [0] and not shares.is_launched(os.environ, in_batch_body=in_body):
        say(f"{len(numbers)} processes fit together, one a device: {', '.join(map(str, numbers))}")
        processes.fit_on(run, runtime, numbers)
        return
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise UserError(
            "fit is one job whose processes talk to each other, found a job array; submit it without --array"
        )
    with Stop() as stop:
        from batchjob.job.fit import fit as fit_here  # takes seconds, in which a signal is noted already

        share = shares.share_of(os.environ, in_batch_body=in_body)
        fit_here(run, runtime, rank=share.index, world=share.count, should_stop=stop, say=say)


def label(run: Path, plan: Plan, runtime: Runtime, named: Sequence[int] | None, *, say: Say) -> None:
    """Labels the missing partitions, or those of them that are `named`: this process's share, or all on many devices.

    Parameters
    ----------
    run
        The folder of the run.
    plan
        Its plan.
    runtime
        The runtime options.
    named
        Numbers of partitions; None for all that are missing.
    say
        Gets a line for each choice and for progress.

    Raises
    ------
    UserError
        The run does not have such a partition.
    WorkLeft
        The process was told to stop.
    """
    with Stop() as stop:  # before the imports, which take seconds in which a signal would kill
        _label(run, plan, runtime, named, stop=stop, say=say)


def _label(
    run: Path, plan: Plan, runtime: Runtime, named: Sequence[int] | None, *, stop: Callable[[], bool], say: Say
) -> None:
    count = plan.partition_count
    if wrong := [partition for partition in named or () if not 0 <= partition < count]:
        raise UserError(f"--partition {wrong[0]} is not in {run}, which has {count}; give 0 to {count - 1}")
    numbers = processes.devices(runtime, visible_gpus(runtime.device))
    in_body = shares.in_batch_body()
    if numbers != [0] and not shares.is_launched(os.environ, in_batch_body=in_body):
        say(f"{len(numbers)} processes, one a device: {', '.join(map(str, numbers))}")
        processes.label_on(run, runtime, numbers, named)
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
        say(f"share {share.index} of {share.count} ({share.source}) on {node}: {len(own)} partitions")
    from batchjob.job.label import label as label_here

    with SharedProgress(run, attempt, share, plan, partitions) as shared:
        label_here(run, runtime, own, should_stop=stop, shared=shared, say=say)

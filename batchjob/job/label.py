"""The loop: images → loader → model → attention → clustering → store, a partition at a time."""

import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from batchjob import plan as plans
from batchjob import retries
from batchjob.config import Runtime, to_json
from batchjob.errors import WorkLeft, counted, tell
from batchjob.job.buffers import Buffers
from batchjob.job.clusters import FindClusters, find_engine, forecast, open_clusterer, prepare_problems
from batchjob.job.context import Context
from batchjob.job.opening import Job, open_job
from batchjob.job.presence import describe_failures, is_a_loss_of_data, may_pass, raise_for_absence
from batchjob.job.progress import Progress
from batchjob.job.scores import Scorer
from batchjob.launch.progress import SharedProgress
from batchjob.launch.shares import claimed
from batchjob.machine import choose_device
from batchjob.store.writer import Failure, Writer


def label(
    run: Path,
    runtime: Runtime,
    partitions: Sequence[int],
    *,
    should_stop: Callable[[], bool] = lambda: False,
    shared: SharedProgress | None = None,
    say: Callable[[str], None] = tell,
) -> None:
    """Labels partitions of a run, and publishes each one whole.

    Parameters
    ----------
    run, runtime, should_stop, say
        As in `Context`.
    partitions
        The numbers of the partitions.
    shared
        Counts the images of all processes; None for a process that is alone.

    Raises
    ------
    WorkLeft
        The process was told to stop, or DATA can't be seen any more.
    UserError
        An input changed since it was planned, or nothing fits the device.
    """
    plan, device = plans.load(run), choose_device(runtime.device)
    context = Context(run, plan, runtime, device, should_stop, say)
    engine, reason = find_engine(context)
    say(f"labelling {len(partitions)} of {counted(plan.partition_count, 'partition')} on {device}, {plan.precision}")
    say(f"engine {engine.name}: {reason}")
    for line in forecast(plan, partitions):
        say(line)
    cluster, score = open_clusterer(context, engine), Scorer(context)
    progress = Progress(plan.row_count, shared.done if shared else 0, shared=shared)
    ranges = [plan.rows_of(partition) for partition in partitions]
    failed, lost = Counter[str](), dict[int, str]()
    with (
        Writer(run, plan) as writer,
        open_job(context, ranges, progress=progress, prepare=[prepare_problems(context), score.prepare]) as job,
    ):
        for partition in claimed(writer, partitions, should_stop):
            try:
                arrays, failures = job.guard.run(lambda: _compute(job, partition, cluster, score))  # noqa: B023
                if may_pass(failures):  # a few photos may be gone, but not DATA itself
                    raise_for_absence(job.index, plan.data)
            except WorkLeft:
                writer.release(partition)
                raise
            start, stop = plan.rows_of(partition)
            if is_a_loss_of_data(failures, stop - start, runtime.max_failures):
                writer.release(partition)
                lost[partition] = f"{may_pass(failures)} of {counted(stop - start, 'image')} of partition {partition}"
                continue
            failed.update(cause for _, cause, _ in failures)
            with job.stages("store"):
                writer.write(partition, arrays, failures)
    say(job.stages.summary())
    say(job.loader.verdict(job.stages.total_s, device.type))
    worker = f"{os.environ.get('SLURMD_NODENAME') or socket.gethostname()}-{os.getpid()}"
    job.stages.save(
        run / "logs" / f"timing-{worker}.json",
        device=str(device),
        batch_size=job.batch_size,
        engine=engine.name,
        start_s=job.start_s,
    )
    if failed:
        retry = retries.sentence(retries.count_of(failed), plan.data, run, to_json(plan.options))
        say(describe_failures(failed, job.stages.images, retry=retry))
    if lost:
        raise WorkLeft(
            f"not published: {'; '.join(list(lost.values())[:3])} can't be read now "
            f"({counted(len(lost), 'partition')}); bring DATA back and run the same command again, or, if they are "
            "gone for good, with a greater --max-failures"
        )


def _compute(
    job: Job, partition: int, cluster: FindClusters, score: Scorer
) -> tuple[dict[str, NDArray[Any]], list[Failure]]:
    """(arrays by name, rows in order; failures) of a partition. Starts from nothing, so that it may be called again."""
    plan, stages = job.context.plan, job.stages
    out = Buffers(plan, partition)
    for batch in job.batches(plan.rows_of(partition)):
        out.put_images(batch, job.instances)
        for layer, maps in enumerate(stages.timed("model", job.extract(batch.pixels))):
            with stages("rows"):
                rows = maps.to_cluster(batch.mask)  # float32 [B, H, P, P], or [B, H, P, D] of other vectors
            with stages("clustering"):
                found = cluster(rows, maps, batch)
            with stages("scores"):
                scores = score(rows, batch)
            out.put(layer, maps, found, scores, batch)
        with stages("results"):
            out.finish(batch, job.index)
    with stages("results"):
        out.store_pending(job.index)
    return out.arrays, out.failures

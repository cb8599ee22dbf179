"""The fit of a dataset-wide clustering: reads the images once, keeps a sample of their rows, fits the centroids."""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

from batchjob import plan as plans
from batchjob.codebook import kmeans as dataset
from batchjob.codebook.processes import Group, join
from batchjob.codebook.rows import RowKind, Sample, affordable_rows, asked_rows, draw_sample, row_kind
from batchjob.config import Runtime
from batchjob.errors import UserError, WorkLeft, counted, tell
from batchjob.job.context import Context
from batchjob.job.opening import Job, open_job
from batchjob.job.progress import Progress
from batchjob.job.read_rows import ReadRows
from batchjob.job.sampled_rows import SampledRows
from batchjob.loader.chunks import Range
from batchjob.machine import choose_device, total_memory_bytes
from batchjob.plan import Plan
from batchjob.store import centroids as stored
from batchjob.store.centroids import Centroids, Checkpoint
from batchjob.store.claims import Claims

_CPU_SAMPLE_SHARE = 0.25  # of the machine's memory for the sample
_GPU_SAMPLE_SHARE = 0.5  # of the device's memory for the sample; the model, its batch and the pool take the rest
_WAIT_S = 1.0  # between two looks at whether another fit of the same run has ended


def fit(
    run: Path,
    runtime: Runtime,
    *,
    rank: int = 0,
    world: int = 1,
    budget_bytes: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = tell,
) -> Centroids:
    """Fits the centroids of a dataset-scope run, or reads them where they are there.

    Parameters
    ----------
    run, runtime, should_stop, say
        As in `Context`; `say` is called in the first process alone.
    rank, world
        This process's number, from 0, and how many fit together. The first one writes the centroids to RUN/fit.
    budget_bytes
        Bytes for this process's rows; 0 stands for what `sample_budget` finds.

    Returns
    -------
    The centroids of every layer and head.

    Raises
    ------
    WorkLeft
        A process was told to stop; the same command goes on from the last full iteration.
    UserError
        The run has image scope, or has fewer rows than clusters, or an input changed.
    """
    plan = plans.load(run)
    if plan.options.scope != "dataset":
        raise UserError(
            f"{run} clusters image by image and has nothing to fit; plan it with --scope dataset, or label it"
        )
    if stored.is_fitted(run):
        return stored.load(run, plan.digest)
    device = choose_device(runtime.device)
    shares = plan.partitions[rank::world]
    tell = say if rank == 0 else lambda line: None
    context = Context(run, plan, runtime, device, should_stop, tell)
    with join(rank, world, device) as group, _only_fit(context, group):
        if group.largest(float(stored.is_fitted(run))):  # another fit has ended meanwhile
            return stored.load(run, plan.digest)
        refiner, reason = dataset.open_refiner(runtime.engine, device, group)
        budget = budget_bytes or sample_budget(device, world)
        kind, sample, sentence = sample_for(plan, shares, group, budget)
        tell(sentence)
        tell(f"fitting on {world} × {device}; engine {refiner.name}: {reason}")
        rows = SampledRows(plan, kind, sample, shares, device)
        kept = ReadRows(run, f"{plan.digest} {sample}", rank, world)
        if group.largest(float(_was_stopped(context, rows, shares, kept))):
            raise WorkLeft(f"told to stop while {run} was read for the fit; go on with the same command")
        counts = group.all(float(len(rows)))
        if refiner.name == "cuml" and world > 1 and min(counts) < int(plan.options.k):
            refiner = dataset.TorchRefiner()  # KMeansMG raises there
            fewest = counted(int(min(counts)), "row")
            tell(f"fitting in torch: a process has {fewest}, cuml needs {plan.options.k} in each")
        seen = int(sum(counts))
        shape = (len(plan.layers), len(plan.heads), int(plan.options.k), kind.width)
        wanted = Centroids.blank(
            shape, rows=seen, asked_rows=asked_rows(plan.options), engine=refiner.name, plan_digest=plan.digest
        )
        found = _fit_all(context, rows, refiner, group, wanted)
        if rank == 0:
            stored.save(run, found)
            stored.drop_state(run)
        group.barrier()  # nobody labels before the centroids are there
    return found


@contextmanager
def _only_fit(context: Context, group: Group) -> Iterator[None]:
    """Waits until no other fit works on the run, and keeps others out: each would remove what the other has kept.

    Raises WorkLeft, in all processes of `group` together, where one of them is told to stop while they wait.
    """
    with ExitStack() as stack:
        claims = stack.enter_context(Claims(context.run / "fit")) if group.rank == 0 else None
        is_told = False
        while not group.largest(float(claims is not None and claims.take(0))):
            if not is_told:
                context.say(f"waiting for another fit of {context.run}")
            is_told = True
            if group.largest(float(context.should_stop())):
                raise WorkLeft(f"told to stop while another fit of {context.run} goes on; go on with the same command")
            time.sleep(_WAIT_S)
        yield


def _was_stopped(context: Context, rows: SampledRows, shares: Sequence[Range], kept: ReadRows) -> bool:
    """Takes this process's images through the model into `rows`; whether it was told to stop before the end.

    Does not read again what an earlier attempt has `kept`, and keeps there what this one reads.
    """
    done = rows.take(kept)
    if done:
        of_all = f"{done} of {counted(len(shares), 'partition')}"
        context.say(f"going on after {of_all} of the first process, read by an earlier attempt")
    if done == len(shares):
        return False
    left = shares[done:]
    progress = Progress(sum(stop - start for start, stop in left), what="rows for the fit")
    whole = len(rows)  # up to the end of a partition
    taken_bytes = rows.bytes if context.device.type == "cuda" else 0
    with open_job(context, left, progress=progress, taken_bytes=taken_bytes) as job:
        try:
            for share in left:
                job.guard.run(lambda: _read(job, share, rows, whole))  # noqa: B023
                done, whole = done + 1, len(rows)
                if kept.is_due():
                    rows.keep(kept, whole, done)
        except WorkLeft:
            rows.keep(kept, whole, done)
            return True
    rows.keep(kept, whole, done)
    return False


def _read(job: Job, share: Range, rows: SampledRows, whole: int) -> None:
    """Adds a share's rows behind the first `whole` ones. Drops all others first, so that it may be called again."""
    rows.drop_after(whole)
    for batch in job.batches(share):
        rows.add(batch, job.extract(batch.pixels))
    rows.settle()


def sample_budget(device: torch.device, world: int) -> int:
    """Finds how many bytes of rows this process may hold.

    Parameters
    ----------
    device
        Where the rows are.
    world
        How many processes fit together; they share this machine's memory unless the launcher names fewer for it.

    Returns
    -------
    Half of a GPU's memory, or this process's part of a quarter of the machine's.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * _GPU_SAMPLE_SHARE)
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_TASKS_PER_NODE") or str(world)
    return int(_CPU_SAMPLE_SHARE * total_memory_bytes() / max(1, int(re.split(r"\D", here)[0] or world)))


def sample_for(
    plan: Plan, shares: Sequence[tuple[int, int]], group: Group, budget_bytes: int
) -> tuple[RowKind, Sample, str]:
    """Chooses which rows the fit sees: as many as asked for, or as many as every process can hold.

    Parameters
    ----------
    plan
        The run's plan.
    shares
        This process's ranges of images [start, stop).
    group
        The processes that fit together.
    budget_bytes
        Bytes for this process's rows; the smallest of all processes' counts.

    Returns
    -------
    (what a row is, which rows the fit sees, a sentence about their number).

    Raises
    ------
    UserError
        There are fewer rows than clusters.
    """
    kind = row_kind(plan.options, plan.model.grid, plan.vector_size)
    total, wanted = plan.row_count * kind.per_image, asked_rows(plan.options)
    share = group.largest(sum(stop - start for start, stop in shares) / plan.row_count)
    rows, why = affordable_rows(
        min(wanted, total),
        row_bytes=len(plan.layers) * len(plan.heads) * kind.width * 4,
        budget_bytes=-int(group.largest(-budget_bytes)),
        largest_share=share,
    )
    if rows < int(plan.options.k):
        raise UserError(f"--k {plan.options.k} needs as many rows, found {rows:,} ({why}); give a smaller k, or more")
    sample = draw_sample(total, rows, plan.options.seed)
    return kind, sample, f"the fit sees {sample.rows:,} of {counted(total, 'row')} ({why})"


def _fit_all(
    context: Context, rows: SampledRows, refiner: dataset.Refiner, group: Group, wanted: Centroids
) -> Centroids:
    """Fits all layers and heads that `wanted` lacks, one after the other, and keeps every iteration on disk.

    Raises WorkLeft, in all processes together, where one of them was told to stop.
    """
    run, plan, device = context.run, context.plan, context.device
    before = stored.load_checkpoint(run, wanted)
    group.barrier()  # all have read it before the first writes the next
    found = before.finished if before else wanted
    if before:
        context.say(f"going on with layer {plan.layers[before.layer]}, head {plan.heads[before.head]} "
            f"after {counted(before.iterations, 'iteration')}")  # fmt: skip
    for layer, head in np.ndindex(found.inertia.shape):
        if found.counts[layer, head].sum() > 0:
            continue
        start = None
        if before and (layer, head) == (before.layer, before.head):
            start = dataset.State(torch.from_numpy(before.current).to(device), before.iterations, before.done)

        def keep(state: dataset.State, layer: int = layer, head: int = head) -> None:
            if group.rank == 0:
                current = (state.centroids if state.on_host is None else state.on_host).cpu().numpy()
                stored.save(run, Checkpoint(found, layer, head, current, state.iterations, state.done))
            if group.largest(float(context.should_stop())):
                raise WorkLeft(f"stopped in the fit of {run}; go on with the same command")

        result = dataset.fit(rows.problem(layer, head, group), refiner, start=start, keep=keep)
        found.centroids[layer, head] = result.centroids.cpu().numpy()
        found.counts[layer, head] = result.counts.cpu().numpy()
        found.inertia[layer, head], found.iterations[layer, head] = result.inertia, result.iterations
        context.say(f"layer {plan.layers[layer]}, head {plan.heads[head]}: {counted(result.iterations, 'iteration')}, "
            f"inertia {result.inertia / result.rows:.4g} a row, {int((result.counts == 0).sum())} empty")  # fmt: skip
    return found

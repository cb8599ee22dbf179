"""The fit of a dataset-wide clustering: the images streamed once, a sample of their rows kept, centroids fitted."""

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
from batchjob.codebook.rows import (
    RowKind,
    Sample,
    affordable_rows,
    asked_rows,
    draw,
    row_kind,
)
from batchjob.config import Runtime
from batchjob.errors import UserError, WorkLeft, tell
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

CPU_SAMPLE_SHARE = 0.25  # of the machine's memory for the sample
WAIT_S = 1.0  # between two looks at whether another fit of the same run has ended
GPU_SAMPLE_SHARE = 0.5  # of the device's memory for the sample; the model, its batch and the pool take the rest


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
    """Fits the centroids of a dataset-scope run; the first of `world` processes writes them to RUN/fit. Finished ones
    are read.

    Parameters
    ----------
    run
        The folder of the run.
    runtime
        The runtime options.
    rank, world
        This process's number and how many fit together.
    budget_bytes
        Bytes for this process's rows; 0: half a GPU's memory, or its part of a quarter of the machine's.
    should_stop
        Whether somebody wants this process to end; asked after each batch and iteration.
    say
        Gets a line for each choice and for progress; only the first process's lines are passed on.

    Raises
    ------
    WorkLeft
        It was told to stop; the same command goes on from the last full iteration.
    UserError
        RUN has image scope, or its rows fit nowhere.
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
    with join(rank, world, device) as group, only_fit(run, group, should_stop=should_stop, say=tell):
        if group.largest(float(stored.is_fitted(run))):  # another fit has ended meanwhile
            return stored.load(run, plan.digest)
        refiner, reason = dataset.open_refiner(runtime.engine, device, group)
        budget = budget_bytes or sample_budget(device, world)
        kind, sample, sentence = sample_for(plan, shares, group, budget)
        tell(sentence)
        tell(f"fitting on {world} × {device}; engine {refiner.name}: {reason}")
        rows = SampledRows(plan, kind, sample, shares, device)
        kept = ReadRows(run, f"{plan.digest} {sample}", rank, world)
        stopped = collect(run, plan, runtime, rows, shares, kept=kept, device=device, should_stop=should_stop, say=tell)
        if group.largest(float(stopped)):
            raise WorkLeft(f"told to stop while {run} was read for the fit; go on with the same command")
        counts = group.all(float(len(rows)))
        if refiner.name == "cuml" and world > 1 and min(counts) < int(plan.options.k):
            refiner = dataset.TorchRefiner()  # KMeansMG raises there
            tell(f"fitting in torch: a process has {min(counts):.0f} rows, cuml needs {plan.options.k} in each")
        seen = int(sum(counts))
        shape = (len(plan.layers), len(plan.heads), int(plan.options.k), kind.width)
        wanted = Centroids.blank(
            shape, rows=seen, asked_rows=asked_rows(plan.options), engine=refiner.name, plan_digest=plan.digest
        )
        found = fit_all(run, plan, rows, refiner, device, group=group, wanted=wanted, should_stop=should_stop, say=tell)
        if rank == 0:
            stored.save(run, found)
            stored.drop_state(run)
        group.barrier()  # nobody labels before the centroids are there
    return found


@contextmanager
def only_fit(run: Path, group: Group, *, should_stop: Callable[[], bool], say: Callable[[str], None]) -> Iterator[None]:
    """While inside, no other fit works on `run`: two would each throw away what the other keeps between attempts.

    A second one waits until the first ends or dies. Raises WorkLeft, in all processes of `group` together, where one is
    told to stop meanwhile.
    """
    with ExitStack() as stack:
        claims = stack.enter_context(Claims(run / "fit")) if group.rank == 0 else None
        is_told = False
        while not group.largest(float(claims is not None and claims.take(0))):
            if not is_told:
                say(f"waiting for another fit of {run}")
            is_told = True
            if group.largest(float(should_stop())):
                raise WorkLeft(f"told to stop while another fit of {run} goes on; go on with the same command")
            time.sleep(WAIT_S)
        yield


def collect(
    run: Path,
    plan: Plan,
    runtime: Runtime,
    rows: SampledRows,
    shares: Sequence[Range],
    *,
    kept: ReadRows,
    device: torch.device,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> bool:
    """Streams this process's images through the model into `rows`. What an earlier attempt read and `kept` is not read
    again.

    Parameters
    ----------
    run
        The folder of the run.
    plan
        Its plan.
    runtime
        The runtime options.
    rows
        Where the rows go.
    shares
        This process's ranges of images [start, stop).
    kept
        What an earlier attempt read; this one's rows are added.
    device
        Of the model and the rows.
    should_stop
        Whether somebody wants this process to end; asked after each batch.
    say
        Gets a line for each choice and for progress.

    Returns
    -------
        Whether it was told to stop before the end.
    """
    done = rows.take(kept)
    if done:
        say(f"going on after {done} of {len(shares)} partitions of the first process, read by an earlier attempt")
    if done == len(shares):
        return False
    left = shares[done:]
    progress = Progress(sum(stop - start for start, stop in left), what="rows for the fit")
    whole = len(rows)  # up to the end of a partition
    with open_job(
        run, plan, runtime, left, device=device, progress=progress, should_stop=should_stop, say=say,
        taken_bytes=rows.bytes if device.type == "cuda" else 0,
    ) as job:  # fmt: skip
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
    """Adds the rows of a share to the first `whole`. Starts from these, so that it may be called again."""
    rows.drop_after(whole)
    for batch in job.batches(share):
        rows.add(batch, job.extract(batch.pixels))


def sample_budget(device: torch.device, world: int) -> int:
    """Bytes of rows that this process may hold: half a GPU's memory, or its part of a quarter of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * GPU_SAMPLE_SHARE)
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_TASKS_PER_NODE") or str(world)
    return int(CPU_SAMPLE_SHARE * total_memory_bytes() / max(1, int(re.split(r"\D", here)[0] or world)))


def sample_for(
    plan: Plan, shares: Sequence[tuple[int, int]], group: Group, budget_bytes: int
) -> tuple[RowKind, Sample, str]:
    """Chooses which rows the fit sees: as many as asked for, or as every process can hold.

    Parameters
    ----------
    plan
        Its plan.
    shares
        This process's ranges of images [start, stop).
    group
        The processes that fit together.
    budget_bytes
        Bytes for this process's rows.

    Returns
    -------
        (what a row is, which rows the fit sees, a sentence about it).

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
    sample = draw(total, rows, plan.options.seed)
    return kind, sample, f"the fit sees {sample.rows:,} of {total:,} rows ({why})"


def fit_all(
    run: Path,
    plan: Plan,
    rows: SampledRows,
    refiner: dataset.Refiner,
    device: torch.device,
    *,
    group: Group,
    wanted: Centroids,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> Centroids:
    """Fits all layers and heads, one problem after the other; every iteration is kept on disk.

    Parameters
    ----------
    run
        The folder of the run.
    plan
        Its plan.
    rows
        This process's rows.
    refiner
        What improves centroids.
    device
        Of the rows.
    group
        The processes that fit together.
    wanted
        Centroids that are not fitted yet, and what they depend on.
    should_stop
        Whether somebody wants this process to end; asked after each batch.
    say
        Gets a line for each choice and for progress.

    Raises
    ------
    WorkLeft
        Any of the processes was told to stop; raised in all of them together.
    """
    before = stored.load_checkpoint(run, wanted)
    group.barrier()  # all have read it before the first writes the next
    found = before.finished if before else wanted
    if before:
        say(f"going on with layer {plan.layers[before.layer]}, head {plan.heads[before.head]} "
            f"after {before.iterations} iterations")  # fmt: skip
    for layer, head in np.ndindex(found.inertia.shape):
        if found.counts[layer, head].sum() > 0:
            continue
        start = None
        if before and (layer, head) == (before.layer, before.head):
            start = dataset.State(torch.from_numpy(before.current).to(device), before.iterations, before.done)

        def keep(state: dataset.State, layer: int = layer, head: int = head) -> None:
            if group.rank == 0:
                current = state.centroids.cpu().numpy()
                stored.save(run, Checkpoint(found, layer, head, current, state.iterations, state.done))
            if group.largest(float(should_stop())):
                raise WorkLeft(f"stopped in the fit of {run}; go on with: batchjob run {plan.data} {run}")

        result = dataset.fit(rows.problem(layer, head, group), refiner, start=start, keep=keep)
        found.centroids[layer, head] = result.centroids.cpu().numpy()
        found.counts[layer, head] = result.counts.cpu().numpy()
        found.inertia[layer, head], found.iterations[layer, head] = result.inertia, result.iterations
        say(f"layer {plan.layers[layer]}, head {plan.heads[head]}: {result.iterations} iterations, "
            f"inertia {result.inertia / result.rows:.4g} a row, {int((result.counts == 0).sum())} empty")  # fmt: skip
    return found

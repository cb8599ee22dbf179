"""The fit of a dataset-wide clustering: the images streamed once, a sample of their rows kept, centroids fitted."""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from batchjob import plan as plans
from batchjob.clustering.base import problem_seeds
from batchjob.codebook import kmeans as dataset
from batchjob.codebook.features import features
from batchjob.codebook.processes import Group, join
from batchjob.codebook.rows import (
    RowKind,
    Sample,
    affordable_rows,
    asked_rows,
    draw,
    row_kind,
    row_numbers,
)
from batchjob.config import Runtime
from batchjob.errors import UserError, WorkLeft, tell
from batchjob.job.opening import open_job
from batchjob.job.progress import Progress
from batchjob.job.read_rows import ReadRows
from batchjob.loader.chunks import Range
from batchjob.loader.loader import Batch
from batchjob.machine import choose_device, total_memory_bytes
from batchjob.model.attention import LayerMaps, renormalise
from batchjob.plan import Plan
from batchjob.store import centroids as stored
from batchjob.store.centroids import Centroids, Checkpoint
from batchjob.store.claims import Claims

AUTO_STARTS = 4  # of a dataset-wide k-means on its sample, for --n-init auto
CPU_SAMPLE_SHARE = 0.25  # of the machine's memory for the sample
WAIT_S = 1.0  # between two looks at whether another fit of the same run has ended
GPU_SAMPLE_SHARE = 0.5  # of the device's memory for the sample; the model, its batch and the pool take the rest


class SampledRows:
    """The rows of this process's images that the fit sees, in all layers and heads: [L, H, n, D], allocated at once."""

    def __init__(
        self, plan: Plan, kind: RowKind, sample: Sample, shares: Iterable[tuple[int, int]], device: torch.device
    ):
        self._plan, self._kind, self._sample = plan, kind, sample
        room = sum(sample.room(start * kind.per_image, stop * kind.per_image) for start, stop in shares)
        self._x = torch.empty(len(plan.layers), len(plan.heads), room, kind.width, device=device)
        self._numbers = torch.empty(room, dtype=torch.int64, device=device)
        self._filled = 0

    def __len__(self) -> int:
        return self._filled

    def add(self, batch: Batch, layers: Iterable[LayerMaps]) -> None:
        """Keeps the chosen rows of a batch. An image that failed, or overflowed in any layer, gives none."""
        numbers = row_numbers(batch.rows, self._kind)
        wanted = torch.from_numpy(self._sample.chosen(numbers) & (batch.status == 0)[:, None]).to(self._x.device)
        if batch.mask is not None and self._kind.queries == "rows":
            wanted = wanted & batch.mask
        chosen = wanted.flatten().nonzero()[: len(self._numbers) - self._filled, 0]
        source, place = chosen // self._kind.per_image, chosen % self._kind.per_image
        finite = torch.ones(len(batch.rows), dtype=torch.bool, device=self._x.device)
        end = self._filled + len(chosen)
        for layer, maps in enumerate(layers):
            own = self._own_rows(maps, source, place, batch.mask)
            x = features(own, place, self._kind, distance=self._plan.options.distance)
            self._x[layer, :, self._filled : end] = x.transpose(0, 1)
            finite &= maps.finite
        self._numbers[self._filled : end] = torch.from_numpy(numbers).to(self._x.device).flatten()[chosen]
        good = finite[source]
        if not bool(good.all()):
            kept = self._filled + good.nonzero()[:, 0]
            end = self._filled + len(kept)
            self._x[:, :, self._filled : end] = self._x[:, :, kept]
            self._numbers[self._filled : end] = self._numbers[kept]
        self._filled = end

    def _own_rows(self, maps: LayerMaps, source: Tensor, place: Tensor, mask: Tensor | None) -> Tensor:
        """[n, H, D]: the rows of the images `source` at their patches `place`, attention renormalised."""
        if maps.vectors is not None:
            return maps.vectors[source, :, place]
        assert maps.rows is not None
        own = maps.cls[source] if self._kind.queries == "cls" else maps.rows[source, :, place]
        return renormalise(own[:, :, None], None if mask is None else mask[source])[:, :, 0]

    def take(self, kept: ReadRows) -> int:
        """Takes the rows that an earlier attempt kept; of how many partitions they are."""
        done, self._filled = kept.load_into(self._x, self._numbers)
        return done

    def keep(self, kept: ReadRows, count: int, partitions: int) -> None:
        """Keeps the first `count` rows, all of the first `partitions` partitions."""
        kept.save(self._x[:, :, :count], self._numbers[:count], partitions)

    def problem(self, layer: int, head: int, group: Group) -> dataset.Problem:
        """The k-means of one layer and head, counted as in the plan; its rows are a view."""
        options, plan = self._plan.options, self._plan
        no_image = torch.zeros(1, dtype=torch.int64)
        seed = problem_seeds(no_image, plan.layers[layer], [plan.heads[head]], int(options.k), options.seed)
        x, numbers = self._x[layer, head, : self._filled], self._numbers[: self._filled]
        return dataset.Problem(x, numbers, int(options.k), int(seed[0]), options.starts or AUTO_STARTS, group)


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
    """The centroids of a dataset-scope run, written to RUN/fit by the first of `world` processes; done ones are read.

    Raises WorkLeft where it is told to stop; the same command goes on from the last full iteration.
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
        seen = int(sum(group.all(float(len(rows)))))
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
    """Streams this process's images through the model into `rows`; True where it was told to stop before the end.

    What an earlier attempt read and `kept` is not read again.
    """
    done = rows.take(kept)
    if done:
        say(f"going on after {done} of {len(shares)} partitions of the first process, read by an earlier attempt")
    if done == len(shares):
        return False
    left = shares[done:]
    progress = Progress(sum(stop - start for start, stop in left), what="rows for the fit")
    whole = len(rows)  # up to the end of a partition
    with open_job(run, plan, runtime, left, device=device, progress=progress, should_stop=should_stop, say=say) as job:
        try:
            for share in left:
                for batch in job.batches(share):
                    rows.add(batch, job.extract(batch.pixels))
                done, whole = done + 1, len(rows)
                if kept.is_due():
                    rows.keep(kept, whole, done)
        except WorkLeft:
            rows.keep(kept, whole, done)
            return True
    rows.keep(kept, whole, done)
    return False


def sample_budget(device: torch.device, world: int) -> int:
    """Bytes of rows that this process may hold: half a GPU's memory, or its part of a quarter of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * GPU_SAMPLE_SHARE)
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_TASKS_PER_NODE") or str(world)
    return int(CPU_SAMPLE_SHARE * total_memory_bytes() / max(1, int(re.split(r"\D", here)[0] or world)))


def sample_for(
    plan: Plan, shares: Sequence[tuple[int, int]], group: Group, budget_bytes: int
) -> tuple[RowKind, Sample, str]:
    """(what a row is, which rows the fit sees, a sentence): as many as asked for, or as every process can hold."""
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
    """The centroids of all layers and heads, one problem after the other; every iteration is kept on disk.

    Raises WorkLeft, in all processes together, if any of them is told to stop.
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

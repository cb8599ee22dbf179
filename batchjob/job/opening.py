"""A planned run, opened by one process: every choice is made and said once, for `fit` and `label` alike."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from batchjob.config import Runtime
from batchjob.data.index import ImageIndex
from batchjob.data.instances import GridInstances
from batchjob.errors import WorkLeft
from batchjob.job.memory import HalvingGuard, choose_batch_size
from batchjob.job.presence import raise_for_absence
from batchjob.job.progress import Progress, Stages
from batchjob.job.upload import DeviceBatch, Prepare, Uploads
from batchjob.loader.chunks import Range
from batchjob.loader.loader import Batch, Loader
from batchjob.machine import choose_workers
from batchjob.model import weights
from batchjob.model.attention import Extractor
from batchjob.model.describe import load_model
from batchjob.plan import Plan


@dataclass(slots=True)
class Job:
    """What a process needs to take images through the model."""

    plan: Plan
    device: torch.device
    index: ImageIndex
    instances: GridInstances | None  # with annotations
    batch_size: int  # images of one forward pass
    loader: Loader
    extract: Extractor
    progress: Progress
    guard: HalvingGuard
    should_stop: Callable[[], bool]
    start_s: float  # from opening to the first batch
    uploads: Uploads
    stages: Stages = field(default_factory=Stages)

    def batches(self, rows: Range) -> Iterator[DeviceBatch]:
        """The batches of the rows [start, stop) in order, on the device, halved once memory ran out.

        Times the loader and counts images. Raises WorkLeft where the process is told to stop.
        """
        for batch in self.uploads(self._on_host(rows)):
            yield batch
            self.stages.images += len(batch.rows)
            self.progress.advance(len(batch.rows))

    def _on_host(self, rows: Range) -> Iterator[Batch]:
        for whole in self.stages.timed("images", self.loader.batches(*rows)):
            if self.should_stop():
                raise WorkLeft(f"told to stop among images {rows[0]} to {rows[1] - 1}; go on with the same command")
            yield from self.guard.parts(whole)


@contextmanager
def open_job(
    run: Path,
    plan: Plan,
    runtime: Runtime,
    ranges: Sequence[Range],
    *,
    device: torch.device,
    progress: Progress,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
    prepare: Sequence[Prepare] = (),
    taken_bytes: int = 0,
) -> Iterator[Job]:
    """Opens the images and the model, and closes the workers at the end.

    Parameters
    ----------
    run
        The folder of the run.
    plan
        Its plan.
    runtime
        The runtime options.
    ranges
        Ranges of images [start, stop) that will be asked for, in this order.
    device
        Of the model.
    progress
        Counts images.
    should_stop
        Whether somebody wants this process to end; asked after each batch.
    say
        Gets a line for each choice and for progress.
    prepare
        Each of these sees every batch before it is worked on.
    taken_bytes
        Of the device that are not for batches.

    Yields
    ------
        The opened run.

    Raises
    ------
    UserError
        The weights are gone or changed, or nothing fits the device.
    WorkLeft
        DATA can't be seen.
    """
    began = time.monotonic()
    index = ImageIndex.load(run / "index")
    raise_for_absence(index)
    instances = GridInstances.load(run / "index") if plan.annotations else None
    batch_size, reason = choose_batch_size(runtime.batch_size, plan, device, taken_bytes=taken_bytes)
    say(f"batch size {batch_size}: {reason}")
    with _open_loader(plan, index, runtime, batch_size, device) as loader:
        loader.announce(ranges)  # decoded while the model is loaded
        state = weights.state_dict(weights.Weights(**plan.weights))
        model = load_model(plan.model, state, precision=plan.precision, device=device, seed=plan.options.seed)
        extract = Extractor(model, plan.layers, plan.heads, cluster_on=plan.options.cluster_on)
        loader.wait()
        start_s = time.monotonic() - began
        say(f"ready after {start_s:.1f} s: the model, and {loader.workers} decoding workers")
        guard = HalvingGuard(say)
        with progress:
            yield Job(
                plan=plan,
                device=device,
                index=index,
                instances=instances,
                batch_size=batch_size,
                loader=loader,
                extract=extract,
                progress=progress,
                guard=guard,
                should_stop=should_stop,
                start_s=start_s,
                uploads=Uploads(device, prepare),
            )


def _open_loader(plan: Plan, index: ImageIndex, runtime: Runtime, batch_size: int, device: torch.device) -> Loader:
    """The loader of a plan. Padding has the model's mean colour, so that it is near zero after normalisation."""
    red, green, blue = (round(255 * channel) for channel in plan.model.mean)
    return Loader(
        index,
        plan.geometry,
        fill_rgb=(red, green, blue),
        interpolation=plan.model.interpolation,
        batch_size=batch_size,
        workers=choose_workers(runtime.workers, bytes_each=index.bytes_a_worker),
        pin_for=device if device.type == "cuda" else None,
    )

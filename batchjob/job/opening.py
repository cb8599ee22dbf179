"""A planned run, opened by one process: every choice is made and said once, for `fit` and `label` alike."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from batchjob.data.index import ImageIndex
from batchjob.data.instances import GridInstances
from batchjob.errors import WorkLeft, counted
from batchjob.job.context import Context
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


@dataclass(slots=True)
class Job:
    """A run that a process has opened: what it needs to take images through the model."""

    context: Context
    index: ImageIndex
    instances: GridInstances | None  # with annotations
    batch_size: int  # images of one forward pass
    loader: Loader
    extract: Extractor
    progress: Progress
    guard: HalvingGuard
    start_s: float  # from opening to the first batch
    uploads: Uploads
    stages: Stages = field(default_factory=Stages)

    def batches(self, rows: Range) -> Iterator[DeviceBatch]:
        """Yields the batches of the rows [start, stop) in order, on the device; in halves once memory has run out.

        Times the loader and counts the images. Raises WorkLeft where the process is told to stop.
        """
        for batch in self.uploads(self._on_host(rows)):
            yield batch
            self.stages.images += len(batch.rows)
            self.progress.advance(len(batch.rows))

    def _on_host(self, rows: Range) -> Iterator[Batch]:
        for whole in self.stages.timed("images", self.loader.batches(*rows)):
            if self.context.should_stop():
                raise WorkLeft(f"told to stop among images {rows[0]} to {rows[1] - 1}; go on with the same command")
            yield from self.guard.parts(whole)


@contextmanager
def open_job(
    context: Context,
    ranges: Sequence[Range],
    *,
    progress: Progress,
    prepare: Sequence[Prepare] = (),
    taken_bytes: int = 0,
) -> Iterator[Job]:
    """Opens the images and the model, says what was chosen, and closes the workers when the block ends.

    Parameters
    ----------
    context
        The run, the device and the runtime options.
    ranges
        Ranges of images [start, stop) that will be asked for, in this order.
    progress
        Counts the images.
    prepare
        Each of these sees every batch before it is worked on.
    taken_bytes
        Bytes of the device that batches may not use.

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
    plan, device = context.plan, context.device
    index = ImageIndex.load(context.run / "index")
    raise_for_absence(index, plan.data)
    instances = GridInstances.load(context.run / "index") if plan.annotations else None
    batch_size, reason = choose_batch_size(context.runtime.batch_size, plan, device, taken_bytes=taken_bytes)
    context.say(f"batch size {batch_size}: {reason}")
    with _open_loader(context, index, batch_size) as loader:
        loader.announce(ranges)  # decoded while the model is loaded
        state = weights.state_dict(weights.Weights(**plan.weights))
        model = load_model(plan.model, state, precision=plan.precision, device=device, seed=plan.options.seed)
        extract = Extractor(model, plan.layers, plan.heads, cluster_on=plan.options.cluster_on)
        loader.wait()
        start_s = time.monotonic() - began
        context.say(f"ready after {start_s:.1f} s: the model, and {counted(loader.workers, 'decoding worker')}")
        with progress:
            yield Job(
                context=context,
                index=index,
                instances=instances,
                batch_size=batch_size,
                loader=loader,
                extract=extract,
                progress=progress,
                guard=HalvingGuard(context.say),
                start_s=start_s,
                uploads=Uploads(device, prepare),
            )


def _open_loader(context: Context, index: ImageIndex, batch_size: int) -> Loader:
    """The loader of a plan. Padding has the model's mean colour, so that it is near zero after normalisation."""
    plan, device = context.plan, context.device
    red, green, blue = (round(255 * channel) for channel in plan.model.mean)
    return Loader(
        index,
        plan.geometry,
        fill_rgb=(red, green, blue),
        interpolation=plan.model.interpolation,
        batch_size=batch_size,
        workers=choose_workers(context.runtime.workers, bytes_each=index.bytes_a_worker),
        pin_for=device if device.type == "cuda" else None,
    )

"""Runs the real loops on the pretended device: `fit` and `label` over a few photos, counted by stage."""

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch

from batchjob import plan as plans
from batchjob.clustering import self_check
from batchjob.codebook import kmeans
from batchjob.config import Options, Runtime
from batchjob.job import fit
from batchjob.job import label as job
from batchjob.job.prepare import prepare
from batchjob.job.progress import Stages
from tests.conftest import SAMPLE
from tests.pretended import Meter, OnDevice, pretended
from tests.stand_ins import counted_kernels

SMALL = {"vit_base_patch16_224": {"embed_dim": 48}}  # 12 blocks of 12 heads, like the study's model


@dataclass(frozen=True, slots=True)
class Counted:
    """The counts of `label` on the device for `batches` batches, without those of opening the job."""

    meter: Meter
    batches: int
    lines: tuple[str, ...]  # its output


@dataclass(frozen=True, slots=True)
class CountedFit:
    """What `fit` asked of the device, without what opening the job took.

    Its stages: `read` for the images, `keep` for what goes to disk, `lloyd` for the iterations of all starts, `fit` for
    all else of a k-means.
    """

    meter: Meter
    batches: int
    fits: int  # k-means, one a layer and head
    descents: int  # from a start to its fixed point
    iterations: int  # of Lloyd's algorithm, on the sample and on all rows together


def count_run(options: Options, runtime: Runtime, *, copies: int = 1, run: Path | None = None) -> Counted:
    """Labels `copies` copies of the sample's eight photos, with random weights on a pretended GPU.

    `run` is the run's folder; by default it is a temporary one. A run of dataset scope is fitted first, uncounted.
    """
    lines: list[str] = []
    with contextlib.ExitStack() as stack:
        run = _planned(stack, options, copies, run)
        meter = _on_pretended_gpu(stack)
        if options.scope == "dataset":
            fit.fit(run, runtime, say=lambda line: None)
        batches = stack.enter_context(counted_stages(meter))
        job.label(run, runtime, range(plans.load(run).partition_count), say=lines.append)
    return Counted(meter, len(batches), tuple(lines))


def count_fit(options: Options, runtime: Runtime) -> CountedFit:
    """Fits the centroids of the sample's eight photos in torch, with random weights on a pretended GPU."""
    with contextlib.ExitStack() as stack:
        run = _planned(stack, options, 1, None)
        meter = _on_pretended_gpu(stack)
        meter.stage = "read"
        batches = stack.enter_context(counted_stages(meter, first="read"))
        calls = {"fit": 0, "_descend": 0, "advance": 0}

        def counted(owner: Any, name: str, stage: str) -> None:
            real = getattr(owner, name)

            def staged(*given: Any, **more: Any) -> Any:
                calls[name] = calls.get(name, 0) + 1
                with meter.within(stage):
                    return real(*given, **more)

            stack.enter_context(mock.patch.object(owner, name, staged))

        counted(fit, "_fit_all", "keep")
        counted(fit.ReadRows, "save", "keep")
        counted(kmeans, "fit", "fit")
        counted(kmeans, "_descend", "lloyd")
        counted(kmeans.TorchRefiner, "advance", "lloyd")
        fit.fit(run, runtime, say=lambda line: None)
    return CountedFit(meter, len(batches), calls["fit"], calls["_descend"], calls["advance"])


def _planned(stack: contextlib.ExitStack, options: Options, copies: int, run: Path | None) -> Path:
    run = run or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
    data = SAMPLE if copies == 1 else _copied(Path(stack.enter_context(tempfile.TemporaryDirectory())), copies)
    create = functools.partial(timm.create_model, **SMALL.get(options.model, {}))
    stack.enter_context(mock.patch.object(timm, "create_model", create))
    prepare(str(data), run, options, say=lambda line: None)
    return run


def _on_pretended_gpu(stack: contextlib.ExitStack) -> Meter:
    meter = stack.enter_context(pretended())
    stack.enter_context(counted_kernels(meter))
    stack.enter_context(mock.patch.object(self_check, "find_refusal", return_value=""))  # it has its own test
    return meter


@contextmanager
def counted_stages(meter: Meter, *, first: str = "images") -> Iterator[list[None]]:
    """The loop's own stages become the meter's, from the first batch on; the list gets an entry a batch.

    `first`: what the meter calls the stage in which the loop waits for images.
    """
    batches: list[None] = []
    enter = Stages.__call__

    @contextmanager
    def staged(self: Stages, stage: str) -> Iterator[None]:
        if stage == "images" and not batches:
            meter.reset()
        if stage == "images":
            batches.append(None)
        with enter(self, stage), meter.within(first if stage == "images" else stage):
            yield

    with mock.patch.object(Stages, "__call__", staged):
        yield batches
        batches.pop()  # the last entry is of the call that found no further batch


def _copied(folder: Path, copies: int) -> Path:
    for number in range(copies):
        for photo in sorted((SAMPLE / "val2017").glob("*.jpg")):
            shutil.copy(photo, folder / f"{number:03d}-{photo.name}")
    return folder


def problems(count: int, patches: int) -> torch.Tensor:
    """Returns [count, patches, patches]: rows of smooth noise, like attention."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 8, 8, generator=generator)
    rows = torch.nn.functional.interpolate(coarse[:, None], size=(patches, patches), mode="bilinear")[:, 0]
    return (6 * rows + torch.rand(count, patches, patches, generator=generator)).softmax(-1)


def on_device(tensor: torch.Tensor) -> OnDevice:
    """Returns the tensor as one of the pretended device, without counting a copy."""
    return OnDevice(tensor)

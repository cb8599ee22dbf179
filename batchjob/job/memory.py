"""Forecasts from shapes what memory a batch takes, chooses the batch size that fits, and halves one that does not."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch

from batchjob.errors import UserError, counted
from batchjob.loader.loader import Batch
from batchjob.machine import total_memory_bytes
from batchjob.model.attention import CHUNK_BYTES
from batchjob.model.describe import DTYPES
from batchjob.plan import ModelSpec, Plan

_GPU_SHARE = 0.8  # of the device's memory; the CUDA context, cuBLAS and fragmentation take the rest
_CPU_SHARE = 0.25  # of the machine's memory; the loader's workers and other processes need some too
_MOST_IMAGES = {"cuda": 256, "cpu": 16}  # 256 photos are 50,000 tokens, which keep any device busy
T = TypeVar("T")
_ENGINE_BYTES = {"cuda": 4 << 30, "cpu": 1 << 28}  # four times the budget of the batched engine's chunks


@dataclass(frozen=True, slots=True)
class _Forecast:
    """The bytes that a batch of `images` takes on the device when it takes most."""

    images: int
    weights: int
    activations: int
    maps: int
    clustering: int

    @property
    def total(self) -> int:
        """All bytes. Activations are freed before the maps are made, so the larger of the two counts."""
        return self.weights + max(self.activations, self.maps + self.clustering)

    @property
    def sentence(self) -> str:
        """The forecast in words, for a log."""
        parts = ", ".join(
            f"{name} {_format_bytes(getattr(self, name))}" for name in ("weights", "activations", "maps", "clustering")
        )
        return f"{_format_bytes(self.total)} forecast for {counted(self.images, 'image')} a batch ({parts})"


def forecast(
    spec: ModelSpec, *, precision: str, layers: int, heads: int, images: int, device_type: str = "cuda"
) -> _Forecast:
    """Forecasts the memory that labelling takes, from shapes alone.

    Parameters
    ----------
    spec
        The model.
    precision
        fp32, fp16 or bf16.
    layers, heads
        How many layers and heads are wanted.
    images
        Images of a batch.
    device_type
        `cuda` or `cpu`.

    Returns
    -------
    Bytes by what takes them.
    """
    number = DTYPES[precision].itemsize
    map_number = 4 if precision == "fp32" else 2
    height, width = spec.input_px
    problems = images * heads
    square = problems * spec.num_patches**2
    scores = problems * spec.num_tokens**2 * 4
    # pixels as bytes, float32 and numbers; queries and keys are views of one product with the values
    pixels = images * 3 * height * width * (1 + 4 + number)
    kept = images * layers * 3 * spec.num_tokens * spec.num_heads * spec.head_dim * number if spec.kind == "vit" else 0
    queries = 2 * problems * spec.num_tokens * spec.head_dim * 4
    return _Forecast(
        images=images,
        weights=spec.parameters * number,
        activations=pixels + kept + images * spec.activation_numbers * number,
        # scores and their softmax, a chunk at a time, at least one image; then the rows
        maps=kept + queries + 2 * min(scores, max(CHUNK_BYTES, scores // images)) + square * map_number,
        # rows in float32, renormalised; the engine's Gram matrices and distances
        clustering=2 * square * 4 + min(4 * square * 4, _ENGINE_BYTES[device_type]),
    )


def choose_batch_size(asked: str, plan: Plan, device: torch.device, *, taken_bytes: int = 0) -> tuple[int, str]:
    """Chooses how many images go through the model at once.

    `auto` takes the largest power of two whose forecast fits the device, up to 256 on a GPU and 16 on a CPU. It counts
    the device's whole memory, not what is free at the moment. The batch size decides how products are rounded, so that
    a job that goes on must choose the same one.

    Parameters
    ----------
    asked
        `auto`, or a number, which is taken even where its forecast does not fit.
    plan
        The run's plan.
    device
        The device of the model.
    taken_bytes
        Bytes of the device that are in use for something else.

    Returns
    -------
    (images of a batch, why).

    Raises
    ------
    UserError
        Not even one image fits.
    """
    budget, spec = memory_budget(device) - taken_bytes, plan.model
    kind = device.type if device.type in _MOST_IMAGES else "cpu"

    def predict(images: int) -> _Forecast:
        layers, heads = len(plan.layers), len(plan.heads)
        return forecast(spec, precision=plan.precision, layers=layers, heads=heads, images=images, device_type=kind)

    if asked != "auto":
        known = predict(int(asked))
        doubt = "" if known.total <= budget else f", more than the {_format_bytes(budget)} to be used"
        return int(asked), f"as asked; {known.sentence}{doubt}"
    images = _MOST_IMAGES[kind]
    while images > 1 and predict(images).total > budget:
        images //= 2
    chosen = predict(images)
    if chosen.total > budget:
        raise UserError(
            f"{spec.name} at {spec.input_px[0]}x{spec.input_px[1]} does not fit: {chosen.sentence}, "
            f"{_format_bytes(budget)} of {device} to be used; give a smaller --image-size or model, or fewer --heads"
        )
    return images, f"{chosen.sentence}, {_format_bytes(budget)} of {device} to be used"


def memory_budget(device: torch.device) -> int:
    """Returns how many bytes of the device a batch may take."""
    if device.type == "cuda":
        return int(_GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return int(_CPU_SHARE * total_memory_bytes())


def _format_bytes(count: float) -> str:
    """A number of bytes such as `12 MiB` or `1.5 GiB`."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{max(1, round(count / 2**20))} MiB"


class HalvingGuard:
    """Runs work on batches, and again on half batches where memory ran out. `parts` cuts the batches."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` gets a line where batches are halved."""
        self.say = say
        self.has_halved = False
        self._images = 0  # of the batch that was last cut

    def parts(self, batch: Batch) -> tuple[Batch, ...]:
        """Returns the batch itself, or its two halves in the order of the rows once memory has run out."""
        self._images = len(batch.rows)
        return halves(batch) if self.has_halved else (batch,)

    def run(self, attempt: Callable[[], T]) -> T:
        """Returns what `attempt` returns, which is called again where memory ran out and must start from nothing.

        Raises UserError where half a batch does not fit either.
        """
        done, result = _try(attempt)
        if not done and not self.has_halved:
            self.has_halved = True
            self.say(f"out of memory with {counted(self._images, 'image')} a batch; going on with half as many")
            done, result = _try(attempt)
        if not done:
            most = max(1, self._images // 4)
            raise UserError(
                f"out of memory with {counted(self._images, 'image')} a batch, in halves too; "
                f"give --batch-size {most} or less, a smaller --image-size, or fewer --heads"
            )
        return cast(T, result)


def _try(attempt: Callable[[], T]) -> tuple[bool, T | None]:
    try:
        return True, attempt()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
    # The traceback held the tensors of the attempt until the `except` block ended.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False, None


def _is_out_of_memory(error: RuntimeError) -> bool:
    # torch's CPU allocator raises a plain RuntimeError (c10/core/impl/alloc_cpu.cpp); cuBLAS where its workspace fails
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "ALLOC_FAILED" in text


def halves(batch: Batch) -> tuple[Batch, ...]:
    """Cuts a batch in two, in the order of the rows; a batch of one image stays as it is."""
    count = len(batch.rows)
    cuts = [slice(0, (count + 1) // 2), slice((count + 1) // 2, count)]
    return tuple(_take(batch, cut) for cut in cuts if cut.stop > cut.start)


def _take(batch: Batch, part: slice) -> Batch:
    rows = batch.rows[part]
    return dataclasses.replace(
        batch,
        rows=rows,
        pixels=batch.pixels[part],
        status=batch.status[part],
        heights=batch.heights[part],
        widths=batch.widths[part],
        failures=[failure for failure in batch.failures if np.isin(failure[0], rows)],
        mask=None if batch.mask is None else batch.mask[part],
    )

"""How much memory a batch will take, forecast from shapes; the batch size that fits; one halving where it did not."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch

from batchjob.errors import UserError
from batchjob.loader.loader import Batch
from batchjob.machine import total_memory_bytes
from batchjob.model.attention import CHUNK_BYTES
from batchjob.model.describe import DTYPES
from batchjob.plan import ModelSpec, Plan

GPU_SHARE = 0.8  # of the device's memory: the rest is the CUDA context, cuBLAS and fragmentation
CPU_SHARE = 0.25  # of the machine's: the loader's workers and other processes live there too
MOST_IMAGES = {"cuda": 256, "cpu": 16}  # 256 photos are 50,000 tokens: larger products don't make a device busier
T = TypeVar("T")
ENGINE_BYTES = {"cuda": 4 << 30, "cpu": 1 << 28}  # four times the budget of the batched engine's chunks


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes alive at once on the device, at the worst moment of a batch of `images`."""

    images: int
    weights: int
    activations: int
    maps: int
    clustering: int

    @property
    def total(self) -> int:
        """All of it: activations are let go before the maps are made, so the larger of the two counts."""
        return self.weights + max(self.activations, self.maps + self.clustering)

    @property
    def sentence(self) -> str:
        """What a log says of it."""
        parts = ", ".join(
            f"{name} {format_bytes(getattr(self, name))}" for name in ("weights", "activations", "maps", "clustering")
        )
        return f"{format_bytes(self.total)} forecast for {self.images} images a batch ({parts})"


def forecast(
    spec: ModelSpec, *, precision: str, layers: int, heads: int, images: int, device_type: str = "cuda"
) -> Forecast:
    """What labelling batches of `images` will take, from shapes alone. `layers` and `heads` are how many are wanted."""
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
    return Forecast(
        images=images,
        weights=spec.parameters * number,
        activations=pixels + kept + images * spec.activation_numbers * number,
        # scores and their softmax, a chunk at a time, at least one image; then the rows
        maps=kept + queries + 2 * min(scores, max(CHUNK_BYTES, scores // images)) + square * map_number,
        # rows in float32, renormalised; the engine's Gram matrices and distances
        clustering=2 * square * 4 + min(4 * square * 4, ENGINE_BYTES[device_type]),
    )


def choose_batch_size(asked: str, plan: Plan, device: torch.device, *, taken_bytes: int = 0) -> tuple[int, str]:
    """Chooses how many images go through the model at once: as asked, or the largest power of two whose forecast fits
    the device.

    Judged by the device's whole memory, not by what is free just now: the batch size takes part in how products are
    rounded, so a job that goes on must choose the same.

    Parameters
    ----------
    asked
        `auto` or a number.
    plan
        The run's plan.
    device
        Of the model.
    taken_bytes
        Of the device's share that are in use for something else.

    Returns
    -------
        (images of a batch, why).

    Raises
    ------
    UserError
        Not even one image fits.
    """
    budget, spec = memory_budget(device) - taken_bytes, plan.model
    kind = device.type if device.type in MOST_IMAGES else "cpu"

    def predict(images: int) -> Forecast:
        layers, heads = len(plan.layers), len(plan.heads)
        return forecast(spec, precision=plan.precision, layers=layers, heads=heads, images=images, device_type=kind)

    if asked != "auto":
        known = predict(int(asked))
        doubt = "" if known.total <= budget else f", more than the {format_bytes(budget)} to be used"
        return int(asked), f"as asked; {known.sentence}{doubt}"
    images = MOST_IMAGES[kind]
    while images > 1 and predict(images).total > budget:
        images //= 2
    chosen = predict(images)
    if chosen.total > budget:
        raise UserError(
            f"{spec.name} at {spec.input_px[0]}x{spec.input_px[1]} does not fit: {chosen.sentence}, "
            f"{format_bytes(budget)} of {device} to be used; give a smaller --image-size or model, or fewer --heads"
        )
    return images, f"{chosen.sentence}, {format_bytes(budget)} of {device} to be used"


def memory_budget(device: torch.device) -> int:
    """Bytes of the device that a batch may take."""
    if device.type == "cuda":
        return int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return int(CPU_SHARE * total_memory_bytes())


def format_bytes(count: float) -> str:
    """`12 MiB`, `1.5 GiB`: for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{max(1, round(count / 2**20))} MiB"


class HalvingGuard:
    """Runs attempts whose batches go through `parts`; out of memory the first time, it tries again in halves."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.has_halved = False
        self._images = 0  # of the batch that was last cut

    def parts(self, batch: Batch) -> tuple[Batch, ...]:
        """The batch as it is; its two halves in row order once memory ran out."""
        self._images = len(batch.rows)
        return halves(batch) if self.has_halved else (batch,)

    def run(self, attempt: Callable[[], T]) -> T:
        """What `attempt` returns; it starts from nothing each time, so that no sum holds an image twice.

        Raises UserError where half a batch does not fit either.
        """
        done, result = _try(attempt)
        if not done and not self.has_halved:
            self.has_halved = True
            self.say(f"out of memory with {self._images} images a batch; going on with half as many")
            done, result = _try(attempt)
        if not done:
            most = max(1, self._images // 4)
            raise UserError(
                f"out of memory with {self._images} images a batch, in halves too; give --batch-size {most} or less, "
                "a smaller --image-size, or fewer --heads"
            )
        return cast(T, result)


def _try(attempt: Callable[[], T]) -> tuple[bool, T | None]:
    try:
        return True, attempt()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
    # Outside the `except`: its traceback held the tensors of the attempt.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False, None


def _is_out_of_memory(error: RuntimeError) -> bool:
    # torch's CPU allocator raises a plain RuntimeError (c10/core/impl/alloc_cpu.cpp); cuBLAS where its workspace fails
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "ALLOC_FAILED" in text


def halves(batch: Batch) -> tuple[Batch, ...]:
    """The batch as two, in row order; one of a single image as it is."""
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

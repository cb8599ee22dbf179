"""Batches on their way to the device and results on their way back, without the host waiting for either."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from batchjob.loader.loader import Batch
from batchjob.metrics.pair_table import PairTable


@dataclass(frozen=True, slots=True)
class PairsOfBatch:
    """The pairs of patches that a batch is scored on: the photos' own, those of others, and whose these are."""

    own: PairTable
    lent: PairTable
    lent_to: Tensor  # int64 [most, B], see `pair_table.members_of`


@dataclass(frozen=True, slots=True)
class TruthOfBatch:
    """The objects from which the images that have two of a category are clustered; b images, n starts of all of them.

    On the device, int64 but where it says otherwise: `which` [b] images of the batch; `starts` int16 [b, S, P], on the
    host; of each start its `image` among the b, its `place` among that image's, the `owner` of each patch [n, P] and
    `twins` float64 [n, M, G]; which starts are the image's `own` [b] and which are `lent`, and whose those are
    (`members_of`).
    """

    clusters: int
    which: Tensor
    starts: Tensor
    image: Tensor
    place: Tensor
    owner: Tensor
    twins: Tensor
    own: Tensor
    lent: Tensor
    lent_to: Tensor


@dataclass(slots=True)
class DeviceBatch(Batch):
    """A batch with `pixels` and `mask` on the device, and what its problems need, prepared on the host."""

    host_mask: Tensor | None = None  # `mask` where the host can read it
    k: Tensor | None = None  # int32 [B * H] on the host: clusters of each problem; None where a rule will choose them
    seeds: Tensor | None = None  # int64 [L, B * H] on the host
    pairs: PairsOfBatch | None = None  # with `--scores pairs`, and the next one too
    truth: TruthOfBatch | None = None


Prepare = Callable[[DeviceBatch], None]  # fills in what comes after `host_mask`


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The host's tensor, page-locked where `device` is a GPU: copies out of it need not be waited for."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


class Uploads:
    """Batches as `DeviceBatch`es. The next one is copied to a GPU, on a stream of its own, while this one is used."""

    def __init__(self, device: torch.device, prepare: Sequence[Prepare]) -> None:
        self._device, self._prepare = device, prepare
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call, unused-ignore]

    def __call__(self, batches: Iterator[Batch]) -> Iterator[DeviceBatch]:
        """One `DeviceBatch` for each batch, in order; on a GPU one is always under way."""
        if self._stream is None:
            for batch in batches:
                yield self._upload(batch)
            return
        ahead: tuple[DeviceBatch, torch.cuda.Event] | None = None
        for batch in batches:
            with torch.cuda.stream(self._stream):
                following = self._upload(batch), self._stream.record_event()
            if ahead is not None:
                yield self._hand_over(*ahead)
            ahead = following
        if ahead is not None:
            yield self._hand_over(*ahead)

    def _upload(self, batch: Batch) -> DeviceBatch:
        made = DeviceBatch(**{field.name: getattr(batch, field.name) for field in fields(Batch)})
        made.pixels = batch.pixels.to(self._device, non_blocking=True)
        if batch.mask is not None:
            made.host_mask = batch.mask
            made.mask = pinned(batch.mask, self._device).to(self._device, non_blocking=True)
        for prepare in self._prepare:
            prepare(made)
        return made

    def _hand_over(self, batch: DeviceBatch, copied: torch.cuda.Event) -> DeviceBatch:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in (batch.pixels, batch.mask):
            if tensor is not None:  # the memory was taken on the other stream and must not go back to it too early
                tensor.record_stream(current)
        return batch


class Download:
    """Tensors copied to the host: from a GPU into page-locked memory, in the background."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._done: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._tensors = [_start_copy(tensor) for tensor in tensors]
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]
            self._done.record()

    def arrays(self) -> list[NDArray[Any]]:
        """The numbers; waits until all of them have arrived."""
        if self._done is not None:
            self._done.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


def _start_copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)

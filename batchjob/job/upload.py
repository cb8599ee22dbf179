"""Copies batches to the device and results back to the host, without the host waiting for either."""

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
    """The pairs of patches that a batch is scored on."""

    own: PairTable  # of each image's own objects
    lent: PairTable  # of the objects of photos that lend theirs to an image of the batch
    lent_to: Tensor  # int64 [most, B] which of the lent tables are each image's, see `pair_table.members_of`


@dataclass(frozen=True, slots=True)
class TruthOfBatch:
    """The objects from which clusterings start, for the b images of a batch that have two objects of one category.

    An image has one start from its own objects, and one from those of each photo that lends it objects. There are n
    starts in all, and at most S of one image. Tensors are int64 and on the device where nothing else is said.
    """

    clusters: int  # the most of any start
    which: Tensor  # [b] the images' places in the batch
    starts: Tensor  # int16 [b, S, P] on the host: the cluster of each patch
    image: Tensor  # [n] each start's image, counted among the b
    place: Tensor  # [n] its place among the image's starts
    owner: Tensor  # [n, P] the instance that owns each patch
    twins: Tensor  # float64 [n, M, G], see `on_device.twins_of`
    own: Tensor  # [b] the starts from the images' own objects
    lent: Tensor  # [n - b] the other starts
    lent_to: Tensor  # which of these are each image's, see `pair_table.members_of`


@dataclass(slots=True)
class DeviceBatch(Batch):
    """A batch with `pixels` and `mask` on the device, and what its problems need, which is prepared on the host."""

    host_mask: Tensor | None = None  # `mask` on the host
    k: Tensor | None = None  # int32 [B * H] on the host: clusters of each problem; None where a rule chooses them
    seeds: Tensor | None = None  # int64 [L, B * H] on the host
    pairs: PairsOfBatch | None = None  # with `--scores pairs`
    truth: TruthOfBatch | None = None  # with `--scores pairs`


Prepare = Callable[[DeviceBatch], None]  # fills in fields behind `host_mask`


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor from which copies to a device run in the background.

    Parameters
    ----------
    tensor
        A tensor on the host.
    device
        Where it will be copied to.

    Returns
    -------
    A page-locked copy for a GPU, else the tensor itself.
    """
    return tensor.pin_memory() if device.type == "cuda" else tensor


class Uploads:
    """Copies batches to the device. The next one is copied to a GPU, on a stream of its own, while this one is used."""

    def __init__(self, device: torch.device, prepare: Sequence[Prepare]) -> None:
        """Makes the stream where the device is a GPU.

        Parameters
        ----------
        device
            Where the batches go.
        prepare
            Each of these is called with every batch, in this order.
        """
        self._device, self._prepare = device, prepare
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call, unused-ignore]

    def __call__(self, batches: Iterator[Batch]) -> Iterator[DeviceBatch]:
        """Yields a `DeviceBatch` for each batch, in order; on a GPU the next one is always under way."""
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
    """Copies tensors to the host; from a GPU in the background, into page-locked memory."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._done: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._tensors = [_start_copy(tensor) for tensor in tensors]
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]
            self._done.record()

    def arrays(self) -> list[NDArray[Any]]:
        """Waits until all tensors have arrived and returns them as arrays."""
        if self._done is not None:
            self._done.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


def _start_copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)

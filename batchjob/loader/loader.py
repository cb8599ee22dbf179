"""Loads the rows of an index as batches of uint8 tensors, in order, and says what held them up."""

import math
import os
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchjob.data.decode import RGB
from batchjob.data.index import ImageIndex
from batchjob.geometry import Geometry
from batchjob.loader.chunks import Chunk, Range, Recipe
from batchjob.loader.prefetch import Ahead
from batchjob.loader.workers import Chunks
from batchjob.machine import usable_cores

STALL_S = 60.0  # no file takes that long to read and decode; a hung network disk does


@dataclass(slots=True)
class Batch:
    """B consecutive rows. Where `status` is not 0, the pixels are zeros and `failures` says why."""

    rows: NDArray[np.int64]  # [B]
    pixels: Tensor  # uint8 [B, 3, H, W], in page-locked memory with `pin_for`
    status: NDArray[np.uint8]  # [B] codes of `STATUS`
    heights: NDArray[np.int32]  # [B] of the photos in pixels after the EXIF rotation; 0 for one that failed
    widths: NDArray[np.int32]
    failures: list[tuple[int, str, str]]  # row, cause, message
    mask: Tensor | None = None  # bool [B, P], False for patches of padding; None where the resize pads nothing


class Loader:
    """Loads batches of an index. Its workers live from the first `announce` or `batches` until `close`."""

    def __init__(
        self,
        index: ImageIndex,
        geometry: Geometry,
        *,
        fill_rgb: RGB,
        interpolation: str = "bicubic",
        batch_size: int,
        workers: int,
        pin_for: torch.device | None = None,
        stall_s: float = STALL_S,
    ) -> None:
        """Checks DATA, and sets aside the memory for the pixels.

        Parameters
        ----------
        index
            The rows.
        geometry
            The size of the model's input, and how photos are fitted to it.
        fill_rgb, interpolation
            As `decode`.
        batch_size
            Images of a batch.
        workers
            Decoding processes; 0: this process decodes.
        pin_for
            The GPU that batches are copied to: their pixels are then in page-locked memory. None for the CPU.
        stall_s
            Seconds after which the image that a worker has in hand is taken for one that never ends.

        Raises
        ------
        UserError
            DATA is gone or has changed, or the images are too large for so many workers.
        """
        index.check()
        self.workers = workers
        self.waited_s = 0.0  # how long the caller waited for images in `batches`
        self.read_s = 0.0  # of all workers together
        self.decode_s = 0.0
        self._batch_size, self._pin_for = batch_size, pin_for
        self._geometry, self._image = geometry, (3, geometry.height, geometry.width)
        recipe = Recipe(index, geometry, fill_rgb, interpolation)
        self._chunks = Chunks(recipe, workers=workers, batch_size=batch_size, stall_s=stall_s)
        self._ranges: list[Range] = []
        self._positions: dict[Range, int] = {}
        self._due = -1  # the range that the stream comes to next
        self._stream: Generator[Batch, None, None] | Ahead[Batch] | None = None

    @property
    def bytes_in_flight(self) -> int:
        """The most bytes of decoded images that wait for the caller at one time."""
        ready = 3 * self._batch_size * math.prod(self._image)  # of the thread that puts batches together
        return self._chunks.sizing.bytes_in_flight + (ready if self.workers else 0)

    def announce(self, ranges: Sequence[Range]) -> None:
        """Says which ranges of rows `batches` will be asked for, in order, and lets the workers begin.

        They decode ahead across the ends of ranges. A range may be left out or asked for again, which costs only what
        was decoded ahead.
        """
        self._ranges = [(start, stop) for start, stop in ranges if stop > start]
        self._positions = {asked: i for i, asked in enumerate(self._ranges)}
        self._open_stream(0)

    def wait(self) -> None:
        """Waits for the first of the announced batches; returns at once with `workers=0`.

        This time goes into the start of the processes, and is not counted in `waited_s`.
        """
        if isinstance(self._stream, Ahead):
            self._stream.wait()

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the rows [start, stop) as batches, in order.

        Parameters
        ----------
        start, stop
            A range that was announced, or any other.

        Yields
        ------
        Batches of `batch_size` rows; the last may be smaller.
        """
        if stop <= start:
            return
        if (start, stop) not in self._positions:
            self.announce([(start, stop)])
        position = self._positions[start, stop]
        if self._due != position:
            self._open_stream(position)
        stream, self._due = self._stream, -1  # no other call can go on with it before the range ends
        assert stream is not None
        for first in range(start, stop, self._batch_size):
            began = time.perf_counter()
            batch = next(stream)
            self.waited_s += time.perf_counter() - began
            assert batch.rows[0] == first, f"rows from {batch.rows[0]} came where {first} was due"
            if first + self._batch_size >= stop:
                self._due = position + 1
            yield batch

    def verdict(self, total_s: float, device: str) -> str:
        """Says by `bottleneck` what held this loader's batches up.

        Parameters
        ----------
        total_s
            Seconds that the caller has worked and waited.
        device
            As `bottleneck`.
        """
        return bottleneck(
            total_s=total_s,
            waited_s=self.waited_s,
            read_s=self.read_s,
            decode_s=self.decode_s,
            workers=self.workers,
            cores=usable_cores(),
            device=device,
            in_job="SLURM_JOB_ID" in os.environ,
        )

    def close(self) -> None:
        """Ends the workers."""
        self._end_stream()
        self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_stream(self, position: int) -> None:
        """Begins with the batches from a range on. With workers, a thread puts the batches together meanwhile."""
        self._end_stream()
        ranges = self._ranges[position:]
        batches = self._assemble(ranges, self._chunks.read(ranges))
        self._stream = Ahead(batches, interrupt=self._chunks.interrupt) if self.workers else batches
        self._due = position

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream, self._due = None, -1

    def _assemble(self, ranges: list[Range], chunks: Iterator[tuple[Chunk, Tensor]]) -> Generator[Batch, None, None]:
        if self._pin_for is not None:  # a new thread begins with the first GPU, which may be another process's
            torch.cuda.set_device(self._pin_for)
        for start, stop in ranges:
            for first in range(start, stop, self._batch_size):
                yield self._gather(chunks, first, min(first + self._batch_size, stop))

    def _gather(self, stream: Iterator[tuple[Chunk, Tensor]], start: int, stop: int) -> Batch:
        pixels = torch.empty((stop - start, *self._image), dtype=torch.uint8, pin_memory=self._pin_for is not None)
        chunks = []
        row = start
        while row < stop:
            chunk, decoded = next(stream)
            assert chunk.start == row, f"rows from {chunk.start} came where {row} was due"
            chunks.append(chunk)
            # by NumPy: called in another thread, torch would start threads there that compete with the model's
            np.copyto(pixels[row - start : row - start + len(decoded)].numpy(), decoded.numpy())
            row += len(decoded)
            self.read_s += chunk.read_s
            self.decode_s += chunk.decode_s
        heights = np.concatenate([chunk.heights for chunk in chunks])
        widths = np.concatenate([chunk.widths for chunk in chunks])
        return Batch(
            np.arange(start, stop),
            pixels,
            np.concatenate([chunk.status for chunk in chunks]),
            heights,
            widths,
            [failure for chunk in chunks for failure in chunk.failures],
            _padding_mask(self._geometry, heights, widths),
        )


def _padding_mask(geometry: Geometry, heights: NDArray[np.int32], widths: NDArray[np.int32]) -> Tensor | None:
    """Returns bool [B, P], True for the patches of each photo that are image; None where the resize pads nothing."""
    if geometry.resize != "pad":
        return None
    sizes = zip(np.maximum(heights, 1), np.maximum(widths, 1), strict=True)  # 0 of a photo that failed
    return torch.from_numpy(np.stack([geometry.content_patches(int(h), int(w)).ravel() for h, w in sizes]))


def bottleneck(
    *,
    total_s: float,
    waited_s: float,
    read_s: float,
    decode_s: float,
    workers: int,
    cores: int,
    device: str,
    in_job: bool = False,
) -> str:
    """Says in one sentence how long the device waited for images, what held it up, and which option would help.

    Parameters
    ----------
    total_s
        Seconds that the caller has worked and waited.
    waited_s
        Seconds that it has waited for images.
    read_s, decode_s
        Seconds that all workers together have read files and decoded images.
    workers
        Decoding processes.
    cores
        That this process may use.
    device
        `cpu`, or a name that begins with `cuda`.
    in_job
        Whether this runs in a job of Slurm, where more tasks are advised rather than a GPU.
    """
    share = waited_s / total_s if total_s > 0 else 0.0
    said = f"the device ({device}) waited {share:.0%} of {total_s:.0f} s for images"
    if share < 0.05:
        alone = "more tasks or nodes" if in_job else "a GPU (--device cuda)"
        more = "more --gpus, or --precision fp16," if device.startswith("cuda") else alone
        return f"{said}: the model and the clustering set the pace; {more} would help"
    if read_s > decode_s:
        return (
            f"{said}: reading sets the pace ({read_s / (read_s + decode_s):.0%} of the workers' time); "
            f"--workers {max(1, 2 * workers)} (now {workers}) would help, or DATA on a local disk, or packed in tars"
        )
    if workers < cores:
        return f"{said}: decoding sets the pace; --workers {cores} (now {workers}) would help"
    return f"{said}: decoding sets the pace, on all of {cores} cores; photos stored smaller, or more cores, would help"

"""Rows of an index as batches of uint8 tensors, in order, decoded by worker processes; and what the waiting says."""

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
    """Rows in order. Where `status` is not 0 the pixels are zeros, and `failures` has a (row, cause, message)."""

    rows: NDArray[np.int64]  # [B]
    pixels: Tensor  # uint8 [B, 3, H, W], in pinned memory if asked for
    status: NDArray[np.uint8]  # [B]
    heights: NDArray[np.int32]  # [B], photo's pixels after the EXIF rotation; 0 where it failed
    widths: NDArray[np.int32]
    failures: list[tuple[int, str, str]]
    mask: Tensor | None = None  # bool [B, P], False for patches of padding; None where the resize pads nothing


class Loader:
    """Batches of an index. Workers live from the first `batches` until `close`."""

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
        """`pin_for`: the GPU that batches are copied to, out of page-locked memory.

        Raises UserError where DATA is gone or has changed, or images are too large for so many workers.
        """
        index.check()
        self.workers = workers
        self.waited_s = 0.0  # of the caller, in `batches`, for images
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
        """At most so many bytes of decoded images wait for the caller."""
        ready = 3 * self._batch_size * math.prod(self._image)  # by the thread that puts batches together
        return self._chunks.sizing.bytes_in_flight + (ready if self.workers else 0)

    def announce(self, ranges: Sequence[Range]) -> None:
        """Says which `batches` come next, in order: the workers begin, and decode ahead across the ends of ranges.

        One may be left out or come again; then what was decoded ahead is lost, no more.
        """
        self._ranges = [(start, stop) for start, stop in ranges if stop > start]
        self._positions = {asked: i for i, asked in enumerate(self._ranges)}
        self._open_stream(0)

    def wait(self) -> None:
        """Returns when the first of the announced batches is there, or with `workers=0` at once.

        What it takes is the start of the processes, and not counted as `waited_s`.
        """
        if isinstance(self._stream, Ahead):
            self._stream.wait()

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The rows [start, stop) in order, `batch_size` at a time, the last batch smaller."""
        if stop <= start:
            return
        if (start, stop) not in self._positions:
            self.announce([(start, stop)])
        position = self._positions[start, stop]
        if self._due != position:
            self._open_stream(position)
        stream, self._due = self._stream, -1  # until its end nobody else can go on with it
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
        """`bottleneck` for what this loader did in `total_s` seconds of the caller's."""
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
        """The batches from a range on, put together by a thread where there are workers that decode meanwhile."""
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
        if self._pin_for is not None:  # in a new thread it would be the first GPU, whoever uses that
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
            # by NumPy: in a thread of its own, torch would start a pool of threads that compete with the model's
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
            padding_mask(self._geometry, heights, widths),
        )


def padding_mask(geometry: Geometry, heights: NDArray[np.int32], widths: NDArray[np.int32]) -> Tensor | None:
    """bool [B, P] of photos of these sizes: True for patches that are image; None where the resize pads nothing."""
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
    """One sentence: how long the device waited for images, what held it up, and the option that would help.

    `read_s` and `decode_s` are summed over the workers; `cores` are those of this process; `in_job`: it runs on a
    cluster, where a GPU is not at hand.
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

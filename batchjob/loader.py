"""Rows of an index as batches of uint8 tensors, in order, decoded by worker processes."""

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from batchjob.geometry import Geometry
from batchjob.images import RGB, STATUS, ReadFailure, decode
from batchjob.index import ImageIndex


@dataclass(slots=True)
class Batch:
    """Rows in order. Where `status` is not 0 the pixels are anything, and `failures` has a (row, cause, message)."""

    rows: NDArray[np.int64]  # [B]
    pixels: Tensor  # uint8 [B, 3, H, W]
    status: NDArray[np.uint8]  # [B]
    heights: NDArray[np.int32]  # [B], photo's pixels after the EXIF rotation; 0 where it failed
    widths: NDArray[np.int32]
    failures: list[tuple[int, str, str]]


class _Rows(Dataset[Batch]):
    def __init__(self, index: ImageIndex, geometry: Geometry, fill_rgb: RGB, interpolation: str) -> None:
        self.index, self.geometry, self.fill_rgb, self.interpolation = index, geometry, fill_rgb, interpolation

    def __getitem__(self, rows: Any) -> Batch:
        count = len(rows)
        batch = Batch(
            np.fromiter(rows, np.int64, count),
            torch.zeros((count, 3, self.geometry.height, self.geometry.width), dtype=torch.uint8),
            np.zeros(count, np.uint8),
            np.zeros(count, np.int32),
            np.zeros(count, np.int32),
            [],
        )
        for i, row in enumerate(rows):
            try:
                image = decode(self.index.read(row), self.geometry, self.fill_rgb, interpolation=self.interpolation)
            except ReadFailure as failure:
                batch.status[i] = STATUS[failure.cause]
                batch.failures.append((row, failure.cause, failure.message))
                continue
            batch.pixels[i] = torch.from_numpy(image.pixels)
            batch.heights[i], batch.widths[i] = image.height, image.width
        return batch


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
        pin: bool = False,
    ) -> None:
        index.check()
        self.waited_s = 0.0  # of the caller, in `batches`, for images
        self._ranges: list[range] = []
        self._batch_size = batch_size
        self._loader: DataLoader[Batch] = DataLoader(
            _Rows(index, geometry, fill_rgb, interpolation),
            batch_size=None,
            sampler=self._ranges,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin,
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_signals,
        )

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The rows [start, stop) in order, `batch_size` at a time, the last batch smaller."""
        self._ranges[:] = [range(i, min(i + self._batch_size, stop)) for i in range(start, stop, self._batch_size)]
        stream = iter(self._loader)
        while True:
            began = time.perf_counter()
            batch = next(stream, None)
            self.waited_s += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def close(self) -> None:
        """Ends the workers."""
        self._loader._iterator = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    # a scheduler signals every process of a step; the workers go on until the loop has stored its batch
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

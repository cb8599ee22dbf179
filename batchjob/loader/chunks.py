"""Reads and decodes chunks of rows in one process, and notes meanwhile which row it has in hand."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from batchjob.codes import STATUS
from batchjob.data.decode import RGB, decode
from batchjob.data.index import ImageIndex
from batchjob.data.reading import ReadFailure
from batchjob.geometry import Geometry
from batchjob.loader import jpeg
from batchjob.loader.shared_pixels import PixelPool

Range = tuple[int, int]  # rows [start, stop)
RETRIED = ("missing", "unreadable")  # causes that may pass, if a network disk is the reason
RETRY_AFTER_S = (0.05, 0.25)  # one wait before each further try


@dataclass(slots=True)
class Chunk:
    """What is known of n consecutive rows. Their pixels are in the pool's `slot`; those of a failed row are zeros."""

    start: int  # the first row
    slot: int
    status: NDArray[np.uint8]  # [n] codes of `STATUS`
    heights: NDArray[np.int32]  # [n] pixels after the EXIF rotation; 0 for a failed row
    widths: NDArray[np.int32]
    failures: list[tuple[int, str, str]] = field(default_factory=list)  # row, cause, message
    read_s: float = 0.0  # of all rows together
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """Where rows are read, and how they are decoded: the last three fields are arguments of `decode`."""

    index: ImageIndex
    geometry: Geometry
    fill_rgb: RGB
    interpolation: str


class Rows(Dataset[Chunk]):
    """The dataset of the workers: the item (start, stop, slot) decodes rows [start, stop) into a slot of the pool."""

    def __init__(self, recipe: Recipe, pool: PixelPool, given_up: dict[int, tuple[str, str]], marks: Any) -> None:
        """Takes over what every item needs.

        Parameters
        ----------
        recipe
            Where rows are read, and how they are decoded.
        pool
            Memory for the pixels.
        given_up
            Row → (cause, message), for the rows that fail without another try.
        marks
            Shared array of three numbers for each worker: its pid, the row in hand (−1 for none), and since when on the
            monotonic clock. None in the job's own process.
        """
        self._recipe, self._pool, self._given_up, self._marks = recipe, pool, given_up, marks

    def __getitem__(self, rows: Any) -> Chunk:
        start, stop, slot = rows
        count = stop - start
        chunk = Chunk(
            start,
            slot,
            np.zeros(count, np.uint8),
            np.zeros(count, np.int32),
            np.zeros(count, np.int32),
        )
        failed = self._fill_all(chunk, range(count))
        for wait_s in RETRY_AFTER_S:  # a network disk may be gone for a moment; one wait serves the whole chunk
            again = [i for i, failure in failed.items() if failure.cause in RETRIED and start + i not in self._given_up]
            if again:
                time.sleep(wait_s)
                failed = {i: f for i, f in failed.items() if i not in again} | self._fill_all(chunk, again)
        for i, failure in sorted(failed.items()):
            self._pool.pixels[slot, i] = 0
            chunk.status[i] = STATUS[failure.cause]
            chunk.failures.append((start + i, failure.cause, failure.message))
        self._mark(-1)
        return chunk

    def _fill_all(self, chunk: Chunk, places: Iterable[int]) -> dict[int, ReadFailure]:
        """Fills these places of a chunk, and returns the failures by place."""
        failed = {}
        for i in places:
            try:
                self._mark(chunk.start + i)
                self._fill(chunk, i)
            except ReadFailure as failure:
                failed[i] = failure
        return failed

    def _fill(self, chunk: Chunk, i: int) -> None:
        recipe, row = self._recipe, chunk.start + i
        if row in self._given_up:
            raise ReadFailure(*self._given_up[row])
        began = time.perf_counter()
        try:
            data = recipe.index.read(row)
        finally:
            chunk.read_s += (read := time.perf_counter()) - began
        try:
            image = decode(data, recipe.geometry, recipe.fill_rgb, interpolation=recipe.interpolation, accelerate=jpeg)
            self._pool.pixels[chunk.slot, i] = torch.from_numpy(image.pixels)
        finally:
            chunk.decode_s += time.perf_counter() - read
        chunk.heights[i], chunk.widths[i] = image.height, image.width

    def _mark(self, row: int) -> None:
        """Notes which row this worker has in hand, and since when."""
        info = get_worker_info()
        if self._marks is not None and info is not None:
            self._marks[3 * info.id : 3 * info.id + 3] = [os.getpid(), row, time.monotonic()]

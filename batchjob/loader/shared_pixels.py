"""Memory for decoded images that workers fill and the job reads, so that pixels need not go through a pipe."""

import math
import mmap
import os
import weakref
from multiprocessing import reduction
from typing import Any

import torch


class PixelPool:
    """Holds `pixels`, uint8 [slots, rows, 3, H, W], zeros at first, in memory that all processes with the pool share.

    The memory has no name and is not in /dev/shm, whose size containers limit. It is freed with the last process.
    """

    def __init__(self, shape: tuple[int, ...], descriptor: int | None = None) -> None:
        """Makes a new pool, or joins one of another process.

        Parameters
        ----------
        shape
            (slots, rows, 3, H, W).
        descriptor
            Of the memory of a pool of this shape, which this one takes over and closes; None makes new memory.
        """
        self._shape = shape
        size = math.prod(shape)
        if descriptor is None:
            descriptor = os.memfd_create("pixels")
            os.ftruncate(descriptor, size)
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.pixels = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8).view(shape)

    def __reduce__(self) -> Any:
        return _receive, (self._shape, reduction.DupFd(self._descriptor))


def _receive(shape: tuple[int, ...], descriptor: Any) -> PixelPool:
    return PixelPool(shape, descriptor.detach())

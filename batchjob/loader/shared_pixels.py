"""Memory for decoded images that workers fill and the job reads, so that no pixel goes through a pipe."""

import math
import mmap
import os
import weakref
from multiprocessing import reduction
from typing import Any

import torch


class PixelPool:
    """`pixels`, uint8 [slots, rows, 3, H, W], at first zeros, the same memory in every process that gets the pool.

    The memory has no name and no place in /dev/shm, whose size containers limit, and goes with its last process.
    """

    def __init__(self, shape: tuple[int, ...], descriptor: int | None = None) -> None:
        """`descriptor` is of another process's pool of that shape, and is taken over."""
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

"""The arrays of some images of a run, as they are read for `stats`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Part:
    """The arrays of n images; None for an array that the run lacks, or that was not asked for.

    M algorithms, L layers, H heads, P patches, R repeats.
    """

    start: int  # the first image's row
    status: NDArray[np.uint8]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    labels: NDArray[np.uint8] | None  # [n, M, L, H, P]
    k: NDArray[np.uint8] | None  # [n, M, L, H]
    repeats: NDArray[np.uint8] | None  # [n, M, L, H, R, P]
    maps: NDArray[np.float32] | None  # [n, L, H, P]
    prefix_mass: NDArray[np.float32]  # [n, L, H]
    scores: Mapping[str, NDArray[np.float32]]  # [n, L, H] each; those that labelling computed
    instance: NDArray[np.int16] | None = None  # [n, P] which of the image's annotations owns each patch; −1 for none
    category: NDArray[np.int32] | None = None  # [n, P] the category of that annotation; −1 for none
    settled: NDArray[np.bool_] | None = None  # [n, M, L, H] whether the best partition was found from two starts

    def pick(self, rows: NDArray[np.integer[Any]]) -> "Part":
        """Returns the images at some rows of this part, in their order, without scores and `settled`."""
        own: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        chosen: dict[str, Any] = {name: None if v is None else v[rows] for name, v in own.items()}
        return Part(start=self.start, scores={}, **chosen)


_FIELDS = ("status", "height", "width", "labels", "k", "repeats", "maps", "prefix_mass", "instance", "category")


def join(parts: list[Part]) -> Part:
    """Returns the images of several parts, one part after the other, without scores and `settled`."""
    joined = {n: [getattr(p, n) for p in parts] for n in _FIELDS}
    whole: dict[str, Any] = {n: None if v[0] is None else np.concatenate(v) for n, v in joined.items()}
    return Part(start=parts[0].start, scores={}, **whole)

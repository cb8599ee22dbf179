"""The arrays of some images of a run, as they are read for `stats`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
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
        """Returns the images at some rows of this part, in their order."""
        return _made_of([self], lambda arrays: arrays[0][rows])


def join(parts: list[Part]) -> Part:
    """Returns the images of several parts, one part after the other."""
    return _made_of(parts, np.concatenate)


def _made_of(parts: list[Part], make: Callable[[list[NDArray[Any]]], NDArray[Any]]) -> Part:
    """Makes each array of a part from those of the parts, which have the same ones."""
    names = [field.name for field in fields(Part) if field.name not in ("start", "scores")]
    arrays = {name: [getattr(part, name) for part in parts] for name in names}
    made: dict[str, Any] = {name: None if values[0] is None else make(values) for name, values in arrays.items()}
    scores = {name: make([part.scores[name] for part in parts]) for name in parts[0].scores}
    return Part(start=parts[0].start, scores=scores, **made)

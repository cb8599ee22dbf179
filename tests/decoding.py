"""Helpers for the tests of decoding: a small input, a fill colour, and three ways to look at the result."""

import numpy as np
import pytest

from batchjob.codes import STATUS
from batchjob.data.decode import decode
from batchjob.data.reading import ReadFailure
from batchjob.geometry import Geometry

SQUARE = Geometry(56, 56, 14, 14)
FILL = (10, 200, 30)


def cause_of(data, geometry=SQUARE, **options) -> str:
    with pytest.raises(ReadFailure) as failure:
        decode(data, geometry, FILL, **options)
    assert failure.value.cause in STATUS
    assert failure.value.message
    assert "\n" not in failure.value.message
    return failure.value.cause


def colour(data, **options):
    """Returns the mean of a picture, and checks that the picture is flat."""
    pixels = decode(data, SQUARE, FILL, **options).pixels.reshape(3, -1).astype(int)
    assert np.ptp(pixels, axis=1).max() <= 4
    return pixels.mean(1).round().tolist()


def outcome(data, geometry, fast, filter="bicubic"):
    """Returns the pixels, or the number of the cause of the failure."""
    try:
        return decode(data, geometry, FILL, interpolation=filter, accelerate=fast).pixels
    except ReadFailure as failure:
        return np.full(1, STATUS[failure.cause], np.uint8)

"""Compiled functions: numba's `njit` without the interpreter's lock, with a cache on disk wherever one can be kept."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")
# Sums may be taken in another order than written; NaN and infinity stay what they are.
MATH = {"contract", "reassoc", "nsz", "arcp"}


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function in machine code, compiled for each type of argument at its first call.

    The code is kept beside the source, else in the user's cache folder. Where neither can be written (a read-only
    installation and home), every process compiles for itself.
    """
    try:
        return cast(Callable[P, R], numba.njit(function, cache=True, nogil=True, fastmath=MATH))
    except RuntimeError:  # numba found no folder for its cache
        return cast(Callable[P, R], numba.njit(function, nogil=True, fastmath=MATH))

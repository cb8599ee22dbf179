"""Compiled functions: numba's `njit` without the interpreter's lock, with a cache on disk wherever one can be kept."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")
# Sums may be taken in another order than written; NaN and infinity stay what they are.
_FLAGS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",  # no test for 0 before a division
    "fastmath": {"contract", "reassoc", "nsz", "arcp"},
}


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function in machine code, compiled for each type of argument at its first call.

    The code is kept beside the source, else in the user's cache folder. Where neither can be written (a read-only
    installation and home), every process compiles for itself. numba looks at the age of this one source file only: a
    compiled function must call no compiled function of another file.
    """
    try:
        return cast(Callable[P, R], numba.njit(function, cache=True, **_FLAGS))
    except RuntimeError:  # numba found no folder for its cache
        return cast(Callable[P, R], numba.njit(function, **_FLAGS))


def inner(function: Callable[P, R]) -> Callable[P, R]:
    """The same for a function that only compiled functions call: it is part of their code, and cached with it."""
    return cast(Callable[P, R], numba.njit(function, no_cpython_wrapper=True, **_FLAGS))

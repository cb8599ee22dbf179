"""Functions compiled by numba: without the interpreter's lock, and cached on disk where a cache can be kept."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")
# The compiler may add in another order than written; NaN and infinity keep their meaning.
_FLAGS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",  # no test for 0 before a division
    "fastmath": {"contract", "reassoc", "nsz", "arcp"},
}


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles a function to machine code, for each type of argument at its first call.

    The code is kept beside the source, else in the user's cache folder. Where neither folder can be written, every
    process compiles for itself. numba compares the cache only with the age of the function's own source file: after a
    change to a function of another file that it calls (`draws`), the cache has to be removed.
    """
    try:
        return cast(Callable[P, R], numba.njit(function, cache=True, **_FLAGS))
    except RuntimeError:  # numba found no folder for its cache
        return cast(Callable[P, R], numba.njit(function, **_FLAGS))


def inner(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles a function that only compiled functions call: it becomes part of their code, and is cached with it."""
    return cast(Callable[P, R], numba.njit(function, no_cpython_wrapper=True, **_FLAGS))

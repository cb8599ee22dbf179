"""Functions compiled by numba: without the interpreter's lock, and cached on disk where a cache can be kept."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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
    process compiles for itself. A change to any file that holds compiled functions lets all be compiled anew.
    """
    with _cache_of_these_sources():
        try:
            return cast(Callable[P, R], numba.njit(function, cache=True, **_FLAGS))
        except RuntimeError:  # numba found no folder for its cache
            return cast(Callable[P, R], numba.njit(function, **_FLAGS))


def inner(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles a function that only compiled functions call: it becomes part of their code, and is cached with it."""
    return cast(Callable[P, R], numba.njit(function, no_cpython_wrapper=True, **_FLAGS))


@contextmanager
def _cache_of_these_sources() -> Iterator[None]:
    """Lets numba keep what is decorated inside in a folder that is named by the contents of all compiled files.

    By itself numba looks only at the age of a function's own file, and would go on with old code where a function of
    another file that it calls (`draws`) has changed.
    """
    given, beside = numba.config.CACHE_DIR, Path(__file__).parent
    if given or os.access(beside, os.W_OK):
        numba.config.CACHE_DIR = str(Path(given or beside / "__pycache__") / f"batchjob-{_digest()}")
    try:
        yield
    finally:
        numba.config.CACHE_DIR = given


@functools.cache
def _digest() -> str:
    """A hash of every file of this package that holds compiled functions."""
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    holding = [text for text in texts if b"from batchjob.clustering.jit import" in text]
    return hashlib.sha256(b"".join(holding)).hexdigest()[:16]

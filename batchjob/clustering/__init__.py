"""Clusters of attention rows: engines that compute k-means behind one protocol, and algorithms on top of them.

N problems of P rows go in and labels come out; nothing here knows of images or stores. `search` does without torch: it
takes NumPy arrays and gives near-optimal k-means.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchjob.clustering.algorithms import cluster
    from batchjob.clustering.base import Clusters, Engine, problem_seeds
    from batchjob.clustering.engines import find_engine, open_engine

__all__ = ["Clusters", "Engine", "cluster", "find_engine", "open_engine", "problem_seeds"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: most of them bring torch, which `search` does without."""
    if name in __all__:
        for module in ("base", "algorithms", "engines"):
            found = vars(importlib.import_module(f"{__name__}.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

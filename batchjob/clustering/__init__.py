"""Clusters of attention rows: one narrow protocol, several engines behind it, several algorithms on top.

Nothing here knows of images or stores: N problems of P rows go in, labels come out. `search` needs no torch: NumPy
arrays in, near-optimal k-means out.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchjob.clustering.algorithms import cluster
    from batchjob.clustering.base import Clusters, Engine, problem_seeds
    from batchjob.clustering.engines import find_engine, open_engine

__all__ = ["Clusters", "Engine", "cluster", "find_engine", "open_engine", "problem_seeds"]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for: most bring torch, which `search` does without."""
    if name in __all__:
        for module in ("base", "algorithms", "engines"):
            found = vars(importlib.import_module(f"{__name__}.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

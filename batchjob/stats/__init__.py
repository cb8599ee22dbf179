"""Tables over a run: scores of attention and its clusters, null models, intervals, and what they say in words.

The scores themselves are plain NumPy functions in `batchjob.metrics`, and docs/metrics.md defines them. The package
itself can be called: `batchjob.stats("runs/a")` calls `frames.stats`.
"""

import sys
import types
from typing import Any

from batchjob.stats.frames import stats
from batchjob.stats.run import run_stats

__all__ = ["run_stats", "stats"]


class _Callable(types.ModuleType):
    """Makes the package callable. Importing the package `batchjob.stats` would replace a function of that name."""

    def __call__(self, *runs: Any, **options: Any) -> Any:
        return stats(*runs, **options)


sys.modules[__name__].__class__ = _Callable

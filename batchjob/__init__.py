"""Clusters the self-attention of vision transformers, head by head, over a whole data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchjob.codes import VERSION

if TYPE_CHECKING:
    from batchjob.api import attention, cluster, open, plot, run
    from batchjob.stats.frames import stats

__all__ = ["attention", "cluster", "open", "plot", "run", "stats"]
__version__ = VERSION


def __getattr__(name: str) -> Any:
    """Imports `batchjob.api` or `batchjob.stats` when one of their functions is first asked for."""
    if name == "stats":  # the package itself, which can be called: importing it later would replace a function
        import batchjob.stats

        return batchjob.stats
    if name in __all__:
        from batchjob import api

        return getattr(api, name)
    raise AttributeError(f"module 'batchjob' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

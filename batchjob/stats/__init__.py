"""Scores of attention and its clusters, null models, intervals: plain NumPy functions, and `run_stats` for a run.

Nothing here knows a device: a score takes arrays and gives arrays, so that each can be used by itself. The definitions
are in docs/metrics.md. The package itself can be called: `batchjob.stats("runs/a")` is `frames.stats`.
"""

import sys
import types
from typing import Any

from batchjob.metrics.agreement import ami, ari, contingency
from batchjob.metrics.attention import attention_scores, draw_pairs, group_auc, pair_scores
from batchjob.metrics.clusters import (
    agreement,
    cluster_sizes,
    coherence,
    image_ari,
    instance_pairs,
    instance_scores,
    pair_ari,
)
from batchjob.metrics.nulls import locality_rows, position_labels, shuffle
from batchjob.metrics.saliency import corloc, jaccard, mass_mask, normalise, saliency_scores
from batchjob.metrics.uncertainty import first_half, holm, interval, sign_flip
from batchjob.stats.frames import stats
from batchjob.stats.run import run_stats

__all__ = [
    "agreement",
    "ami",
    "ari",
    "attention_scores",
    "cluster_sizes",
    "coherence",
    "contingency",
    "corloc",
    "draw_pairs",
    "first_half",
    "group_auc",
    "holm",
    "image_ari",
    "instance_pairs",
    "instance_scores",
    "interval",
    "jaccard",
    "locality_rows",
    "mass_mask",
    "normalise",
    "pair_ari",
    "pair_scores",
    "position_labels",
    "run_stats",
    "saliency_scores",
    "shuffle",
    "sign_flip",
    "stats",
]


class _Callable(types.ModuleType):
    """A module that is also the function of its name: an import of `batchjob.stats` would replace a plain function."""

    def __call__(self, *runs: Any, **options: Any) -> Any:
        return stats(*runs, **options)


sys.modules[__name__].__class__ = _Callable

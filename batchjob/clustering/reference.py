"""k-means by scikit-learn, one problem after the other: the answers with which other engines are compared."""

import functools
import warnings

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from batchjob.clustering.base import Clusters, solve_one_by_one

AUTO_STARTS = 100


class ReferenceEngine:
    """k-means by `sklearn.cluster.KMeans` on the CPU, to a fixed point (tol = 0)."""

    name = "sklearn"

    def kmeans(
        self, x: Tensor, k: Tensor, seeds: Tensor, *, n_init: int, mask: Tensor | None = None, checks: bool = True
    ) -> Clusters:
        """Clusters each problem; the rows are copied to the CPU and the labels back.

        Parameters
        ----------
        x, k, seeds, n_init, mask, checks
            As in `Engine.kmeans`; it always checks.

        Returns
        -------
        The clusters; `settled` is False.
        """
        solve = functools.partial(_solve, n_init=n_init or AUTO_STARTS)
        return solve_one_by_one(x, k, seeds, mask, solve=solve)


def _solve(x: Tensor, k: int, seed: int, n_init: int) -> tuple[Tensor, float]:
    rows = x.float().cpu().numpy()
    most = np.abs(rows).max()
    scale = 1.0 if most == 0 else float(2.0 ** -np.frexp(most)[1])  # a power of two rounds nothing
    rows = rows * np.float32(scale)
    k = min(k, len(np.unique(rows, axis=0)))
    fit = KMeans(k, n_init=n_init, tol=0, random_state=np.random.RandomState(seed & 0xFFFFFFFF))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # of nearly equal rows: `k` says how many clusters there are
        fit.fit(rows)
    return torch.from_numpy(fit.labels_), fit.inertia_ / scale**2

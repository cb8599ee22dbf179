"""scikit-learn, one problem after the other: the oracle that the other engines are held against."""

import warnings

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from batchjob.clustering.base import Clusters, check_finite, check_shapes, number_by_appearance
from batchjob.codes import NO_LABEL

AUTO_STARTS = 100


class ReferenceEngine:
    """k-means by `sklearn.cluster.KMeans`, on the CPU, to a fixed point (tol = 0)."""

    name = "sklearn"

    def kmeans(
        self, x: Tensor, k: Tensor, seeds: Tensor, *, n_init: int, mask: Tensor | None = None, checks: bool = True
    ) -> Clusters:
        """See `Engine.kmeans`. Data on another device is copied to the CPU and the labels back."""
        check_shapes(x, k, seeds, mask)
        check_finite(x, mask)
        n, p, _ = x.shape
        labels = np.full((n, p), NO_LABEL, np.uint8)
        inertia = np.zeros(n, np.float32)
        rows = x.float().cpu().numpy()
        valid = None if mask is None else mask.cpu().numpy()
        for i, (wanted, seed) in enumerate(zip(k.tolist(), seeds.tolist(), strict=True)):
            keep = slice(None) if valid is None else valid[i]
            if len(rows[i, keep]):
                labels[i, keep], inertia[i] = _solve(rows[i, keep], wanted, seed, n_init or AUTO_STARTS)
        numbered, found = number_by_appearance(torch.from_numpy(labels).to(x.device), NO_LABEL - 1)
        unknown = torch.zeros(n, dtype=torch.bool, device=x.device)  # it does not tell the starts apart
        return Clusters(numbered, torch.from_numpy(inertia).to(x.device), found, unknown)


def _solve(rows: np.ndarray, k: int, seed: int, n_init: int) -> tuple[np.ndarray, float]:
    most = np.abs(rows).max()
    scale = 1.0 if most == 0 else float(2.0 ** -np.frexp(most)[1])  # a power of two rounds nothing
    rows = rows * np.float32(scale)
    k = min(k, len(np.unique(rows, axis=0)))
    fit = KMeans(k, n_init=n_init, tol=0, random_state=np.random.RandomState(seed & 0xFFFFFFFF))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near-duplicates: fewer clusters, which `k` reports
        fit.fit(rows)
    return fit.labels_, fit.inertia_ / scale**2

"""k-means in machine code on the CPU, behind the engines' protocol."""

import numpy as np
import torch
from torch import Tensor

from batchjob.clustering.base import Clusters
from batchjob.clustering.search import best_partitions
from batchjob.codes import NO_LABEL


class CompiledEngine:
    """Near-optimal k-means on the CPU (`search`), on as many threads as torch may use; the default on a CPU."""

    name = "compiled"

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
        The clusters.
        """
        found = best_partitions(
            (x if x.dtype == torch.float64 else x.float()).detach().cpu().numpy(),
            k.cpu().numpy(),
            seeds.cpu().numpy(),
            n_init=n_init,
            mask=None if mask is None else mask.cpu().numpy(),
            threads=torch.get_num_threads(),
        )
        inside = np.where(found.labels == NO_LABEL, -1, found.labels.astype(np.int16))
        clusters = torch.from_numpy((inside.max(axis=1, initial=-1) + 1).astype(np.uint8))
        labels, inertia = torch.from_numpy(found.labels), torch.from_numpy(found.inertia).float()
        settled = torch.from_numpy(found.settled)
        return Clusters(*(part.to(x.device) for part in (labels, inertia, clusters, settled)))

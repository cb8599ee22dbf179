"""From one layer's maps to the scores of `--scores`: padding, failures and instances of each image looked up."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from batchjob.data.instances import GridInstances
from batchjob.job.clusters import patch_mask
from batchjob.loader.loader import Batch
from batchjob.metrics.on_device import LocalitySums, attention_scores, pair_scores
from batchjob.model.attention import LayerMaps, renormalise
from batchjob.plan import Plan


class Scorer:
    """Scores batches on the device, and sums each partition's attention by offset; does nothing if none were asked."""

    def __init__(self, plan: Plan, run: Path, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self._instances = GridInstances.load(run / "index") if "pairs" in plan.options.score_groups else None
        self._sums = self._new_sums()

    def __call__(self, layer: int, maps: LayerMaps, batch: Batch) -> dict[str, NDArray[np.float32]]:
        """name -> [B, H]; `layer` is a position. Failed images score anything."""
        groups = self._plan.options.score_groups
        if self._sums is None:
            return {}
        grid, mask = self._plan.model.grid, patch_mask(self._plan, batch)
        rows = renormalise(maps.rows, None if mask is None else mask.to(self._device))
        keep = torch.ones(rows.shape[0], rows.shape[2], dtype=torch.bool) if mask is None else mask
        usable = (keep & torch.from_numpy(batch.status == 0)[:, None]).to(self._device) & maps.finite[:, None]
        self._sums.add(layer, rows, usable)
        found: dict[str, torch.Tensor] = {}
        if "attention" in groups:
            found |= attention_scores(rows, grid, None if mask is None else mask.to(self._device))
        if self._instances is not None:
            sizes = zip(batch.heights, batch.widths, strict=True)
            pairs = [
                self._instances.pairs(int(row), (int(h), int(w)), seed=self._plan.options.seed)
                for row, (h, w) in zip(batch.rows, sizes, strict=True)
            ]
            found |= pair_scores(rows, pairs, grid)
        values = torch.stack(list(found.values())).cpu().numpy()  # one copy for all
        return dict(zip(found, values, strict=True))

    def partition_sums(self) -> dict[str, NDArray[Any]]:
        """`locality_sum` and `locality_count` of what was scored since the last call, [1, L, …] each."""
        if self._sums is None:
            return {}
        arrays = self._sums.arrays()
        self._sums = self._new_sums()
        return {name: values[None] for name, values in arrays.items()}

    def _new_sums(self) -> LocalitySums | None:
        plan = self._plan
        if not plan.options.score_groups:
            return None
        return LocalitySums(len(plan.layers), len(plan.heads), plan.model.grid, self._device)

"""From one layer's attention to the scores of `--scores`: failures and instances of each image looked up."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchjob.data.instances import GridInstances
from batchjob.loader.loader import Batch
from batchjob.metrics.attention import PatchPairs, draw_pairs
from batchjob.metrics.on_device import LocalitySums, attention_scores, pair_scores
from batchjob.plan import Plan


class Scorer:
    """Scores batches on the device, and sums each partition's attention by offset; does nothing if none were asked."""

    def __init__(self, plan: Plan, run: Path, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self._instances = GridInstances.load(run / "index") if "pairs" in plan.options.score_groups else None
        self._sums = self._new_sums()

    def __call__(self, layer: int, rows: Tensor, finite: Tensor, batch: Batch) -> dict[str, NDArray[np.float32]]:
        """name -> [B, H] of rows [B, H, P, P] that sum to 1; `layer` is a position. Failed images score anything."""
        groups, grid = self._plan.options.score_groups, self._plan.model.grid
        if self._sums is None:
            return {}
        good = torch.from_numpy(batch.status == 0).to(self._device) & finite
        keep = torch.ones(rows.shape[0], rows.shape[2], dtype=torch.bool, device=self._device)
        self._sums.add(layer, rows, (keep if batch.mask is None else batch.mask) & good[:, None])
        found: dict[str, Tensor] = {}
        if "attention" in groups:
            found |= attention_scores(rows, grid, batch.mask)
        if self._instances is not None:
            sizes = zip(batch.heights, batch.widths, strict=True)
            pairs = [
                pairs_of(self._instances, int(row), (int(h), int(w)), seed=self._plan.options.seed)
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


def pairs_of(instances: GridInstances, row: int, size: tuple[int, int], *, seed: int) -> PatchPairs:
    """The drawn pairs of patches of an image; none where its (height, width) is not the one that was annotated."""
    category = instances.category[instances.start[row] : instances.start[row + 1]]
    if tuple(instances.size[row]) != size:
        category = category[:0]
    return draw_pairs(instances.owner[row], category, row=row, seed=seed)

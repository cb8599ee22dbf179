"""From one layer's attention to the scores of `--scores`: failures and instances of each image looked up."""

import functools
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchjob.data.instances import GridInstances
from batchjob.geometry import Geometry
from batchjob.loader.loader import Batch
from batchjob.metrics.attention import MAX_PAIRS, PatchPairs, draw_pairs
from batchjob.metrics.nulls import Donors
from batchjob.metrics.on_device import attention_scores, pair_scores
from batchjob.plan import Plan

_CACHED_DRAWINGS = 8192  # of photos that lend their objects: some 10 kB each
LENT_PAIRS = (
    200  # of each kind and category of a photo that lends: 20 photos of 2,000 would cost 25 times the own pairs
)


class Scorer:
    """Scores batches on the device; does nothing if no scores were asked."""

    def __init__(self, plan: Plan, run: Path, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self._pairs: DrawnPairs | None = None
        if "pairs" in plan.options.score_groups:
            self._pairs = DrawnPairs(GridInstances.load(run / "index"), plan.geometry, plan.options.seed)

    def __call__(self, layer: int, rows: Tensor, finite: Tensor, batch: Batch) -> dict[str, NDArray[np.float32]]:
        """name -> [B, H] of rows [B, H, P, P] that sum to 1; `layer` is a position. Failed images score anything."""
        found: dict[str, Tensor] = {}
        if "attention" in self._plan.options.score_groups:
            found |= attention_scores(rows, self._plan.model.grid, batch.mask)
        if self._pairs is not None:
            found |= self._score_pairs(self._pairs, rows, batch)
        if not found:
            return {}
        values = torch.stack(list(found.values())).cpu().numpy()  # one copy for all
        return dict(zip(found, values, strict=True))

    def _score_pairs(self, drawn: "DrawnPairs", rows: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The scores over each image's own pairs, and as `.swap` their mean over the pairs of other photos."""
        keep = None if batch.mask is None else batch.mask.cpu().numpy()
        pairs: list[PatchPairs] = []
        lent: list[PatchPairs] = []
        image: list[int] = []
        for i, row in enumerate(int(r) for r in batch.rows):
            inside = None if keep is None else keep[i]
            pairs.append(drawn.own(row, (int(batch.heights[i]), int(batch.widths[i])), inside))
            others = drawn.lent(row, inside) if len(pairs[-1].group) else []
            lent += others
            image += [i] * len(others)
        found = pair_scores(rows, pairs, self._plan.model.grid)
        swapped = pair_scores(rows, lent, self._plan.model.grid, image)
        where = torch.as_tensor(image, device=rows.device, dtype=torch.long)
        for name in ("pair_auc", "pair_auc_matched"):
            found[f"{name}.swap"] = _mean_known_by(swapped[name], where, len(pairs))
        return found


class DrawnPairs:
    """The pairs of patches that each image, and the photos that lend their objects to it, are scored on."""

    def __init__(self, instances: GridInstances, geometry: Geometry, seed: int) -> None:
        self._instances, self._seed = instances, seed
        counts = np.diff(instances.start)
        twins = [len(np.unique(c)) < len(c) for c in np.split(instances.category, instances.start[1:-1])]
        shapes = [geometry.content_shape(int(h), int(w)) for h, w in instances.size]
        self._donors = Donors(counts, np.array(twins, bool), np.array(shapes, np.int64), seed=seed)
        self._lent = functools.lru_cache(_CACHED_DRAWINGS)(functools.partial(self._draw, limit=LENT_PAIRS))

    def own(self, row: int, size: tuple[int, int], keep: NDArray[np.bool_] | None) -> PatchPairs:
        """The pairs of an image; none where its (height, width) is not the one that was annotated."""
        if tuple(self._instances.size[row]) != size:
            return draw_pairs(self._instances.owner[row], self._instances.category[:0], row=row, seed=self._seed)
        return _within(self._draw(row), keep)

    def lent(self, row: int, keep: NDArray[np.bool_] | None) -> list[PatchPairs]:
        """The pairs of each photo that lends its objects to an image."""
        return [_within(self._lent(int(other)), keep) for other in self._donors.of(row)]

    def _draw(self, row: int, limit: int = MAX_PAIRS) -> PatchPairs:
        category = self._instances.category[self._instances.start[row] : self._instances.start[row + 1]]
        return draw_pairs(self._instances.owner[row], category, row=row, seed=self._seed, limit=limit)


def _within(pairs: PatchPairs, keep: NDArray[np.bool_] | None) -> PatchPairs:
    """The pairs whose patches are both in `keep`: those of padding take part in nothing."""
    if keep is None:
        return pairs
    inside = keep[pairs.first] & keep[pairs.second]
    kept = [g for g in np.unique(pairs.group) if len(np.unique(pairs.same[inside & (pairs.group == g)])) == 2]
    inside &= np.isin(pairs.group, kept)
    group = np.searchsorted(kept, pairs.group[inside])
    return PatchPairs(pairs.first[inside], pairs.second[inside], pairs.same[inside], group)


def _mean_known_by(values: Tensor, image: Tensor, count: int) -> Tensor:
    """[count, H]: mean of the finite values [n, H] of each image; NaN where it has none."""
    known = torch.isfinite(values)
    shape = (count, values.shape[1])
    # in float64, in the drawings' own order on a CPU: one image's sum does not depend on what else is in the batch
    total = torch.zeros(shape, dtype=torch.float64, device=values.device)
    total.index_add_(0, image, torch.where(known, values, 0.0).double())
    number = torch.zeros_like(total).index_add_(0, image, known.double())
    return torch.where(number > 0, total / number.clamp_min(1), torch.nan).float()

"""From one layer's attention to the scores of `--scores`: failures and instances of each image looked up."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchjob.clustering.algorithms import prepare, prepare_vectors
from batchjob.clustering.from_labels import settle
from batchjob.data.instances import GridInstances
from batchjob.job.lent import LentObjects, Owned
from batchjob.loader.loader import Batch
from batchjob.metrics.attention import PatchPairs
from batchjob.metrics.on_device import attention_scores, instance_ari, pair_scores
from batchjob.metrics.truth import clusters_of
from batchjob.plan import Plan


class Scorer:
    """Scores batches on the device; does nothing if no scores were asked."""

    def __init__(self, plan: Plan, run: Path, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self._objects: LentObjects | None = None
        if "pairs" in plan.options.score_groups:
            self._objects = LentObjects(GridInstances.load(run / "index"), plan.geometry, plan.options.seed)

    def __call__(self, layer: int, rows: Tensor, finite: Tensor, batch: Batch) -> dict[str, NDArray[np.float32]]:
        """name -> [B, H] of what is clustered, rows [B, H, P, P] that sum to 1 or vectors [B, H, P, D].

        `layer` is a position. Failed images score anything.
        """
        are_vectors = self._plan.vector_size > 0
        found: dict[str, Tensor] = {}
        if "attention" in self._plan.options.score_groups:
            found |= attention_scores(rows, self._plan.model.grid, batch.mask)
        if self._objects is not None:
            if not are_vectors:
                found |= self._score_pairs(self._objects, rows, batch)
            found |= self._score_truth(self._objects, rows, batch, are_vectors=are_vectors)
        if not found:
            return {}
        values = torch.stack(list(found.values())).cpu().numpy()  # one copy for all
        return dict(zip(found, values, strict=True))

    def _score_pairs(self, objects: LentObjects, rows: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The scores over each image's own pairs, and as `.swap` their mean over the pairs of other photos."""
        pairs: list[PatchPairs] = []
        lent: list[PatchPairs] = []
        image: list[int] = []
        for i, (row, size, inside) in enumerate(_images(batch)):
            pairs.append(objects.own_pairs(row, size, inside))
            others = objects.lent_pairs(row, inside) if len(pairs[-1].group) else []
            lent += others
            image += [i] * len(others)
        found = pair_scores(rows, pairs, self._plan.model.grid)
        swapped = pair_scores(rows, lent, self._plan.model.grid, image)
        for name in ("pair_auc", "pair_auc_matched"):
            found[f"{name}.swap"] = _mean_known_by(swapped[name], image, len(pairs))
        return found

    def _score_truth(self, objects: LentObjects, rows: Tensor, batch: Batch, *, are_vectors: bool) -> dict[str, Tensor]:
        """`instance_ari_truth`, and as `.swap` its mean over starts from the objects of other photos."""
        found = torch.full((2, *rows.shape[:2]), torch.nan, device=rows.device)
        which: list[int] = []
        owned: list[list[Owned]] = []  # of each of these images: its own objects, then those lent to it
        keeps: list[NDArray[np.bool_] | None] = []
        for i, (row, size, inside) in enumerate(_images(batch)):
            own = objects.own(row, size, inside)
            if own.has_twins:
                which.append(i)
                owned.append([own, *(other for other in objects.lent(row, inside) if other.has_twins)])
                keeps.append(inside)
        if which:
            x, mask = rows[which], None if batch.mask is None else batch.mask[which]
            distance = self._plan.options.distance
            if are_vectors:
                x = prepare_vectors(x, distance)
            else:
                problems = None if mask is None else mask.repeat_interleave(x.shape[1], 0)
                x = prepare(x.flatten(0, 1), distance, problems).view_as(x)
            labels = settle(x, _starts(owned, keeps))  # [b, H, S, P]
            image = [i for i, of_image in enumerate(owned) for _ in of_image]
            place = [s for of_image in owned for s in range(len(of_image))]
            flat = [each for of_image in owned for each in of_image]
            scores = instance_ari(
                labels[image, :, place], np.stack([o.owner for o in flat]), [o.category for o in flat]
            )
            is_own = np.array(place) == 0
            found[0, which] = scores[np.flatnonzero(is_own)]
            others = np.flatnonzero(~is_own)
            found[1, which] = _mean_known_by(scores[others], [image[i] for i in others], len(which))
        return dict(zip(("instance_ari_truth", "instance_ari_truth.swap"), found, strict=True))


def _images(batch: Batch) -> list[tuple[int, tuple[int, int], NDArray[np.bool_] | None]]:
    """(row, (height, width), which patches are image or None for all) of each image of a batch."""
    keep = [None] * len(batch.rows) if batch.mask is None else list(batch.mask.cpu().numpy())
    sizes = zip(batch.heights, batch.widths, strict=True)
    return [(int(r), (int(h), int(w)), k) for r, (h, w), k in zip(batch.rows, sizes, keep, strict=True)]


def _starts(owned: Sequence[Sequence[Owned]], keeps: Sequence[NDArray[np.bool_] | None]) -> Tensor:
    """int16 [b, S, P]: each instance a cluster and the rest one; −1 throughout where an image has fewer starts."""
    most, patches = max(len(of_image) for of_image in owned), len(owned[0][0].owner)
    starts = np.full((len(owned), most, patches), -1, np.int16)
    for i, (of_image, keep) in enumerate(zip(owned, keeps, strict=True)):
        for s, each in enumerate(of_image):
            starts[i, s] = clusters_of(each.owner, len(each.category), keep)
    return torch.from_numpy(starts)


def _mean_known_by(values: Tensor, image: Sequence[int], count: int) -> Tensor:
    """[count, H]: mean of the finite values [n, H] of each image; NaN where it has none."""
    where = torch.as_tensor(image, device=values.device, dtype=torch.long)
    known = torch.isfinite(values)
    shape = (count, values.shape[1])
    # in float64, in the drawings' own order on a CPU: one image's sum does not depend on what else is in the batch
    total = torch.zeros(shape, dtype=torch.float64, device=values.device)
    total.index_add_(0, where, torch.where(known, values, 0.0).double())
    number = torch.zeros_like(total).index_add_(0, where, known.double())
    return torch.where(number > 0, total / number.clamp_min(1), torch.nan).float()

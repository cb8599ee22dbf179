"""From what is clustered in one layer to the scores of `--scores`; looks up the objects of each image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchjob.clustering.algorithms import prepare, prepare_vectors
from batchjob.clustering.from_labels import settle
from batchjob.data.instances import GridInstances
from batchjob.job.context import Context
from batchjob.job.lent import LentObjects, Owned
from batchjob.job.upload import DeviceBatch, PairsOfBatch, TruthOfBatch, pinned
from batchjob.metrics.attention import PatchPairs
from batchjob.metrics.nulls import BY_LENDER, SWAPS
from batchjob.metrics.on_device import attention_scores, by_owner, instance_ari, mean_by_owner, pair_scores, twins_of
from batchjob.metrics.pair_table import PairTable, members_of
from batchjob.metrics.truth import clusters_of


class Scorer:
    """Scores batches on the device; does nothing where no scores were asked for."""

    def __init__(self, context: Context) -> None:
        plan = self._plan = context.plan
        self._device = context.device
        self._objects: LentObjects | None = None
        if "pairs" in plan.options.score_groups:
            self._objects = LentObjects(GridInstances.load(context.run / "index"), plan.geometry, plan.options.seed)

    def __call__(self, rows: Tensor, batch: DeviceBatch) -> dict[str, Tensor]:
        """Scores what is clustered in one layer.

        Parameters
        ----------
        rows
            Attention rows [B, H, P, P] that sum to 1, or vectors [B, H, P, D].
        batch
            Their batch, which `prepare` has seen.

        Returns
        -------
        Float32 [B, H] by the score's name; of `SCORE.by_lender`, float16 [B, H, SWAPS]. What an image that failed
        scores is meaningless.
        """
        found: dict[str, Tensor] = {}
        if "attention" in self._plan.options.score_groups:
            found |= attention_scores(rows, self._plan.model.grid, batch.mask)
        if batch.pairs is not None:
            found |= _score_pairs(rows, batch.pairs)
        if self._objects is not None:
            found |= self._score_truth(rows, batch)
        return found

    def prepare(self, batch: DeviceBatch) -> None:
        """Looks up, once for all layers, the objects of a batch's photos and those that other photos lend them."""
        if self._objects is None:
            return
        if self._plan.vector_size == 0:
            batch.pairs = self._pairs_of(self._objects, batch)
        batch.truth = self._truth_of(self._objects, batch)

    def _pairs_of(self, objects: LentObjects, batch: DeviceBatch) -> PairsOfBatch:
        pairs: list[PatchPairs] = []
        lent: list[PatchPairs] = []
        image: list[int] = []
        for i, (row, size, inside) in enumerate(_images(batch)):
            pairs.append(objects.own_pairs(row, size, inside))
            others = objects.lent_pairs(row, inside) if len(pairs[-1].group) else []
            lent += others
            image += [i] * len(others)
        grid, device = self._plan.model.grid, self._device
        return PairsOfBatch(
            PairTable.of(pairs, grid).to(device),
            PairTable.of(lent, grid, image).to(device),
            self._upload(members_of(np.asarray(image, np.int64), len(pairs))),
        )

    def _truth_of(self, objects: LentObjects, batch: DeviceBatch) -> TruthOfBatch | None:
        which: list[int] = []
        owned: list[list[Owned]] = []  # for each of these images: its own objects, then those lent to it
        keeps: list[NDArray[np.bool_] | None] = []
        for i, (row, size, inside) in enumerate(_images(batch)):
            own = objects.own(row, size, inside)
            if own.has_twins:
                which.append(i)
                owned.append([own, *objects.lent(row, inside)])
                keeps.append(inside)
        if not which:
            return None
        flat = [each for of_image in owned for each in of_image]
        place = np.array([s for of_image in owned for s in range(len(of_image))])
        image = np.array([i for i, of_image in enumerate(owned) for _ in of_image])
        starts = _starts(owned, keeps)
        return TruthOfBatch(
            clusters=int(starts.max()) + 1,
            which=self._upload(np.array(which)),
            starts=pinned(torch.from_numpy(starts), self._device),
            image=self._upload(image),
            place=self._upload(place),
            owner=self._upload(np.stack([o.owner for o in flat]).astype(np.int64)),
            twins=self._upload(twins_of([o.category for o in flat]).astype(np.float64)),
            own=self._upload(np.flatnonzero(place == 0)),
            lent=self._upload(np.flatnonzero(place)),
            lent_to=self._upload(members_of(image[place > 0], len(which))),
        )

    def _upload(self, values: NDArray[Any]) -> Tensor:
        return pinned(torch.from_numpy(values), self._device).to(self._device, non_blocking=True)

    def _score_truth(self, rows: Tensor, batch: DeviceBatch) -> dict[str, Tensor]:
        """`instance_ari_truth`, and the same from the objects of other photos: their mean, and each by itself."""
        found = torch.full((2, *rows.shape[:2]), torch.nan, device=rows.device)
        each = torch.full((*rows.shape[:2], SWAPS), torch.nan, device=rows.device, dtype=torch.float16)
        if (truth := batch.truth) is not None:
            x, mask = rows[truth.which], None if batch.mask is None else batch.mask[truth.which]
            distance = self._plan.options.distance
            if self._plan.vector_size > 0:
                x = prepare_vectors(x, distance)
            else:
                problems = None if mask is None else mask.repeat_interleave(x.shape[1], 0)
                x = prepare(x.flatten(0, 1), distance, problems).view_as(x)
            labels = settle(x, truth.starts)  # [b, H, S, P]
            chosen = labels[truth.image, :, truth.place]
            scores = instance_ari(chosen, truth.owner, truth.twins, clusters=truth.clusters)
            found[0, truth.which] = scores[truth.own]
            lent = scores[truth.lent]
            found[1, truth.which] = mean_by_owner(lent, truth.lent_to)
            each[truth.which] = by_owner(lent, truth.lent_to, SWAPS).half()
        name = "instance_ari_truth"
        return {name: found[0], f"{name}.swap": found[1], name + BY_LENDER: each}


def _score_pairs(rows: Tensor, pairs: PairsOfBatch) -> dict[str, Tensor]:
    """Scores each image's own pairs, and the pairs of other photos: their mean, and each by itself."""
    found, swapped = pair_scores(rows, pairs.own), pair_scores(rows, pairs.lent)
    for name in ("pair_auc", "pair_auc_matched"):
        found[f"{name}.swap"] = mean_by_owner(swapped[name], pairs.lent_to)
        found[name + BY_LENDER] = by_owner(swapped[name], pairs.lent_to, SWAPS).half()
    return found


def _images(batch: DeviceBatch) -> list[tuple[int, tuple[int, int], NDArray[np.bool_] | None]]:
    """(row, (height, width), which patches are image or None for all) of each image of a batch."""
    keep = [None] * len(batch.rows) if batch.host_mask is None else list(batch.host_mask.numpy())
    sizes = zip(batch.heights, batch.widths, strict=True)
    return [(int(r), (int(h), int(w)), k) for r, (h, w), k in zip(batch.rows, sizes, keep, strict=True)]


def _starts(owned: Sequence[Sequence[Owned]], keeps: Sequence[NDArray[np.bool_] | None]) -> NDArray[np.int16]:
    """int16 [b, S, P]: a start has a cluster for each instance and one for the rest; −1 where an image has fewer."""
    most, patches = max(len(of_image) for of_image in owned), len(owned[0][0].owner)
    starts = np.full((len(owned), most, patches), -1, np.int16)
    for i, (of_image, keep) in enumerate(zip(owned, keeps, strict=True)):
        for s, each in enumerate(of_image):
            starts[i, s] = clusters_of(each.owner, len(each.category), keep)
    return starts

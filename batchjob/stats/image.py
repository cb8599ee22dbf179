"""One image's scores, and what its null models score: arrays in, arrays out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.codes import NO_LABEL
from batchjob.data.annotations import PatchInstances
from batchjob.geometry import Geometry
from batchjob.metrics import clusters as scores
from batchjob.metrics import nulls
from batchjob.metrics.attention import attention_scores, draw_pairs, pair_scores_of, patch_distances
from batchjob.metrics.saliency import normalise, saliency_scores

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Context:
    """What all images of a run share: the grid, the seeds, and what the data set as a whole looks like.

    C stands for layers × heads, the head fastest. Without `--scores` there is no locality.
    """

    geometry: Geometry
    layers: int
    heads: int
    n_init: int
    seed: int
    centre: Floats | None = None  # [C, P] mean CLS maps, each of sum 1
    locality: Floats | None = None  # [C, P, P] mean attention by offset
    locality_labels: Mapping[int, NDArray[np.uint8]] = field(default_factory=dict)  # k -> [S, C, P]

    @property
    def grid(self) -> tuple[int, int]:
        return self.geometry.grid


@dataclass(frozen=True, slots=True)
class PairTable:
    """The pairs of instances of one image and what each labelling makes of them."""

    pairs: scores.Pairs
    ari: Floats  # [M·C, n]
    position: Floats  # [M·C, n]


def score_labels(
    labels: NDArray[np.uint8], k: NDArray[np.integer[Any]], truth: PatchInstances | None, row: int, context: Context
) -> tuple[dict[str, Floats], PairTable | None]:
    """Every score of the labels [M·C, P] and of their nulls (`SCORE.NULL`), [M·C] each; and the image's pairs.

    `k` [M·C] clusters, which the null models are given too. Without truth, what needs none.
    """
    pairs = _pairs(truth, context)
    found, by_pair = _score_stack(labels, truth, pairs, context.grid)
    found |= scores.cluster_sizes(labels)
    keep = np.all(labels != NO_LABEL, axis=0)
    place = np.arange(len(labels)) % (context.layers * context.heads)
    position_by_pair = np.full_like(by_pair, np.nan)
    for value in np.unique(k[k > 0]):
        of_k = np.flatnonzero(k == value)
        stack = nulls.position_labels(context.grid, value, n_init=context.n_init, seed=context.seed, keep=keep)
        values, null_by_pair = _score_stack(stack, truth, pairs, context.grid)
        position_by_pair[of_k] = null_by_pair.mean(axis=0)
        _put(found, "position", {name: v.mean() for name, v in values.items()}, of_k, len(labels))
        if int(value) in context.locality_labels:
            local = context.locality_labels[int(value)][:, place[of_k]]
            flat = np.where(keep, local.reshape(-1, local.shape[2]), NO_LABEL)
            values, _ = _score_stack(flat, truth, pairs, context.grid)
            means = {name: v.reshape(local.shape[:2]).mean(axis=0) for name, v in values.items()}
            _put(found, "locality", means, of_k, len(labels))
    if truth is not None:
        values, _ = _score_stack(nulls.shuffle(labels, row=row, seed=context.seed), truth, pairs, context.grid)
        values.pop("coherence")
        _put(found, "shuffled", values, np.arange(len(labels)), len(labels))
    return found, None if pairs is None or not len(pairs.first) else PairTable(pairs, by_pair, position_by_pair)


def _score_stack(
    labels: NDArray[np.uint8], truth: PatchInstances | None, pairs: scores.Pairs | None, grid: tuple[int, int]
) -> tuple[dict[str, Floats], Floats]:
    found = {"coherence": scores.coherence(labels, grid)}
    if truth is None or pairs is None:
        return found, np.full((len(labels), 0), np.nan)
    found |= scores.instance_scores(labels, truth.owner, truth.category)
    found["image_ari"] = scores.image_ari(labels, truth.owner)
    if not len(pairs.first):
        return found | {"pair_ari": np.full(len(labels), np.nan)}, np.full((len(labels), 0), np.nan)
    by_pair = scores.pair_ari(labels, truth.owner, pairs)
    return found | {"pair_ari": by_pair.mean(axis=1)}, by_pair


def _pairs(truth: PatchInstances | None, context: Context) -> scores.Pairs | None:
    if truth is None:
        return None
    return scores.instance_pairs(truth.owner, truth.category, truth.boxes, context.grid)


def _put(found: dict[str, Floats], null: str, values: Mapping[str, Any], where: Any, size: int) -> None:
    for name, value in values.items():
        found.setdefault(f"{name}.{null}", np.full(size, np.nan))[where] = value


def score_maps(
    maps: NDArray[np.floating[Any]], truth: PatchInstances, keep: NDArray[np.bool_] | None, context: Context
) -> dict[str, Floats]:
    """Jaccard and CorLoc of CLS maps [C, P] and of the centre null, [C] each; `jaccard_oracle_t` [L]."""
    patch = np.array([context.geometry.patch_width, context.geometry.patch_height] * 2, np.float64)
    found: dict[str, Floats] = {}
    for null, stack in (("", maps), (".centre", context.centre)):
        if stack is None:
            continue
        own, by_instance = saliency_scores(normalise(stack, keep), truth.coverage, truth.boxes / patch, context.grid)
        found |= {name + null: value for name, value in own.items()}
        for name, value in by_instance.items():
            best = value.reshape(context.layers, context.heads, -1).max(axis=1)
            oracle = best.mean(axis=1) if best.shape[1] else np.full(context.layers, np.nan)
            found[name.replace("jaccard", "jaccard_oracle") + null] = oracle
    return found


def locality_attention(context: Context) -> dict[str, Floats]:
    """The scores that attention by offset alone has, `SCORE.locality`, [C] each: the same for every image."""
    if context.locality is None:
        return {}
    return {f"{name}.locality": v for name, v in attention_scores(context.locality, context.grid).items()}


def locality_pairs(truth: PatchInstances, row: int, context: Context) -> dict[str, Floats]:
    """The pair scores of the locality null, [C] each, over the pairs that labelling drew for this row."""
    if context.locality is None:
        return {}
    pairs = draw_pairs(truth.owner, truth.category, row=row, seed=context.seed)
    one, other = pairs.first, pairs.second
    strength = context.locality[:, one, other] + context.locality[:, other, one]
    found = pair_scores_of(strength, patch_distances(context.grid)[one, other], pairs)
    return {f"{name}.locality": found[name] for name in ("pair_auc", "pair_auc_matched", "pair_auc_exact")}

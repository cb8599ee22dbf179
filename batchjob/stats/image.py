"""Computes the scores of one image and of its null models, from arrays to arrays.

C counts labellings: algorithms × layers × heads, the head fastest. For maps it counts layers × heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.codes import NOISE
from batchjob.metrics import catalogue, clusters
from batchjob.metrics.nulls import BY_LENDER
from batchjob.metrics.objects import Labelled, Mapped, Objects
from batchjob.metrics.uncertainty import mean_known
from batchjob.stats.position import position_labels

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PairTable:
    """The n pairs of instances of one category in an image, and how well each labelling separates them."""

    pairs: clusters.Pairs
    ari: Floats  # [C, n] adjusted Rand index of each pair
    position: Floats  # [C, n] the same of the position null with the labelling's k


@dataclass(frozen=True, slots=True)
class Scene:
    """What scores take of an image beside its labels and maps."""

    grid: tuple[int, int]  # (rows, columns) of patches
    seed: int  # of the position null
    keep: NDArray[np.bool_] | None = None  # [P] false in padding; None where there is no padding
    objects: Objects | None = None  # None where the image is not annotated
    donors: Mapping[int, Objects] = field(default_factory=dict)  # other photos' objects, by row, for the `swap` null


def count_groups(labels: NDArray[np.uint8], k: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Counts the groups of each labelling as scores take them: its k clusters, and hdbscan's noise as one more.

    Parameters
    ----------
    labels
        [C, P].
    k
        [C], without noise.

    Returns
    -------
    [C].
    """
    return np.add(k, np.any(labels == NOISE, axis=1), dtype=np.int64)


def score_labels(labels: NDArray[np.uint8], k: NDArray[np.uint8], scene: Scene) -> dict[str, Floats]:
    """Computes every score of an image's labels and of its nulls; without objects, the scores that need none.

    Parameters
    ----------
    labels
        [C, P], 255 for no label.
    k
        [C] clusters of each labelling: the position null gets as many, and one more for noise.
    scene
        The image.

    Returns
    -------
    float64 [C] of each score by its name, and of each null by `SCORE.NULL`; [donors, C] of `SCORE.by_lender`, whose
    mean is `SCORE.swap`. NaN where a score is not defined.
    """
    rows = [s for s in catalogue.SCORES if s.source == "labels" and s.compute]
    rows = [s for s in rows if scene.objects is not None or not s.needs_objects]
    own = Labelled(labels, scene.grid, scene.objects)
    others = [Labelled(labels, scene.grid, lent) for lent in scene.donors.values()]
    groups = count_groups(labels, k)
    places = _by_position(groups, scene)
    found: dict[str, Floats] = {}
    for score in rows:
        found |= _with_swap(score, own, others)
        if "position" in score.nulls and score.compute:
            found[f"{score.name}.position"] = np.full(len(labels), np.nan)
            for value, of_place in places.items():
                found[f"{score.name}.position"][groups == value] = score.compute(of_place).mean()
    return found


def pair_table(labels: NDArray[np.uint8], k: NDArray[np.uint8], scene: Scene) -> PairTable | None:
    """Scores each pair of objects of one category by itself.

    Parameters
    ----------
    labels, k, scene
        As `score_labels`.

    Returns
    -------
    The table, or None where the image has no pair.
    """
    if scene.objects is None:
        return None
    own = Labelled(labels, scene.grid, scene.objects)
    pairs = own.pairs
    if not len(pairs.first):
        return None
    groups = count_groups(labels, k)
    position = np.full((len(labels), len(pairs.first)), np.nan)
    for value, of_place in _by_position(groups, scene).items():
        position[groups == value] = clusters.pair_ari(of_place.table[:, :, 1:], pairs.first, pairs.second).mean(axis=0)
    return PairTable(pairs, clusters.pair_ari(own.table[:, :, 1:], pairs.first, pairs.second), position)


def _by_position(groups: NDArray[np.int64], scene: Scene) -> dict[int, Labelled]:
    """Returns the labellings of the position null, one for each seed, by the number of groups."""
    values = [int(value) for value in np.unique(groups[groups > 0])]
    stacks = {v: position_labels(scene.grid, v, seed=scene.seed, keep=scene.keep) for v in values}
    return {v: Labelled(stack, scene.grid, scene.objects) for v, stack in stacks.items()}


def score_maps(maps: Floats, heads: int, scene: Scene) -> dict[str, Floats]:
    """Computes every score of an image's CLS maps and of its nulls; none without objects.

    Parameters
    ----------
    maps
        [C, P]; each map sums to 1.
    heads
        How many heads a layer has.
    scene
        The image.

    Returns
    -------
    As `score_labels`; an oracle, which takes a layer's best head for each object, has [C / heads].
    """
    if scene.objects is None:
        return {}
    own = Mapped(maps, scene.grid, heads, scene.objects)
    others = [own.beside(lent) for lent in scene.donors.values()]
    found: dict[str, Floats] = {}
    for score in catalogue.SCORES:
        if score.source in ("maps", "oracle") and score.compute:
            found |= _with_swap(score, own, others)
    return found


def _with_swap(score: catalogue.Score, own: Any, others: Sequence[Any]) -> dict[str, Floats]:
    """Computes a score, its values with the other photos' objects, and the `swap` null, which is their mean."""
    assert score.compute is not None
    found = {score.name: score.compute(own)}
    if "swap" in score.nulls and others:
        each = np.stack([score.compute(other) for other in others])
        found |= {f"{score.name}.swap": mean_known(each, axis=0), score.name + BY_LENDER: each}
    return found


def stability(repeats: NDArray[np.uint8]) -> Floats:
    """Returns [C]: the mean adjusted Rand index between each two of R clusterings [C, R, P]; NaN where R is 1."""
    first, second = np.triu_indices(repeats.shape[1], 1)
    if not len(first):
        return np.full(len(repeats), np.nan)
    return np.array([clusters.agreement(own, own)[first, second].mean() for own in repeats])

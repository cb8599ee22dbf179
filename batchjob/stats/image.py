"""One image's scores, and what its null models score: arrays in, arrays out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchjob.metrics import catalogue, clusters
from batchjob.metrics.objects import Labelled, Mapped, Objects
from batchjob.metrics.uncertainty import mean_known
from batchjob.stats.position import position_labels

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PairTable:
    """The pairs of instances of one image and what each labelling makes of them."""

    pairs: clusters.Pairs
    ari: Floats  # [M·C, n]
    position: Floats  # [M·C, n]


@dataclass(frozen=True, slots=True)
class Scene:
    """One image as its scores see it."""

    grid: tuple[int, int]
    seed: int
    keep: NDArray[np.bool_] | None = None  # [P] false in padding; None where there is none
    objects: Objects | None = None  # None: nobody annotated it
    donors: Sequence[Objects] = ()  # other photos' objects, for the `swap` null


def score_labels(labels: NDArray[np.uint8], k: NDArray[np.uint8], scene: Scene) -> dict[str, Floats]:
    """Every score of an image's labels and of its nulls (`SCORE.NULL`); without objects, the scores that need none.

    Parameters
    ----------
    labels
        [C, P] of C heads.
    k
        [C] clusters of each head: what the position null is given.
    scene
        The image.

    Returns
    -------
    score -> [C].
    """
    rows = [s for s in catalogue.SCORES if s.source == "labels" and s.compute]
    rows = [s for s in rows if scene.objects is not None or not s.needs_objects]
    own = Labelled(labels, scene.grid, scene.objects)
    others = [Labelled(labels, scene.grid, lent) for lent in scene.donors]
    places = _by_position(k, scene)
    found: dict[str, Floats] = {}
    for score in rows:
        assert score.compute is not None
        found[score.name] = score.compute(own)
        if "swap" in score.nulls and others:
            found[f"{score.name}.swap"] = mean_known(np.stack([score.compute(other) for other in others]), axis=0)
        if "position" in score.nulls:
            found[f"{score.name}.position"] = np.full(len(labels), np.nan)
            for value, of_place in places.items():
                found[f"{score.name}.position"][k == value] = score.compute(of_place).mean()
    return found


def pair_table(labels: NDArray[np.uint8], k: NDArray[np.uint8], scene: Scene) -> PairTable | None:
    """The image's pairs of objects of a category and the index of each; None where there are no pairs.

    Parameters
    ----------
    labels
        [C, P] of C heads.
    k
        [C] clusters of each head.
    scene
        The image.
    """
    if scene.objects is None:
        return None
    own = Labelled(labels, scene.grid, scene.objects)
    pairs = own.pairs
    if not len(pairs.first):
        return None
    position = np.full((len(labels), len(pairs.first)), np.nan)
    for value, of_place in _by_position(k, scene).items():
        position[k == value] = clusters.pair_ari(of_place.table[:, :, 1:], pairs.first, pairs.second).mean(axis=0)
    return PairTable(pairs, clusters.pair_ari(own.table[:, :, 1:], pairs.first, pairs.second), position)


def _by_position(k: NDArray[np.uint8], scene: Scene) -> dict[int, Labelled]:
    """k -> what position alone makes of the image, a labelling a seed."""
    values = [int(value) for value in np.unique(k[k > 0])]
    stacks = {v: position_labels(scene.grid, v, seed=scene.seed, keep=scene.keep) for v in values}
    return {v: Labelled(stack, scene.grid, scene.objects) for v, stack in stacks.items()}


def score_maps(maps: Floats, heads: int, scene: Scene) -> dict[str, Floats]:
    """Every score of an image's CLS maps and of its nulls; nothing without objects.

    Parameters
    ----------
    maps
        [C, P] of sum 1, C = layers × heads, the head fastest.
    heads
        How many heads a layer has.
    scene
        The image.

    Returns
    -------
    score -> [C], or [C / heads] of an oracle.
    """
    if scene.objects is None:
        return {}
    own = Mapped(maps, scene.grid, heads, scene.objects)
    others = [own.beside(lent) for lent in scene.donors]
    found: dict[str, Floats] = {}
    for score in catalogue.SCORES:
        if score.source not in ("maps", "oracle") or score.compute is None:
            continue
        found[score.name] = score.compute(own)
        if "swap" in score.nulls and others:
            found[f"{score.name}.swap"] = mean_known(np.stack([score.compute(other) for other in others]), axis=0)
    return found


def stability(repeats: NDArray[np.uint8]) -> Floats:
    """[C]: mean adjusted Rand index between each two of the R clusterings [C, R, P]; NaN for a single one."""
    first, second = np.triu_indices(repeats.shape[1], 1)
    if not len(first):
        return np.full(len(repeats), np.nan)
    return np.array([clusters.agreement(own, own)[first, second].mean() for own in repeats])

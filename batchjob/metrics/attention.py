"""Scores of attention rows, in NumPy: the specification that `on_device` follows.

`rows` [C, P, P] is the attention of C heads from query to key patch; each row sums to 1.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MAX_PAIRS = 2000  # pairs of each kind, in each category of an image


@dataclass(frozen=True, slots=True)
class PatchPairs:
    """N pairs of patches of one image; the two patches belong to instances of one of G categories."""

    first: NDArray[np.int64]  # [N] number of one patch
    second: NDArray[np.int64]  # [N] number of the other patch
    same: NDArray[np.bool_]  # [N] whether both belong to one instance
    group: NDArray[np.int64]  # [N] number of the category, 0 to G − 1


def attention_scores(rows: NDArray[np.floating[Any]], grid: tuple[int, int]) -> dict[str, Floats]:
    """Scores attention by itself: distance, relative distance, entropy, its exponential, NMI, sink.

    Parameters
    ----------
    rows
        [C, P, P] attention.
    grid
        (rows, columns) of the P patches.

    Returns
    -------
    score -> float64 [C]. `attention_distance` is in patches, and `attention_distance_relative` is that divided by the
    distance of uniform attention. `entropy` is in nats, and `effective_patches` from 1 to P. `query_key_nmi` and `sink`
    are from 0 to 1.
    """
    rows = np.asarray(rows, np.float64)
    patches = rows.shape[-1]
    distances = patch_distances(grid)
    entropy = _entropy(rows).mean(axis=1)
    key = rows.mean(axis=1)
    key_entropy = _entropy(key)
    # I = H(key) − H(key | query), and the query is uniform
    norm = np.sqrt(np.log(patches) * key_entropy) if patches > 1 else np.zeros(len(rows))
    distance = np.einsum("cqk,qk->c", rows, distances) / patches
    uniform = distances.mean()
    return {
        "attention_distance": distance,
        "attention_distance_relative": distance / (uniform if uniform > 0 else 1),
        "entropy": entropy,
        "effective_patches": np.exp(entropy),
        "query_key_nmi": np.where(
            norm > 1e-12, np.clip(key_entropy - entropy, 0, None) / np.where(norm > 0, norm, 1), 0
        ),
        "sink": key.max(axis=1),
    }


def _entropy(p: NDArray[np.floating[Any]]) -> Floats:
    return np.asarray(-(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1))


@functools.lru_cache(maxsize=8)
def patch_distances(grid: tuple[int, int]) -> Floats:
    """float64 [P, P]: Euclidean distances between the patches of a grid of (rows, columns), in patches."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.asarray(np.hypot(y[:, None] - y[None, :], x[:, None] - x[None, :]))


@functools.lru_cache(maxsize=256)
def _triangle(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first, second = np.triu_indices(n, 1)
    return first, second


def draw_pairs(
    owner: NDArray[np.integer[Any]], category: NDArray[np.integer[Any]], *, row: int, seed: int, limit: int = MAX_PAIRS
) -> PatchPairs:
    """Draws pairs of patches of the same instance and pairs of different ones, within each category.

    Parameters
    ----------
    owner
        [P] instance of each patch, −1 for none.
    category
        [m] category of each instance. A category with one instance gives no pairs.
    row, seed
        The image's row in the run and the run's seed. Equal numbers give equal pairs.
    limit
        The most pairs of each kind in each category.

    Returns
    -------
    N pairs; N is 0 where no category has two instances.
    """
    random = np.random.default_rng((seed, row))
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], int]] = []
    for value in np.unique(category):
        members = np.flatnonzero(category == value)
        if len(members) < 2:
            continue
        patches = np.flatnonzero(np.isin(owner, members))
        first, second = _triangle(len(patches))
        owned = owner[patches]
        same = owned[first] == owned[second]
        for kind in (True, False):
            chosen = np.flatnonzero(same == kind)
            if len(chosen) > limit:
                chosen = np.sort(random.choice(chosen, limit, replace=False, shuffle=False))
            parts.append((patches[first[chosen]], patches[second[chosen]], np.full(len(chosen), kind), len(parts) // 2))
    if not parts:
        none = np.zeros(0, np.int64)
        return PatchPairs(none, none, none.astype(bool), none)
    first, second, same = (np.concatenate(column) for column in list(zip(*parts, strict=True))[:3])
    return PatchPairs(first, second, same.astype(bool), np.repeat([p[3] for p in parts], [len(p[0]) for p in parts]))


def pair_scores(rows: NDArray[np.floating[Any]], pairs: PatchPairs, grid: tuple[int, int]) -> dict[str, Floats]:
    """Scores whether attention within an instance is larger than between two instances of a category.

    Parameters
    ----------
    rows
        [C, P, P] attention.
    pairs
        From `draw_pairs`.
    grid
        (rows, columns) of the P patches.

    Returns
    -------
    score -> float64 [C] from 0 to 1, NaN without pairs. `pair_auc` is over all pairs, `pair_auc_matched` inside bins of
    equal distance. `pair_auc.distance` is `pair_auc` of −distance in place of attention.
    """
    heads = len(rows)
    if not len(pairs.group):
        return {name: np.full(heads, np.nan) for name in ("pair_auc", "pair_auc_matched", "pair_auc.distance")}
    distance = patch_distances(grid)[pairs.first, pairs.second]
    strength = np.asarray(rows[:, pairs.first, pairs.second] + rows[:, pairs.second, pairs.first], np.float64)
    auc = group_auc(np.concatenate([strength, -distance[None, :]]), pairs.same, pairs.group)[0].mean(axis=1)
    return {
        "pair_auc": auc[:-1],
        "pair_auc_matched": _binned_auc(strength, pairs, np.rint(distance**2).astype(np.int64)),
        "pair_auc.distance": np.full(heads, auc[-1]),
    }


def _binned_auc(values: Floats, pairs: PatchPairs, bins: NDArray[np.int64]) -> Floats:
    """[C]: AUC inside each bin, weighted by min(#same, #different), then the mean over categories that have a bin."""
    groups, width = int(pairs.group.max()) + 1, int(bins.max()) + 1
    used, dense = np.unique(pairs.group * width + bins, return_inverse=True)
    in_bins, same, different = group_auc(values, pairs.same, dense)
    weight = np.minimum(same, different)
    owner = used // width
    total = np.bincount(owner, weight, minlength=groups)
    share = weight / np.maximum(total, 1)[owner]
    by_group = np.stack([np.bincount(owner, row * share, minlength=groups) for row in np.nan_to_num(in_bins)])
    return by_group[:, total > 0].mean(axis=1) if (total > 0).any() else np.full(len(values), np.nan)


def group_auc(
    values: Floats, positive: NDArray[np.bool_], group: NDArray[np.int64]
) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Computes the area under the ROC curve for positive against negative values within each group, ties as ½.

    Parameters
    ----------
    values
        [C, N]
    positive
        bool [N]: whether a value should be large.
    group
        [N] from 0 to G − 1.

    Returns
    -------
    AUC [C, G], NaN where a group lacks one kind; the numbers of positive and of negative values, [G] each.

    Notes
    -----
    It is Mann and Whitney's U, from the mid-ranks of one sort of all groups.
    """
    count = int(group.max(initial=-1)) + 1
    ones = np.bincount(group, positive, minlength=count).astype(np.int64)
    size = np.bincount(group, minlength=count)
    zeros = size - ones
    groups = np.broadcast_to(group, values.shape)
    order = np.lexsort((values, groups), axis=-1)
    ordered = np.take_along_axis(values, order, axis=1)
    ordered_group = group[order]
    new = np.ones(values.shape, bool)
    new[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]) | (ordered_group[:, 1:] != ordered_group[:, :-1])
    place = np.arange(values.shape[1])
    first = np.maximum.accumulate(np.where(new, place, 0), axis=1)
    ends = np.ones(values.shape, bool)
    ends[:, :-1] = new[:, 1:]
    last = np.minimum.accumulate(np.where(ends, place, values.shape[1])[:, ::-1], axis=1)[:, ::-1]
    rank = (first + last) / 2
    codes = np.arange(len(values))[:, None] * count + ordered_group
    total = np.bincount(codes.ravel(), (rank * positive[order]).ravel(), minlength=len(values) * count)
    starts = np.concatenate([[0], np.cumsum(size)[:-1]])
    above = total.reshape(len(values), count) - ones * starts - ones * (ones - 1) / 2
    both = ones * zeros
    return np.where(both > 0, above / np.maximum(both, 1), np.nan), ones, zeros

"""Heads that know nothing of a photo's objects must gain nothing over `swap`, whatever their habits are."""

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from batchjob.clustering.search import best_partition
from batchjob.codes import NO_LABEL
from batchjob.metrics.attention import draw_pairs
from batchjob.metrics.nulls import Donors
from batchjob.metrics.objects import Objects
from batchjob.metrics.on_device import pair_scores
from batchjob.metrics.saliency import normalise
from batchjob.metrics.uncertainty import holm, mean_known, sign_flip
from batchjob.stats.image import Scene, score_labels, score_maps
from tests import scenes

IMAGES, HEADS = 40, 4
GRID, PATCHES = scenes.GRID, scenes.GRID[0] * scenes.GRID[1]
PAIRS = 150  # of each kind: the test is of the null, not of the figures' last digit


def content(resize: str, i: int) -> NDArray[np.bool_]:
    """[P]: patches that are image; padded photos are landscape and portrait in turn."""
    keep = np.ones(GRID, bool)
    if resize == "pad":
        keep[(slice(11, None), slice(None)) if i % 2 else (slice(None), slice(11, None))] = False
    return keep.ravel()


def objects_of(count: int, keep: NDArray[np.bool_], random: np.random.Generator) -> Objects:
    """Disks of one category inside the image; their boxes and coverage follow from the owned patches."""
    inside = keep.reshape(GRID)
    small = int(inside.any(axis=1).sum()), int(inside.any(axis=0).sum())
    owner = np.full(GRID, -1)
    owner[: small[0], : small[1]] = scenes.disks(count, random, small).reshape(small)
    coverage = (owner.ravel() == np.arange(count)[:, None]).astype(np.float32)
    y, x = np.divmod(np.arange(PATCHES), GRID[1])
    boxes = [[x[c].min(), y[c].min(), x[c].max() + 1, y[c].max() + 1] for c in coverage > 0]
    return Objects(owner.ravel(), np.zeros(count, int), np.array(boxes, float), coverage)


def gains_of_a_data_set(resize: str, seed: int) -> dict[str, NDArray[np.float64]]:
    """score -> [images, heads] gains over swap of heads that look nearby, each with noise of its own in every photo."""
    random = np.random.default_rng((seed, resize == "pad"))
    counts = np.resize((2, 3, 6) if resize == "squash" else (2, 2, 3), IMAGES)
    keeps = [content(resize, i) for i in range(IMAGES)]
    found = [objects_of(int(c), keep, random) for c, keep in zip(counts, keeps, strict=True)]
    shapes = np.array([int(keep.reshape(GRID)[-1].any()) for keep in keeps]) * (resize == "pad")
    donors = Donors(counts, counts > 1, shapes, seed=seed)
    drawn = [draw_pairs(o.owner, o.category, row=i, seed=seed, limit=PAIRS) for i, o in enumerate(found)]
    gains: dict[str, list[Any]] = defaultdict(list)
    for i, keep in enumerate(keeps):
        rows = np.stack([scenes.attention("local × noise", found[i].owner, random) for _ in range(HEADS)])
        rows = rows * keep[None, None, :]
        rows /= rows.sum(axis=2, keepdims=True)
        labels = np.full((HEADS, PATCHES), NO_LABEL, np.uint8)
        for h in range(HEADS):
            own = rows[h][np.ix_(keep, keep)]
            labels[h, keep] = best_partition(own, int(counts[i]) + 1, seed=seed * IMAGES + i, n_init=1).labels
        lent = donors.of(i)
        scene = Scene(GRID, seed, keep, found[i], [found[j].inside(keep) for j in lent])
        scored = score_labels(labels, np.zeros(HEADS, np.uint8), scene)
        scored |= score_maps(normalise(rows.mean(axis=1), keep), HEADS, scene)
        pairs = [drawn[i]] + [drawn[j] for j in lent if (keep[drawn[j].first] & keep[drawn[j].second]).all()]
        auc = pair_scores(torch.as_tensor(rows[None], dtype=torch.float32), pairs, GRID, [0] * len(pairs))
        for name in ("pair_auc", "pair_auc_matched"):
            values = auc[name].numpy().astype(np.float64)
            scored |= {name: values[0], f"{name}.swap": mean_known(values[1:], axis=0)}
        for name in [n for n in scored if f"{n}.swap" in scored and "oracle" not in n]:
            gains[name].append(scored[name] - scored[f"{name}.swap"])
    return {name: np.array(values) for name, values in gains.items()}


def rejections(resize: str, sets: int) -> tuple[dict[str, float], dict[str, float]]:
    """(share of the tests with p ≤ 0.05, share of the data sets with any head after Holm), by score."""
    alone: dict[str, list[float]] = defaultdict(list)
    named: dict[str, list[float]] = defaultdict(list)
    for seed in range(sets):
        for name, gains in gains_of_a_data_set(resize, seed).items():
            p = sign_flip(gains, flips=2000, seed=seed)
            alone[name].append(float(np.mean(p <= 0.05)))
            named[name].append(float((holm(p) <= 0.05).any()))
    return tuple({n: float(np.mean(v)) for n, v in of.items()} for of in (alone, named))  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_of_heads_that_know_nothing_five_of_a_hundred_tests_reject(resize: str) -> None:
    """With 200 data sets, which take half an hour, the limits are 0.05 ± 0.02 and 0.07; 16 leave so much to chance."""
    alone, named = rejections(resize, 16)
    assert {"instance_ari", "instance_ami", "image_ari", "pair_ari", "pair_auc", "pair_auc_matched"} <= set(alone)
    assert {"jaccard_60", "jaccard_80", "jaccard_90", "corloc"} <= set(alone)
    rare = {"corloc"}  # nearly all 0: the test can't reject what it doesn't see
    assert {n: v for n, v in alone.items() if n not in rare and abs(v - 0.05) > 0.08} == {}, alone
    assert {n: v for n, v in named.items() if v > 0.25} == {}, named
    assert all(alone[n] <= 0.13 for n in rare)


def test_a_head_that_knows_nothing_gains_nothing_within_its_error_and_no_null_is_missing() -> None:
    gains = gains_of_a_data_set("pad", 1)
    for name, values in gains.items():
        known = values[np.isfinite(values)]
        assert len(known) >= 0.8 * values.size, name
        assert abs(known.mean()) <= 4 * known.std() / np.sqrt(len(known) / HEADS) + 1e-9, name

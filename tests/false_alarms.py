"""`python -m tests.false_alarms [--sets 200] [--out FILE]`: how often tests reject wrongly.

Each made-up data set has 40 photos of disks and 4 heads that look nearby, with noise of their own in every photo: rows
by distance times log-normal noise, which depend on no object. The Jaccard scores take the mean of a head's rows as its
map. CorLoc would be 0 there, so it has a large rectangle for each photo and maps that are brightest at a random place.
So 5 % of the tests over `swap` should reject before Holm's correction, and at most 5 % of the data sets should have any
head that passes after it.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from batchjob.clustering.from_labels import settle
from batchjob.clustering.search import best_partition
from batchjob.codes import NO_LABEL
from batchjob.metrics.attention import PatchPairs, draw_pairs
from batchjob.metrics.nulls import BY_LENDER, Donors
from batchjob.metrics.objects import Objects
from batchjob.metrics.on_device import instance_ari, pair_scores, twins_of
from batchjob.metrics.pair_table import PairTable
from batchjob.metrics.saliency import normalise
from batchjob.metrics.truth import clusters_of
from batchjob.metrics.uncertainty import holm, mean_known, sign_flip
from batchjob.stats.image import Scene, score_labels, score_maps
from batchjob.stats.lent import HALVES, Lent, attribute, excess
from tests import scenes

IMAGES, HEADS = 40, 4
GRID, PATCHES = scenes.GRID, scenes.GRID[0] * scenes.GRID[1]
PAIRS = 150  # pairs of each kind: few are enough to test the null model
RESIZES = ("squash", "pad")
FLIPS = 2000
Floats = NDArray[np.float64]
Scores = dict[str, Floats]
Rates = dict[str, tuple[float, float]]  # score -> (share of tests with p ≤ 0.05, whether any head passes Holm)


def content(resize: str, i: int) -> NDArray[np.bool_]:
    """Returns [P]: True for patches of the image; padded photos are landscape and portrait in turn."""
    keep = np.ones(GRID, bool)
    if resize == "pad":
        keep[(slice(11, None), slice(None)) if i % 2 else (slice(None), slice(11, None))] = False
    return keep.ravel()


def objects_of(count: int, keep: NDArray[np.bool_], random: np.random.Generator) -> Objects:
    """Draws disks of one category inside the image; their boxes and coverage follow from the owned patches."""
    inside = keep.reshape(GRID)
    small = int(inside.any(axis=1).sum()), int(inside.any(axis=0).sum())
    owner = np.full(GRID, -1)
    owner[: small[0], : small[1]] = scenes.disks(count, random, small).reshape(small)
    coverage = (owner.ravel() == np.arange(count)[:, None]).astype(np.float32)
    y, x = np.divmod(np.arange(PATCHES), GRID[1])
    boxes = [[x[c].min(), y[c].min(), x[c].max() + 1, y[c].max() + 1] for c in coverage > 0]
    return Objects(owner.ravel(), np.zeros(count, int), np.array(boxes, float), coverage)


def rectangle_of(keep: NDArray[np.bool_], random: np.random.Generator) -> Objects:
    """Draws one object: a rectangle inside the image, half to all of its height and of its width."""
    inside = keep.reshape(GRID)
    height, width = int(inside.any(axis=1).sum()), int(inside.any(axis=0).sum())
    tall, wide = int(random.integers(height // 2, height)), int(random.integers(width // 2, width))
    top, left = int(random.integers(height - tall + 1)), int(random.integers(width - wide + 1))
    owner = np.full(GRID, -1)
    owner[top : top + tall, left : left + wide] = 0
    box = np.array([[left, top, left + wide, top + tall]], float)
    return Objects(owner.ravel(), np.zeros(1, int), box, (owner.ravel() == 0)[None].astype(np.float32))


def places(keep: NDArray[np.bool_], random: np.random.Generator) -> Floats:
    """Returns maps [heads, P] that fall off with the distance from a random patch, with noise.

    They find the large object of a photo about every second time: gains of rare hits are skewed, and a sign-flip test
    tests symmetry.
    """
    y, x = np.divmod(np.arange(PATCHES), GRID[1])
    at = random.choice(np.flatnonzero(keep), HEADS)[:, None]
    squared = (y - y[at]) ** 2 + (x - x[at]) ** 2
    return normalise(np.exp(-squared / 128 + 0.3 * random.standard_normal(squared.shape)), keep)


@dataclass(frozen=True)
class Photo:
    """One photo's heads, its objects, and other photos' objects for the `swap` null model."""

    row: int
    seed: int  # of the data set
    keep: NDArray[np.bool_]
    rows: Floats  # [heads, P, P]
    maps: Floats  # [heads, P] bright at one place
    lenders: list[int]  # rows of the photos that lend their objects
    objects: list[Objects]  # the photo's own first
    pairs: list[PatchPairs]  # likewise
    large: list[Objects]  # likewise

    def scene(self, objects: Sequence[Objects]) -> Scene:
        """Returns the photo with these objects as the scores of `stats` take it."""
        return Scene(GRID, self.seed, self.keep, objects[0], dict(zip(self.lenders, objects[1:], strict=True)))


def photos_of_a_data_set(resize: str, seed: int) -> Iterator[Photo]:
    """Makes `IMAGES` photos whose heads look nearby, with noise of their own in every photo."""
    random = np.random.default_rng((seed, resize == "pad"))
    counts = np.resize((2, 3, 6) if resize == "squash" else (2, 2, 3), IMAGES)
    keeps = [content(resize, i) for i in range(IMAGES)]
    found = [objects_of(int(c), keep, random) for c, keep in zip(counts, keeps, strict=True)]
    shapes = np.array([int(keep.reshape(GRID)[-1].any()) for keep in keeps]) * (resize == "pad")
    donors = Donors(counts, counts > 1, shapes, seed=seed)
    large = [rectangle_of(keep, random) for keep in keeps]
    drawn = [draw_pairs(o.owner, o.category, row=i, seed=seed, limit=PAIRS) for i, o in enumerate(found)]
    for i, keep in enumerate(keeps):
        rows = np.stack([scenes.attention("local × noise", found[i].owner, random) for _ in range(HEADS)])
        rows = rows * keep[None, None, :]
        rows /= rows.sum(axis=2, keepdims=True)
        lent = [int(j) for j in donors.of(i)]
        yield Photo(
            row=i,
            seed=seed,
            keep=keep,
            rows=rows,
            maps=places(keep, random),
            lenders=lent,
            objects=[found[i], *(found[j].inside(keep, GRID) for j in lent)],
            pairs=[drawn[j] for j in (i, *lent)],
            large=[large[i], *(large[j].inside(keep, GRID) for j in lent)],
        )


def score_clusters(photo: Photo) -> Scores:
    """Computes the scores of clusters by k-means, k = instances + 1."""
    keep, k = photo.keep, len(photo.objects[0].category) + 1
    labels = np.full((HEADS, PATCHES), NO_LABEL, np.uint8)
    for h in range(HEADS):
        own = photo.rows[h][np.ix_(keep, keep)]
        labels[h, keep] = best_partition(own, k, seed=photo.seed * IMAGES + photo.row, n_init=1).labels
    return score_labels(labels, np.zeros(HEADS, np.uint8), photo.scene(photo.objects))


def score_means(photo: Photo) -> Scores:
    """Computes the Jaccard scores, for the mean over queries."""
    found = score_maps(normalise(photo.rows.mean(axis=1), photo.keep), HEADS, photo.scene(photo.objects))
    return {name: values for name, values in found.items() if not name.startswith("corloc")}


def score_places(photo: Photo) -> Scores:
    """Computes CorLoc, for maps of one place and large objects."""
    found = score_maps(photo.maps, HEADS, photo.scene(photo.large))
    return {name: values for name, values in found.items() if name.startswith("corloc")}


def score_pairs(photo: Photo) -> Scores:
    """Computes the scores of pairs of patches, by the device's code."""
    rows = torch.as_tensor(photo.rows[None], dtype=torch.float32)
    auc = pair_scores(rows, PairTable.of(photo.pairs, GRID, [0] * len(photo.pairs)))
    return _with_swap({name: auc[name] for name in ("pair_auc", "pair_auc_matched")})


def score_truth(photo: Photo) -> Scores:
    """Computes the score of k-means that starts from the objects, by the device's code."""
    objects = photo.objects
    starts = np.stack([clusters_of(o.owner, len(o.category), photo.keep) for o in objects])
    labels = settle(torch.as_tensor(photo.rows[None], dtype=torch.float32), torch.as_tensor(starts[None]))
    owner = torch.from_numpy(np.stack([o.owner for o in objects]).astype(np.int64))
    twins = torch.from_numpy(twins_of([o.category for o in objects]).astype(np.float64))
    ours = instance_ari(labels[0].transpose(0, 1), owner, twins, clusters=int(starts.max()) + 1)
    return _with_swap({"instance_ari_truth": ours})


def _with_swap(found: Mapping[str, torch.Tensor]) -> Scores:
    """Returns own and null scores, [heads] each, from values [objects, heads] with the photo's own objects first."""
    scores: Scores = {}
    for name, values in found.items():
        each = values.numpy().astype(np.float64)
        scores |= {name: each[0], f"{name}.swap": mean_known(each[1:], axis=0), name + BY_LENDER: each[1:]}
    return scores


def gains_of_a_data_set(resize: str, seed: int) -> dict[str, tuple[Floats, Floats, Floats]]:
    """Returns for each score the gains over `swap` and what objects add to others' nulls, and the excess of squares."""
    gains: dict[str, list[Floats]] = defaultdict(list)
    lent = Lent(IMAGES)
    for photo in photos_of_a_data_set(resize, seed):
        lent.lend(photo.row, np.array(photo.lenders, np.intp))
        for part in (score_clusters, score_means, score_places, score_pairs, score_truth):
            scored = part(photo)
            for name in scored:
                if f"{name}.swap" in scored and "oracle" not in name:
                    gains[name].append(scored[name] - scored[f"{name}.swap"])
                    lent.add(name, photo.row, scored[name + BY_LENDER], scored[name], half=0)
    found: dict[str, tuple[Floats, Floats, Floats]] = {}
    lenders, rows, sums = lent.sums()
    for name, of_lenders in sums.items():
        values, added = np.array(gains[name]), np.zeros((IMAGES, HALVES, HEADS))
        added[rows] = of_lenders
        attribute(added, lenders, np.isfinite(values), np.zeros(IMAGES, int))
        found[name] = values, added[:, 0], excess(values, added, slice(HALVES), (lenders >= 0).sum(axis=1))
    return found


def rates_of_a_data_set(resize: str, seed: int) -> Rates:
    """Returns the results of the tests on one data set."""
    found: Rates = {}
    for name, (gains, lent, more) in gains_of_a_data_set(resize, seed).items():
        p = sign_flip(gains, lent, more, flips=FLIPS, seed=seed)
        found[name] = float(np.mean(p <= 0.05)), float((holm(p) <= 0.05).any())
    return found


def mean_rates(sets: Iterable[Mapping[str, tuple[float, float]]]) -> tuple[dict[str, float], dict[str, float]]:
    """Returns by score: share of tests with p ≤ 0.05, share of data sets with any head after Holm's correction."""
    parts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for one in sets:
        for name, pair in one.items():
            parts[name].append(pair)
    means = {name: np.mean(values, axis=0) for name, values in parts.items()}
    return {n: float(m[0]) for n, m in means.items()}, {n: float(m[1]) for n, m in means.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.false_alarms", description=__doc__)
    parser.add_argument("--sets", type=int, default=200, help="data sets of each resize [200]")
    parser.add_argument("--out", type=Path, default=Path("build/false_alarms.jsonl"), help="goes on where it stopped")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    known: dict[tuple[str, int], Rates] = {}
    if args.out.exists():
        for line in args.out.read_text().splitlines():
            one = json.loads(line)
            known[one["resize"], one["seed"]] = one["rates"]
    start = time.monotonic()
    with args.out.open("a") as out:
        for seed in range(args.sets):
            for resize in RESIZES:
                if (resize, seed) not in known:
                    known[resize, seed] = rates = rates_of_a_data_set(resize, seed)
                    out.write(json.dumps({"resize": resize, "seed": seed, "rates": rates}) + "\n")
                    out.flush()
    print(f"{time.monotonic() - start:.0f} s, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    for resize in RESIZES:
        sets = [rates for (own, seed), rates in known.items() if own == resize and seed < args.sets]
        print(f"\n{resize}, {len(sets)} data sets\n| score | tests that reject | data sets that name a head |")
        print("| --- | --- | --- |")
        alone, named = mean_rates(sets)
        for name in alone:
            print(f"| `{name}` | {alone[name]:.1%} | {named[name]:.1%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Draws the pictures of docs/metrics.md: python docs/metrics_picture.py [NAME …], at the root.

With names, it draws only the pictures of these names. The numbers in the pictures are computed by `batchjob`; the
scenes are those of tests/scenes.py, whose answers are known.
"""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.patches import Circle, Rectangle
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from batchjob.metrics import attention, clusters, saliency
from batchjob.metrics.agreement import contingency
from batchjob.metrics.attention import patch_distances
from batchjob.metrics.saliency import component_boxes
from batchjob.stats import position
from docs.metrics_panels import (
    DIFFERENT,
    GRID,
    MARK,
    SAME,
    SIZE,
    X,
    Y,
    aligned,
    figure_of,
    indices,
    mark,
    scene,
    sheet,
    show,
)
from tests import scenes


def main() -> None:
    wanted = sys.argv[1:] or PICTURES
    for name, draw in PICTURES.items():
        if name not in wanted:
            continue
        figure = draw()
        figure.savefig(buffer := io.BytesIO(), dpi=100, facecolor="white", bbox_inches="tight", pad_inches=0.06)
        picture = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
        picture.save(Path(__file__).parent / f"{name}.png", optimize=True)
        plt.close(figure)


def draw_scenes() -> Any:
    owner, query, rules = scene()
    names = ("by class:\nall objects alike", "by instance:\nthe own object", "by distance:\nnear patches", "at random")
    figure, axes = sheet(2, 6, row_gap=0.08)
    top, bottom = axes[:6], axes[6:]
    show(top[0], owner >= 0, "three objects of\none class", cmap="gray_r")
    show(bottom[0], owner + 1, "", "instance_ari 1.00\nimage_ari 1.00", owner=owner, cmap="labels")
    null = position.position_labels(GRID, 4)
    panels = [(n, scenes.k_means(a, 4, 0), a[query]) for n, a in zip(names, rules.values(), strict=True)]
    panels.append(("position null:\nonly where a patch is", null, None))
    for upper, lower, (name, labels, row) in zip(top[1:], bottom[1:], panels, strict=True):
        if row is None:
            show(upper, Y + X, name, owner=owner, cmap="Greys")
        else:
            show(upper, row, name, owner=owner)
            mark(upper, query)
        instance, _, image = indices(labels, owner)
        seeds = "\n(means of 20 seeds)" if row is None else ""
        below = f"instance_ari {figure_of(instance)}\nimage_ari {figure_of(image)}{seeds}"
        show(lower, aligned(labels[0], owner), "", below, owner=owner, cmap="labels")
    mark(top[0], query)
    top[0].set_ylabel("objects and a marked\npatch; its attention")
    bottom[0].set_ylabel("objects; clusters, k = 4")
    return figure


def draw_grid() -> Any:
    figure, axes = sheet(1, 4)
    y, x = np.mgrid[0:112, 0:112] + 0.5
    shapes = [((y - 38) / 30) ** 2 + ((x - 35) / 27) ** 2, ((y - 72) / 26) ** 2 + ((x - 78) / 22) ** 2]
    masks = [s <= 1 for s in shapes]
    masks[0] &= ~masks[1]
    masks.append((np.abs(y - 20) < 5) & (np.abs(x - 84) < 5))
    whole = sum((i + 1) * m for i, m in enumerate(masks))
    coverage = np.stack([m.reshape(14, 8, 14, 8).mean(axis=(1, 3)).ravel() for m in masks])
    owner = np.where(coverage.max(axis=0) >= 0.5, coverage.argmax(axis=0), -1)
    kept = np.where((owner >= 0) & (np.bincount(owner[owner >= 0], minlength=3)[owner] >= 2), owner, -1)
    show(axes[0], whole, "masks, in pixels", "three instances", cmap="labels")
    show(axes[1], coverage[0], "coverage of patches", "by the first: exact areas", cmap="gray_r")
    show(axes[2], owner + 1, "owner: the one that\ncovers at least half", "the third owns one patch", cmap="labels")
    show(axes[3], kept + 1, "kept: those that own\ntwo patches or more", "two instances, k = 3", cmap="labels")
    for axis in axes[1:]:
        axis.set_xticks(np.arange(13) + 0.5, labels=[], minor=False)
        axis.set_yticks(np.arange(13) + 0.5, labels=[], minor=False)
        axis.grid(color="white", linewidth=0.4)
        axis.tick_params(length=0)
    return figure


def draw_clusters() -> Any:
    owner, _, _ = scene()
    figure, axes = sheet(2, 5)
    perfect = owner + 1
    split = np.where((owner == 2) & (Y[owner == 2].mean() >= Y), 4, perfect)
    merged = np.where(owner == 1, 1, perfect)
    halves = np.where((owner < 0) & (X >= 7), 4, perfect)
    panels = [
        ("instance_ari, instance_ami:\neach object a cluster", perfect, 0, 1),
        ("instance_ari, _ami:\nan object in two parts", split, 0, 1),
        ("instance_ari, _ami:\ntwo objects in one", merged, 0, 1),
        ("image_ari: each object\nand the rest", perfect, 0, 2),
        ("image_ari: the back-\nground in two parts", halves, 0, 2),
    ]
    for axis, (title, labels, *which) in zip(axes, panels, strict=False):
        values = indices(labels, owner)
        names = ("instance_ari", "instance_ami", "image_ari")
        below = "\n".join(f"{names[i]} {figure_of(values[i])}" for i in which)
        show(axis, labels, title, below, owner=owner, cmap="labels")
    _draw_pair_ari(axes[5], owner, merged)
    _draw_coherence(axes[6])
    collapsed = np.where(owner == 0, 1, np.where((owner == 1) & (Y <= 2), 2, 0))
    sizes = clusters.cluster_sizes(collapsed.astype(np.uint8))
    shares = [figure_of(float(sizes[f"{n}_cluster"][0])) for n in ("largest", "smallest")]
    below = f"clusters {sizes['clusters'][0]:.0f}\nlargest_cluster {shares[0]}\nsmallest_cluster {shares[1]}"
    show(axes[7], collapsed, "cluster sizes:\na collapsed head", below, cmap="labels")
    quarters, left = (Y >= 7) * 2 + (X >= 7) + 1, (Y >= 7) * 2 + (X >= 5) + 1
    value = figure_of(float(clusters.agreement(quarters.astype(np.uint8), left.astype(np.uint8))[0, 0]))
    show(axes[8], quarters, "agreement: clusters\nof one head", f"agreement {value}", cmap="labels")
    below = f"agreement {value}\n(neither knows an object)"
    show(axes[9], left, "agreement: clusters\nof another head", below, cmap="labels")
    return figure


def _draw_pair_ari(axis: Any, owner: Any, labels: Any) -> None:
    pairs = clusters.instance_pairs(owner, np.zeros(3, int), np.zeros((3, 4)), GRID)
    values = clusters.pair_ari(contingency(labels.astype(np.uint8), owner), pairs.first, pairs.second)[0]
    show(
        axis,
        labels,
        "pair_ari:\neach two of a class",
        f"pair_ari {figure_of(values.mean())}\n(the mean of the three)",
        owner=owner,
        cmap="labels",
    )
    centres = [(X[owner == i].mean(), Y[owner == i].mean()) for i in range(3)]
    for a, b, value in zip(pairs.first, pairs.second, values, strict=True):
        (x, y), (x1, y1) = centres[a], centres[b]
        axis.plot([x, x1], [y, y1], "o-", color="black", markersize=3, linewidth=1)
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
        axis.text((x + x1) / 2, (y + y1) / 2, figure_of(value), ha="center", va="center", fontsize=8, bbox=box)


def _draw_coherence(axis: Any) -> None:
    labels = np.array([[0, 0, 1], [0, 1, 1], [2, 2, 1]])
    value = float(clusters.coherence(labels.reshape(1, -1).astype(np.uint8), (3, 3))[0])
    show(axis, labels + 1, "coherence: neighbours\nwith equal labels", "", cmap="labels")
    for y, x in np.ndindex(3, 3):
        for y1, x1 in ((y, x + 1), (y + 1, x)):
            if y1 < 3 and x1 < 3:
                equal = labels[y, x] == labels[y1, x1]
                axis.plot(
                    [x, x1], [y, y1], "-" if equal else ":", color="black", linewidth=2.5 if equal else 1, zorder=1
                )
        axis.plot(x, y, "o", color="white", markeredgecolor="black", markersize=7)
    axis.set_xlabel(f"coherence {figure_of(value)}\n(thick: equal, 6 of 12)")


def draw_pairs() -> Any:
    owner, _, rules = scene()
    figure, axes = sheet(1, 3, gap=0.3)
    rows = rules["local"]
    pairs = attention.draw_pairs(owner, np.zeros(3, int), row=0, seed=0)
    found = {k: figure_of(float(v[0])) for k, v in attention.pair_scores(rows[None], pairs, GRID).items()}
    strength = 1000 * (rows[pairs.first, pairs.second] + rows[pairs.second, pairs.first])
    distance = patch_distances(GRID)[pairs.first, pairs.second]
    show(axes[0], owner >= 0, "pairs of patches: of one\ninstance, of two", "at most 2,000 of each kind", cmap="Greys")
    axes[0].images[0].set_clim(0, 4)
    for kind, colour in ((True, SAME), (False, DIFFERENT)):
        some = np.random.default_rng(1).choice(np.flatnonzero(pairs.same == kind), 9, replace=False)
        ends = [[(X[p], Y[p]), (X[q], Y[q])] for p, q in zip(pairs.first[some], pairs.second[some], strict=True)]
        axes[0].add_collection(LineCollection(ends, colors=colour, linewidths=1.4))
        name = "one instance" if kind else "two instances"
        bins = np.linspace(0, strength.max(), 25)
        axes[1].hist(strength[pairs.same == kind], bins, color=colour, alpha=0.65, label=name, density=True)
    axes[1].set(title=f"pair_auc {found['pair_auc']}\nits null, distance: {found['pair_auc.distance']}")
    axes[1].set(xlabel="attention both ways, × 1,000", yticks=[], ylabel="share of the pairs")
    axes[1].legend(fontsize=8, frameon=False)
    squares = np.rint(distance**2).astype(int)
    # the distance at which the rarer kind of pairs is most frequent
    equal = np.sqrt(max(np.unique(squares), key=lambda v: _rarer_kind(pairs.same[squares == v])))
    near = np.abs(distance - equal) <= 1e-6
    jitter = np.random.default_rng(0).uniform(-0.12, 0.12, len(near))
    for kind, colour in ((True, SAME), (False, DIFFERENT)):
        chosen = near & (pairs.same == kind)
        shift = jitter + (0.25 if kind else -0.25)  # draws the kinds side by side
        axes[2].plot(distance[chosen] + shift[chosen], strength[chosen], ".", color=colour, markersize=4, alpha=0.6)
    axes[2].set(yticks=[], ylabel="attention both ways")
    axes[2].set_title(f"pair_auc_matched {found['pair_auc_matched']}\nin bins of equal distance")
    axes[2].set(xlim=(equal - 0.6, equal + 0.6), xlabel=f"all at distance {equal:.2f}")
    axes[2].set_xticks([equal - 0.25, equal + 0.25], ["two", "one instance"])
    return figure


def _rarer_kind(same: Any) -> int:
    return int(min(same.sum(), (~same).sum()))


def draw_attention() -> Any:
    _, query, rules = scene()
    figure, axes = sheet(2, 4, gap=0.3)
    sink = np.full((SIZE, SIZE), 0.5 / SIZE)
    sink[:, 20] += 0.5
    wide = np.full((SIZE, SIZE), 1 / SIZE)
    stack = np.stack([rules["local"], wide, sink])
    found = {k: [figure_of(float(x)) for x in v] for k, v in attention.attention_scores(stack, GRID).items()}
    for i, axis in enumerate(axes[:3]):
        name = ("near patches", "all patches alike", "half of it to one patch")[i]
        shown = np.minimum(stack[i, query], 0.03)
        distance, relative = (found[f"attention_distance{end}"][i] for end in ("", "_relative"))
        below = f"attention_distance {distance}\n… _relative {relative}"
        show(axis, shown, f"attention_distance:\n{name}", below)
        axis.images[0].set_clim(0, 0.018)
        radius = float(attention.attention_scores(stack[i : i + 1], GRID)["attention_distance"][0])
        axis.add_patch(Circle((X[query], Y[query]), radius, fill=False, color=MARK, linewidth=1.2))
        axis.set(xlim=(-0.5, GRID[1] - 0.5), ylim=(GRID[0] - 0.5, -0.5))
        mark(axis, query)
    colours = (SAME, "#999999", DIFFERENT)
    for i, name in enumerate(("near", "all alike", "sink")):
        ordered = np.sort(stack[i, query])[::-1]
        axes[3].plot(np.arange(1, SIZE + 1), ordered, color=colours[i], label=f"{name}: {found['entropy'][i]}")
        effective = float(found["effective_patches"][i])
        axes[3].plot([effective], [1.25e-3], "v", color=colours[i], markersize=6)
    axes[3].set(xscale="log", yscale="log", ylim=(1e-3, 1), xlabel="patches, in order", yticks=[])
    axes[3].minorticks_off()
    axes[3].set_title("entropy (nats);\n▾ effective_patches")
    axes[3].set_ylabel("attention of a row (log)")
    axes[3].legend(fontsize=8, frameon=False)
    for i, axis in zip((0, 2), axes[4:6], strict=True):
        show(axis, stack[i], "query_key_nmi:\n" + ("a block a query" if i == 0 else "each query alike"))
        axis.images[0].set_clim(0, 0.02)
        axis.set(xlabel=f"key patch\nquery_key_nmi {found['query_key_nmi'][i]}", ylabel="query patch")
    axes[4].set_title("query_key_nmi:\nqueries differ")
    means = stack[2].mean(axis=0)
    axes[6].plot(np.arange(SIZE), means, color=DIFFERENT)
    axes[6].axhline(1 / SIZE, color="black", linestyle=":", linewidth=1)
    axes[6].set(xlabel=f"key patch (dotted: 1/P)\nsink {found['sink'][2]}", ylabel="mean over queries", ylim=(0, 0.6))
    axes[6].set_title("sink: the largest\ncolumn mean")
    left = 0
    for name, share, colour in (("CLS", 0.45, "#cc79a7"), ("registers", 0.25, "#e69f00"), ("patches", 0.3, "#d9d9d9")):
        axes[7].bar(0, share, 0.8, left, color=colour)
        axes[7].text(0, left + share / 2, f"{name}\n{share:.2f}", ha="center", va="center", fontsize=8)
        left += share
    axes[7].set(xlim=(-0.8, 0.8), ylim=(0, 1), xticks=[], title="prefix_mass: what goes\nto no patch")
    axes[7].set(ylabel="a row of attention", xlabel="prefix_mass 0.70\n(an example)")
    return figure


def _cls_maps(owner: Any, random: Any) -> Any:
    """Makes the CLS maps of three heads, [3, P]: one of all objects, and two of one object each, with a dim rest."""
    soft = [np.exp(-((Y - Y[owner == i].mean()) ** 2 + (X - X[owner == i].mean()) ** 2) / 8) for i in range(3)]
    heads = np.stack([soft[0] + 0.8 * soft[1] + 0.6 * soft[2], soft[0] + 0.1 * soft[1], soft[2] + 0.1 * soft[1]])
    return saliency.normalise(heads + 0.06 * random.random(heads.shape))


def draw_cls() -> Any:
    owner, _, _ = scene()
    figure, axes = sheet(1, 6)
    maps = _cls_maps(owner, np.random.default_rng(0))
    coverage = np.stack([owner == i for i in range(3)]).astype(float)
    show(axes[0], maps[0], "a CLS map", "and three objects", owner=owner)
    for axis, share in zip(axes[1:4], (0.6, 0.8, 0.9), strict=True):
        mask = saliency.mass_mask(maps, share)
        overlap = saliency.jaccard(mask, coverage)
        name = f"jaccard_{share * 100:.0f}"
        show(axis, 2 * mask[0], f"{name}: the patches\nthat hold {100 * share:.0f} %", owner=owner, cmap="labels")
        axis.set_xlabel(f"{name} {figure_of(float(overlap[0].mean()))}")
    mask = saliency.mass_mask(maps, 0.6)
    overlap = saliency.jaccard(mask, coverage)
    best = overlap.argmax(axis=0)
    chosen = np.zeros(SIZE, int)
    for head in np.unique(best):
        chosen[mask[head]] = (2, 1, 3)[head]
    show(axes[4], chosen, "jaccard_oracle_60: each\nobject's best head", owner=owner, cmap="labels")
    axes[4].set_xlabel(f"three heads, a colour each\noracle {figure_of(float(overlap.max(axis=0).mean()))}")
    target = np.array([[*(v[owner == i].min() for v in (X, Y)), *(v[owner == i].max() + 1 for v in (X, Y))]
                       for i in range(3)], float)  # fmt: skip
    box = component_boxes(mask[1:2], GRID)[0]
    hit = float(saliency.corloc(saliency.component_boxes(mask[1:2], GRID), target)[0])
    show(axes[5], 2 * mask[1], "corloc: box of the\nlargest part (60 %)", f"IoU ≥ ½ with an object's\ncorloc {hit:.0f}",
         cmap="labels")  # fmt: skip
    for corners, colour, style in ((box, DIFFERENT, "-"), *((t, "black", ":") for t in target)):
        left, top, right, bottom = corners
        axes[5].add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=colour,
                                    linestyle=style, linewidth=1.8))  # fmt: skip
    return figure


def draw_nulls() -> Any:
    owner, query, rules = scene()
    figure, axes = sheet(2, 4)
    random = np.random.default_rng(4)
    others = [scenes.disks(3, random) for _ in range(20)]
    kinds = ((axes[:2], rules["local"], "by distance"), (axes[4:6], rules["instance"], "by instance"))
    for (own, other), rows, name in kinds:
        labels = scenes.k_means(rows, 4, 0)
        lent = [indices(labels, o)[0] for o in others]
        show(own, labels[0] + 1, f"attention {name}:\nthe photo's own objects", owner=owner, cmap="labels")
        own.set_xlabel(f"instance_ari {figure_of(indices(labels, owner)[0])}")
        show(other, labels[0] + 1, "swap: the same clusters,\nanother photo's objects", owner=others[0], cmap="labels")
        other.set_xlabel(f"instance_ari {figure_of(lent[0])}\n(mean of 20 photos {figure_of(float(np.mean(lent)))})")
    beside = np.select([(Y - 6.5) ** 2 + (X - c) ** 2 <= 2.6**2 for c in (3, 10)], [0, 1], -1)
    null = position.position_labels(GRID, 2)
    each = [indices(labels, beside)[0] for labels in null]
    for axis, i, name in ((axes[2], int(np.argmin(each)), "worst"), (axes[3], int(np.argmax(each)), "best")):
        below = f"instance_ari {figure_of(each[i])}\n(mean of 20 seeds {figure_of(float(np.mean(each)))})"
        title = f"position: k-means of\n(y, x), {name} seed"
        show(axis, null[i] + 1, title, below, owner=beside, cmap="labels")
    distances = patch_distances(GRID)[query]
    show(axes[6], distances.max() - distances, "distance: nearer is\nstronger, always", "for pair_auc", owner=owner)
    mark(axes[6], query)
    drawn = "random: an untrained\nnetwork (drawn: noise)"
    show(axes[7], rules["random"][query], drawn, "for every score", owner=owner)
    mark(axes[7], query)
    return figure


PICTURES: dict[str, Callable[[], Any]] = {
    "metrics": draw_scenes,
    "metrics_grid": draw_grid,
    "metrics_clusters": draw_clusters,
    "metrics_pairs": draw_pairs,
    "metrics_attention": draw_attention,
    "metrics_cls": draw_cls,
    "metrics_nulls": draw_nulls,
}

main()

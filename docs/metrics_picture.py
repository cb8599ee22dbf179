"""Draws docs/metrics.png, four scenes whose answer is known: python docs/metrics_picture.py, at the root."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from batchjob.stats import image_ari, instance_scores, position_labels
from tests import scenes

RULES = {
    "class": "by class:\nall objects alike",
    "instance": "by instance:\nthe own object",
    "local": "by distance:\nnear patches",
    "random": "at random",
}


def main() -> None:
    random = np.random.default_rng(3)
    owner = scenes.disks(3, random)
    category = np.zeros(3, int)
    query = int(np.flatnonzero(owner == 0)[len(np.flatnonzero(owner == 0)) // 2])
    figure, axes = plt.subplots(2, 6, figsize=(11, 4.2), constrained_layout=True)
    panels = [("three objects of one class\n(the mark: a query patch)", owner, None)]
    for kind, name in RULES.items():
        rows = scenes.attention(kind, owner, random)
        panels.append((name, scenes.k_means(rows, 4, 0)[0], rows[query]))
    null = position_labels(scenes.GRID, 4, n_init=4)
    panels.append(("position null:\nk-means of (y, x)", null[0], None))
    for column, (name, labels, row) in enumerate(panels):
        top, bottom = axes[:, column]
        for axis in (top, bottom):
            axis.set_xticks([])
            axis.set_yticks([])
        top.set_title(name, fontsize=9)
        shown = row if row is not None else np.where(owner >= 0, 1.0, 0.0)
        top.imshow(shown.reshape(scenes.GRID), cmap="magma" if row is not None else "gray_r", vmin=0)
        y, x = divmod(query, scenes.GRID[1])
        top.plot(x, y, "+", color="tab:cyan", markersize=9)
        bottom.imshow(np.where(labels < 0, 7, labels).reshape(scenes.GRID), cmap="Set2", vmin=0, vmax=7)
        stack = null if column == 5 else np.where(labels < 0, 3, labels)[None].astype(np.uint8)
        instance = instance_scores(stack, owner, category)["instance_ari"].mean()
        bottom.set_xlabel(f"instance_ari {instance:.2f}\nimage_ari {image_ari(stack, owner).mean():.2f}", fontsize=9)
    axes[0, 0].set_ylabel("attention of the query", fontsize=9)
    axes[1, 0].set_ylabel("clusters, k = 4", fontsize=9)
    figure.savefig(Path(__file__).parent / "metrics.png", dpi=80)


main()

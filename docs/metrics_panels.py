"""What the pictures of docs/metrics.md are made of: sheets of square panels, maps, labels, the scene of all of them."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from scipy.optimize import linear_sum_assignment

from batchjob.metrics import clusters
from batchjob.metrics.agreement import contingency
from tests import scenes

GRID = scenes.GRID
SIZE = GRID[0] * GRID[1]
# Okabe and Ito's colours, told apart by colour-blind eyes too; the background is grey, the rest objects or clusters
COLOURS = ("#d9d9d9", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#f0e442")
SAME, DIFFERENT, MARK = "#0072b2", "#d55e00", "#00d5ff"
Y, X = np.divmod(np.arange(SIZE), GRID[1])
plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8})


def sheet(rows: int, columns: int, *, gap: float = 0.08, row_gap: float = 0.62) -> tuple[Any, list[Any]]:
    """A figure of square panels of 1.8 inches, `gap` of that between columns and `row_gap` between rows."""
    size = (1.8 * (columns + (columns - 1) * gap), 1.8 * (rows + (rows - 1) * row_gap))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=gap, hspace=row_gap)
    for axis in axes.ravel():
        axis.set_box_aspect(1)
    return figure, list(axes.ravel())


def show(axis: Any, values: Any, title: str, below: str = "", *, owner: Any = None, cmap: Any = "magma") -> None:
    """A map of the grid, from 0 (dark) up, or labels in COLOURS; objects outlined."""
    values = np.asarray(values).reshape(GRID) if np.size(values) == SIZE else np.asarray(values)
    if cmap == "labels":
        axis.imshow(values, cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=len(COLOURS) - 0.5)
    else:
        axis.imshow(values, cmap=cmap, vmin=0)
    axis.set(xticks=[], yticks=[], title=title, xlabel=below)
    if owner is not None:
        outline(axis, owner, "black" if cmap in ("labels", "gray_r", "Greys") else "white")


def outline(axis: Any, owner: Any, colour: str, width: float = 1.2) -> None:
    """The borders of the groups that `owner` [P] names, along the edges of patches."""
    owner = np.asarray(owner).reshape(GRID)
    lines = [
        [(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)] for y, x in np.argwhere(np.diff(owner, axis=1, prepend=owner[:, :1]))
    ]
    lines += [
        [(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)] for y, x in np.argwhere(np.diff(owner, axis=0, prepend=owner[:1]))
    ]
    axis.add_collection(LineCollection(lines, colors=colour, linewidths=width))


def mark(axis: Any, patch: int) -> None:
    axis.plot(X[patch], Y[patch], "+", color=MARK, markersize=9, markeredgewidth=2)


def aligned(labels: Any, owner: Any) -> Any:
    """Labels renumbered: each cluster takes the colour of the object, or of the background, that it meets most."""
    labels, count = np.unique(labels, return_inverse=True)[1].ravel(), len(COLOURS)
    table = np.zeros((count, count))
    np.add.at(table, (labels, np.asarray(owner) + 1), 1)
    return linear_sum_assignment(-table)[1][labels]


def indices(labels: Any, owner: Any) -> tuple[float, float, float]:
    """instance_ari, instance_ami and image_ari of labels [C, P] or [P], means over C; one category."""
    labels = np.atleast_2d(labels).astype(np.uint8)
    table = contingency(labels, np.asarray(owner) + 1)
    found = clusters.instance_scores(labels, owner, np.zeros(owner.max() + 1, int))
    values = (found["instance_ari"], found["instance_ami"], clusters.image_ari(table))
    return tuple(float(v.mean()) for v in values)  # type: ignore[return-value]


def figure_of(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")


def scene() -> tuple[Any, int, dict[str, Any]]:
    """owner [P] of three objects, a query patch in the first, and attention [P, P] by each rule."""
    random = np.random.default_rng(3)
    owner = scenes.disks(3, random)
    inside = np.flatnonzero(owner == 0)
    rules = {kind: scenes.attention(kind, owner, random) for kind in ("class", "instance", "local", "random")}
    return owner, int(inside[len(inside) // 2]), rules

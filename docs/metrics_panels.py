"""Draws the parts of the pictures of docs/metrics.md: sheets of square panels, maps, labels, and their scene."""

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
from batchjob.stats.numbers import number
from tests import scenes

GRID = scenes.GRID
SIZE = GRID[0] * GRID[1]
# Colours that colour-blind eyes can tell apart (Okabe and Ito): grey for the background, then for objects or clusters.
COLOURS = ("#d9d9d9", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#f0e442")
SAME, DIFFERENT, MARK = "#0072b2", "#d55e00", "#00d5ff"
Y, X = np.divmod(np.arange(SIZE), GRID[1])
plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8})


def sheet(rows: int, columns: int, *, gap: float = 0.08, row_gap: float = 0.62) -> tuple[Any, list[Any]]:
    """Makes a figure of square panels of 1.8 inches.

    Parameters
    ----------
    rows, columns
        How many panels.
    gap, row_gap
        Between columns and between rows, as shares of a panel.

    Returns
    -------
    The figure, and the axes of the panels row by row.
    """
    size = (1.8 * (columns + (columns - 1) * gap), 1.8 * (rows + (rows - 1) * row_gap))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=gap, hspace=row_gap)
    for axis in axes.ravel():
        axis.set_box_aspect(1)
    return figure, list(axes.ravel())


def show(axis: Any, values: Any, title: str, below: str = "", *, owner: Any = None, cmap: Any = "magma") -> None:
    """Draws a map or labels on a panel.

    Parameters
    ----------
    axis
        The panel.
    values
        [P] of the grid, or a picture of another size.
    title, below
        Text above and below the panel.
    owner
        [P] the object of each patch; objects are outlined.
    cmap
        A colour map, dark at 0; or `labels`, for labels in COLOURS.
    """
    values = np.asarray(values).reshape(GRID) if np.size(values) == SIZE else np.asarray(values)
    if cmap == "labels":
        axis.imshow(values, cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=len(COLOURS) - 0.5)
    else:
        axis.imshow(values, cmap=cmap, vmin=0)
    axis.set(xticks=[], yticks=[], title=title, xlabel=below)
    if owner is not None:
        _outline(axis, owner, "black" if cmap in ("labels", "gray_r", "Greys") else "white")


def _outline(axis: Any, owner: Any, colour: str) -> None:
    """Draws the borders of the groups that `owner` [P] names, along the edges of patches."""
    owner = np.asarray(owner).reshape(GRID)
    lines = [
        [(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)] for y, x in np.argwhere(np.diff(owner, axis=1, prepend=owner[:, :1]))
    ]
    lines += [
        [(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)] for y, x in np.argwhere(np.diff(owner, axis=0, prepend=owner[:1]))
    ]
    axis.add_collection(LineCollection(lines, colors=colour, linewidths=1.2))


def mark(axis: Any, patch: int) -> None:
    """Marks a patch.

    Parameters
    ----------
    axis
        The panel.
    patch
        Its number, in row-major order of the grid.
    """
    axis.plot(X[patch], Y[patch], "+", color=MARK, markersize=9, markeredgewidth=2)


def aligned(labels: Any, owner: Any) -> Any:
    """Renumbers labels by the one-to-one assignment of clusters to objects and background that overlaps most.

    Parameters
    ----------
    labels
        [P].
    owner
        [P] the object of each patch, −1 for the background.
    """
    labels, count = np.unique(labels, return_inverse=True)[1].ravel(), len(COLOURS)
    table = np.zeros((count, count))
    np.add.at(table, (labels, np.asarray(owner) + 1), 1)
    return linear_sum_assignment(-table)[1][labels]


def indices(labels: Any, owner: Any) -> tuple[float, float, float]:
    """Computes instance_ari, instance_ami and image_ari of labels, for objects of one category.

    Parameters
    ----------
    labels
        [P], or [C, P] for the means over C labellings.
    owner
        [P] the object of each patch, −1 for the background.
    """
    labels = np.atleast_2d(labels).astype(np.uint8)
    table = contingency(labels, np.asarray(owner) + 1)
    found = clusters.instance_scores(labels, owner, np.zeros(owner.max() + 1, int))
    values = (found["instance_ari"], found["instance_ami"], clusters.image_ari(table))
    return tuple(float(v.mean()) for v in values)  # type: ignore[return-value]


def figure_of(value: float) -> str:
    """Writes a number with two decimals and a true minus sign."""
    return number(value, 2)


def scene() -> tuple[Any, int, dict[str, Any]]:
    """Makes the scene: the owner [P] of each patch for three objects, a patch in one, attention [P, P] by kind."""
    random = np.random.default_rng(3)
    owner = scenes.disks(3, random)
    inside = np.flatnonzero(owner == 0)
    rules = {kind: scenes.attention(kind, owner, random) for kind in ("class", "instance", "local", "random")}
    return owner, int(inside[len(inside) // 2]), rules

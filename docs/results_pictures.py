"""Draws the pictures of docs/results.md: gains by layer and head, scores by layer, attention against keys."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from batchjob.figures import canvas
from batchjob.figures.nulls import LAYERS
from batchjob.metrics.uncertainty import SURE

if TYPE_CHECKING:
    from docs.results_page import Tables

_WIDTH = 7.1  # inches, 180 mm: as wide as a page, where a picture's letters have the size that they say
# Colours that colour-blind eyes can tell apart (Okabe and Ito).
_COLOURS = {
    "attention": "#0072b2",
    "query": "#56b4e9",
    "key": "#d55e00",
    "value": "#e69f00",
    "token": "#009e73",
    "random0": "#8a929c",
}


def draw(found: "Sequence[Tables]", more: "Sequence[Tables]", docs: Path) -> None:
    """Writes results_map.png, results_layers.png and results_paired.png.

    Parameters
    ----------
    found
        The tables of each model and size.
    more
        Tables of all layers, where those in `found` have the last one.
    docs
        Where the files are written.
    """
    deep = [t for t in (*found, *more) if t.heads("attention", "swap").layer.nunique() > 1]
    with_keys = [t for t in found if t.has("key")]
    with canvas.style():
        for name, panels, picture in (("map", deep, _map), ("layers", deep, _layers), ("paired", with_keys, _paired)):
            if panels:
                canvas.save(picture(panels), docs / f"results_{name}")


def _panel(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    axes = canvas.place(figure, left, top, width, height)
    axes.set_axis_on()
    return axes


def _map(found: "Sequence[Tables]") -> Figure:
    """Draws the gain over other photos' objects by layer and head, trained and untrained side by side on one scale."""
    panels = [(t, run) for t in found for run in ("attention", "random0") if t.has(run)]
    tables = [t.heads(run, "swap") for t, run in panels]
    heads = [int(table["head"].nunique()) for table in tables]
    cell = min(0.165, (_WIDTH - 0.95 - 0.45 * len(tables)) / sum(heads))
    height = max(table.layer.nunique() for table in tables) * cell
    figure = canvas.sheet(0.5 + sum(count * cell + 0.45 for count in heads) + 0.45, height + 1.0)
    limit = max(float(np.nanmax(np.abs(table.gain))) for table in tables)
    left = 0.5
    for (t, run), table, count in zip(panels, tables, heads, strict=True):
        image = _grid(_panel(figure, left, 0.5, count * cell, height), table, limit, is_first=left < 1)
        canvas.write(figure, left, 0.28, _short(t) if run == "attention" else "untrained", size=7)
        left += count * cell + 0.45
    bar = _panel(figure, left - 0.2, 0.5, 0.08, height)
    figure.colorbar(image, cax=bar)
    bar.tick_params(length=2)
    figure.axes[-1].set_ylabel("ARI: gain over other photos' objects", size=7)
    canvas.write(figure, 0.14, height + 0.86, f"● p ≤ {SURE} after Holm", size=7, color=canvas.QUIET)
    return figure


def _short(t: "Tables") -> str:
    """Names model and size in a few letters: DINOv2, 448 px."""
    name, size = t.title.split(", ")[:2]
    return f"{next(word for word in name.split() if word != 'supervised')}, {size}"


def _grid(axes: Axes, table: pd.DataFrame, limit: float, *, is_first: bool) -> AxesImage:
    """Draws one run's gains, layer down and head across, with a dot where they are sure."""
    values = table.pivot(index="layer", columns="head", values="gain").sort_index()
    sure = table.pivot(index="layer", columns="head", values="sure").sort_index().eq(True)
    image = axes.imshow(values, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    for i, j in zip(*np.nonzero(sure.to_numpy()), strict=True):
        axes.plot(j, i, "o", color="#111111", markersize=2)
    axes.set_xticks(range(0, len(values.columns), 2), [str(h) for h in values.columns[::2]])
    axes.set_yticks(range(0, len(values), 2), [str(x) for x in values.index[::2]])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("head")
    if is_first:
        axes.set_ylabel("layer")
    return image


def _layers(found: "Sequence[Tables]") -> Figure:
    """Draws the mean score of the heads by layer: a line for each kind of vector clustered, and one for position."""
    width, height = min(2.5, (_WIDTH - 1.6) / len(found) - 0.35), 1.9
    figure = canvas.sheet(0.6 + len(found) * (width + 0.35) + 1.0, height + 0.95)
    lines: dict[str, Any] = {}
    for i, t in enumerate(found):
        axes = _panel(figure, 0.6 + i * (width + 0.35), 0.4, width, height)
        for run, colour in _COLOURS.items():
            if not t.has(run):
                continue
            heads = t.heads(run, "swap")
            means = heads.groupby("layer")["mean"].mean()
            name = "attention, untrained" if run == "random0" else run
            (lines[name],) = axes.plot(means.index, means, color=colour, linewidth=1.2)
            if run == "attention":
                axes.scatter(heads.layer, heads["mean"], s=4, color=colour, alpha=0.45, linewidths=0)
        position = t.heads("attention", "position").null_mean.mean()
        lines["position alone"] = axes.axhline(position, color=canvas.INK, linewidth=0.7, ls=(0, (4, 2)))
        axes.set_ylim(-0.02, 0.6)
        axes.set_xlabel("layer")
        axes.set_xticks(range(0, 12, 2))
        canvas.write(figure, 0.6 + i * (width + 0.35), 0.2, _short(t), size=7)
        if i == 0:
            axes.set_ylabel("ARI within categories")
        else:
            axes.set_yticklabels([])
    axes.legend(lines.values(), lines.keys(), loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return figure


def _paired(found: "Sequence[Tables]") -> Figure:
    """Draws a dot a head, its keys' score across and its attention's up; filled if the difference is sure."""
    side = min(1.65, (_WIDTH - 1.2) / len(found) - 0.3)
    shades = ScalarMappable(Normalize(0, 11), LAYERS)
    figure = canvas.sheet(0.6 + len(found) * (side + 0.3) + 0.6, side + 0.95)
    for i, t in enumerate(found):
        axes = _panel(figure, 0.6 + i * (side + 0.3), 0.4, side, side)
        heads = t.compared("key", "head")
        axes.plot([0, 0.7], [0, 0.7], color=canvas.RULE, linewidth=0.8, zorder=0)
        inks = shades.to_rgba(heads.layer_a.to_numpy(dtype=float))
        fills = np.where(heads.sure.to_numpy()[:, None], inks, to_rgba("white"))
        axes.scatter(heads.mean_b, heads.mean_a, s=13, ec=inks, fc=fills, linewidths=0.8)
        axes.set_xlim(-0.03, 0.7)
        axes.set_ylim(-0.03, 0.7)
        axes.set_xlabel("its keys: ARI")
        canvas.write(figure, 0.6 + i * (side + 0.3), 0.2, _short(t), size=7)
        if i == 0:
            axes.set_ylabel("its attention: ARI")
        else:
            axes.set_yticklabels([])
    bar = _panel(figure, 0.6 + len(found) * (side + 0.3), 0.4, 0.07, side)
    figure.colorbar(shades, cax=bar).set_label("layer", size=7)
    bar.invert_yaxis()  # the first layer on top, as in the figures of a run
    bar.tick_params(length=2)
    told = f"filled: the difference has p ≤ {SURE} after Holm; open: it has not, or too few photos have it"
    canvas.write(figure, 0.14, side + 0.8, told, size=7, color=canvas.QUIET)
    return figure

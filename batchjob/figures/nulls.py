"""Draws each head's gain over one null model against its gain over another, and names the best heads."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from batchjob.figures import canvas, statistics
from batchjob.metrics.uncertainty import SURE

# viridis without its ends, which can't be seen on a dark or on a white background
LAYERS = ListedColormap(colormaps["viridis"](np.linspace(0.25, 0.88, 128)))
_MOST_NAMES = 8  # the most points of a scatter that are named
# Where the name of a point may stand, in points from it, the nearest first.
_PLACES = sorted(
    (
        (dx, dy)
        for dx in (-15, -10, -5, 0, 5, 10, 15)
        for dy in (-15, -10, -5, 0, 5, 10, 15)
        if max(abs(dx), abs(dy)) > 4
    ),
    key=lambda at: (np.hypot(*at), -at[0], -at[1]),
)


def against_nulls(summary: pd.DataFrame, *, score: str, heading: str, algorithm: str = "") -> Figure:
    """Draws each head's gain over other photos' objects against its gain over position, with both 95 % intervals.

    Only a head in the upper right does better than both null models. A point is filled if both gains are sure: `sure`
    of the summary. Heads without one of the gains are left out; at least one must have both.

    Parameters
    ----------
    summary, score, algorithm
        As `statistics.of_score`.
    heading
        As `statistics.gain_map`.
    """
    by_null = [statistics.of_score(summary, score, null=null, algorithm=algorithm) for null in ("position", "swap")]
    both = of_both(*by_null)
    layers = both["layer"].to_numpy(dtype=int)
    several = len(set(layers)) > 1
    x, y = both["gain_x"].to_numpy(float), both["gain_y"].to_numpy(float)
    names = [f"{r.layer}/{r.head}" if several else f"head {r.head}" for r in both.itertuples()]
    order = [int(i) for i in np.argsort(-np.minimum(x, y), kind="stable")[:_MOST_NAMES]]
    images = statistics.count_words(pd.concat([both["gain_n_x"], both["gain_n_y"]]), "image")
    has_lines = bool(both[["gain_low_x", "gain_low_y"]].notna().any(axis=None))
    told = (
        f"{'Lines: 95 % intervals' if has_lines else 'Each head: the means'} over {images}. Filled: both gains have "
        f"p ≤ {SURE} after Holm's correction, on enough images to say. "
    )
    longest = told + _told_names(len(order) - 1, len(order), len(x), several)
    with canvas.style():
        tall = 4.74 + canvas.note_height(5.2, longest)
        figure, axes = statistics.chart((5.2, tall), heading, (0.75, 0.7, 3.7 if several else 4.2, 3.55))
        for line in (axes.axhline, axes.axvline):
            line(0, color=canvas.QUIET, lw=0.7, zorder=1)
        wide: dict[str, Any] = {"color": canvas.RULE, "lw": 0.9, "zorder": 2}
        statistics.draw_intervals(axes.hlines, y, both["gain_low_x"], both["gain_high_x"], **wide)
        statistics.draw_intervals(axes.vlines, x, both["gain_low_y"], both["gain_high_y"], **wide)
        shades = ScalarMappable(Normalize(layers.min(), layers.max()), LAYERS)
        inks = shades.to_rgba(layers) if several else np.tile(to_rgba(statistics.BLUE), (len(x), 1))
        sure = both[["sure_x", "sure_y"]].all(axis=1).to_numpy()
        fills = np.where(sure[:, None], inks, to_rgba("white"))
        axes.scatter(x, y, s=20, lw=0.9, ec=inks, fc=fills, zorder=4)
        axes.margins(0.06)
        axes.set_xlabel(f"{statistics.score_name(score)}: gain over position alone")
        axes.set_ylabel(f"{statistics.score_name(score)}: gain over other photos' objects")
        if several:
            bar = figure.add_axes(statistics.fraction(figure, 4.6, 0.7, 0.1, 3.55))
            figure.colorbar(shades, cax=bar, ticks=sorted(set(layers))).set_label("layer", size=7)
            bar.invert_yaxis()  # the first layer on top, as in the other pictures
        lines = [*zip(both["gain_low_x"], y, both["gain_high_x"], y, strict=True)]
        lines += zip(x, both["gain_low_y"], x, both["gain_high_y"], strict=True)
        drawn = np.array(lines)[np.isfinite(lines).all(axis=1)]
        _name_corners(figure, axes, np.column_stack([x, y]))
        named = _name_points(figure, axes, np.column_stack([x, y]), [(i, names[i]) for i in order], drawn)
        canvas.note(figure, 4.74, told + _told_names(named, len(order), len(x), several))
    return figure


def of_both(position: pd.DataFrame, swap: pd.DataFrame) -> pd.DataFrame:
    """Joins the heads' gains over two null models.

    Parameters
    ----------
    position, swap
        What `statistics.of_score` returns for each null.

    Returns
    -------
    The heads that have both gains; columns end in `_x` and `_y`.
    """
    own, other = statistics.with_gains(position), statistics.with_gains(swap)
    return own.merge(other, on=["layer", "head"], suffixes=("_x", "_y"))


def _told_names(named: int, wanted: int, points: int, several: bool) -> str:
    """Says which points have names: `Named as layer/head: 6 of the 8 best by the smaller of the two gains.`"""
    how = " as layer/head" if several else ""
    if named == points:
        return f"Named{how}." if several else ""
    which = f"the {wanted} best" if named == wanted else f"{named} of the {wanted} best, where there is room,"
    return f"Named{how}: {which} by the smaller of the two gains."


def _name_corners(figure: Figure, axes: Axes, points: NDArray[np.float64]) -> None:
    """Writes what a head in each corner does, where the words fit between the zero lines and cover no point."""
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    figure.draw_without_rendering()
    frame, (zero_x, zero_y) = axes.get_window_extent(renderer), axes.transData.transform((0, 0))
    words = {(1, 1): "more than both nulls", (0, 1): "this photo's objects, no more than position"}
    words |= {(1, 0): "more than position, for any photo's objects", (0, 0): "less than both"}
    for (u, v), text in words.items():
        corner = Bbox.from_extents(
            max(zero_x, frame.x0) + 2 if u else frame.x0,
            max(zero_y, frame.y0) + 2 if v else frame.y0,
            frame.x1 if u else min(zero_x, frame.x1) - 2,
            frame.y1 if v else min(zero_y, frame.y1) - 2,
        )
        where: dict[str, Any] = {"ha": "right" if u else "left", "va": "top" if v else "bottom"}
        for width in (60, 26, 16):
            lines = "\n".join(textwrap.wrap(text, width))
            drawn = axes.text(
                0.985 if u else 0.015, 0.985 if v else 0.015, lines, transform=axes.transAxes, size=7, style="italic",
                color=canvas.QUIET, zorder=5, **where,
            )  # fmt: skip
            box = drawn.get_window_extent(renderer)
            inside = corner.x0 <= box.x0 and box.x1 <= corner.x1 and corner.y0 <= box.y0 and box.y1 <= corner.y1
            if inside and not box.padded(4).count_contains(axes.transData.transform(points)):
                break
            drawn.remove()


def _name_points(
    figure: Figure,
    axes: Axes,
    points: NDArray[np.float64],
    names: Sequence[tuple[int, str]],
    lines: NDArray[np.float64],
) -> int:
    """Writes names beside points where they cover neither a point nor a word, and as few lines as possible.

    The line from a point to its name runs through no word either.

    Parameters
    ----------
    figure, axes
        Where to write.
    points
        [n, (x, y)] of all points.
    names
        Of some points, by their numbers.
    lines
        [m, (left, low, right, high)] of the intervals, level or upright.

    Returns
    -------
    How many names were written; those without a place are left out.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    figure.draw_without_rendering()
    pixels = axes.transData.transform(points)
    radius = 4.0 * figure.dpi / 72
    taken = [Bbox([p - radius, p + radius]) for p in pixels]
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    frame = axes.get_window_extent(renderer)
    zero = axes.transData.transform((0, 0))
    drawn = [Bbox(axes.transData.transform(line.reshape(2, 2))) for line in lines]
    drawn += [
        Bbox.from_extents(frame.x0, zero[1], frame.x1, zero[1]),
        Bbox.from_extents(zero[0], frame.y0, zero[0], frame.y1),
    ]
    count, ties = 0, list[Path]()
    for i, name in names:
        best: tuple[float, Text, Bbox, Path | None] | None = None
        for dx, dy in _PLACES:
            how: dict[str, Any] = {"ha": "left" if dx > 0 else "right" if dx < 0 else "center"}
            how["va"] = "bottom" if dy > 0 else "top" if dy < 0 else "center"
            text = axes.annotate(name, points[i], (dx, dy), textcoords="offset points", size=7, zorder=5, **how)
            box = text.get_window_extent(renderer)
            tie = _tie(pixels[i], box, 5.0 * figure.dpi / 72)
            free = not any(box.overlaps(other) for other in taken) and not any(
                t.intersects_bbox(box, filled=False) for t in ties
            )
            crossed = [tie is not None and tie.intersects_bbox(other, filled=False) for other in taken]
            free = free and not any(crossed[len(points) :])
            cost = sum(box.overlaps(line) for line in drawn) + sum(crossed) + 0.09 * np.hypot(dx, dy)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if free and inside and (best is None or cost < best[0]):
                if best:
                    best[1].remove()
                best = (cost, text, box, tie)
            else:
                text.remove()
        if best:
            taken.append(best[2])
            if best[3]:
                ties.append(best[3])
                x, y = axes.transData.inverted().transform(best[3].vertices).T
                axes.add_artist(Line2D(x, y, color=canvas.QUIET, lw=0.6, zorder=5))
            count += 1
    return count


def _tie(point: NDArray[np.float64], box: Bbox, near: float) -> Path | None:
    """Returns the line from a point to its name, if the name is further away than `near`; all are in pixels."""
    end = np.clip(point, box.min, box.max)
    away = float(np.hypot(*(end - point)))
    return Path([point + (end - point) * min(1.0, 0.7 * near / away), end]) if away > near else None

"""Draws the tables that `stats` writes: gains by layer and head, forests, heads against nulls, distances."""

import re
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
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from batchjob.figures import canvas
from batchjob.metrics import catalogue

BLUE, RED = "#0072b2", "#d55e00"
# viridis without its ends, which can't be seen on a dark or on a white background
LAYERS = ListedColormap(colormaps["viridis"](np.linspace(0.25, 0.88, 128)))
NULLS = {  # marker and words of each null model
    "swap": ("o", "other photos' objects"),
    "position": ("D", "position alone"),
    "distance": ("v", "distance alone"),
    "random": ("^", "untrained"),
}
_SURE = 0.05  # a gain is sure if its p-value by Holm is at most this
OPEN = f"Open marks: p > {_SURE} after Holm's correction."
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
_MOST_HEADS = 30  # the most heads of a forest: of more, it shows the best and the worst


def score_name(score: str) -> str:
    """Returns the words for a score on an axis, or its name where the catalogue has none."""
    row = catalogue.score(score)
    return row.words if row else score.replace("_", " ")


def of_score(summary: pd.DataFrame, score: str, *, null: str = "", algorithm: str = "") -> pd.DataFrame:
    """Picks the rows of one score from a summary.

    Parameters
    ----------
    summary
        stats/summary.parquet.
    score
        Its name.
    null
        The null model whose rows are picked; by default those of all nulls.
    algorithm
        By default the first.

    Returns
    -------
    Rows of heads whose mean is known.
    """
    found = summary[(summary["score"] == score) & summary["mean"].notna() & (summary["head"] >= 0)]
    if null:
        found = found[found["null"] == null]
    algorithms = list(dict.fromkeys(found["algorithm"]))
    algorithm = algorithm or (algorithms[0] if algorithms else "")
    return found[found["algorithm"] == algorithm] if algorithm in algorithms else found


def gain_map(rows: pd.DataFrame, *, heading: str, null: str = "swap") -> Figure:
    """Draws the gain over a null as a heat map of layers × heads, with a dot where the gain is sure by Holm.

    Parameters
    ----------
    rows
        What `of_score` returns for one null.
    heading
        What is shown; after a line break, of which run.
    null
        The null model.
    """
    table = rows.pivot(index="layer", columns="head", values="gain").sort_index()
    values = table.to_numpy(dtype=np.float64)
    limit = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    cell = float(np.clip(6.4 / max(values.shape), 0.26, 0.62))
    size = (values.shape[1] * cell, values.shape[0] * cell * 0.72)
    with canvas.style():
        figure, axes = _chart((max(size[0], 2.6) + 1.75, size[1] + 1.35), heading, (0.75, 0.65, size[0], size[1]))
        image = axes.imshow(values, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
        axes.set_xticks(range(len(table.columns)), [str(h) for h in table.columns])
        axes.set_yticks(range(len(table.index)), [str(x) for x in table.index])
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        place = {(int(r["layer"]), int(r["head"])): r for r in rows.to_dict("records")}
        for i, layer in enumerate(table.index):
            for j, head in enumerate(table.columns):
                _gain_cell(axes, (j, i), place.get((int(layer), int(head))), limit, cell)
        bar = figure.add_axes(fraction(figure, 0.75 + size[0] + 0.15, 0.65, 0.1, size[1]))
        figure.colorbar(image, cax=bar).set_label(f"{score_name(str(rows['score'].iloc[0]))}: gain", size=7)
        bar.tick_params(length=2)
        canvas.note(figure, 0.14, size[1] + 1.1, f"● p ≤ {_SURE} after Holm's correction over all heads")
    return figure


def _gain_cell(axes: Axes, at: tuple[int, int], row: Any, limit: float, cell: float) -> None:
    if row is None or not np.isfinite(row["gain"]):
        axes.text(*at, "–", ha="center", va="center", size=7, color=canvas.QUIET)
        return
    ink = "#fefefe" if abs(row["gain"]) > 0.62 * limit else "#111111"
    if cell >= 0.42:
        axes.text(
            *at, f"{round(row['gain'], 2) + 0.0:+.2f}".replace("-", "−"), ha="center", va="center", size=7, color=ink
        )
        at = (at[0], at[1] + 0.36)  # type: ignore[assignment]
    if row["p_holm"] <= _SURE:
        axes.plot(*at, "o", ms=2.0, color=ink)


def forest(summary: pd.DataFrame, *, score: str, heading: str, algorithm: str = "") -> Figure:
    """Draws the heads' gains over each null model with 95 % intervals, the best head first.

    A mark is filled if the gain is sure after Holm's correction.

    Parameters
    ----------
    summary, score, algorithm
        As `of_score`.
    heading
        As `gain_map`.
    """
    found = of_score(summary, score, algorithm=algorithm)
    heads = best_first(found)
    count, cut = len(heads), len(heads) > _MOST_HEADS
    half = _MOST_HEADS // 2
    if cut:
        heads = pd.concat([heads.head(half), heads.tail(half)])
    height = 0.24 * len(heads) + 0.1
    with canvas.style():
        figure, axes = _chart((6.2, height + 1.62), heading, (1.45, 0.65, 4.5, height))
        forest_on(axes, found, heads, score)
        if cut:
            axes.axhline(half - 0.5, color=canvas.RULE, lw=0.8, ls=(0, (4, 3)))
        shown = (
            f"Shown: the {half} heads of {count} with the largest and the {half} with the smallest gain. "
            if cut
            else ""
        )
        canvas.note(figure, 0.14, height + 1.36, f"{shown}{OPEN}" if found["null"].isin(list(NULLS)).any() else shown)
        legend(figure, axes, 0.14, height + 1.15)
    return figure


def best_first(found: pd.DataFrame) -> pd.DataFrame:
    """Sorts the heads in what `of_score` returns by their gain over the first known null, the largest first."""
    nulls = [n for n in NULLS if n in set(found["null"])]
    main = found[found["null"] == nulls[0]] if nulls else found.drop_duplicates(["layer", "head"])
    return main.sort_values(["gain", "mean", "layer", "head"], ascending=[False, False, True, True])


def forest_on(axes: Axes, found: pd.DataFrame, heads: pd.DataFrame, score: str) -> None:
    """Draws gains over each null model on axes, a line a head.

    Parameters
    ----------
    axes
        Where to draw.
    found
        What `of_score` returns for all nulls.
    heads
        The heads to draw, as `best_first` returns them.
    score
        The score's name.
    """
    nulls = [n for n in NULLS if n in set(found["null"])]
    y = np.arange(len(heads))
    for number, null in enumerate(nulls):
        against = found[found["null"] == null].set_index(["layer", "head"])
        mine = against.reindex(list(zip(heads["layer"], heads["head"], strict=True)))
        _gains(axes, mine, y + 0.24 * (number - (len(nulls) - 1) / 2), null, (BLUE, canvas.QUIET, RED)[number % 3])
    if not nulls:
        axes.hlines(y, heads["low"], heads["high"], color=BLUE, lw=1.4)
        axes.plot(heads["mean"], y, "o", ms=4, color=BLUE, label="mean, with its 95 % interval")
    several = found["layer"].nunique() > 1
    names = [f"layer {r.layer} head {r.head}" if several else f"head {r.head}" for r in heads.itertuples()]
    means = [canvas.decimals(m) for m in heads["mean"]]
    axes.set_yticks(y, [f"{n}   {m}" if nulls else n for n, m in zip(names, means, strict=True)])
    axes.set_ylim(len(heads) - 0.4, -0.6)
    axes.axvline(0, color=canvas.QUIET, lw=0.8, zorder=0)
    what = f"{score_name(score)}: {'gain' if nulls else 'mean'}"
    axes.set_xlabel(f"{what}, over {count_words(heads['n'])} images")
    if nulls:
        how: dict[str, Any] = {"ha": "right", "va": "bottom", "textcoords": "offset points", "color": canvas.QUIET}
        axes.annotate("mean", (0, 1), (-7, 2), xycoords="axes fraction", **how)


def _gains(axes: Axes, rows: pd.DataFrame, y: Any, null: str, colour: str) -> None:
    """Draws the gains over one null as marks with intervals; a mark is filled if the gain is sure."""
    marker, name = NULLS[null]
    axes.hlines(y, rows["gain_low"], rows["gain_high"], color=colour, lw=1.2)
    sure = rows["p_holm"].to_numpy(dtype=float) <= _SURE
    marks: dict[str, Any] = {"ms": 4, "mec": colour, "mew": 0.9, "ls": "none"}
    axes.plot(rows["gain"][~sure], y[~sure], marker, mfc="white", **marks)
    axes.plot(rows["gain"][sure], y[sure], marker, mfc=colour, **marks)
    axes.plot([], [], marker, mfc=colour, label=f"over {name}", **marks)


def against_nulls(summary: pd.DataFrame, *, score: str, heading: str, algorithm: str = "") -> Figure:
    """Draws each head's gain over other photos' objects against its gain over position, with both 95 % intervals.

    Only a head in the upper right does better than both null models. A point is filled if both gains are sure after
    Holm's correction.

    Parameters
    ----------
    summary, score, algorithm
        As `of_score`.
    heading
        As `gain_map`.
    """
    by_null = [of_score(summary, score, null=null, algorithm=algorithm) for null in ("position", "swap")]
    both = by_null[0].merge(by_null[1], on=["layer", "head"], suffixes=("_x", "_y"))
    layers = both["layer"].to_numpy(dtype=int)
    several = len(set(layers)) > 1
    x, y = both["gain_x"].to_numpy(float), both["gain_y"].to_numpy(float)
    with canvas.style():
        figure, axes = _chart((5.2, 5.22), heading, (0.75, 0.7, 3.7 if several else 4.2, 3.55))
        for line in (axes.axhline, axes.axvline):
            line(0, color=canvas.QUIET, lw=0.7, zorder=1)
        wide: dict[str, Any] = {"color": canvas.RULE, "lw": 0.9, "zorder": 2}
        axes.hlines(y, both["gain_low_x"], both["gain_high_x"], **wide)
        axes.vlines(x, both["gain_low_y"], both["gain_high_y"], **wide)
        shades = ScalarMappable(Normalize(layers.min(), layers.max()), LAYERS)
        inks = shades.to_rgba(layers) if several else np.tile(to_rgba(BLUE), (len(x), 1))
        sure = (both["p_holm_x"].to_numpy(float) <= _SURE) & (both["p_holm_y"].to_numpy(float) <= _SURE)
        fills = np.where(sure[:, None], inks, to_rgba("white"))
        axes.scatter(x, y, s=20, lw=0.9, ec=inks, fc=fills, zorder=4)
        axes.margins(0.06)
        axes.set_xlabel(f"{score_name(score)}: gain over position alone")
        axes.set_ylabel("gain over other photos' objects")
        if several:
            bar = figure.add_axes(fraction(figure, 4.6, 0.7, 0.1, 3.55))
            figure.colorbar(shades, cax=bar, ticks=sorted(set(layers))).set_label("layer", size=7)
            bar.invert_yaxis()  # the first layer on top, as in the other pictures
        names = [f"{r.layer}/{r.head}" if several else f"head {r.head}" for r in both.itertuples()]
        order = [int(i) for i in np.argsort(-np.minimum(x, y), kind="stable")[:_MOST_NAMES]]
        lines = [*zip(both["gain_low_x"], y, both["gain_high_x"], y, strict=True)]
        lines += zip(x, both["gain_low_y"], x, both["gain_high_y"], strict=True)
        _name_corners(figure, axes, np.column_stack([x, y]))
        named = _name_points(figure, axes, np.column_stack([x, y]), [(i, names[i]) for i in order], np.array(lines))
        told = (
            f"Lines: 95 % intervals over {count_words(both['n_x'])} images. Filled: both gains have p ≤ {_SURE} after "
            f"Holm's correction. {_told_names(named, len(order), len(x), several)}"
        )
        canvas.note(figure, 0.14, 4.74, told)
    return figure


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
    count = 0
    for i, name in names:
        best: tuple[float, Text, Bbox] | None = None
        for dx, dy in _PLACES:
            how: dict[str, Any] = {"ha": "left" if dx > 0 else "right" if dx < 0 else "center"}
            how["va"] = "bottom" if dy > 0 else "top" if dy < 0 else "center"
            text = axes.annotate(name, points[i], (dx, dy), textcoords="offset points", size=7, zorder=5, **how)
            box = text.get_window_extent(renderer)
            free = not any(box.overlaps(other) for other in taken) and frame.x0 <= box.x0 and box.x1 <= frame.x1
            cost = sum(box.overlaps(line) for line in drawn) + 0.09 * np.hypot(dx, dy)
            if free and frame.y0 <= box.y0 and box.y1 <= frame.y1 and (best is None or cost < best[0]):
                if best:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
        if best:
            taken.append(best[2])
            _tie(axes, pixels[i], best[2], 5.0 * figure.dpi / 72)
            count += 1
    return count


def _tie(axes: Axes, point: NDArray[np.float64], box: Bbox, near: float) -> None:
    """Draws a line from a point to its name, if the name is further away than `near`; all are in pixels."""
    end = np.clip(point, box.min, box.max)
    away = float(np.hypot(*(end - point)))
    if away > near:
        start = point + (end - point) * min(1.0, 0.7 * near / away)
        x, y = axes.transData.inverted().transform([start, end]).T
        axes.add_artist(Line2D(x, y, color=canvas.QUIET, lw=0.6, zorder=5))


def distance_by_layer(summary: pd.DataFrame, *, heading: str, rows_name: str = "attention") -> Figure:
    """Draws each head's mean attention distance in patches by layer, or by head where there is one layer.

    Parameters
    ----------
    summary
        stats/summary.parquet.
    heading
        As `gain_map`.
    rows_name
        What the run's rows are called, as `Run.rows_name`.
    """
    rows = of_score(summary, "attention_distance").drop_duplicates(["layer", "head"])
    several = rows["layer"].nunique() > 1
    x = rows["layer" if several else "head"].to_numpy(dtype=float)
    with canvas.style():
        figure, axes = _chart((5.2, 3.6), heading, (0.7, 0.65, 4.2, 2.35))
        if several:
            by_layer = rows.groupby("layer")["mean"].mean()
            axes.plot(by_layer.index, by_layer, "-", color=canvas.QUIET, lw=1, label="mean of the heads")
        else:
            axes.vlines(x, rows["low"], rows["high"], color=BLUE, lw=1.4)
        axes.plot(x, rows["mean"], "o", ms=4, color=BLUE, alpha=0.85, label="a head")
        axes.set_xticks(np.unique(x), [str(int(v)) for v in np.unique(x)])
        axes.margins(0.08)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer" if several else "head")
        axes.set_ylabel(f"{rows_name} distance, patches")
        if several:
            axes.legend(loc="best")
    return figure


def by_modifier(
    rows: pd.DataFrame, *, heading: str, xlabel: str = "distance between the centroids of two instances, patches"
) -> Figure:
    """Draws a head's `pair_ari` in bins of a modifier with 95 % intervals over images, and the position null.

    Parameters
    ----------
    rows
        The bins of one head and modifier, from stats/modifiers.parquet.
    heading
        As `gain_map`.
    xlabel
        What the modifier is.
    """
    rows = rows.sort_values("low")
    x = np.arange(len(rows))
    with canvas.style():
        figure, axes = _chart((5.2, 3.85), heading, (0.7, 0.65, 4.2, 2.3))
        axes.axhline(0, color=canvas.RULE, lw=0.8, zorder=0)
        axes.plot(
            x, rows["position"], "D--", ms=4, lw=0.9, mfc="none", color=canvas.QUIET, label="null: position alone"
        )
        axes.vlines(x, rows["pair_ari_low"], rows["pair_ari_high"], color=BLUE, lw=1.4)
        axes.plot(x, rows["pair_ari"], "o-", ms=4.5, lw=1.1, color=BLUE, label="head, with its 95 % interval")
        axes.set_xticks(x, [f"{_bin(r.low, r.high)}\n{r.pairs} pair{'s' * (r.pairs != 1)}" for r in rows.itertuples()])
        axes.set_xlim(-0.4, len(rows) - 0.6)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("ARI of pairs")
        legend(figure, axes, 0.14, 3.6)
    return figure


def _bin(low: Any, high: Any) -> str:
    return f"≥ {low:g}" if not np.isfinite(high) else f"{low:g}–{high:g}"


def count_words(n: "pd.Series[Any]") -> str:
    """Writes how many images a column `n` of a table counts: `40`, or `38 to 40` where heads differ."""
    return f"{n.min():,}" if n.min() == n.max() else f"{n.min():,} to {n.max():,}"


def _chart(size: tuple[float, float], heading: str, box: tuple[float, float, float, float]) -> tuple[Figure, Axes]:
    figure = canvas.sheet(*size)
    canvas.heading(figure, heading, size=8.5)
    return figure, figure.add_axes(fraction(figure, *box))


def fraction(figure: Figure, left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
    """Computes the box that matplotlib takes for axes.

    Parameters
    ----------
    figure, left, top, width, height
        As `canvas.place`.

    Returns
    -------
    (left, bottom, width, height) in fractions of the sheet.
    """
    wide, tall = figure.get_size_inches()
    return left / wide, 1 - (top + height) / tall, width / wide, height / tall


def legend(figure: Figure, axes: Axes, left: float, top: float, *, columns: int = 3) -> None:
    """Writes what the marks of the axes mean.

    Parameters
    ----------
    figure, left, top
        As `canvas.place`.
    axes
        Those with the marks.
    columns
        How many entries stand side by side.
    """
    width, height = figure.get_size_inches()
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles[::-1], names[::-1], loc="upper left", bbox_to_anchor=(left / width, 1 - top / height), ncols=columns,
        borderaxespad=0, handletextpad=0.4, columnspacing=1.4,
    )  # fmt: skip


def themed(svg: str, prefix: str, colours: Sequence[tuple[str, str]]) -> str:
    """Prepares an SVG to stand in an HTML page beside others.

    Parameters
    ----------
    svg
        The text of an SVG file.
    prefix
        Put before all ids, so that they are unique in the page.
    colours
        (colour, replacement) pairs, such as `("#1b1f24", "var(--ink)")`.

    Returns
    -------
    The `svg` element.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', lambda m: m[1] + prefix, body)
    for old, new in colours:
        body = body.replace(old, new)
    return body

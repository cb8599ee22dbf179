"""Draws the tables that `stats` writes: gains by layer and head, forests, heads against nulls, distances."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchjob.errors import counted
from batchjob.figures import canvas
from batchjob.metrics import catalogue
from batchjob.metrics.uncertainty import FEWEST_IMAGES, SURE

BLUE, RED = "#0072b2", "#d55e00"
NULLS = {  # marker and words of each null model
    "swap": ("o", "other photos' objects"),
    "position": ("D", "position alone"),
    "distance": ("v", "distance alone"),
    "random": ("^", "untrained"),
}
OPEN = f"Open marks: p > {SURE} after Holm's correction, or too few images to say."
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


def with_gains(rows: pd.DataFrame) -> pd.DataFrame:
    """Drops the rows of null models over which a head has no gain; those without a null model stay."""
    return rows[rows["gain"].notna() | ~rows["null"].isin(list(NULLS))]


def gain_map(rows: pd.DataFrame, *, heading: str, null: str = "swap") -> Figure:
    """Draws the gain over a null as a heat map of layers × heads, with a dot where the gain is sure.

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
        wide, below = max(size[0], 2.6) + 1.75, size[1] + 1.1
        images = count_words(with_gains(rows)["gain_n"], "image")
        told = f"Means over {images}. ● p ≤ {SURE} after Holm's correction, on enough images."
        tall = below + canvas.note_height(wide, told)
        figure, axes = chart((wide, tall), heading, (0.75, 0.65, size[0], size[1]))
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
        canvas.note(figure, below, told)
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
    if row["sure"]:
        axes.plot(*at, "o", ms=2.0, color=ink)


def forest(summary: pd.DataFrame, *, score: str, heading: str, algorithm: str = "") -> Figure:
    """Draws the heads' gains over each null model with 95 % intervals, the best head first.

    A mark is filled if the gain is sure: `sure` of the summary. A null model over which no head has a gain is left out.

    Parameters
    ----------
    summary, score, algorithm
        As `of_score`.
    heading
        As `gain_map`.
    """
    found = with_gains(of_score(summary, score, algorithm=algorithm))
    heads = best_first(found)
    count, cut = len(heads), len(heads) > _MOST_HEADS
    half = _MOST_HEADS // 2
    if cut:
        heads = pd.concat([heads.head(half), heads.tail(half)])
    height = 0.24 * len(heads) + 0.1
    told = f"Shown: the {half} heads of {count} with the largest and the {half} with the smallest gain. " * cut
    if found["null"].isin(list(NULLS)).any():
        told += "Lines: 95 % intervals. " * bool(found["gain_low"].notna().any()) + OPEN
    with canvas.style():
        size = (6.2, height + 1.36 + canvas.note_height(6.2, told))
        figure, axes = chart(size, heading, (1.45, 0.65, 4.5, height))
        forest_on(axes, found, heads, score)
        if cut:
            axes.axhline(half - 0.5, color=canvas.RULE, lw=0.8, ls=(0, (4, 3)))
        canvas.note(figure, height + 1.36, told)
        legend(figure, axes, 0.14, height + 1.15)
    return figure


def best_first(found: pd.DataFrame) -> pd.DataFrame:
    """Sorts the heads in what `with_gains` returns by their gain over the first known null, the largest first.

    Heads that have no gain over it come after the others, by their gain over the next one.
    """
    ranks = found["null"].map({null: rank for rank, null in enumerate(NULLS)}).fillna(len(NULLS))
    ranked = found.assign(rank=ranks).sort_values("rank", kind="stable").drop_duplicates(["layer", "head"])
    order = ["rank", "gain", "mean", "layer", "head"]
    return ranked.sort_values(order, ascending=[True, False, False, True, True]).drop(columns="rank")


def forest_on(axes: Axes, found: pd.DataFrame, heads: pd.DataFrame, score: str) -> None:
    """Draws gains over each null model on axes, a line a head.

    Parameters
    ----------
    axes
        Where to draw.
    found
        What `with_gains` returns for all nulls.
    heads
        The heads to draw, as `best_first` returns them.
    score
        The score's name.
    """
    places = list(zip(heads["layer"], heads["head"], strict=True))
    shown = found[found.set_index(["layer", "head"]).index.isin(places)]
    nulls = [n for n in NULLS if n in set(shown["null"])]
    y = np.arange(len(heads))
    for number, null in enumerate(nulls):
        mine = shown[shown["null"] == null].set_index(["layer", "head"]).reindex(places)
        _gains(axes, mine, y + 0.24 * (number - (len(nulls) - 1) / 2), null, (BLUE, canvas.QUIET, RED)[number % 3])
    if not nulls:
        is_known = draw_intervals(axes.hlines, y, heads["low"], heads["high"], color=BLUE, lw=1.4)
        axes.plot(heads["mean"], y, "o", ms=4, color=BLUE, label="mean" + ", with its 95 % interval" * is_known)
    several = found["layer"].nunique() > 1
    names = [f"layer {r.layer} head {r.head}" if several else f"head {r.head}" for r in heads.itertuples()]
    means = [canvas.decimals(m) for m in heads["mean"]]
    axes.set_yticks(y, [f"{n}   {m}" if nulls else n for n, m in zip(names, means, strict=True)])
    axes.set_ylim(len(heads) - 0.4, -0.6)
    axes.axvline(0, color=canvas.QUIET, lw=0.8, zorder=0)
    what = f"{score_name(score)}: {'gain' if nulls else 'mean'}"
    axes.set_xlabel(f"{what}, over {count_words(shown['gain_n' if nulls else 'n'], 'image')}")
    if nulls:
        how: dict[str, Any] = {"ha": "right", "va": "bottom", "textcoords": "offset points", "color": canvas.QUIET}
        axes.annotate(f"mean {_unit(score)}", (0, 1), (-7, 2), xycoords="axes fraction", **how)


def draw_intervals(lines: Callable[..., Any], at: Any, low: Any, high: Any, **how: Any) -> bool:
    """Draws the intervals whose bounds are known: one value has a mean and no interval.

    Parameters
    ----------
    lines
        `hlines` or `vlines` of the axes.
    at, low, high
        Where each line lies, and its ends.
    how
        What the lines look like.

    Returns
    -------
    Whether there is one.
    """
    at, low, high = (np.asarray(values, np.float64) for values in (at, low, high))
    known = np.isfinite(low) & np.isfinite(high)
    if known.any():
        lines(at[known], low[known], high[known], **how)
    return bool(known.any())


def _unit(score: str) -> str:
    """Returns the short word for a score, such as ARI, or its name on an axis where it has none."""
    row = catalogue.score(score)
    return row.short if row and row.short else score_name(score)


def _gains(axes: Axes, rows: pd.DataFrame, y: Any, null: str, colour: str) -> None:
    """Draws the gains over one null as marks with intervals; a mark is filled if the gain is sure."""
    marker, name = NULLS[null]
    draw_intervals(axes.hlines, y, rows["gain_low"], rows["gain_high"], color=colour, lw=1.2)
    sure = rows["sure"].eq(True).to_numpy()  # NaN for a head without this null
    marks: dict[str, Any] = {"ms": 4, "mec": colour, "mew": 0.9, "ls": "none"}
    axes.plot(rows["gain"][~sure], y[~sure], marker, mfc="white", **marks)
    axes.plot(rows["gain"][sure], y[sure], marker, mfc=colour, **marks)
    axes.plot([], [], marker, mfc=colour, label=f"over {name}", **marks)


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
    images = count_words(rows["n"], "image")
    has_lines = not several and bool(rows["low"].notna().any())
    told = f"Lines: 95 % intervals of the means over {images}." if has_lines else f"Each head: the mean over {images}."
    with canvas.style():
        figure, axes = chart((5.2, 3.45 + canvas.note_height(5.2, told)), heading, (0.7, 0.65, 4.2, 2.35))
        if several:
            by_layer = rows.groupby("layer")["mean"].mean()
            axes.plot(by_layer.index, by_layer, "-", color=canvas.QUIET, lw=1, label="mean of the heads")
        else:
            draw_intervals(axes.vlines, x, rows["low"], rows["high"], color=BLUE, lw=1.4)
        axes.plot(x, rows["mean"], "o", ms=4, color=BLUE, alpha=0.85, label="a head")
        axes.set_xticks(np.unique(x), [str(int(v)) for v in np.unique(x)])
        axes.margins(0.08)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer" if several else "head")
        axes.set_ylabel(f"{rows_name} distance, patches")
        if several:
            axes.legend(loc="best")
        canvas.note(figure, 3.45, told)
    return figure


def by_modifier(
    rows: pd.DataFrame,
    *,
    heading: str,
    xlabel: str = "distance between the centroids of two instances, patches",
    remark: str = "",
) -> Figure:
    """Draws a head's `pair_ari` in bins of a modifier with 95 % intervals over images, and the position null.

    A bin of few images has open marks and no interval, because nothing can be claimed from it.

    Parameters
    ----------
    rows
        The bins of one head and modifier, from stats/modifiers.parquet.
    heading
        As `gain_map`.
    xlabel
        What the modifier is.
    remark
        For the small print.
    """
    rows = rows.sort_values("low")
    x, enough = np.arange(len(rows)), (rows["images"] >= FEWEST_IMAGES).to_numpy()
    ends = rows["pair_ari_low"][enough], rows["pair_ari_high"][enough]
    told = "Lines: 95 % intervals over photos. " * bool(ends[0].notna().any())
    told += f"Open: fewer than {FEWEST_IMAGES} photos, too few to say. " * (not enough.all()) + remark
    with canvas.style():
        figure, axes = chart((5.2, 4.02 + canvas.note_height(5.2, told)), heading, (0.7, 0.65, 4.2, 2.3))
        axes.axhline(0, color=canvas.RULE, lw=0.8, zorder=0)
        draw_intervals(axes.vlines, x[enough], *ends, color=BLUE, lw=1.4)
        kinds = (("position", "D--", canvas.QUIET, "null: position alone"), ("pair_ari", "o-", BLUE, "head"))
        for column, line, colour, name in kinds:
            values = rows[column].to_numpy()
            axes.plot(x, values, line[1:], lw=1, color=colour)
            how: dict[str, Any] = {"ls": "none", "marker": line[0], "ms": 4.2, "mec": colour, "mew": 0.9}
            axes.plot(x[enough], values[enough], mfc=colour, **how)
            axes.plot(x[~enough], values[~enough], mfc="white", **how)
            axes.plot([], [], line, ms=4.2, lw=1, color=colour, label=name)
        bins = [
            f"{_bin(low, high)}\n{counted(pairs, 'pair')},\n{counted(images, 'photo')}"
            for low, high, pairs, images in rows[["low", "high", "pairs", "images"]].itertuples(index=False)
        ]
        axes.set_xticks(x, bins)
        axes.set_xlim(-0.4, len(rows) - 0.6)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("ARI of pairs")
        legend(figure, axes, 0.14, 3.75)
        canvas.note(figure, 4.02, told)
    return figure


def _bin(low: Any, high: Any) -> str:
    return f"≥ {low:g}" if not np.isfinite(high) else f"{low:g}–{high:g}"


def count_words(n: "pd.Series[Any]", noun: str = "") -> str:
    """Writes how many images a column of a table counts.

    Parameters
    ----------
    n
        The column.
    noun
        The word for one image; by default none is written.

    Returns
    -------
    `40 photos`, `1 photo`, or `38 to 40 photos` where heads differ.
    """
    low, high = n.min(), n.max()
    count = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"{count} {noun}{'' if high == 1 else 's'}" if noun else count


def chart(size: tuple[float, float], heading: str, box: tuple[float, float, float, float]) -> tuple[Figure, Axes]:
    """Makes a sheet with a heading, and axes on it.

    Parameters
    ----------
    size
        (width, height) of the sheet in inches.
    heading
        As `gain_map`.
    box
        (left, top, width, height) of the axes, as `canvas.place` takes them.
    """
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

"""The study's figure: images × heads, raw CLS attention above, one row of clusters for each algorithm below."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from batchjob.codes import NOISE
from batchjob.figures import canvas
from batchjob.figures.palette import MAP_COLOURS, label_colours, match_colours

_SHEET = 12.0  # inches that the cells of the heads share; fewer heads get larger cells
_GAP, _BETWEEN = 0.045, 0.30  # inches between cells, between images
_MARGIN, _TITLES = 0.14, 0.32  # around the sheet; for the rows' titles


def study_grid(
    photos: Sequence[NDArray[np.uint8]],
    cls_attention: NDArray[np.floating[Any]],
    labels: NDArray[np.uint8],
    *,
    titles: Sequence[str],
    algorithms: Sequence[str] = ("kmeans",),
    heads: Sequence[int] | None = None,
    heading: str = "",
    attention_name: str = "CLS attention",
    spans: Sequence[tuple[float, float]] | None = None,
    match: bool = True,
    smooth: bool = False,
) -> Figure:
    """A figure with one block an image: the photo, and for each head its CLS attention and its clusters.

    photos: n arrays uint8 [height, width, 3] of any size, the part that the model saw, at its own aspect ratio.
    cls_attention: [n, H, rows, columns]; labels: uint8 [n, M, H, rows, columns], 254 noise, 255 none.
    heads: the H heads' numbers, if not 0 to H − 1. spans: for each photo the (height, width) that its patch grid
    covers in photo heights and widths; more than 1 where the input was padded. match: renumber the clusters of one
    image so that an object keeps its colour in all its maps; not wanted where numbers mean something (centroids).
    """
    heads = list(range(labels.shape[2])) if heads is None else list(heads)
    spans = spans or [(1.0, 1.0)] * len(photos)
    rows = 1 + len(algorithms)
    wide = float(np.clip(_SHEET / (len(heads) + 1.5), 0.86, 1.45))  # a cell's width
    cells = [wide * float(np.clip(p.shape[0] / p.shape[1], 0.4, 1.8)) for p in photos]
    blocks = [rows * cell + (rows - 1) * _GAP for cell in cells]
    photo_width = max(min(wide * 2.2, block / (cell / wide)) for block, cell in zip(blocks, cells, strict=True))
    left = _MARGIN + photo_width + _TITLES + _GAP
    top = _MARGIN + (0.32 if heading else 0.0) + 0.20
    width = left + len(heads) * (wide + _GAP) - _GAP + _MARGIN
    height = top + sum(blocks) + (len(blocks) - 1) * _BETWEEN + 0.5
    with canvas.style():
        figure = canvas.sheet(width, height)
        if heading:
            canvas.write(figure, _MARGIN, _MARGIN, canvas.shorten(heading, int(width * 10)), size=9.5, weight="bold")
        for column, head in enumerate(heads):
            centre = left + column * (wide + _GAP) + wide / 2
            canvas.write(figure, centre, top - 0.05, f"head {head}", ha="center", va="bottom", size=7.5)
        for i, photo in enumerate(photos):
            maps = (
                match_colours(labels[i].reshape(-1, *labels.shape[-2:])).reshape(labels[i].shape)
                if match
                else labels[i]
            )
            _block(
                figure,
                photo,
                (cls_attention[i], maps),
                at=(left, top, cells[i], photo_width, wide),
                title=titles[i],
                row_titles=[attention_name, *(_row_title(m, labels[i, r]) for r, m in enumerate(algorithms))],
                span=spans[i],
                smooth=smooth,
            )
            top += blocks[i] + _BETWEEN
        note = f"{attention_name}: each map from 0 (dark) to its own 99th percentile (bright)."
        note += " Clusters: colours matched within an image; they mean nothing across images." if match else ""
        canvas.note(figure, _MARGIN, top - _BETWEEN + 0.14, note)
    return figure


def _block(
    figure: Figure,
    photo: NDArray[np.uint8],
    maps: tuple[NDArray[np.floating[Any]], NDArray[np.uint8]],
    *,
    at: tuple[float, float, float, float, float],
    title: str,
    row_titles: Sequence[str],
    span: tuple[float, float],
    smooth: bool,
) -> None:
    attention, labels = maps
    left, top, cell, photo_width, wide = at
    rows = 1 + len(labels)
    ratio = cell / wide
    shown = min(photo_width, (rows * cell + (rows - 1) * _GAP) / ratio)
    canvas.show_photo(canvas.place(figure, _MARGIN, top, shown, shown * ratio), photo)
    canvas.write(figure, _MARGIN, top - 0.05, canvas.short_id(title, int(photo_width * 15)), va="bottom", size=7)
    present = labels[labels < NOISE]
    colours = label_colours(int(present.max()) + 1 if present.size else 1)
    for row, text in enumerate(row_titles):
        y = top + row * (cell + _GAP)
        canvas.write(
            figure, left - 0.07, y + cell / 2, text, rotation=90, ha="right", va="center", size=6.2, color=canvas.QUIET
        )
        for head in range(labels.shape[1]):
            axes = canvas.place(figure, left + head * (wide + _GAP), y, wide, cell)
            if row:
                canvas.show_labels(axes, photo, labels[row - 1, head], colours=colours, span=span)
            else:
                values = attention[head].astype(np.float64)
                peak = float(np.nanpercentile(values, 99)) if np.isfinite(values).any() else 0.0
                canvas.show_map(
                    axes, values, span=span, smooth=smooth, cmap=MAP_COLOURS, vmin=0, vmax=peak if peak > 0 else 1
                )


def _row_title(algorithm: str, labels: NDArray[np.uint8]) -> str:
    """`kmeans, k = 5`, or the range of k where the heads differ."""
    counts = [len(np.unique(one[one < NOISE])) for one in labels]
    low, high = min(counts), max(counts)
    return f"{algorithm}\nk = {low}" if low == high else f"{algorithm}\nk = {low}–{high}"

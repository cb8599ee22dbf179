"""Draws the study's figure: images × heads, with raw CLS attention above and a row of clusters for each algorithm."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from batchjob.codes import NOISE
from batchjob.figures import canvas
from batchjob.figures.outlines import Outline
from batchjob.figures.palette import match_colours

_SHEET = 12.0  # inches that the cells of the heads share; fewer heads get larger cells
_GAP, _BETWEEN = 0.045, 0.32  # inches between cells, and between images
_NUMBERS = 0.12  # inches of the line with the scores
_KEY = 0.13  # inches of the line that says what is outlined
_MARGIN, _TITLES = canvas.MARGIN, 0.32  # inches around the sheet, and for the titles of the rows


@dataclass(frozen=True)
class Scored:
    """The numbers that the study's figure writes over the first clusters of each image and head."""

    name: str  # of the score, in words
    values: NDArray[np.floating[Any]]  # [n, H], NaN where an image has no score


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
    objects: Sequence[Sequence[Outline]] | None = None,
    scored: Scored | None = None,
) -> Figure:
    """Draws one block an image: the photo, and for each head its CLS attention and its clusters.

    Parameters
    ----------
    photos
        n photos, uint8 [height, width, 3] of any size: the part that the model saw, at its own aspect ratio.
    cls_attention
        [n, H, rows, columns] on the patch grid. Each map is drawn on its own scale.
    labels
        uint8 [n, M, H, rows, columns] of M algorithms; 254 noise, 255 none.
    titles
        n titles, written over the photos.
    algorithms
        The names of the M algorithms.
    heads
        The numbers of the H heads; by default 0 to H − 1.
    heading
        What is shown; after a line break, of which run.
    attention_name
        What `cls_attention` is called.
    spans
        For each photo (height, width) of its patch grid in photo heights and widths: above 1 where the input was
        padded. By default 1.
    match
        Whether to renumber the clusters of one image so that a region keeps its colour in all maps. Give False where
        the numbers have a meaning, as those of shared centroids do.
    smooth
        Whether to interpolate attention between patches.
    objects
        For each photo the objects that are outlined on it and on its clusters.
    scored
        What is written over the first clusters of each head.

    Returns
    -------
    A figure that pyplot does not manage.
    """
    is_outlined = any(objects or ())
    heads = list(range(labels.shape[2])) if heads is None else list(heads)
    spans = spans or [(1.0, 1.0)] * len(photos)
    rows = 1 + len(algorithms)
    wide = float(np.clip(_SHEET / (len(heads) + 1.5), 0.86, 1.45))  # a cell's width
    cells = [wide * float(np.clip(p.shape[0] / p.shape[1], 0.4, 1.8)) for p in photos]
    apart = _GAP + (_NUMBERS if scored else 0)  # between the attention and the clusters
    blocks = [rows * cell + (rows - 2) * _GAP + apart for cell in cells] if len(algorithms) else cells
    photo_width = max(min(wide * 2.2, block / (cell / wide)) for block, cell in zip(blocks, cells, strict=True))
    left = _MARGIN + photo_width + _TITLES + _GAP
    between = _BETWEEN + (2 * _KEY if is_outlined else 0)
    lifted = _NUMBERS if scored and not len(algorithms) else 0.0  # the titles of the heads, over the numbers
    top = _MARGIN + (0.48 if heading else 0.0) + 0.20 + lifted
    width = left + len(heads) * (wide + _GAP) - _GAP + _MARGIN
    below = top + sum(blocks) + (len(blocks) - 1) * between + 0.14 + (2 * _KEY if is_outlined else 0)
    told = _explain(match, is_outlined, scored)
    shown = canvas.titles_of(titles, [photo_width] * len(photos))
    with canvas.style():
        figure = canvas.sheet(width, below + canvas.note_height(width, told, heat=attention_name))
        if heading:
            canvas.heading(figure, heading)
        for column, head in enumerate(heads):
            centre = left + column * (wide + _GAP) + wide / 2
            canvas.write(figure, centre, top - 0.05 - lifted, f"head {head}", ha="center", va="bottom", size=7.5)
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
                at=(left, top, cells[i], photo_width, wide, apart),
                title=shown[i],
                row_titles=[attention_name, *(_row_title(m, labels[i, r]) for r, m in enumerate(algorithms))],
                span=spans[i],
                smooth=smooth,
                objects=objects[i] if objects else (),
                scores=scored.values[i] if scored else None,
            )
            top += blocks[i] + between
        canvas.note(figure, below, told, heat=attention_name)
    return figure


def _explain(match: bool, is_outlined: bool, scored: Scored | None) -> str:
    parts = ["Clusters: colours matched within an image; they mean nothing across images."] if match else []
    parts += [f"Numbers over the maps: {scored.name}; –: no score."] if scored else []
    return " ".join(parts + [canvas.OBJECTS_NOTE] * is_outlined)


def _block(
    figure: Figure,
    photo: NDArray[np.uint8],
    maps: tuple[NDArray[np.floating[Any]], NDArray[np.uint8]],
    *,
    at: tuple[float, float, float, float, float, float],
    title: str,
    row_titles: Sequence[str],
    span: tuple[float, float],
    smooth: bool,
    objects: Sequence[Outline],
    scores: NDArray[np.floating[Any]] | None,
) -> None:
    attention, labels = maps
    left, top, cell, photo_width, wide, apart = at
    ratio = cell / wide
    tops = [top, *(top + cell + apart + row * (cell + _GAP) for row in range(len(labels)))]
    shown = min(photo_width, (tops[-1] + cell - top) / ratio)
    photo_axes = canvas.place(figure, _MARGIN, top, shown, shown * ratio)
    canvas.show_photo(photo_axes, photo)
    canvas.show_objects(photo_axes, objects)
    canvas.key(figure, _MARGIN, top + shown * ratio + 0.03, photo_width, objects, lines=2)
    canvas.write(figure, _MARGIN, top - 0.05, title, va="bottom", size=7)
    for row, (y, text) in enumerate(zip(tops, row_titles, strict=True)):
        canvas.write(
            figure, left - 0.07, y + cell / 2, text, rotation=90, ha="right", va="center", size=7, color=canvas.QUIET
        )
        for head in range(labels.shape[1]):
            axes = canvas.place(figure, left + head * (wide + _GAP), y, wide, cell)
            if row:
                canvas.show_labels(axes, photo, labels[row - 1, head], span=span)
                canvas.show_objects(axes, objects, is_white=True, width=0.5)
            else:
                canvas.show_heat(axes, attention[head], span=span, smooth=smooth)
    over = tops[1] if len(labels) else top  # the score is of the first clusters
    for head, value in enumerate(() if scores is None else scores):
        how: dict[str, Any] = {"ha": "center", "va": "bottom", "size": 7, "color": canvas.QUIET}
        canvas.write(figure, left + head * (wide + _GAP) + wide / 2, over - 0.02, canvas.decimals(value), **how)


def _row_title(algorithm: str, labels: NDArray[np.uint8]) -> str:
    """Writes the algorithm and below it `k = 5`, or `k = 3–5` where the heads differ."""
    counts = [len(np.unique(one[one < NOISE])) for one in labels]
    low, high = min(counts), max(counts)
    return f"{algorithm}\nk = {low}" if low == high else f"{algorithm}\nk = {low}–{high}"

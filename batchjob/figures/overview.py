"""Draws one figure that sums a run up: the question, three photos, the heads with their nulls, and the answer."""

import textwrap

import numpy as np
from matplotlib.figure import Figure

from batchjob.figures import canvas, statistics
from batchjob.figures.look import Look, scores_of_head
from batchjob.figures.maps import Panel
from batchjob.figures.outlines import colours_of
from batchjob.figures.palette import match_colours
from batchjob.figures.pictures import headline, panel
from batchjob.metrics import catalogue
from batchjob.store.run import Run

_WIDTH = 7.2  # inches: two columns of a journal
_HEADS = 10  # that are shown, those with the largest gains
_CELL, _GAP = 1.36, 0.06
_FOREST = 1.0  # inches for the names of the heads


def overview(run: Run, look: Look) -> Figure | None:
    """Draws the overview.

    Parameters
    ----------
    run
        The run.
    look
        Whether objects are outlined.

    Returns
    -------
    The figure, or None where the statistics have no answer to the study's question for this run.
    """
    (question, said), summary = run.answer, run.table("summary")
    if run.best is None or summary is None or run.image_score is None or not said or not run.patch_algorithms:
        return None
    found = statistics.of_score(summary, catalogue.QUESTION)
    layer, head = run.best
    shown = _three(run, layer, head, look)
    heads = statistics.best_first(found)
    lines = [text for sentence in said[:2] for text in textwrap.wrap(sentence, 78)]
    left, top = canvas.MARGIN + 3 * (_CELL + _GAP) + 0.1 + _FOREST, canvas.MARGIN + 0.64
    tall = max(max(2 * _size(p)[1] for p in shown) + 0.17, 0.2 * min(len(heads), _HEADS) + 0.3)
    below = top + tall + max(0.16 + 0.142 * len(lines), 0.75)
    with canvas.style():
        figure = canvas.sheet(_WIDTH, below + 0.56)
        canvas.heading(figure, f"{question}\n{headline(run, layer)}, k = {run.options['k']}")
        _photos(figure, shown, top)
        axes = figure.add_axes(statistics.fraction(figure, left, top - 0.06, _WIDTH - left - 0.12, tall + 0.06))
        statistics.forest_on(axes, found, heads.head(_HEADS), catalogue.QUESTION)
        axes.set_xlabel(f"{statistics.score_name(catalogue.QUESTION)}: gain")
        statistics.legend(figure, axes, left - _FOREST + 0.1, top + tall + 0.38, columns=1)
        canvas.write(figure, canvas.MARGIN, top + tall + 0.16, "\n".join(lines), size=7, linespacing=1.35)
        canvas.note(figure, canvas.MARGIN, below, _explain(run, layer, head, len(heads)))
    return figure


def _size(one: Panel) -> tuple[float, float]:
    """Returns (width, height) in inches of a photo that fits a square cell."""
    ratio = one.photo.shape[0] / one.photo.shape[1]
    return (_CELL, _CELL * ratio) if ratio <= 1 else (_CELL / ratio, _CELL)


def _three(run: Run, layer: int, head: int, look: Look) -> list[Panel]:
    """Chooses the images with the highest, the median and the lowest score of the head, or fewer if fewer have one."""
    scores = scores_of_head(run, layer, head)
    assert scores is not None
    known = run.ok_rows[np.isfinite(scores[run.ok_rows])]
    order = known[np.argsort(-scores[known], kind="stable")]
    places = dict.fromkeys([0, len(order) // 2, len(order) - 1])
    return [panel(run, int(order[i]), layer, head, look) for i in places if i < len(order)]


def _photos(figure: Figure, shown: list[Panel], top: float) -> None:
    colours = colours_of(p.objects for p in shown)
    for column, one in enumerate(shown):
        wide, high = _size(one)
        left = canvas.MARGIN + column * (_CELL + _GAP)
        names = ("best", "median", "worst") if len(shown) == 3 else ("best", "worst")
        canvas.write(figure, left, top - 0.03, f"{names[column]}: {one.score}", va="bottom", size=7)
        axes = canvas.place(figure, left, top, wide, high)
        canvas.show_photo(axes, one.photo)
        canvas.show_objects(axes, one.objects, colours, width=0.8)
        canvas.key(figure, left, top + high + 0.025, _CELL, one.objects, colours)
        if one.labels is not None:
            labels = match_colours(one.labels[None])[0]
            axes = canvas.place(figure, left, top + high + 0.17, wide, high)
            canvas.show_labels(axes, one.photo, labels, span=one.span)
            canvas.show_objects(axes, one.objects, width=0.5)


def _explain(run: Run, layer: int, head: int, count: int) -> str:
    best = f"the {_HEADS} of {count} heads with the largest gain" if count > _HEADS else "all heads"
    return (
        f"Left: annotated objects, and below them the clusters of head {head} of layer {layer}, for the images where "
        f"it scores highest, median and lowest. Right: {best}, over all images, with 95 % intervals; the answer "
        "is on the images that did not choose the head."
    )

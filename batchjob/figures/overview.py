"""Draws one figure that sums a run up: the question, three photos, the heads with their nulls, and the answer."""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from batchjob.errors import counted
from batchjob.figures import canvas, statistics
from batchjob.figures.look import Look, scores_of_head
from batchjob.figures.maps import Panel
from batchjob.figures.palette import match_colours
from batchjob.figures.pictures import headline, panel
from batchjob.metrics import catalogue
from batchjob.store.run import Run

_WIDTH = 7.2  # inches: two columns of a journal
_HEADS = 10  # that are shown, those with the largest gains
_CELL, _GAP, _KEY = 1.36, 0.06, 0.29
_FOREST = 1.05  # inches for the names of the heads


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
    if run.image_score[0] != catalogue.QUESTION:  # then the sentence says why there is no answer
        return None
    found = statistics.with_gains(statistics.of_score(summary, catalogue.QUESTION, algorithm=run.algorithms[0]))
    layer, head = run.best
    shown, count = _three(run, layer, head, look)
    heads = statistics.best_first(found)
    drawn = found.merge(heads.head(_HEADS)[["layer", "head"]], on=["layer", "head"])
    photos = statistics.count_words(pd.concat([drawn["n"], drawn["gain_n"]]), "photo")
    wrapped = textwrap.wrap(_answer(run, (layer, head), said[:2], photos), 76)
    left, top = canvas.MARGIN + 3 * (_CELL + _GAP) + 0.1 + _FOREST, canvas.MARGIN + 0.86
    tall = max(max(2 * _size(p)[1] for p in shown) + _KEY, 0.2 * min(len(heads), _HEADS) + 0.3)
    below = top + tall + max(0.16 + 0.142 * len(wrapped), 0.75)
    by = f"{run.algorithms[0]}, " if len(run.algorithms) > 1 else ""
    told = _explain(head, layer, len(heads), is_outlined=any(one.objects for one in shown))
    with canvas.style():
        figure = canvas.sheet(_WIDTH, below + canvas.note_height(_WIDTH, told))
        canvas.heading(figure, f"{question}\n{headline(run, layer)}, {by}k = {run.options['k']}")
        name = statistics.score_name(catalogue.QUESTION)
        _title(figure, canvas.MARGIN, top - 0.24, "a", f"Head {head} on single photos (n = {count:,}): {name}")
        _photos(figure, shown, top)
        axes = figure.add_axes(statistics.fraction(figure, left, top, _WIDTH - left - 0.12, tall))
        statistics.forest_on(axes, found, heads.head(_HEADS), catalogue.QUESTION)
        axes.set_xlabel(f"{name}: gain")
        _title(figure, left - _FOREST + 0.1, top - 0.24, "b", f"Each head's mean and gains (n = {photos})")
        statistics.legend(figure, axes, left - _FOREST + 0.1, top + tall + 0.38, columns=1)
        canvas.write(figure, canvas.MARGIN, top + tall + 0.16, "\n".join(wrapped), size=7, linespacing=1.35)
        canvas.note(figure, below, told)
    return figure


def _title(figure: Figure, left: float, top: float, letter: str, text: str) -> None:
    canvas.write(figure, left, top, letter, va="bottom", size=8, weight="bold")
    canvas.write(figure, left + 0.13, top, text, va="bottom", size=7)


def _answer(run: Run, head: tuple[int, int], said: Sequence[str], photos: str) -> str:
    """Writes the answer, and which photos it is on, since its score is not that of the photos shown.

    Parameters
    ----------
    run
        The run.
    head
        The pair (layer, head) that was chosen.
    said
        The sentences of the answer.
    photos
        How many photos b is of, in words.
    """
    chosen = run.chosen(catalogue.QUESTION)[0]
    tried, used = int(chosen["chosen_n"]), int(chosen["n"])
    which = "b is" if scores_of_head(run, *head).leaves_out else "a and b are"
    halves = (
        f"The head was chosen on {counted(tried, 'photo')}; the answer is from the {counted(used, 'other')}; "
        f"{which} over all {photos}."
    )
    return " ".join([*said, halves])


def _size(one: Panel) -> tuple[float, float]:
    """Returns (width, height) in inches of a photo that fits a square cell."""
    ratio = one.photo.shape[0] / one.photo.shape[1]
    return (_CELL, _CELL * ratio) if ratio <= 1 else (_CELL / ratio, _CELL)


def _three(run: Run, layer: int, head: int, look: Look) -> tuple[list[Panel], int]:
    """Chooses the images with the highest, the median and the lowest score of the head, or fewer if fewer have one.

    The second value is how many images have a score.
    """
    scores = scores_of_head(run, layer, head).values
    assert scores is not None
    known = run.ok_rows[np.isfinite(scores[run.ok_rows])]
    order = known[np.argsort(-scores[known], kind="stable")]
    places = dict.fromkeys([0, len(order) // 2, len(order) - 1])
    return [panel(run, int(order[i]), layer, head, look) for i in places if i < len(order)], len(known)


def _photos(figure: Figure, shown: list[Panel], top: float) -> None:
    for column, one in enumerate(shown):
        wide, high = _size(one)
        left = canvas.MARGIN + column * (_CELL + _GAP)
        names = ("best", "median", "worst") if len(shown) == 3 else ("best", "worst")
        canvas.write(figure, left, top - 0.03, f"{names[column]} {one.score}", va="bottom", size=7)
        axes = canvas.place(figure, left, top, wide, high)
        canvas.show_photo(axes, one.photo)
        canvas.show_objects(axes, one.objects, width=0.8)
        canvas.key(figure, left, top + high + 0.025, _CELL, one.objects, lines=2)
        if one.labels is not None:
            labels = match_colours(one.labels[None])[0]
            axes = canvas.place(figure, left, top + high + _KEY, wide, high)
            canvas.show_labels(axes, one.photo, labels, span=one.span)
            canvas.show_objects(axes, one.objects, is_white=True, width=0.5)


def _explain(head: int, layer: int, count: int, *, is_outlined: bool) -> str:
    best = f"the {_HEADS} of {count} heads with the largest gain" if count > _HEADS else "all heads"
    return (
        f"a: annotated objects, and below them the clusters of head {head} of layer {layer}, for the photos where it "
        f"scores highest, median and lowest. b: {best}; the mean score, and its gains over the null models with 95 % "
        f"intervals. {statistics.OPEN}" + f" {canvas.OBJECTS_NOTE}" * is_outlined
    )

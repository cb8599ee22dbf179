"""What the pictures show, as the command line asks for it, and which layer, head and images of a run that means."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchjob.errors import UserError, nearest
from batchjob.figures.photos import choose_rows
from batchjob.metrics.uncertainty import first_half
from batchjob.store.run import Run

FORMATS = ("png", "svg", "pdf")
_HEADS_ACROSS = 12
_FEWEST_OTHERS = 3  # images that did not choose the best head


@dataclass(frozen=True, slots=True)
class Look:
    """What the pictures show and how. The defaults are those of `batchjob figures RUN`."""

    images: str = "spread"  # spread, random, best, worst, or ids separated by commas
    count: int = 8  # images in a picture
    seed: int = 0  # of `random`
    layer: int | None = None  # of the pictures of one layer; None: the best head's by the statistics, else the last
    head: int | None = None  # of the pictures of one head; None: the best by the statistics, else the first
    # (row, column) of the patch whose attention is shown; None: the patch with the greatest CLS attention
    query: tuple[int, int] | None = None
    heads_across: int = _HEADS_ACROSS  # the most heads in one figure of all heads
    formats: tuple[str, ...] = ("png",)
    smooth: bool = False  # whether attention is interpolated between patches
    objects: bool = True  # whether annotated objects are outlined

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("heads_across", 1), ("seed", 0)):
            if getattr(self, name) < least:
                option = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise UserError(f"{option} is too small; give {least} or more")


def formats(text: str) -> tuple[str, ...]:
    """Returns the file formats that `png,svg` names. Raises UserError for an unknown one."""
    found = tuple(part.strip().lower() for part in text.split(",") if part.strip())
    if wrong := [name for name in found if name not in FORMATS]:
        raise UserError(f"--format {wrong[0]!r} is unknown; {nearest(wrong[0], list(FORMATS))}")
    return found or FORMATS[:1]


def query(text: str | None) -> tuple[int, int] | None:
    """Returns (row, column) of a text such as `4,7`, and None if it is empty. Raises UserError for any other text."""
    if not text:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise UserError(f"--query {text!r} is not a patch; give its row and column, counted from 0: --query 4,7")
    return int(parts[0]), int(parts[1])


def chosen_layer(run: Run, look: Look) -> int:
    """Chooses the layer of the pictures of one layer.

    Parameters
    ----------
    run
        The run.
    look
        What was asked for.

    Raises
    ------
    UserError
        If the run does not have the layer that was asked for.
    """
    best = run.best[0] if run.best else run.layers[-1]
    layer = best if look.layer is None else look.layer
    if layer not in run.layers:
        raise UserError(f"--layer {layer} is not in {run.folder}; it has {', '.join(map(str, run.layers))}")
    return layer


def chosen_head(run: Run, look: Look) -> int:
    """Chooses the head of the pictures of one head.

    Parameters
    ----------
    run, look
        As `chosen_layer`.

    Raises
    ------
    UserError
        If the run does not have the layer or the head that was asked for.
    """
    layer = chosen_layer(run, look)
    best = run.best[1] if run.best and run.best[0] == layer else run.heads[0]
    head = best if look.head is None else look.head
    if head not in run.heads:
        raise UserError(f"--head {head} is not in {run.folder}; it has {', '.join(map(str, run.heads))}")
    return head


def chosen_rows(run: Run, look: Look, count: int) -> list[int]:
    """Chooses the images of a picture. `best` and `worst` go by the score of the chosen head.

    Parameters
    ----------
    run, look
        As `chosen_layer`.
    count
        As `choose_rows`, which says what is returned and raised.
    """
    score = None
    if look.images in ("best", "worst"):
        score = scores_of_head(run, chosen_layer(run, look), chosen_head(run, look)).values
    return choose_rows(run, look.images, count, seed=look.seed, score=score)


@dataclass(frozen=True, slots=True)
class ImageScores:
    """The score of each image that tells good images from bad ones, for one head and the run's first algorithm."""

    values: NDArray[np.float32] | None  # [images], NaN where an image has none; None for a run without statistics
    leaves_out: bool = False  # whether the images that chose the head have none
    note: str = ""  # for the best head: which images have a score


def scores_of_head(run: Run, layer: int, head: int) -> ImageScores:
    """Returns the scores of the images for one head.

    The images that chose the best head say nothing about it, so they have no score with it. Where fewer than three
    others have one, all images keep theirs.

    Parameters
    ----------
    run
        The run.
    layer, head
        Their numbers.
    """
    if run.image_score is None:
        return ImageScores(None)
    scores = run.image_score[1][:, 0, run.layers.index(layer), run.heads.index(head)]
    if run.best != (layer, head):
        return ImageScores(scores)
    others = np.where(first_half(run.ids), np.nan, scores)
    if np.isfinite(others[run.ok_rows]).sum() >= _FEWEST_OTHERS:
        return ImageScores(others, leaves_out=True, note="Only images that did not choose the head.")
    return ImageScores(scores, note="Over all images, also those that chose the head: too few others have a score.")


def check_query(run: Run, patch: tuple[int, int] | None) -> None:
    """Checks the patch whose attention is asked for.

    Parameters
    ----------
    run
        The run.
    patch
        (row, column); None passes.

    Raises
    ------
    UserError
        If the patch is outside the run's grid, or the run has stored no attention.
    """
    rows, columns = run.geometry.grid
    if patch is not None and not (patch[0] < rows and patch[1] < columns):
        where = f"--query {patch[0]},{patch[1]} is outside the grid of {rows}×{columns} patches"
        raise UserError(f"{where}; give at most {rows - 1},{columns - 1}")
    if patch is not None and not run.kept_rows:
        raise UserError(f"--query needs stored attention, and {run.folder} has none; run again with --keep-maps N")

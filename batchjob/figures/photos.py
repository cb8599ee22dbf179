"""Reads the photos of a run as the model saw them, and chooses those that a picture shows."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob import retries
from batchjob.errors import UserError, nearest
from batchjob.geometry import Geometry
from batchjob.store.run import Run

_MISSING_GREY = 205


@dataclass(frozen=True)
class Photo:
    """The part of a photo that the model saw, and how much of it the patch grid covers."""

    pixels: NDArray[np.uint8]  # [height, width, 3], at the photo's own aspect ratio
    span: tuple[float, float]  # (height, width) of the grid in photo heights and widths; above 1 where padded
    found: bool  # false where the file can't be read: `pixels` are then grey


def open_run(folder: Path) -> Run:
    """Opens a run. Raises UserError if the folder is not a run, or the run has no labelled image."""
    run = Run.checked(folder)
    if not len(run.ok_rows):
        status = run.read(0, run.rows, only=()).status
        raise UserError(retries.without_images(status, run.data_asked, folder, run.options))
    return run


@functools.lru_cache(maxsize=8)
def _index(folder: Path) -> Any:
    from batchjob.data.index import ImageIndex

    return ImageIndex.load(folder / "index")


def photo_of(run: Run, row: int, *, side: int = 448) -> Photo:
    """Reads a photo of the data that the run was made from.

    Parameters
    ----------
    run
        The run.
    row
        The row of the image.
    side
        Pixels of the photo's longer side.

    Returns
    -------
    The photo; grey if its file can't be read any more.
    """
    from batchjob.data.decode import decode
    from batchjob.data.reading import ReadFailure

    height, width = int(run.data["height"][row]), int(run.data["width"][row])
    shown, span = display(run.geometry, height, width, side)
    try:
        pixels = decode(_index(run.folder).read(row), shown, (255, 255, 255)).pixels.transpose(1, 2, 0)
    except (ReadFailure, OSError):
        grey = np.full((shown.height, shown.width, 3), _MISSING_GREY, np.uint8)
        return Photo(grey, span, False)
    return Photo(np.ascontiguousarray(pixels), span, True)


def _row_of(run: Run, image_id: str) -> int:
    """Finds the row of an id, or of the end of one (`000000000139.jpg`, `000000000139`)."""
    if image_id in run.ids:
        return run.ids.index(image_id)
    ends = [r for r, name in enumerate(run.ids) if name.endswith("/" + image_id) or _stem(name) == image_id]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise UserError(f"image {image_id!r} is {len(ends)} images of {run.folder}; give the whole id")
    raise UserError(f"image {image_id!r} is not in {run.folder}; {nearest(image_id, run.ids[:2000])[:200]}")


def choose_rows(
    run: Run, how: str, count: int, *, seed: int = 0, score: NDArray[np.floating[Any]] | None = None
) -> list[int]:
    """Chooses labelled images to show.

    Parameters
    ----------
    run
        The run.
    how
        `spread` for images at even distances, `random`, `best`, `worst`, or ids separated by commas.
    count
        The most images to choose; it does not count for ids.
    seed
        Of `random`.
    score
        [images], for `best` and `worst`; images with NaN are not chosen.

    Returns
    -------
    Rows of the images, best or worst first.

    Raises
    ------
    UserError
        If `best` or `worst` has no `score`, or an id is not in the run or is ambiguous.
    """
    rows = run.ok_rows
    if how == "spread":
        return [int(r) for r in rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]]
    if how == "random":
        chosen = np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False)
        return sorted(int(r) for r in chosen)
    if how in ("best", "worst"):
        if score is None:
            raise UserError(f"--images {how} goes by a score that stats makes; run: batchjob stats {run.folder}")
        scored = rows[np.isfinite(score[rows])]
        order = scored[np.argsort(score[scored], kind="stable")]
        return [int(r) for r in (order[::-1] if how == "best" else order)[:count]]
    return [_row_of(run, name) for name in _split_ids(how, run.ids)]


def display(geometry: Geometry, height: int, width: int, side: int) -> tuple[Geometry, tuple[float, float]]:
    """Computes how to decode a photo so that it shows what the model saw, at its own aspect ratio.

    Parameters
    ----------
    geometry
        The run's.
    height, width
        Pixels of the photo.
    side
        Pixels of the longer side of what is shown.

    Returns
    -------
    A geometry whose input is what is shown, and the `span` of the run's grid over it as in `Photo`.
    """
    left, top, right, bottom = geometry.source_box(height, width)
    tall, wide = bottom - top, right - left
    scale = side / max(tall, wide)
    pixels = max(1, round(tall * scale)), max(1, round(wide * scale))
    content = geometry.content_size(height, width)
    kind: Any = "crop" if geometry.resize == "crop" else "squash"
    return Geometry(*pixels, 1, 1, kind), (geometry.height / content[0], geometry.width / content[1])


def _stem(name: str) -> str:
    return name.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _split_ids(text: str, ids: Sequence[str]) -> list[str]:
    """Splits a text at its commas into ids, unless the text as a whole is an id."""
    return [text] if text in ids else [part.strip() for part in text.split(",") if part.strip()]

"""Draws the codebook of a dataset-wide run: each centroid as a small map, its share of rows, and typical photos."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from batchjob.figures import canvas
from batchjob.figures.palette import MAP_COLOURS
from batchjob.figures.photos import Photo, photo_of
from batchjob.store.run import Run

MOST = 96  # the most clusters in one picture
_PHOTOS = 3  # of each cluster
_ROWS_AT_ONCE = 4096
_CELL, _GAP, _CAPTION, _APART = 0.70, 0.03, 0.17, 0.16  # inches
_MARGIN = 0.14
_PHOTO_PX = 160


@dataclass(frozen=True, slots=True)
class Typical:
    """A photo that is typical of a cluster."""

    pixels: NDArray[np.uint8]  # [height, width, 3]
    inside: NDArray[np.bool_] | None  # [rows, columns] patches in the cluster; None where the image as a whole is
    span: tuple[float, float] = (1.0, 1.0)  # as `canvas.show_map` takes it


@dataclass(frozen=True, slots=True)
class Entry:
    """One cluster."""

    number: int
    centroid: NDArray[np.floating[Any]] | None  # [rows, columns]; None where the centroid is a vector and not a map
    share: float  # of all rows
    photos: Sequence[Typical]


def codebook(entries: Sequence[Entry], *, heading: str = "", note: str = "", is_relative: bool = False) -> Figure:
    """Draws clusters in the order given, at most four side by side.

    Parameters
    ----------
    entries
        The clusters.
    heading
        What is shown; after a line break, of which run.
    note
        The small print.
    is_relative
        Whether centroids are maps around the query. Its place, the middle, is then marked.
    """
    across = max(1, min(4, len(entries)))
    down = -(-len(entries) // across)
    photos = max((len(entry.photos) for entry in entries), default=0)
    has_maps = any(entry.centroid is not None for entry in entries)
    wide = (has_maps + photos) * (_CELL + _GAP) - _GAP
    width = 2 * _MARGIN + across * wide + (across - 1) * _APART
    top = _MARGIN + (0.5 if heading else 0.0)
    below = top + down * (_CELL + _CAPTION + _APART) + 0.05
    with canvas.style():
        figure = canvas.sheet(width, below + canvas.note_height(width, note))
        if heading:
            canvas.heading(figure, heading)
        for i, entry in enumerate(entries):
            left = _MARGIN + (i % across) * (wide + _APART)
            _entry(figure, entry, left, top + (i // across) * (_CELL + _CAPTION + _APART), is_relative)
        canvas.note(figure, below, note)
    return figure


def _entry(figure: Figure, entry: Entry, left: float, top: float, is_relative: bool) -> None:
    caption = f"{entry.number}   {100 * entry.share:.{1 if entry.share >= 0.001 else 2}f} %"
    canvas.write(figure, left, top + _CAPTION - 0.04, caption, va="bottom", size=7)
    if entry.centroid is not None:
        values = entry.centroid.astype(np.float64)
        axes = _cell(figure, left, top + _CAPTION, values.shape)
        peak = float(np.nanpercentile(values, 99)) if np.isfinite(values).any() else 0.0
        canvas.show_map(axes, values, cmap=MAP_COLOURS, vmin=0, vmax=peak if peak > 0 else float(values.max()) or 1)
        if is_relative:
            axes.plot(0.5, 0.5, "+", color="#56b4e9", markersize=6, markeredgewidth=0.8)
    for j, photo in enumerate(entry.photos, start=entry.centroid is not None):
        axes = _cell(figure, left + j * (_CELL + _GAP), top + _CAPTION, photo.pixels.shape)
        canvas.show_photo(axes, photo.pixels if photo.inside is None else _spotlight(photo))
        if photo.inside is not None:
            lines = canvas.borders(photo.inside)
            canvas.show_lines(axes, lines, photo.inside.shape, photo.span, colors="white", linewidths=0.4)


def _cell(figure: Figure, left: float, top: float, shape: tuple[int, ...]) -> Axes:
    """Places axes in the shape (height, width, …) of a photo or map, as large as a cell takes, in its middle."""
    height, width = (_CELL * side / max(shape[:2]) for side in shape[:2])
    return canvas.place(figure, left + (_CELL - width) / 2, top + (_CELL - height) / 2, width, height)


def _spotlight(photo: Typical) -> NDArray[np.uint8]:
    """Returns the photo in colour where its patches are in the cluster, and dark and grey elsewhere."""
    assert photo.inside is not None
    lit = canvas.per_pixel(photo.inside, (photo.pixels.shape[0], photo.pixels.shape[1]), photo.span)[..., None]
    return np.asarray(np.where(lit, photo.pixels, 0.45 * canvas.grey(photo.pixels)), np.uint8)


def entries_of(run: Run, layer: int, head: int, *, most: int = MOST, photos: int = _PHOTOS) -> list[Entry]:
    """Collects the clusters of a head, the most common first.

    It passes over the head's labels once, which takes 0.1 s for 50,000 images.

    Parameters
    ----------
    run
        A run in dataset scope.
    layer, head
        Their numbers.
    most
        The most clusters to return.
    photos
        The most photos of each. They have the largest share of their patches in the cluster. Where CLS rows were
        clustered, they are those nearest to the centroid.
    """
    centroids = run.data["centroids"].sel(layer=layer, head=head).values[0]
    counts, best, values = _counts(run, layer, head, len(centroids), photos)
    order = np.argsort(-counts, kind="stable")[:most]
    found, opened = [], dict[int, Photo]()  # a photo is often typical of several clusters
    for number in (int(n) for n in order):
        rows = [int(r) for r, v in zip(best[number], values[number], strict=True) if np.isfinite(v)]
        found.append(
            Entry(
                number,
                shown_centroid(run, centroids[number]),
                float(counts[number] / max(counts.sum(), 1)),
                [_typical(run, row, layer, head, number, opened) for row in rows],
            )
        )
    return found


def shown_centroid(run: Run, centroid: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Turns a centroid into a map.

    Parameters
    ----------
    run
        A run in dataset scope.
    centroid
        float32 [D], one of its centroids.

    Returns
    -------
    [rows, columns] of attention: the square roots of the Hellinger distance are undone. None where vectors of another
    kind were clustered, which are not maps.
    """
    from batchjob.codebook.rows import RowKind

    options = run.options
    if options["cluster_on"] != "attention":
        return None
    shape = RowKind(options["queries"], options["features"], run.geometry.grid).shape
    return np.asarray((np.square(centroid) if options["distance"] == "hellinger" else centroid).reshape(shape))


def _counts(
    run: Run, layer: int, head: int, k: int, photos: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Returns each cluster's number of rows [k], its best images [k, photos] and their values, −inf for no image."""
    name = "labels" if "labels" in run.data else "image_labels"
    labels = run.data[name].sel(layer=layer, head=head).isel(algorithm=0)
    inertia = run.data["inertia"].sel(layer=layer, head=head).isel(algorithm=0)
    total = np.zeros(k, np.int64)
    best, values = np.zeros((k, photos), np.int64), np.full((k, photos), -np.inf)
    for start in range(0, len(run.ids), _ROWS_AT_ONCE):
        block = labels.isel(image=slice(start, start + _ROWS_AT_ONCE)).values.astype(np.int64)
        block = block.reshape(len(block), -1)
        codes = (np.arange(len(block))[:, None] * k + block)[block < k]
        shares = np.bincount(codes, minlength=len(block) * k).reshape(-1, k)
        total += shares.sum(0)
        score = np.where(shares > 0, shares, -np.inf)
        if name == "image_labels":
            distance = inertia.isel(image=slice(start, start + _ROWS_AT_ONCE)).values
            score = np.where(shares > 0, -distance[:, None], -np.inf)
        at = np.broadcast_to(start + np.arange(len(block)), (k, len(block)))
        both, where = np.concatenate([values, score.T], 1), np.concatenate([best, at], 1)
        order = np.argsort(-both, axis=1, kind="stable")[:, :photos]
        values, best = np.take_along_axis(both, order, 1), np.take_along_axis(where, order, 1)
    return total, best, values


def _typical(run: Run, row: int, layer: int, head: int, number: int, opened: dict[int, Photo]) -> Typical:
    if row not in opened:
        opened[row] = photo_of(run, row, side=_PHOTO_PX)
    photo = opened[row]
    if "labels" not in run.data:
        return Typical(photo.pixels, None, photo.span)
    return Typical(photo.pixels, run.stack("labels", [row], layer=layer, head=head)[0, 0] == number, photo.span)


def clustered(run: Run) -> str:
    """Names the rows of patches that were clustered."""
    return f"{run.clustered}{' rows' if run.clustered == run.rows_name else ''} of patches"


def explain(run: Run, shown: int) -> str:
    """Writes the small print under the picture.

    Parameters
    ----------
    run
        A run in dataset scope.
    shown
        How many of its clusters the picture shows.
    """
    options, k = run.options, int(run.options["k"])
    is_of_images = options["queries"] == "cls"
    what = "CLS rows" if is_of_images else clustered(run)
    order = "all of them" if shown == k else f"the {shown} most common of {k}"
    where = (
        "around the query, which is in the middle, marked +"
        if options["features"] == "relative"
        else "over key positions"
    )
    parts = ["its number and share of all rows"]
    parts += [f"its centroid {where} (0 is dark)"] * (options["cluster_on"] == "attention")
    parts.append(
        "the photos nearest to the centroid"
        if is_of_images
        else "the photos with most of its patches, which are in colour"
    )
    return f"Clusters of {what} over the whole data set, {order}. Each cluster: {'; '.join(parts)}."

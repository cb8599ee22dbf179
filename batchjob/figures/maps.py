"""Draws attention maps: one head over many images, layers × heads, masks of attended patches, models side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from batchjob.figures import canvas
from batchjob.figures.outlines import Outline

Floats = NDArray[np.floating[Any]]
_MARGIN, _GAP = canvas.MARGIN, 0.05
_SHEET = 11.6  # inches: as wide as the study's figure of twelve heads
_KEY = 0.13  # inches of the line that says what is outlined
_OUTLINE = "#ffb000"  # can be seen on dark and on light photos, by colour-blind eyes too


@dataclass(frozen=True)
class Panel:
    """One photo, and one head's attention and clusters on it."""

    photo: NDArray[np.uint8]  # [height, width, 3]
    attention: Floats  # [rows, columns]
    labels: NDArray[np.uint8] | None  # [rows, columns]; None where there are no clusters
    title: str
    span: tuple[float, float] = (1.0, 1.0)  # as `canvas.show_map` takes it
    objects: Sequence[Outline] = ()
    score: str = ""  # written over the photo, below the title


@dataclass(frozen=True, slots=True)
class _Heights:
    """What the parts of a strip of photos take, in inches."""

    row: float  # the photos, and each row of maps
    scores: float  # the line over the photos
    key: float  # the lines under the photos
    name: float  # the lines over each model's maps


def one_head(
    groups: Mapping[str, Sequence[Panel]],
    *,
    heading: str,
    attention_name: str = "CLS attention",
    smooth: bool = False,
    remark: str = "",
) -> Figure:
    """Draws one head over many images: each image has a column with its photo, attention and clusters.

    Parameters
    ----------
    groups
        The images of each group, by name. A group begins a new strip with its name over it, unless the name is empty.
    heading
        What is shown; after a line break, of which run.
    attention_name
        What the attention is called.
    smooth
        Whether to interpolate attention between patches.
    remark
        For the small print.
    """
    columns = {name: [[panel] for panel in panels] for name, panels in groups.items() if panels}
    return _columns(columns, heading, [""], attention_name, smooth, remark)


def side_by_side(
    photos: Sequence[Sequence[Panel]],
    *,
    models: Sequence[str],
    heading: str,
    attention_name: str = "attention",
    smooth: bool = False,
) -> Figure:
    """Draws the same photos through several models: each model has a block of attention and clusters.

    Parameters
    ----------
    photos
        For each photo, one panel a model. The photo is drawn once.
    models
        The names of the models, written over their blocks.
    heading, attention_name, smooth
        As `one_head`.
    """
    return _columns({"": photos}, heading, models, attention_name, smooth)


def _columns(
    groups: Mapping[str, Sequence[Sequence[Panel]]],
    heading: str,
    models: Sequence[str],
    attention_name: str,
    smooth: bool,
    remark: str = "",
) -> Figure:
    height, titles = 1.02, 0.30
    photos = [panels for group in groups.values() for panels in group]
    is_outlined = any(panels[0].objects for panels in photos)
    widths = [height * float(np.clip(p[0].photo.shape[1] / p[0].photo.shape[0], 0.4, 2.2)) for p in photos]
    strips = _strips(groups, widths, _SHEET - 2 * _MARGIN - titles)
    used = max(sum(widths[i] + _GAP for i in strip) for _, strip in strips)
    width = max(min(_SHEET, 2 * _MARGIN + titles + used), 4.5)
    names = [canvas.wrapped(canvas.printable(name), width - 2 * _MARGIN - titles) for name in models]
    lines = max(len(name) for name in names)
    size = _Heights(
        height,
        scores=0.12 * any(panels[0].score for panels in photos),
        key=2 * _KEY * is_outlined,
        name=lines and 0.08 + 0.13 * lines,
    )
    rows = [(attention_name, *["clusters"] * (panel.labels is not None)) for panel in photos[0]]  # of each model
    block = size.scores + height + _GAP + size.key + 0.26
    block += sum(size.name + len(mine) * (height + _GAP) + 0.08 for mine in rows)
    named = 0.2  # inches over a strip that begins a group with a name
    top = _MARGIN + 0.62 + size.scores
    below = top + len(strips) * block + named * sum(bool(name) for name, _ in strips) - size.scores - 0.12
    told = " ".join([remark] * bool(remark) + [canvas.OBJECTS_NOTE] * is_outlined)
    ids = canvas.titles_of([panels[0].title for panels in photos], [w - 0.03 for w in widths])
    with canvas.style():
        figure = canvas.sheet(width, below + canvas.note_height(width, told, heat=attention_name))
        canvas.heading(figure, heading)
        for name, strip in strips:
            if name:
                canvas.write(figure, _MARGIN, top - size.scores - 0.13, name, size=8)
                top += named
            _row_names(figure, top, size, names, rows)
            left = _MARGIN + titles
            for i in strip:
                _column(figure, photos[i], ids[i], (left, top, widths[i]), size, smooth)
                left += widths[i] + _GAP
            top += block
        canvas.note(figure, below, told, heat=attention_name)
    return figure


def _strips(groups: Mapping[str, Sequence[Any]], widths: Sequence[float], room: float) -> list[tuple[str, list[int]]]:
    """Returns for each strip the name of the group that begins there, or an empty one, and its photos' numbers."""
    found, start = [], 0
    for name, photos in groups.items():
        for number, strip in enumerate(_wrap(widths[start : start + len(photos)], room)):
            found.append((name if not number else "", [start + i for i in strip]))
        start += len(photos)
    return found


def _column(
    figure: Figure,
    panels: Sequence[Panel],
    title: str,
    at: tuple[float, float, float],
    size: _Heights,
    smooth: bool,
) -> None:
    left, top, width = at
    first, height = panels[0], size.row
    quiet: dict[str, Any] = {"va": "bottom", "size": 7, "color": canvas.QUIET}
    canvas.write(figure, left, top - 0.03 - size.scores, title, **quiet)
    canvas.write(figure, left, top - 0.03, first.score, **quiet)
    axes = canvas.place(figure, left, top, width, height)
    canvas.show_photo(axes, first.photo)
    canvas.show_objects(axes, first.objects, width=0.8)
    canvas.key(figure, left, top + height + 0.025, width, first.objects, lines=2)
    y = top + height + _GAP + size.key
    for panel in panels:
        y += size.name
        axes = canvas.place(figure, left, y, width, height)
        canvas.show_heat(axes, panel.attention, span=panel.span, smooth=smooth)
        y += height + _GAP
        if panel.labels is not None:
            axes = canvas.place(figure, left, y, width, height)
            canvas.show_labels(axes, panel.photo, panel.labels, span=panel.span)
            canvas.show_objects(axes, panel.objects, is_white=True, width=0.5)
            y += height + _GAP
        y += 0.08


def _row_names(
    figure: Figure, top: float, size: _Heights, models: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]
) -> None:
    y = top + size.row + _GAP + size.key
    quiet: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "center", "size": 7, "color": canvas.QUIET}
    for lines, names in zip(models, rows, strict=True):
        y += size.name
        canvas.write(figure, _MARGIN + 0.3, y - 0.04, "\n".join(lines), va="bottom", size=7, linespacing=1.35)
        for name in names:
            canvas.write(figure, _MARGIN + 0.12, y + size.row / 2, name, **quiet)
            y += size.row + _GAP
        y += 0.08


def layer_grid(
    photo: NDArray[np.uint8],
    maps: Floats,
    *,
    layers: Sequence[int],
    heads: Sequence[int],
    heading: str,
    what: str,
    span: tuple[float, float] = (1.0, 1.0),
    query: tuple[int, int] | None = None,
    smooth: bool = False,
    objects: Sequence[Outline] = (),
) -> Figure:
    """Draws layers × heads of one image.

    Parameters
    ----------
    photo
        uint8 [height, width, 3].
    maps
        [L, H, rows, columns].
    layers, heads
        The numbers of the L layers and H heads.
    heading, smooth
        As `one_head`.
    what
        What the maps show, in words.
    span
        As `canvas.show_map`.
    query
        (row, column) of a patch to mark.
    objects
        The objects to outline on the photo.
    """
    ratio = float(np.clip(photo.shape[0] / photo.shape[1], 0.4, 1.8))
    cell = float(np.clip(min(9.0 / len(heads), 10.0 / len(layers) / ratio), 0.5, 1.45))
    tall = cell * ratio
    photo_width = float(np.clip(len(layers) * cell, cell, min(2.6, 3.2 / ratio)))
    left, head = _MARGIN + photo_width + 0.62, _MARGIN + 0.68
    width = left + len(heads) * (cell + _GAP) + _MARGIN
    below = head + max(len(layers) * (tall + _GAP), photo_width * ratio + 0.3) + 0.08
    told = canvas.OBJECTS_NOTE if objects else ""
    with canvas.style():
        figure = canvas.sheet(width, below + canvas.note_height(width, told, heat=what))
        canvas.heading(figure, heading)
        axes = canvas.place(figure, _MARGIN, head, photo_width, photo_width * ratio)
        canvas.show_photo(axes, photo)
        canvas.show_objects(axes, objects)
        canvas.key(figure, _MARGIN, head + photo_width * ratio + 0.03, photo_width + 0.5, objects, lines=2)
        _mark(axes, query, maps.shape[-2:], span, 6)
        for column, number in enumerate(heads):
            x = left + column * (cell + _GAP) + cell / 2
            canvas.write(figure, x, head - 0.05, f"head {number}", ha="center", va="bottom", size=7)
        for row, number in enumerate(layers):
            y = head + row * (tall + _GAP)
            canvas.write(figure, left - 0.08, y + tall / 2, f"layer {number}", ha="right", va="center", size=7)
            for column in range(len(heads)):
                axes = canvas.place(figure, left + column * (cell + _GAP), y, cell, tall)
                canvas.show_heat(axes, maps[row, column], span=span, smooth=smooth)
                _mark(axes, query, maps.shape[-2:], span, 3.5)
        canvas.note(figure, below, told, heat=what)
    return figure


def mask_grid(
    photos: Sequence[NDArray[np.uint8]],
    cls_attention: Floats,
    *,
    titles: Sequence[str],
    heads: Sequence[int],
    heading: str,
    spans: Sequence[tuple[float, float]],
    mass: float = 0.6,
    attention_name: str = "attention",
    objects: Sequence[Sequence[Outline]] | None = None,
) -> Figure:
    """Draws images × heads: the fewest patches that hold a share of the CLS attention, outlined on the photo.

    Parameters
    ----------
    photos, cls_attention, titles, spans, objects
        As `study_grid`.
    heads
        The numbers of the H heads.
    heading, attention_name
        As `one_head`.
    mass
        The share, 0 to 1.

    References
    ----------
    Caron et al. 2021 (DINO), figure 1 and appendix.
    """
    is_outlined = any(objects or ())
    apart = 0.26 + (_KEY if is_outlined else 0)  # inches between photos
    cell, top = float(np.clip(11.0 / (len(heads) + 1), 0.86, 1.45)), _MARGIN + 0.68
    ratios = [float(np.clip(p.shape[0] / p.shape[1], 0.4, 1.8)) for p in photos]
    width = 2 * _MARGIN + (len(heads) + 1) * (cell + _GAP)
    below = top + sum(cell * r + apart for r in ratios) - 0.06
    told = f"Bright, in orange: the fewest patches that hold {100 * mass:.0f} % of the {attention_name}."
    told += f" {canvas.OBJECTS_NOTE}" * is_outlined
    with canvas.style():
        figure = canvas.sheet(width, below + canvas.note_height(width, told))
        canvas.heading(figure, heading)
        for column, number in enumerate(heads):
            x = _MARGIN + (column + 1.5) * (cell + _GAP)
            canvas.write(figure, x, top - 0.05, f"head {number}", ha="center", va="bottom", size=7.5)
        outlined = objects or [()] * len(photos)
        shown = canvas.titles_of(titles, [cell] * len(photos))
        for photo, maps, title, span, ratio, own in zip(
            photos, cls_attention, shown, spans, ratios, outlined, strict=True
        ):
            axes = canvas.place(figure, _MARGIN, top, cell, cell * ratio)
            canvas.show_photo(axes, photo)
            canvas.show_objects(axes, own, width=0.8)
            canvas.key(figure, _MARGIN, top + cell * ratio + 0.025, 3 * cell, own)
            canvas.write(figure, _MARGIN, top - 0.04, title, va="bottom", size=7, color=canvas.QUIET)
            for column, values in enumerate(maps):
                axes = canvas.place(figure, _MARGIN + (column + 1) * (cell + _GAP), top, cell, cell * ratio)
                _outline(axes, photo, attended(values, mass), span)
                canvas.show_objects(axes, own, is_white=True, width=0.45)
            top += cell * ratio + apart
        canvas.note(figure, below, told)
    return figure


def attended(values: Floats, mass: float) -> NDArray[np.bool_]:
    """Finds the fewest patches that hold a share of a map.

    Parameters
    ----------
    values
        [rows, columns], not negative.
    mass
        The share, 0 to 1.

    Returns
    -------
    bool [rows, columns]; all false for a map with NaN or without attention.
    """
    flat = np.asarray(values, np.float64).ravel()
    if not np.isfinite(flat).all() or flat.sum() <= 0:
        return np.zeros(values.shape, bool)
    order = np.argsort(-flat, kind="stable")
    held = np.cumsum(flat[order]) / flat.sum()
    mask = np.zeros(flat.size, bool)
    mask[order[: int((held < mass - 1e-9).sum()) + 1]] = True
    return mask.reshape(values.shape)


def _outline(axes: Axes, photo: NDArray[np.uint8], mask: NDArray[np.bool_], span: tuple[float, float]) -> None:
    """Draws the photo, dimmed outside the mask, and the mask's border as a line with a dark rim."""
    inside = canvas.per_pixel(mask, (photo.shape[0], photo.shape[1]), span)[..., None]
    canvas.show_photo(axes, np.where(inside, photo, (photo * 0.42 + 24).astype(np.uint8)))
    lines = canvas.borders(np.pad(mask, 1)) - 1  # padded, so that the mask has a border at the photo's edge too
    thin = canvas.hairline(axes, mask.shape, share=0.2)
    for colour, thick in (("#000000", 2 * thin), (_OUTLINE, thin)):
        canvas.show_lines(axes, lines, mask.shape, span, colors=colour, linewidths=thick)


def _mark(
    axes: Axes, query: tuple[int, int] | None, grid: tuple[int, ...], span: tuple[float, float], size: float
) -> None:
    if query is not None:
        x, y = (query[1] + 0.5) / grid[1] * span[1], (query[0] + 0.5) / grid[0] * span[0]
        axes.plot([x], [y], "o", ms=size, mfc="none", mec="black", mew=1.6)
        axes.plot([x], [y], "o", ms=size, mfc="none", mec="white", mew=0.8)


def _wrap(widths: Sequence[float], room: float) -> list[list[int]]:
    """Splits items into strips and returns the items' numbers; a strip is wider than `room` only if one item is."""
    strips = _fill(widths, room)
    while len(_fill(widths, room - 0.05)) == len(strips) and room > max(widths) + 0.1:
        room -= 0.05  # the narrowest sheet with as few strips: it fills them evenly
    return _fill(widths, room)


def _fill(widths: Sequence[float], room: float) -> list[list[int]]:
    strips: list[list[int]] = [[]]
    used = 0.0
    for i, width in enumerate(widths):
        if strips[-1] and used + width + _GAP > room:
            strips.append([])
            used = 0.0
        strips[-1].append(i)
        used += width + _GAP
    return strips

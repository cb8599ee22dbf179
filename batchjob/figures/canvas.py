"""What all pictures share: sheets measured in inches, photos with maps, labels and outlines on them, and files."""

import functools
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

from batchjob.figures.outlines import KeyEntry, Outline, count_words, key_entries
from batchjob.figures.palette import MAP_COLOURS, label_colours

T = TypeVar("T", bound=np.generic)
MARGIN = 0.14  # inches around a sheet
INK, QUIET, RULE = "#1b1f24", "#5d6672", "#d5d9df"
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 7.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8a929c",
    "axes.linewidth": 0.6,
    "axes.titlesize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.frameon": False,
    "legend.fontsize": 7.0,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "batchjob",
}
_LINE, _BAR = 0.136, 0.5  # inches from line to line of the small print, and of the bar with the colours of maps
_FINE = 1200  # dots per inch at which letters are measured: a coarse grid would round the width of each
KEY_SIZE, KEY_LINE = 7.0, 0.12  # points of the key under a photo, and inches from line to line
OBJECTS_NOTE = "Outlines: annotated objects; dotted, too small for the patch grid; dashed, crowds. Neither is scored."
PHOTO_SHARE = 0.36  # of the photo's grey in a pixel with a cluster's colour: objects stay visible, the colour dominates


@contextmanager
def style() -> Iterator[None]:
    """Sets matplotlib to the figures' look inside a `with` block, and restores the caller's settings after it."""
    with mpl.rc_context(_STYLE):
        yield


def sheet(width: float, height: float) -> Figure:
    """Makes a white figure that pyplot does not manage.

    Parameters
    ----------
    width, height
        In inches.
    """
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Adds axes without ticks and frame to a sheet.

    Parameters
    ----------
    figure
        The sheet.
    left, top
        Place of the upper left corner of the axes, in inches from that of the sheet.
    width, height
        Size of the axes in inches.
    """
    sheet_width, sheet_height = figure.get_size_inches()
    axes = figure.add_axes(
        (left / sheet_width, 1 - (top + height) / sheet_height, width / sheet_width, height / sheet_height)
    )
    axes.set_axis_off()
    return axes


def write(figure: Figure, left: float, top: float, text: str, **how: Any) -> None:
    """Writes text on a sheet.

    Parameters
    ----------
    figure, left, top
        As `place`, for the upper left corner of the text, unless `how` has another alignment.
    text
        The text. It may have line breaks; a `$` is an ordinary character.
    **how
        Properties of matplotlib's `Text`.
    """
    width, height = figure.get_size_inches()
    how = {"ha": "left", "va": "top"} | how
    figure.text(left / width, 1 - top / height, text, parse_math=False, **how)


@functools.cache
def _drawn_characters() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont(_STYLE["font.family"]))
    return frozenset(font.get_charmap())


def printable(text: str) -> str:
    """Escapes the characters that the font can't draw: control characters and letters stand as `\\x1b` or `\\u6f22`."""
    drawn = _drawn_characters()
    return "".join(c if c.isprintable() and ord(c) in drawn else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, limit: int) -> str:
    """Shortens a text by leaving its middle out, and makes it `printable`.

    Parameters
    ----------
    text
        Any text, such as the name of a file.
    limit
        The most characters to return.
    """
    text = printable(text)
    if len(text) <= limit:
        return text
    tail = (limit - 1) * 2 // 3
    return text[: limit - 1 - tail] + "…" + text[len(text) - tail :]


def width_of(text: str, size: float = 7.0) -> float:
    """Computes the inches that a line of text takes.

    Parameters
    ----------
    text
        The line.
    size
        Of its letters, in points.
    """
    font = font_manager.get_font(font_manager.findfont(_STYLE["font.family"]))
    font.set_size(size, _FINE)
    font.set_text(text)
    return float(font.get_width_height()[0]) / 64 / _FINE


def titles_of(ids: Sequence[str], rooms: Sequence[float]) -> list[str]:
    """Shortens the ids of one picture's images so that each fits over its image.

    The folders are left out where the names tell the images apart. Where a name is too long for its image, all names
    lose their extension, unless that makes two alike. One that is still too long loses its beginning, and may then be
    equal to another.

    Parameters
    ----------
    ids
        The ids.
    rooms
        For each id, the inches that its title may take.
    """
    titles, count = [printable(text) for text in ids], len(set(ids))
    names = [text.rsplit("/", 1)[-1] for text in titles]
    titles = names if len(set(names)) == count else titles
    if any(width_of(title) > room for title, room in zip(titles, rooms, strict=True)):
        bare = [text.removesuffix(PurePosixPath(text).suffix) for text in titles]
        titles = bare if len(set(bare)) == count else titles
    return [_end_of(title, room) for title, room in zip(titles, rooms, strict=True)]


def _end_of(text: str, room: float) -> str:
    """Returns the text, or an ellipsis and as much of its end as the room has place for."""
    ends = (text[-length:] for length in reversed(range(1, len(text))))
    return next((t for t in (text, *(f"…{end}" for end in ends)) if width_of(t) <= room), f"…{text[-1:]}")


def decimals(value: float) -> str:
    """Writes a number with two decimals and a true minus sign, or a dash if it is NaN or infinite."""
    return f"{value:z.2f}".replace("-", "−") if np.isfinite(value) else "–"


def heading(figure: Figure, text: str, *, size: float = 9.5) -> None:
    """Writes the heading in the upper left corner of a sheet.

    Parameters
    ----------
    figure
        The sheet.
    text
        What is shown; after a line break, of which run.
    size
        Of the first line, in points.
    """
    width = figure.get_size_inches()[0] - 2 * MARGIN
    for number, line in enumerate(text.split("\n")[:2]):
        how = {"size": 7.5, "color": QUIET} if number else {"size": size, "weight": "bold"}
        room = int(width / (0.055 if number else 0.0091 * size))
        write(figure, MARGIN, MARGIN + (0.2 if number else 0), shorten(line, room), **how)


def note(figure: Figure, top: float, text: str, *, heat: str = "") -> None:
    """Writes the small print of a sheet, in lines that fit it.

    Parameters
    ----------
    figure
        The sheet.
    top
        In inches from the upper edge of the sheet.
    text
        The small print.
    heat
        What the attention maps of the sheet show. A bar with their colours, and what these mean, come first.
    """
    colours, lines = _small_print(figure.get_size_inches()[0], text, heat)
    how: dict[str, Any] = {"size": 7, "color": QUIET, "linespacing": 1.35}
    if colours:
        bar = place(figure, MARGIN, top + 0.015, _BAR, 0.085)
        bar.imshow(np.linspace(0, 1, 128)[None], cmap=MAP_COLOURS, aspect="auto")
        write(figure, MARGIN + _BAR + 0.07, top, "\n".join(colours), **how)
    write(figure, MARGIN, top + _LINE * len(colours), "\n".join(lines), **how)


def note_height(width: float, text: str, *, heat: str = "") -> float:
    """Returns the inches that `note` takes on a sheet of this width, with the margin below.

    Parameters
    ----------
    width
        Of the sheet, in inches.
    text, heat
        As `note`.
    """
    return _LINE * sum(len(lines) for lines in _small_print(width, text, heat)) + MARGIN


def _small_print(width: float, text: str, heat: str) -> tuple[list[str], list[str]]:
    """Returns the lines that say what the colours of maps mean, and the lines of the text."""
    scale = f"{heat[:1].upper()}{heat[1:]}: from 0 (dark) to each map's 99th percentile and above (bright)."
    room = width - 2 * MARGIN
    return wrapped(scale, room - _BAR - 0.07) if heat else [], wrapped(text, room)


def wrapped(text: str, room: float) -> list[str]:
    """Breaks a text into lines.

    Parameters
    ----------
    text
        The text, to be written in letters of 7 points.
    room
        The most inches that a line may take.
    """
    return textwrap.wrap(text, max(20, int(room / 0.056)))


def show_photo(axes: Axes, photo: NDArray[np.uint8]) -> None:
    """Draws a photo and lets the axes count from 0 to 1 over its width and height, with y downwards.

    Parameters
    ----------
    axes
        As `place` makes them.
    photo
        uint8 [height, width, 3].
    """
    axes.imshow(photo, extent=(0, 1, 1, 0), aspect="auto", interpolation="antialiased")
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)


def show_map(
    axes: Axes,
    values: NDArray[np.floating[Any]],
    *,
    span: tuple[float, float] = (1, 1),
    smooth: bool = False,
    **how: Any,
) -> None:
    """Draws values of a patch grid over the box of a photo.

    Parameters
    ----------
    axes
        As `show_photo` leaves them.
    values
        [rows, columns].
    span
        (height, width) of the grid in photo heights and widths: above 1 where the input was padded.
    smooth
        Whether to interpolate between patches.
    **how
        Arguments of matplotlib's `imshow`.
    """
    axes.imshow(
        values,
        extent=(0, span[1], span[0], 0),
        aspect="auto",
        interpolation="bicubic" if smooth else "nearest",
        **how,
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)


def show_heat(
    axes: Axes, values: NDArray[np.floating[Any]], *, span: tuple[float, float] = (1, 1), smooth: bool = False
) -> None:
    """Draws an attention map from dark at 0 to bright at its `peak` and above.

    Parameters
    ----------
    axes, values, span, smooth
        As `show_map`.
    """
    how: dict[str, Any] = {"cmap": MAP_COLOURS, "vmin": 0, "vmax": peak(values)}
    show_map(axes, values.astype(np.float64), span=span, smooth=smooth, **how)


def peak(values: NDArray[np.floating[Any]]) -> float:
    """Returns the 99th percentile of a map's finite values, or 1 if that is not above 0.

    It is drawn as the brightest colour. The maximum would not do: one patch with very high attention would leave all
    others black.
    """
    finite = np.asarray(values, np.float64)[np.isfinite(values)]
    top = float(np.percentile(finite, 99)) if finite.size else 0.0
    return top if top > 0 else 1.0


def show_labels(
    axes: Axes, photo: NDArray[np.uint8], labels: NDArray[np.uint8], *, span: tuple[float, float] = (1, 1)
) -> None:
    """Draws a photo in grey, each patch in the colour of its cluster, and the borders between clusters.

    Parameters
    ----------
    axes, span
        As `show_map`.
    photo
        uint8 [height, width, 3].
    labels
        [rows, columns]; 254 noise, 255 none.
    """
    show_photo(axes, blend(photo, labels, span=span))
    show_lines(axes, borders(labels), labels.shape, span, colors="white", linewidths=hairline(axes, labels.shape))


def show_objects(axes: Axes, outlines: Sequence[Outline], *, is_white: bool = False, width: float = 1.0) -> None:
    """Draws the outlines of objects: dashed for crowds, dotted and thin for objects too small for the patch grid.

    Parameters
    ----------
    axes
        As `show_photo` leaves them.
    outlines
        The objects.
    is_white
        Whether to draw all in white, and not in the colours of their categories.
    width
        Of a line, in points.
    """
    for kind, dashes, share in (("small", (0, (1, 1.2)), 0.6), ("crowd", (0, (4, 2)), 0.8), ("instance", "-", 1.0)):
        mine = [o for o in outlines if o.kind == kind]
        lines = [line for o in mine for line in o.lines]
        inks = ["#ffffff" if is_white else o.colour for o in mine for _ in o.lines]
        how: dict[str, Any] = {"capstyle": "butt", "zorder": 4}
        if lines:
            axes.add_collection(LineCollection(lines, colors="#000000", linewidths=share * width + 0.7, **how))
            axes.add_collection(LineCollection(lines, colors=inks, linewidths=share * width, linestyles=dashes, **how))


def key(figure: Figure, left: float, top: float, room: float, outlines: Sequence[Outline], *, lines: int = 1) -> None:
    """Writes a line that names the categories beside the colours of their outlines, with their counts.

    Where not all fits, it ends with `+ n more` objects.

    Parameters
    ----------
    figure, left, top
        As `place`.
    room
        The length of the line in inches.
    outlines
        The objects of one photo.
    lines
        The most lines.
    """
    renderer, dpi = FigureCanvasAgg(figure).get_renderer(), figure.dpi  # type: ignore[no-untyped-call]
    size = figure.get_size_inches()

    def put(text: str, at: float, line: int, colour: str) -> tuple[Text, float]:
        y = 1 - (top + line * KEY_LINE) / size[1]
        how: dict[str, Any] = {"size": KEY_SIZE, "ha": "left", "va": "top", "parse_math": False}
        drawn = figure.text(at / size[0], y, text, color=colour, **how)
        return drawn, at + float(drawn.get_window_extent(renderer).width) / dpi

    for entries, rest in _keys(outlines):
        drawn: list[Text] = []
        at, line, is_cut = left, 0, False
        for entry in [*entries, *[KeyEntry(rest, "", 0)] * bool(rest)]:
            for _ in range(2):  # on this line, else on the next
                swatch, start = put("■" if entry.colour else "", at, line, entry.colour or QUIET)
                label, end = put(entry.text, start + 0.02 * bool(entry.colour), line, QUIET)
                if end <= left + room or at == left:
                    break
                swatch.remove()
                label.remove()
                at, line = left, line + 1
            drawn += [swatch, label]
            at, is_cut = end + 0.07, is_cut or end > left + room or line >= lines
        if not is_cut or not entries:
            break
        for text in drawn:
            text.remove()


def _keys(outlines: Sequence[Outline]) -> Iterator[tuple[list[KeyEntry], str]]:
    """Yields the entries of a photo's key and the words behind them, first all, then ever fewer."""
    entries, rest = key_entries(outlines), count_words(outlines)[1]
    yield entries, rest
    for count in reversed(range(len(entries) + 1)):
        more = len(outlines) - sum(entry.objects for entry in entries[:count])
        if more:
            yield entries[:count], f"+ {more} more" if count else f"{more} object{'s' * (more > 1)}"


def hairline(axes: Axes, grid: tuple[int, ...], *, share: float = 0.11) -> float:
    """Computes the width of a line that suits the size of the patches.

    Parameters
    ----------
    axes
        Those of the photo.
    grid
        (rows, columns) of patches.
    share
        Of the shorter side of a patch.

    Returns
    -------
    Points, from 0.15 to 0.7.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    box, (width, height) = axes.get_position(), figure.get_size_inches()
    side = 72 * min(box.width * width / grid[1], box.height * height / grid[0])
    return float(np.clip(share * side, 0.15, 0.7))


def blend(
    photo: NDArray[np.uint8], labels: NDArray[np.uint8], *, span: tuple[float, float] = (1, 1)
) -> NDArray[np.uint8]:
    """Lays the colours of clusters over a photo in grey.

    Parameters
    ----------
    photo, labels, span
        As `show_labels`.

    Returns
    -------
    uint8 [height, width, 3], grey where patches have no label.
    """
    rgba = label_colours()[per_pixel(labels, (photo.shape[0], photo.shape[1]), span)]
    weight = rgba[..., 3:] * (1 - PHOTO_SHARE)
    return np.asarray(np.round(255 * (weight * rgba[..., :3] + (1 - weight) * (grey(photo) / 255))), dtype=np.uint8)


def grey(photo: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Returns the brightness, 0 to 255, of a photo [height, width, 3] as [height, width, 1]."""
    return np.asarray((photo @ np.array([0.299, 0.587, 0.114]))[..., None])


def per_pixel(patches: NDArray[T], size: tuple[int, int], span: tuple[float, float] = (1, 1)) -> NDArray[T]:
    """Looks up the patch under each pixel of a photo.

    Parameters
    ----------
    patches
        [rows, columns] of any values.
    size
        (height, width) of the photo in pixels.
    span
        As `show_map`.

    Returns
    -------
    [height, width], the values of the patches.
    """
    (height, width), (rows, columns) = size, patches.shape
    y = np.minimum((np.arange(height) + 0.5) / height / span[0] * rows, rows - 1).astype(np.intp)
    x = np.minimum((np.arange(width) + 0.5) / width / span[1] * columns, columns - 1).astype(np.intp)
    return np.asarray(patches[y[:, None], x[None, :]])


def borders(labels: NDArray[np.generic]) -> NDArray[np.float64]:
    """Finds the borders between patches of different labels: segments [n, 2, (x, y)] in patches from the upper left."""
    y, x = np.nonzero(labels[:, 1:] != labels[:, :-1])
    upright = np.stack([np.stack([x + 1, y], -1), np.stack([x + 1, y + 1], -1)], 1)
    y, x = np.nonzero(labels[1:] != labels[:-1])
    level = np.stack([np.stack([x, y + 1], -1), np.stack([x + 1, y + 1], -1)], 1)
    return np.concatenate([upright, level]).astype(np.float64)


def show_lines(
    axes: Axes, lines: NDArray[np.float64], grid: tuple[int, ...], span: tuple[float, float], **how: Any
) -> None:
    """Draws segments on a photo.

    Parameters
    ----------
    axes, span
        As `show_map`.
    lines
        [n, 2, (x, y)] in patches, as `borders` returns them.
    grid
        (rows, columns) of patches.
    **how
        Arguments of matplotlib's `LineCollection`.
    """
    scaled = lines * np.array([span[1] / grid[1], span[0] / grid[0]])
    axes.add_collection(LineCollection(list(scaled), capstyle="projecting", zorder=3, **how))
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)


def save(figure: Figure, path: Path, *, formats: Sequence[str] = ("png",), dpi: int = 200) -> list[Path]:
    """Writes a figure to files. Equal figures give equal bytes.

    Parameters
    ----------
    figure
        The figure.
    path
        The file without its suffix. Missing folders are made.
    formats
        Any of png, svg and pdf.
    dpi
        Of the PNG, and of the photos inside an SVG or PDF.

    Returns
    -------
    The files, one a format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix in formats:
        file = path.with_name(f"{path.name}.{suffix}")
        dates: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix, {})
        with style():
            figure.savefig(file, dpi=dpi, facecolor="white", metadata=dates)
        written.append(file)
    return written

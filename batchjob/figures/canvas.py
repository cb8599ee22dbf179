"""A sheet measured in inches, photos with maps on them, and files: what all pictures share."""

import functools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from batchjob.figures.outlines import Outline, count_words
from batchjob.figures.palette import MAP_COLOURS

T = TypeVar("T", bound=np.generic)
MARGIN = 0.14  # inches around a sheet
INK, QUIET, RULE = "#1b1f24", "#5d6672", "#d5d9df"
STYLE: Any = {
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
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.frameon": False,
    "legend.fontsize": 6.5,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "batchjob",
}
OBJECTS_NOTE = "Outlines: annotated objects; dotted, too small for the patch grid; dashed, crowds. Neither is scored."
PHOTO_SHARE = 0.36  # of a photo's grey under the clusters' colours: the object stays visible, the colour leads
SIDE_PX = 224  # photos in a figure are no finer than this a cell: a PDF of 8 photos stays small


@contextmanager
def style() -> Iterator[None]:
    """Gives the figures' look inside the `with`, and the caller's own settings back afterwards."""
    with mpl.rc_context(STYLE):
        yield


def sheet(width: float, height: float) -> Figure:
    """Makes a white figure of `width` × `height` inches that no pyplot window knows of."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Adds axes without ticks or frame at `left`, `top`, in inches from the sheet's upper left corner."""
    sheet_width, sheet_height = figure.get_size_inches()
    axes = figure.add_axes(
        (left / sheet_width, 1 - (top + height) / sheet_height, width / sheet_width, height / sheet_height)
    )
    axes.set_axis_off()
    return axes


def write(figure: Figure, left: float, top: float, text: str, **how: Any) -> None:
    """Writes text at `left`, `top` in inches from the upper left corner; `$` and line breaks in it mean themselves."""
    width, height = figure.get_size_inches()
    how = {"ha": "left", "va": "top"} | how
    figure.text(left / width, 1 - top / height, text, parse_math=False, **how)


@functools.cache
def _drawn_characters() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont(STYLE["font.family"]))
    return frozenset(font.get_charmap())


def shorten(text: str, limit: int) -> str:
    """Returns `text` in at most `limit` characters, its middle left out.

    What the font can't draw becomes a visible escape: control characters, and letters that would all be one empty box.
    """
    drawn = _drawn_characters()
    text = "".join(c if c.isprintable() and ord(c) in drawn else c.encode("unicode_escape").decode() for c in text)
    if len(text) <= limit:
        return text
    tail = (limit - 1) * 2 // 3
    return text[: limit - 1 - tail] + "…" + text[len(text) - tail :]


def short_id(text: str, limit: int) -> str:
    """Returns an image's id in at most `limit` characters: its folders go first, since names tell images apart."""
    text = shorten(text, 10_000)
    while len(text) > limit and "/" in text.removeprefix("…/"):
        text = "…/" + text.removeprefix("…/").split("/", 1)[1]
    bare = text.removeprefix("…/")
    return shorten(bare, limit) if len(text) > limit else text


def heading(figure: Figure, text: str, *, size: float = 9.5) -> None:
    """Writes the title in the upper left corner: what is shown, and below it, after a line break, of which run."""
    width = figure.get_size_inches()[0] - 2 * MARGIN
    for number, line in enumerate(text.split("\n")[:2]):
        how = {"size": 7.5, "color": QUIET} if number else {"size": size, "weight": "bold"}
        room = int(width / (0.055 if number else 0.0091 * size))
        write(figure, MARGIN, MARGIN + (0.2 if number else 0), shorten(line, room), **how)


def heat_note(figure: Figure, left: float, top: float, text: str) -> None:
    """Writes small print at `left`, `top` inches that begins with the bar of an attention map's colours."""
    bar = place(figure, left + 0.1, top, 0.5, 0.085)
    bar.imshow(np.linspace(0, 1, 128)[None], cmap=MAP_COLOURS, aspect="auto")
    write(figure, left, top - 0.01, "0", size=6.5, color=QUIET)
    note(figure, left + 0.66, top - 0.01, f"each map's own 99th percentile and more. {text}".rstrip())


def note(figure: Figure, left: float, top: float, text: str) -> None:
    """Writes small print at `left`, `top` inches, broken into the lines that fit the sheet."""
    room = int((figure.get_size_inches()[0] - left - 0.1) / 0.054)  # a character of 6.5 points
    write(figure, left, top, "\n".join(textwrap.wrap(text, max(room, 20))), size=6.5, color=QUIET, linespacing=1.35)


def show_photo(axes: Axes, photo: NDArray[np.uint8]) -> None:
    """Draws `photo` [height, width, 3]; its axes then count in photo widths and heights, 0 to 1, y downwards."""
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
    """Draws `values` [rows, columns] over (height, width) = `span` of the photo's box; nearest unless `smooth`."""
    axes.imshow(
        values,
        extent=(0, span[1], span[0], 0),
        aspect="auto",
        interpolation="bicubic" if smooth else "nearest",
        **how,
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)


def show_labels(
    axes: Axes,
    photo: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    *,
    colours: NDArray[np.float64],
    span: tuple[float, float] = (1, 1),
) -> None:
    """Draws the photo in grey, each patch in its cluster's colour (`colours` [256, 4]), and the clusters' borders."""
    show_photo(axes, blend(photo, labels, colours=colours, span=span))
    show_lines(axes, borders(labels), labels.shape, span, colors="white", linewidths=hairline(axes, labels.shape))


def show_objects(
    axes: Axes, outlines: Sequence[Outline], colours: Mapping[str, str] | None = None, *, width: float = 1.0
) -> None:
    """Draws the outlines of objects on a photo's box, in the colours of their categories, or in white.

    Crowds are dashed, objects that are too small for the patch grid dotted and thin. width: of a line, in points.
    """
    for kind, dashes, share in (("small", (0, (1, 1.2)), 0.6), ("crowd", (0, (4, 2)), 0.8), ("instance", "-", 1.0)):
        mine = [o for o in outlines if o.kind == kind]
        lines = [line for o in mine for line in o.lines]
        inks = [colours[o.category] if colours else "#ffffff" for o in mine for _ in o.lines]
        how: dict[str, Any] = {"capstyle": "butt", "zorder": 4}
        if lines:
            axes.add_collection(LineCollection(lines, colors="#000000", linewidths=share * width + 0.7, **how))
            axes.add_collection(LineCollection(lines, colors=inks, linewidths=share * width, linestyles=dashes, **how))


def key(figure: Figure, left: float, top: float, room: float, outlines: Sequence[Outline], colours: Any) -> None:
    """Writes one line, `room` inches long: in which colour each category is outlined, and how many there are."""
    counts, rest = count_words(outlines)
    renderer, dpi = FigureCanvasAgg(figure).get_renderer(), figure.dpi  # type: ignore[no-untyped-call]
    size = figure.get_size_inches()

    def put(text: str, at: float, colour: str) -> tuple[Any, float]:
        drawn = figure.text(at / size[0], 1 - top / size[1], text, size=6, color=colour, ha="left", va="top")
        return drawn, at + float(drawn.get_window_extent(renderer).width) / dpi

    at, names = left, [(f"{name} {n}", colours[name]) for name, n in counts] + [(rest, "")] * bool(rest)
    for text, colour in names:
        swatch, start = put("■" if colour else "", at, colour or QUIET)
        label, at = put(text, start + 0.02 * bool(colour), QUIET)
        if at > left + room:
            swatch.remove()
            label.remove()
            break
        at += 0.07


def hairline(axes: Axes, grid: tuple[int, ...], *, share: float = 0.11) -> float:
    """Returns a line's width in points: a share of a patch's side, so that borders don't cover small patches."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    box, (width, height) = axes.get_position(), figure.get_size_inches()
    side = 72 * min(box.width * width / grid[1], box.height * height / grid[0])
    return float(np.clip(share * side, 0.15, 0.7))


def blend(
    photo: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    *,
    colours: NDArray[np.float64],
    span: tuple[float, float] = (1, 1),
) -> NDArray[np.uint8]:
    """Lays each patch's colour over the grey of the photo [height, width, 3]; patches without a label stay grey."""
    rgba = colours[per_pixel(labels, (photo.shape[0], photo.shape[1]), span)]
    grey = (photo @ np.array([0.299, 0.587, 0.114]) / 255)[..., None]
    weight = rgba[..., 3:] * (1 - PHOTO_SHARE)
    return np.asarray(np.round(255 * (weight * rgba[..., :3] + (1 - weight) * grey)), dtype=np.uint8)


def per_pixel(patches: NDArray[T], size: tuple[int, int], span: tuple[float, float] = (1, 1)) -> NDArray[T]:
    """Finds the patch under each pixel of a photo of `size` (height, width): nearest up-sampling of [rows, columns]."""
    (height, width), (rows, columns) = size, patches.shape
    y = np.minimum((np.arange(height) + 0.5) / height / span[0] * rows, rows - 1).astype(np.intp)
    x = np.minimum((np.arange(width) + 0.5) / width / span[1] * columns, columns - 1).astype(np.intp)
    return np.asarray(patches[y[:, None], x[None, :]])


def borders(labels: NDArray[np.generic]) -> NDArray[np.float64]:
    """Finds the segments [n, 2, (x, y)] between patches of different labels, in patches from the upper left."""
    y, x = np.nonzero(labels[:, 1:] != labels[:, :-1])
    upright = np.stack([np.stack([x + 1, y], -1), np.stack([x + 1, y + 1], -1)], 1)
    y, x = np.nonzero(labels[1:] != labels[:-1])
    level = np.stack([np.stack([x, y + 1], -1), np.stack([x + 1, y + 1], -1)], 1)
    return np.concatenate([upright, level]).astype(np.float64)


def show_lines(
    axes: Axes, lines: NDArray[np.float64], grid: tuple[int, ...], span: tuple[float, float], **how: Any
) -> None:
    """Draws segments [n, 2, (x, y)] that are measured in patches of a (rows, columns) grid."""
    scaled = lines * np.array([span[1] / grid[1], span[0] / grid[0]])
    axes.add_collection(LineCollection(list(scaled), capstyle="projecting", zorder=3, **how))
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)


def save(figure: Figure, path: Path, *, formats: Sequence[str] = ("png",), dpi: int = 200) -> list[Path]:
    """Writes a figure; equal figures give equal bytes.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    path : Path
        Without its suffix; missing folders are made.
    formats : strings
        Of png, svg and pdf.
    dpi : int
        Of the PNG, and of the photos inside the others.

    Returns
    -------
    list of Path
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

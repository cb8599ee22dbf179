"""Makes the figures of the page: photos as WebP for a light and a dark page, charts as SVG in the page's colours."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from batchjob.errors import UserError, counted
from batchjob.figures import canvas, look, statistics, write
from batchjob.figures import pictures as drawn
from batchjob.figures.look import Look
from batchjob.figures.overview import overview
from batchjob.figures.photos import choose_rows
from batchjob.metrics.uncertainty import SURE
from batchjob.store.run import Run

_PICTURE_DPI = 150
_PICTURE_IMAGES = 6  # images in a picture
_BOTH = "#787f89"  # ink that can be read on the white and on the dark page, with a contrast of 4:1 on both
_THEME = (  # colours of a chart, and the page's colours in their place
    (canvas.INK, "var(--ink)"),
    (canvas.QUIET, "var(--quiet)"),
    (canvas.RULE, "var(--rule)"),
    ("#8a929c", "var(--quiet)"),
    (statistics.BLUE, "var(--a)"),
    (statistics.RED, "var(--bad)"),
)
_CHARTS = {
    "stats-forest": (
        "Heads and their null models",
        "Each head's gain over its null models on the same images, with 95 % intervals, the best first. A filled mark "
        f"is sure: p ≤ {SURE} after Holm's correction, on enough images.",
    ),
    "stats-gain": (
        "Gain by layer and head",
        "What each head scores within categories beyond its score with other photos' objects.",
    ),
    "stats-nulls": (
        "Each head against two null models",
        "The gain over other photos' objects against the gain over position alone, with both 95 % intervals. A head "
        "in the upper right scores more than both null models.",
    ),
    "stats-distance": ("Attention distance", "How far each head looks on average, in patches."),
    "stats-instances": (
        "Score against the distance between instances",
        "Pairs of instances of one category by the distance of their centroids: the best head, and position alone, on "
        "the half of the images that did not choose the head.",
    ),
}


@dataclass(frozen=True)
class Picture:
    """One figure of the page."""

    title: str
    caption: str
    alt: str  # what the figure shows, for those who do not see it
    width: int  # pixels
    height: int  # pixels
    data: str = ""  # a WebP file as base64; empty where there is an SVG
    svg: Markup | None = None

    @property
    def kind(self) -> str:
        """Returns the group of the figure. Charts come first on the page, side by side where there is room."""
        return "charts" if self.svg else "sheets"


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """Draws the figures of the page, of a few images each; `batchjob figures` draws more of them, and larger.

    Raises UserError if several runs have no labelled image in common.
    """
    run, common = runs[0], common_rows(runs)
    how = Look(count=_PICTURE_IMAGES)
    layer, head = look.chosen_layer(run, how), look.chosen_head(run, how)
    rows = choose_rows(run, "spread", how.count)
    found = []
    if (figure := overview(run, how)) is not None:
        caption = "The question, the images where the head does best, middling and worst, the heads, and the answer."
        found.append(picture(figure, "Overview", caption, caption))
    for _, figure in drawn.grids(run, rows, layer, how):
        what = " and ".join([run.attention_name, "clusters"] if run.patch_algorithms else [run.attention_name])
        colours = (
            "stands for one of the head's centroids, in every image"
            if run.has_shared_centroids
            else "is one cluster; colours are matched between heads by overlap, so that a region keeps its colour"
        )
        caption = f"{what} of every head, layer {layer}. In a row of clusters, one colour {colours}."
        alt = f"Grid of {len(rows)} photos by heads {_span(run.heads)} of layer {layer}: {what}."
        found.append(picture(figure, "Images and heads", caption, alt))
    if len(runs) > 1:
        caption = "The same photos through the models of the runs, one head of each."
        figure = drawn.models(runs, _spread(common, how.count), how)
        found.append(picture(figure, "Models side by side", caption, caption))
    caption = f"The fewest patches that hold 60 % of the {run.attention_name}, outlined on the photo."
    found.append(picture(drawn.masks(run, rows, layer, how), "Masks of 60 %", caption, f"{caption} Layer {layer}."))
    for name, figure in drawn.layers(run, rows[0], how):
        is_query = name == "layers-query"
        title = f"{run.rows_name.capitalize()} of one patch" if is_query else "Layers and heads"
        what = f"the marked patch's {run.rows_name}" if is_query else run.attention_name
        found.append(
            picture(figure, title, f"One image, layers by heads: {what}.", f"Layers by heads of one photo: {what}.")
        )
    found += [_chart(figure, name, run.rows_name) for name, figure in write.charts(run)]
    if (figure := drawn.extremes(run, layer, head, how)) is not None:
        caption = f"The images where head {head} of layer {layer} scores highest and lowest: score, objects, clusters."
        found.append(picture(figure, "Best and worst images", caption, caption))
    many = choose_rows(run, "spread", 14)
    caption = f"Layer {layer}, head {head}, over {counted(len(many), 'image')}."
    found.append(picture(drawn.head_gallery(run, many, layer, head, how), "One head", caption, caption))
    return found


def common_rows(runs: Sequence[Run]) -> list[int]:
    """Lists the rows, in the first run, of the images that all runs have labelled. Raises UserError without any."""
    first = runs[0]
    shared = set.intersection(*({run.ids[row] for row in run.ok_rows} for run in runs))
    rows = [int(row) for row in first.ok_rows if first.ids[row] in shared]
    if not rows:
        examples = ", ".join(f"{run.ids[run.ok_rows[0]]!r} in {run.folder}" for run in runs)
        raise UserError(
            f"the runs have no labelled image in common ({examples}); give runs of one DATA, or make a report of each"
        )
    return rows


def _spread(rows: Sequence[int], count: int) -> list[int]:
    """Picks rows at even distances."""
    return [rows[int(i)] for i in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]


def _chart(figure: Figure, name: str, rows_name: str) -> Picture:
    """Turns a chart of the statistics into SVG in the page's colours, light or dark."""
    file = io.StringIO()
    with canvas.style():
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    title, caption = _CHARTS[name]
    title = title.replace("Attention", rows_name.capitalize())
    svg = Markup(statistics.themed(file.getvalue(), f"{name}-", _THEME))
    return Picture(title, caption, f"{title}. {caption}", width, height, svg=svg)


def picture(figure: Figure, title: str, caption: str, alt: str) -> Picture:
    """Turns a figure into WebP with a transparent background and an ink for light and dark pages.

    Parameters
    ----------
    figure
        The figure; its colours are changed.
    title, caption, alt
        As in `Picture`.
    """
    for text in figure.findobj(Text):
        if text.get_color() in (canvas.INK, canvas.QUIET):
            text.set_color(_BOTH)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.tick_params(labelcolor=_BOTH)
    file = io.BytesIO()
    with canvas.style():
        figure.savefig(file, dpi=_PICTURE_DPI, facecolor="none", format="png")
    with Image.open(file) as image:
        small = io.BytesIO()
        image.save(small, "WEBP", quality=80, method=4)
        return Picture(title, caption, alt, *image.size, base64.b64encode(small.getvalue()).decode())


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])

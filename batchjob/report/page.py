"""The page: pictures, facts, table and browser put into the template."""

import base64
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from batchjob.codes import VERSION
from batchjob.figures import canvas, look, statistics, write
from batchjob.figures import pictures as drawn
from batchjob.figures.look import Look
from batchjob.figures.photos import choose_rows, open_run
from batchjob.report import answer, browser, codebook, facts, table
from batchjob.stats import sentences as told
from batchjob.store.run import Run

_PICTURE_DPI = 150
_PICTURE_IMAGES = 6
_SAMPLE = 60
_EXTREME_HEADS, _EXTREMES = 6, 3  # heads whose best and worst images are in the browser, and how many of each
_HERE = Path(__file__).parent
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_THEME = (
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
        "stays clear of zero after the correction for the number of heads.",
    ),
    "stats-gain": (
        "Gain by layer and head",
        "What each head separates within categories beyond what it does with other photos' objects.",
    ),
    "stats-nulls": (
        "Each head against two null models",
        "The gain over other photos' objects against the gain over position alone, with both 95 % intervals. Only a "
        "head in the upper right does what neither null model can do.",
    ),
    "stats-distance": ("Attention distance", "How far each head looks on average, in patches."),
    "stats-instances": (
        "Score against the distance between instances",
        "Pairs of instances of one category by the distance of their centroids: the best head, and position alone, on "
        "the half of the images that did not choose the head.",
    ),
}
_SECTIONS = (
    ("compared", "Side by side"),
    ("answer", "Answer"),
    ("figures", "Figures"),
    ("codebook", "Codebook"),
    ("heads", "Heads"),
    ("images", "Images"),
    ("failures", "Failures"),
    ("timing", "Timing"),
    ("plan", "Plan"),
)


@dataclass(frozen=True)
class Picture:
    """One figure of the page: a WebP as base64, or an SVG that takes the page's colours."""

    title: str
    caption: str
    alt: str
    width: int
    height: int
    data: str = ""
    svg: Markup | None = None

    @property
    def kind(self) -> str:
        """The group that it stands in: charts come first, side by side where there is room."""
        return "charts" if self.svg else "sheets"


def write_report(runs: Sequence[Path], *, seed: int = 0) -> Path:
    """The page's path, RUN/report.html of the first run. Raises UserError where a run is not a run or has no labels."""
    views = [open_run(Path(run)) for run in runs]
    text = render(views, seed=seed)
    path = views[0].folder / "report.html"
    part = path.with_suffix(f".html.part{os.getpid()}")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")  # DATA may have any name
    part.replace(path)
    return path


def render(views: Sequence[Run], *, seed: int = 0) -> str:
    """The page as text. seed: of the images drawn at random for the sample."""
    view = views[0]
    runs = [facts.gather(one) for one in views]
    scores = [None if one.image_score is None else one.image_score[1] for one in views]
    parcel = browser.pack(views, _wanted(view, seed), scores)
    parcel.json |= {"score": (view.image_score or ("",))[0].replace("_", " "), "start": _start(view)}
    for run, one, fact in zip(parcel.json["runs"], views, runs, strict=True):
        run["name"], run["kept"] = fact.folder, len(one.kept_rows)
    shown = len(parcel.json["images"])
    gaps = answer.differences(views) if len(runs) > 1 else answer.Differences()
    summary = view.table("summary")
    layer = look.chosen_layer(view, Look())
    books = [(book, picture(book.figure, book.name, book.caption, book.alt)) for book in codebook.books(view, layer)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown
    )
    return environment.get_template("page.html").render(
        version=VERSION,
        title=" and ".join(dict.fromkeys(run.title for run in runs)),
        subtitle=_subtitle(view),
        sections=_sections(has_several=len(runs) > 1, has_books=bool(books)),
        style=Markup((_HERE / "page.css").read_text()),
        script=Markup((_HERE / "page.js").read_text()),
        runs=runs,
        question=told.question(views),
        answer=answer.sentences(view),
        stats_command=f"batchjob stats {view.folder}",
        tiles=_tiles(runs[0], view),
        compared=_compared(runs) if len(runs) > 1 else [],
        differences=gaps.rows,
        differences_header=gaps.header,
        differences_note=gaps.note,
        pictures=pictures(views),
        books=books,
        books_note=codebook.note(view, layer) if books else "",
        table=table.plain(view) if summary is None else table.scored(view, summary),
        sample_note=_sample_note(shown, len(view.ok_rows), view),
        data=_json(parcel.json),
        blobs=parcel.blobs,
        size_note=f"Its images are a sample of {shown:,} of {len(view.ok_rows):,}."
        if shown < len(view.ok_rows)
        else "",
    )


def pictures(views: Sequence[Run]) -> list[Picture]:
    """The figures of the page, of few images each: `batchjob figures` makes more of them, and larger."""
    view = views[0]
    how = Look(count=_PICTURE_IMAGES)
    layer, head = look.chosen_layer(view, how), look.chosen_head(view, how)
    rows = choose_rows(view, "spread", how.count)
    found = []
    for _, figure in drawn.grids(view, rows, layer, how):
        what = " and ".join([view.attention_name, "clusters"] if view.patch_algorithms else [view.attention_name])
        caption = (
            f"{what} of every head, layer {layer}. In a row of clusters, one colour is one cluster; "
            "colours are matched between heads by overlap, so that a region keeps its colour."
        )
        alt = f"Grid of {len(rows)} photos by heads {_span(view.heads)} of layer {layer}: {what}."
        found.append(picture(figure, "Images and heads", caption, alt))
    if len(views) > 1:
        caption = "The same photos through the models of the runs, one head of each."
        found.append(picture(drawn.models(views, rows, how), "Models side by side", caption, caption))
    caption = f"The fewest patches that hold 60 % of the {view.attention_name}, outlined on the photo."
    found.append(picture(drawn.masks(view, rows, layer, how), "Masks of 60 %", caption, f"{caption} Layer {layer}."))
    for name, figure in drawn.layers(view, rows[0], how):
        is_query = name == "layers-query"
        title = f"{view.rows_name.capitalize()} of one patch" if is_query else "Layers and heads"
        what = f"the marked patch's {view.rows_name}" if is_query else view.attention_name
        found.append(
            picture(figure, title, f"One image, layers by heads: {what}.", f"Layers by heads of one photo: {what}.")
        )
    found += [chart(figure, name, view.rows_name) for name, figure in write.charts(view)]
    many = choose_rows(view, "spread", 14)
    caption = f"Layer {layer}, head {head}, over {len(many)} images."
    found.append(picture(drawn.head_gallery(view, many, layer, head, how), "One head", caption, caption))
    return found


def chart(figure: Figure, name: str, rows_name: str = "attention") -> Picture:
    """A chart of the statistics as SVG in the page's own colours, light or dark."""
    file = io.StringIO()
    with canvas.style():
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    title, caption = _CHARTS[name]
    title = title.replace("Attention", rows_name.capitalize())
    svg = Markup(statistics.themed(file.getvalue(), f"{name}-", _THEME))
    return Picture(title, caption, f"{title}. {caption}", width, height, svg=svg)


def picture(figure: Figure, title: str, caption: str, alt: str) -> Picture:
    """The figure as WebP, small enough to be carried."""
    file = io.BytesIO()
    with canvas.style():
        figure.savefig(file, dpi=_PICTURE_DPI, facecolor="white", format="png")
    with Image.open(file) as image:
        small = io.BytesIO()
        image.convert("RGB").save(small, "WEBP", quality=80, method=4)
        return Picture(title, caption, alt, *image.size, base64.b64encode(small.getvalue()).decode())


def _wanted(view: Run, seed: int) -> list[int]:
    """Rows for the browser, the most wanted first: the best and worst of the best heads, then some at random."""
    rows = [int(r) for r in np.random.default_rng(seed).permutation(view.ok_rows)[:_SAMPLE]]
    if view.image_score is None:
        return rows
    scores = view.image_score[1].reshape(len(view.ids), -1)[view.ok_rows]
    counts = np.isfinite(scores).sum(axis=0)
    means = np.where(counts > 0, np.nansum(scores, axis=0) / np.maximum(counts, 1), -np.inf)
    extremes: list[int] = []
    for head in np.argsort(-means)[:_EXTREME_HEADS]:
        known = np.flatnonzero(np.isfinite(scores[:, head]))
        order = known[np.argsort(scores[known, head], kind="stable")]
        extremes += [int(view.ok_rows[i]) for i in (*order[::-1][:_EXTREMES], *order[:_EXTREMES])]
    return [row for pair in zip_longest(extremes, rows) for row in pair if row is not None]


def _sections(*, has_several: bool, has_books: bool) -> list[tuple[str, str]]:
    """(anchor, name) of those that the page has."""
    without = ([] if has_several else ["compared"]) + ([] if has_books else ["codebook"])
    return [section for section in _SECTIONS if section[0] not in without]


def _start(view: Run) -> dict[str, int]:
    """Where the browser opens: at the head that the figures show."""
    layer, head = look.chosen_layer(view, Look()), look.chosen_head(view, Look())
    return {"layer": view.layers.index(layer), "head": view.heads.index(head)}


def _subtitle(view: Run) -> str:
    grid = view.geometry.grid
    return (
        f"{len(view.ok_rows):,} images, {grid[0]} × {grid[1]} patches, "
        f"{len(view.layers)} layer{'s' if len(view.layers) > 1 else ''} × {len(view.heads)} heads"
        f"{', ' + ' and '.join(view.patch_algorithms) if view.patch_algorithms else ''}"
    )


def _tiles(run: facts.Facts, view: Run) -> list[tuple[str, str]]:
    tiles = [(f"{run.labelled:,}", "images labelled"), (f"{run.images - run.labelled - run.pending:,}", "failed")]
    if run.pending:
        tiles.append((f"{run.pending:,}", "not labelled yet"))
    tiles.append((f"{len(view.layers) * len(view.heads):,}", "heads"))
    k = view.data["k"].values[view.ok_rows]
    low, high = int(k.min()), int(k.max())
    tiles.append((f"{low}" if low == high else f"{low}–{high}", "clusters, k"))
    if run.timing:
        tiles.append((f"{run.timing.rate:.3g}", "images/s"))
        tiles.append((f"{run.timing.stages[0][1]:.0%} {run.timing.stages[0][0]}", "bottleneck"))
    return tiles


def _compared(runs: Sequence[facts.Facts]) -> list[tuple[str, list[str]]]:
    names = list(dict.fromkeys(name for run in runs for name, _ in run.rows))
    rows = [(name, [dict(run.rows).get(name, "–") for run in runs]) for name in names]
    rows.append(("Labelled", [f"{run.labelled:,} of {run.images:,}" for run in runs]))
    rows.append(("Images/s", [f"{run.timing.rate:.3g}" if run.timing else "–" for run in runs]))
    return rows


def _sample_note(shown: int, count: int, view: Run) -> str:
    if shown == count:
        text = f"All {count:,} labelled images."
    else:
        text = (
            f"A sample of {shown:,} of {count:,} labelled images, so that the page stays small: those whose attention "
        )
        text += "was kept, and others drawn at random."
    if not view.kept_rows:
        text += " No attention rows were stored; a run with --keep-maps N shows what each patch of N images attends to."
    return text


def _shown(value: Any) -> Any:
    r"""What an expression of the page gives: in text, which may be a file's name, control characters as \x1b."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", value) if type(value) is str else value


def _json(values: Any) -> Markup:
    """JSON that can stand inside a script element: nothing in it opens or closes a tag or a comment."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])

"""Makes the page: puts pictures, facts, tables and the image browser into the template."""

import json
import os
import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from batchjob.codes import VERSION
from batchjob.errors import counted
from batchjob.figures.look import Look, chosen_head, chosen_layer, scores_of_head
from batchjob.figures.photos import open_run
from batchjob.figures.statistics import score_name
from batchjob.report import answer, browser, codebook, facts, table
from batchjob.report.headmap import head_map
from batchjob.report.sheets import common_rows, picture, pictures
from batchjob.stats import sentences as told
from batchjob.store.run import Run, tell_apart

_SAMPLE = 60  # images drawn at random for the browser
_EXTREME_HEADS, _EXTREMES = 6, 3  # heads whose best and worst images are in the browser, and how many of each kind
_HERE = Path(__file__).parent
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SECTIONS = (
    ("answer", "Answer"),
    ("compared", "Side by side"),
    ("images", "Images"),
    ("map", "Layers × heads"),
    ("heads", "Heads"),
    ("figures", "Figures"),
    ("codebook", "Clusters of the data set"),
    ("failures", "Failures"),
    ("timing", "Timing"),
    ("plan", "Plan"),
)


def write_report(runs: Sequence[Path], *, seed: int = 0) -> Path:
    """Writes the page.

    Parameters
    ----------
    runs
        Folders of runs. Those of several runs are shown side by side.
    seed
        Of the images that are drawn at random where not all fit.

    Returns
    -------
    RUN/report.html of the first run.

    Raises
    ------
    UserError
        If a folder is not a run, no image of it is labelled, or several runs have no labelled image in common.
    """
    opened = [open_run(Path(run)) for run in runs]
    tell_apart(opened)
    text = render(opened, seed=seed)
    path = opened[0].folder / "report.html"
    part = path.with_suffix(f".html.part{os.getpid()}")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")  # DATA may have any name
    part.replace(path)
    return path


def render(runs: Sequence[Run], *, seed: int = 0) -> str:
    """Makes the page as text.

    Parameters
    ----------
    runs
        The runs.
    seed
        As `write_report`.
    """
    run = runs[0]
    common_rows(runs)  # fails before anything is drawn
    known = [facts.gather(one) for one in runs]
    scores = [None if one.image_score is None else one.image_score[1] for one in runs]
    starts = [_start(one) for one in runs]
    page_data = browser.pack(runs, _wanted(run, seed), scores, starts)
    images = page_data.json["images"]
    score = score_name(run.image_score[0]) if run.image_score else ""
    is_sample = len(images) < len(run.ok_rows)
    page_data.json |= {"score": score, "is_sample": is_sample, "start": _first(starts, images)}
    for packed, one, fact in zip(page_data.json["runs"], runs, known, strict=True):
        packed["name"], packed["kept"] = fact.folder, len(one.kept_rows)
    shown = len(images)
    gaps = answer.differences(runs) if len(runs) > 1 else answer.Differences()
    summary = run.table("summary")
    layer = chosen_layer(run, Look())
    books = [(book, picture(book.figure, book.name, book.caption, book.alt)) for book in codebook.books(run, layer)]
    head_maps = [found for place, one in enumerate(runs) if (found := head_map(one, place)) is not None]
    has = {"compared": len(runs) > 1, "codebook": bool(books), "map": bool(head_maps)}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown
    )
    return environment.get_template("page.html").render(
        version=VERSION,
        title=" and ".join(dict.fromkeys(fact.title for fact in known)),
        subtitle=_subtitle(run),
        sections=[section for section in _SECTIONS if has.get(section[0], True)],
        style=Markup((_HERE / "page.css").read_text()),
        script=Markup((_HERE / "page.js").read_text()),
        runs=known,
        question=told.question(runs),
        answer=answer.sentences(run),
        stats_command=f"batchjob stats {run.folder}",
        tiles=_tiles(known[0], run),
        compared=_compared(known) if len(runs) > 1 else [],
        differences=gaps.rows,
        differences_others=gaps.others,
        differences_header=gaps.header,
        differences_note=gaps.note,
        p_note=answer.P_NOTE,
        head_maps=head_maps,
        pictures=pictures(runs),
        books=books,
        books_note=codebook.note(run, layer) if books else "",
        table=table.plain(run) if summary is None else table.scored(run, summary),
        sample_note=_sample_note(shown, len(run.ok_rows), run),
        has_objects=bool(page_data.json["categories"]),
        data=_json(page_data.json),
        blobs=page_data.blobs,
        size_note=f"Its images are a sample of {shown:,} of {len(run.ok_rows):,}." if shown < len(run.ok_rows) else "",
    )


def _first(starts: Sequence[tuple[int, int]], images: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Says where the browser opens: at the head that the figures show, and an image with its attention rows if any."""
    layer, head = starts[0]
    key = f"{layer},{head}"
    kept = (i for i, image in enumerate(images) if image["runs"][0] and key in image["runs"][0]["rows"])
    return {"places": [list(start) for start in starts], "image": next(kept, 0)}


def _wanted(run: Run, seed: int) -> list[int]:
    """Chooses rows for the browser: in turn one of the best and worst images of the best heads, and one at random.

    The head that the statistics chose comes first, with images that did not choose it.
    """
    rows = [int(r) for r in np.random.default_rng(seed).permutation(run.ok_rows)[:_SAMPLE]]
    if run.image_score is None:
        return rows
    scores = run.image_score[1].reshape(len(run.ids), -1)[run.ok_rows]
    counts = np.isfinite(scores).sum(axis=0)
    means = np.where(counts > 0, np.nansum(scores, axis=0) / np.maximum(counts, 1), -np.inf)
    ordered = [scores[:, head] for head in np.argsort(-means)[:_EXTREME_HEADS]]
    if run.best and (of_best := scores_of_head(run, *run.best).values) is not None:
        ordered.insert(0, of_best[run.ok_rows])
    extremes: list[int] = []
    for values in ordered:
        known = np.flatnonzero(np.isfinite(values))
        order = known[np.argsort(values[known], kind="stable")]
        extremes += [int(run.ok_rows[i]) for i in (*order[::-1][:_EXTREMES], *order[:_EXTREMES])]
    return [row for pair in zip_longest(extremes, rows) for row in pair if row is not None]


def _start(run: Run) -> tuple[int, int]:
    """Returns the places, among the run's layers and heads, of the head that the figures show."""
    return run.layers.index(chosen_layer(run, Look())), run.heads.index(chosen_head(run, Look()))


def _subtitle(run: Run) -> str:
    grid = run.geometry.grid
    return (
        f"{counted(len(run.ok_rows), 'image')}, {grid[0]} × {grid[1]} patches, "
        f"{counted(len(run.layers), 'layer')} × {counted(len(run.heads), 'head')}"
        f"{', ' + ' and '.join(run.patch_algorithms) if run.patch_algorithms else ''}"
    )


def _tiles(known: facts.Facts, run: Run) -> list[tuple[str, str]]:
    tiles = [
        (f"{known.labelled:,}", "image labelled" if known.labelled == 1 else "images labelled"),
        (f"{known.images - known.labelled - known.pending:,}", "failed"),
    ]
    if known.pending:
        tiles.append((f"{known.pending:,}", "not labelled yet"))
    heads = len(run.layers) * len(run.heads)
    tiles.append((f"{heads:,}", "head" if heads == 1 else "heads"))
    k = run.data["k"].values[run.ok_rows]
    low, high = int(k.min()), int(k.max())
    tiles.append((f"{low}" if low == high else f"{low}–{high}", "clusters, k"))
    if known.timing:
        tiles.append((f"{known.timing.rate:.3g}", "images/s"))
        tiles.append((f"{100 * known.timing.stages[0][1]:.0f} % {known.timing.stages[0][0]}", "bottleneck"))
    return tiles


def _compared(runs: Sequence[facts.Facts]) -> list[tuple[str, list[str]]]:
    names = list(dict.fromkeys(name for run in runs for name, _ in run.rows))
    rows = [(name, [dict(run.rows).get(name, "–") for run in runs]) for name in names]
    rows.append(("Labelled", [f"{run.labelled:,} of {run.images:,}" for run in runs]))
    rows.append(("Images/s", [f"{run.timing.rate:.3g}" if run.timing else "–" for run in runs]))
    return rows


def _sample_note(shown: int, count: int, run: Run) -> str:
    if shown == count:
        text = f"All {count:,} labelled images." if count > 1 else "The one labelled image."
    else:
        text = (
            f"A sample of {shown:,} of {count:,} labelled images, so that the page stays small: those whose attention "
        )
        text += "was kept, the best and worst of the best heads, " if run.image_score else "was kept, "
        text += "and others drawn at random."
    if not run.kept_rows:
        text += " No attention rows were stored; a run with --keep-maps N shows what each patch of N images attends to."
    return text


def _shown(value: Any) -> Any:
    r"""Returns a value of the page; in text, such as the name of a file, control characters become `\x1b`."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", value) if type(value) is str else value


def _json(values: Any) -> Markup:
    """Writes JSON that can stand inside a script element: nothing in it opens or closes a tag or a comment."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))

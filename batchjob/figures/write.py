"""Writes the pictures under RUN/figures, and decides which pictures a run gets by what it holds."""

import functools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from batchjob.figures import canvas, nulls, pictures, statistics
from batchjob.figures.look import FORMATS, Look, check_query, chosen_head, chosen_layer, chosen_rows
from batchjob.figures.overview import overview
from batchjob.figures.photos import open_run
from batchjob.metrics import catalogue
from batchjob.store.run import Run, tell_apart

# The pictures that a run has only if its statistics have something to show.
_OF_STATISTICS = ("overview", "stats-forest", "stats-gain", "stats-nulls", "stats-distance", "stats-instances")


def write_figures(runs: Path | Sequence[Path], look: Look | None = None) -> list[Path]:
    """Draws every picture that the run holds the data for.

    Parameters
    ----------
    runs
        Folders of runs. All pictures are of the first run; several runs add one of the models side by side.
    look
        What is shown and how.

    Returns
    -------
    The files, under the first run's figures/.

    Raises
    ------
    UserError
        If a folder is not a run or has no labelled image, or the run lacks the image, layer, head or patch asked for.
    """
    look = look or Look()
    folders = [runs] if isinstance(runs, Path) else list(runs)
    opened = [open_run(folder) for folder in folders]
    tell_apart(opened)
    written: list[Path] = []
    for name, figure in _pictures(opened, look):
        written += canvas.save(figure, folders[0] / "figures" / name, formats=look.formats)
    _remove_older(folders[0] / "figures", {path.stem for path in written})
    return written


def _remove_older(folder: Path, drawn: Collection[str]) -> None:
    """Removes pictures of earlier statistics, in any format, that the present ones have nothing to show for."""
    for name in _OF_STATISTICS:
        for kind in FORMATS if name not in drawn else ():
            (folder / f"{name}.{kind}").unlink(missing_ok=True)


def _pictures(runs: Sequence[Run], look: Look) -> Iterator[tuple[str, Figure]]:
    run = runs[0]
    layer, head = chosen_layer(run, look), chosen_head(run, look)
    check_query(run, look.query)
    rows = chosen_rows(run, look, look.count)
    if (figure := overview(run, look)) is not None:
        yield "overview", figure
    yield from pictures.grids(run, rows, layer, look)
    if "centroids" in run.data:
        yield f"codebook-{head}-layer-{layer}", pictures.codebook_of(run, layer, head)
    many = chosen_rows(run, look, 3 * look.count)
    yield f"head-{head}-layer-{layer}", pictures.head_gallery(run, many, layer, head, look)
    if (figure := pictures.extremes(run, layer, head, look)) is not None:
        yield f"extremes-{head}-layer-{layer}", figure
    yield f"masks-layer-{layer}", pictures.masks(run, rows, layer, look)
    yield from pictures.layers(run, rows[0], look)
    if len(runs) > 1:
        yield "models", pictures.models(runs, rows, look)
    yield from charts(run)


def charts(run: Run) -> Iterator[tuple[str, Figure]]:
    """Yields names and charts of the statistics, those for which the run's tables have the scores."""
    summary = run.table("summary")
    if summary is None or not len(summary):
        return
    about, first = pictures.headline(run), run.algorithms[0]
    by = f"{about}, {first}" if len(run.algorithms) > 1 else about  # of scores of clusters
    rows_of = functools.partial(statistics.of_score, summary, algorithm=first)
    scored = [name for name in catalogue.leading() if len(rows_of(name))]
    if scored and len(statistics.with_gains(rows_of(scored[0]))):
        of = by if catalogue.is_of_labels(scored[0]) else about
        heading = f"Gain of each head over its null models, image by image\n{of}"
        yield "stats-forest", statistics.forest(summary, score=scored[0], heading=heading, algorithm=first)
    question = catalogue.QUESTION
    gains, places = (rows_of(question, null=null) for null in ("swap", "position"))
    if gains["gain"].notna().any() and len(run.layers) > 1:
        heading = f"Gain over other photos' objects, by layer and head\n{by}"
        yield "stats-gain", statistics.gain_map(gains, heading=heading)
    if len(nulls.of_both(places, gains)):
        heading = f"Each head against two null models\n{by}"
        yield "stats-nulls", nulls.against_nulls(summary, score=question, heading=heading, algorithm=first)
    if len(rows_of("attention_distance")):
        heading = f"How far each head looks: mean {run.rows_name} distance\n{about}"
        yield "stats-distance", statistics.distance_by_layer(summary, heading=heading, rows_name=run.rows_name)
    mine = _by_distance(run)
    if len(mine) and run.best:
        head = f"head {run.best[1]}" + (f" of layer {run.best[0]}" if len(run.layers) > 1 else "")
        heading = f"Pairs of one category by their distance: {head}\n{by}"
        only = "Only images that did not choose the head."
        yield "stats-instances", statistics.by_modifier(mine, heading=heading, remark=only)


def _by_distance(run: Run) -> pd.DataFrame:
    """Picks the best head's rows of stats/modifiers.parquet that are bins of the distance between two instances."""
    modifiers = run.table("modifiers")
    if modifiers is None or not run.best:
        return pd.DataFrame()
    mine = modifiers[(modifiers["layer"] == run.best[0]) & (modifiers["head"] == run.best[1])]
    mine = mine[(mine["modifier"] == "distance") & (mine["pairs"] > 0)]
    return mine[mine["algorithm"] == run.algorithms[0]]

"""Draws pictures of a run's maps and clusters: reads its arrays, photos and objects for the functions that draw."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from batchjob.errors import UserError, counted
from batchjob.figures import canvas, codebook, maps
from batchjob.figures.grid import Scored, study_grid
from batchjob.figures.look import Look, chosen_head, chosen_layer, scores_of_head
from batchjob.figures.objects import objects_of
from batchjob.figures.outlines import Outline
from batchjob.figures.photos import choose_rows, photo_of
from batchjob.figures.statistics import of_score, score_name
from batchjob.metrics import catalogue
from batchjob.store.run import Run

_EXTREMES = 6  # the most of the best images in a picture, and of the worst


def grids(run: Run, rows: Sequence[int], layer: int, look: Look) -> Iterator[tuple[str, Figure]]:
    """Draws the study's figure.

    Parameters
    ----------
    run
        The run.
    rows
        Rows of the images.
    layer
        The layer's number.
    look
        How many heads a figure has, whether maps are smooth, and whether objects are outlined.

    Yields
    ------
    Names and figures: one figure for each `heads_across` heads.
    """
    photos = [photo_of(run, row) for row in rows]
    attention = run.stack(run.attention, rows, layer=layer)
    shape = (len(rows), 0, len(run.heads), *attention.shape[-2:])
    labels = run.stack("labels", rows, layer=layer) if run.patch_algorithms else np.zeros(shape, np.uint8)
    scored = _scored(run, rows, layer)
    for start in range(0, len(run.heads), look.heads_across):
        part = slice(start, start + look.heads_across)
        heads = run.heads[part]
        several = f"-heads-{heads[0]}-{heads[-1]}" if len(run.heads) > look.heads_across else ""
        figure = study_grid(
            [photo.pixels for photo in photos],
            attention[:, part],
            labels[:, :, part],
            titles=[run.ids[row] for row in rows],
            algorithms=run.patch_algorithms,
            heads=heads,
            heading=f"{_maps_and_clusters(run)} of every head\n{headline(run, layer)}",
            attention_name=run.attention_name,
            spans=[photo.span for photo in photos],
            match=not run.has_shared_centroids,
            smooth=look.smooth,
            objects=_outlines(run, rows, look),
            scored=scored and Scored(scored.name, scored.values[:, part]),
        )
        yield f"grid-layer-{layer}{several}", figure


def codebook_of(run: Run, layer: int, head: int, *, most: int = codebook.MOST) -> Figure:
    """Draws the centroids of one head of a run in dataset scope, each with typical photos.

    Parameters
    ----------
    run
        The run.
    layer, head
        Their numbers.
    most
        The most clusters to draw.
    """
    entries = codebook.entries_of(run, layer, head, most=most)
    return codebook.codebook(
        entries,
        heading=f"The clusters of head {head}, one set for the whole data set\n{headline(run, layer)}",
        note=codebook.explain(run, len(entries)),
        is_relative=run.options["features"] == "relative",
    )


def head_gallery(run: Run, rows: Sequence[int], layer: int, head: int, look: Look) -> Figure:
    """Draws one head over many images.

    Parameters
    ----------
    run, rows, look
        As `grids`.
    layer, head
        Their numbers.
    """
    return maps.one_head(
        {"": [panel(run, row, layer, head, look) for row in rows]},
        heading=f"Head {head} over {counted(len(rows), 'image')}\n{headline(run, layer)}",
        attention_name=run.attention_name,
        smooth=look.smooth,
        remark=_score_remark(run, rows, layer, head),
    )


def extremes(run: Run, layer: int, head: int, look: Look) -> Figure | None:
    """Draws the images with the highest and the lowest scores of a head.

    Parameters
    ----------
    run, layer, head, look
        As `head_gallery`.

    Returns
    -------
    The figure, or None where fewer than two images have a score.
    """
    scores = scores_of_head(run, layer, head).values
    count = 0 if scores is None else min(_EXTREMES, int(np.isfinite(scores[run.ok_rows]).sum()) // 2)
    if not count:
        return None
    rows = {name: choose_rows(run, name, count, score=scores) for name in ("best", "worst")}
    groups = {name.capitalize(): [panel(run, row, layer, head, look) for row in mine] for name, mine in rows.items()}
    return maps.one_head(
        groups,
        heading=f"The best and the worst images of head {head}\n{headline(run, layer)}",
        attention_name=run.attention_name,
        smooth=look.smooth,
        remark=_score_remark(run, [row for mine in rows.values() for row in mine], layer, head),
    )


def masks(run: Run, rows: Sequence[int], layer: int, look: Look) -> Figure:
    """Draws the patches that hold 60 % of each head's attention.

    Parameters
    ----------
    run, rows, layer, look
        As `grids`.
    """
    photos = [photo_of(run, row) for row in rows]
    return maps.mask_grid(
        [photo.pixels for photo in photos],
        run.stack(run.attention, rows, layer=layer),
        titles=[run.ids[row] for row in rows],
        heads=run.heads,
        heading=f"Where 60 % of the {run.attention_name} of each head lies\n{headline(run, layer)}",
        spans=[photo.span for photo in photos],
        attention_name=run.attention_name,
        objects=_outlines(run, rows, look),
    )


def layers(run: Run, row: int, look: Look) -> Iterator[tuple[str, Figure]]:
    """Draws layers × heads of one image.

    Parameters
    ----------
    run
        The run.
    row
        The row of the image.
    look
        Which patch is the query, whether maps are smooth, and whether objects are outlined.

    Yields
    ------
    `layers-cls` and a figure of the CLS rows, for a run of several layers. `layers-query` and a figure of a query
    patch's rows, for a run that kept maps; where those of this image were not kept, it shows the first that has them.
    """
    model = headline(run)
    draw = functools.partial(maps.layer_grid, layers=run.layers, heads=run.heads, smooth=look.smooth)
    if len(run.layers) > 1:
        photo = photo_of(run, row)
        figure = draw(
            photo.pixels,
            run.stack(run.attention, [row])[0],
            heading=f"{run.attention_name} of every layer and head\n{model}: {run.ids[row]}",
            what=run.attention_name,
            span=photo.span,
            objects=(_outlines(run, [row], look) or [[]])[0],
        )
        yield "layers-cls", figure
    if run.kept_rows:
        row = row if row in run.kept_rows else run.kept_rows[0]
        photo, grid = photo_of(run, row), run.geometry.grid
        query = look.query or _brightest(run.stack(run.attention, [row])[0])
        kept = run.data["attention_rows"].sel(kept_image=row).isel(query=query[0] * grid[1] + query[1])
        what = f"{run.rows_name} of the marked patch"
        figure = draw(
            photo.pixels,
            kept.values.reshape(len(run.layers), len(run.heads), *grid),
            heading=f"{what.capitalize()}, in every layer and head\n{model}: {run.ids[row]}",
            what=what,
            span=photo.span,
            query=query,
            objects=(_outlines(run, [row], look) or [[]])[0],
        )
        yield "layers-query", figure


def _brightest(attention: NDArray[np.floating]) -> tuple[int, int]:
    """Finds (row, column) of the patch with the greatest mean attention over maps [L, H, rows, columns]."""
    mean = attention.astype(np.float64).mean(axis=(0, 1))
    row, column = np.unravel_index(int(mean.argmax()), mean.shape)
    return int(row), int(column)


def models(runs: Sequence[Run], rows: Sequence[int], look: Look) -> Figure:
    """Draws the same photos through each run's model, for the best head of each run.

    Parameters
    ----------
    runs
        Two or more runs.
    rows
        Rows of images of the first run; those that another run lacks are left out.
    look
        Whether maps are smooth, and whether objects are outlined.

    Raises
    ------
    UserError
        If none of the images is in all runs.
    """
    first = runs[0]
    places = [{name: row for row, name in enumerate(run.ids)} for run in runs]
    shared = [row for row in rows if all(first.ids[row] in place for place in places)]
    if not shared:
        raise UserError(
            f"the runs share no image of {first.ids[rows[0]]!r} and the others shown; give runs of one DATA"
        )
    heads = [(chosen_layer(run, Look()), chosen_head(run, Look())) for run in runs]
    panels = [
        [
            replace(panel(run, place[first.ids[row]], *at, look), score="")  # one number can't stand for several heads
            for run, place, at in zip(runs, places, heads, strict=True)
        ]
        for row in shared
    ]
    names = []
    for run, (layer, head) in zip(runs, heads, strict=True):
        what = run.clustered if run.patch_algorithms else run.attention_name
        by = f", {run.algorithms[0]}" if len(run.patch_algorithms) > 1 else ""
        names.append(f"{run.name}: {what} of {model_name(run)}, layer {layer}, head {head}{by}")
    kinds = dict.fromkeys("saliency" if run.attention == "saliency" else "attention" for run in runs)
    return maps.side_by_side(
        panels,
        models=names,
        heading="The same photos in each run\none head of each",
        attention_name=" or ".join(kinds),
        smooth=look.smooth,
    )


def panel(run: Run, row: int, layer: int, head: int, look: Look) -> maps.Panel:
    """Reads a photo, its objects, and one head's score, attention and clusters by the first algorithm.

    Parameters
    ----------
    run
        The run.
    row
        The row of the image.
    layer, head
        Their numbers.
    look
        Whether objects are outlined.
    """
    photo = photo_of(run, row)
    attention = run.stack(run.attention, [row], layer=layer, head=head)[0]
    labels = run.stack("labels", [row], layer=layer, head=head)[0, 0] if run.patch_algorithms else None
    scores = scores_of_head(run, layer, head).values
    score = "" if scores is None else canvas.decimals(float(scores[row]))
    objects = objects_of(run, row) if look.objects else []
    return maps.Panel(photo.pixels, attention, labels, run.ids[row], photo.span, objects, score)


def _outlines(run: Run, rows: Sequence[int], look: Look) -> list[list[Outline]] | None:
    """Outlines the objects of each image; returns None where there are none to draw."""
    found = [objects_of(run, row) for row in rows] if look.objects else []
    return found if any(found) else None


def headline(run: Run, layer: int | None = None) -> str:
    """Writes the second line of a heading: the model, `untrained` where its weights are random, layer and input size.

    Parameters
    ----------
    run
        The run.
    layer
        The layer's number; by default that of a run with one layer, and none for a run with several.
    """
    height, width = run.spec["input_px"]
    size = f"{height} px" if height == width else f"{height}×{width} px"
    layer = run.layers[0] if layer is None and len(run.layers) == 1 else layer
    return ", ".join([model_name(run), *([] if layer is None else [f"layer {layer}"]), size])


def model_name(run: Run) -> str:
    """Returns the model's name, with `untrained` where its weights are random."""
    return f"{run.model} (untrained)" if run.is_random else run.model


def _maps_and_clusters(run: Run) -> str:
    return f"{run.attention_name} and clusters" if run.patch_algorithms else run.attention_name


def _scored(run: Run, rows: Sequence[int], layer: int) -> Scored | None:
    """Reads the score of each image and head, by the first algorithm; returns None without statistics."""
    if run.image_score is None:
        return None
    return Scored(_score_words(run, layer), run.image_score[1][list(rows), 0, run.layers.index(layer)])


def _score_remark(run: Run, rows: Sequence[int], layer: int, head: int) -> str:
    """Says what the numbers over the photos of one head are, and what a dash means if one of the rows has it."""
    found = scores_of_head(run, layer, head)
    several = f" Clusters: those of {run.algorithms[0]}." if len(run.patch_algorithms) > 1 else ""
    if found.values is None:
        return several.strip()
    parts = [f"Numbers over the photos: {_score_words(run, layer, head)}."]
    if np.isnan(found.values[list(rows)]).any():
        parts.append(f"–: no score{', or the image chose the head' if found.leaves_out else ''}.")
    if found.note and not (found.leaves_out and len(parts) > 1):  # else the dash has said it
        parts.append(found.note)
    return " ".join(parts) + several


def _score_words(run: Run, layer: int, head: int | None = None) -> str:
    """Names the score and what it is with other photos' objects, for the run's first algorithm.

    Parameters
    ----------
    run
        A run with statistics.
    layer, head
        The head whose scores are shown; without a head, all heads of the layer.

    Returns
    -------
    `ARI within categories of the image (with other photos' objects 0.18 on average)`, where the score has the null
    model `swap`; else without the brackets.
    """
    assert run.image_score is not None
    name = run.image_score[0]
    words = f"{score_name(name)} of the image"
    if len(run.patch_algorithms) > 1 and catalogue.is_of_labels(name):
        words += f", by {run.algorithms[0]}"
    null = _mean_of_null(run, layer, head)
    over = " over the heads" if head is None else ""
    return words if np.isnan(null) else f"{words} (with other photos' objects {canvas.decimals(null)} on average{over})"


def _mean_of_null(run: Run, layer: int, head: int | None) -> float:
    """Returns what `_score_words` tells of the null model `swap`, NaN where it is not known.

    It is over the half that did not choose the head where the images shown are of that half, else over all images.
    """
    summary = run.table("summary")
    if run.image_score is None or summary is None or catalogue.main_null(run.image_score[0]) != "swap":
        return float("nan")
    if head is not None and scores_of_head(run, layer, head).leaves_out:
        half = [row["null_mean"] for row in run.chosen(run.image_score[0]) if row["null"] == "swap"]
        return float(half[0]) if half else float("nan")
    found = of_score(summary, run.image_score[0], null="swap", algorithm=run.algorithms[0])
    found = found[(found["layer"] == layer) & (found["head"].isin(run.heads if head is None else [head]))]
    return float(found["null_mean"].mean())

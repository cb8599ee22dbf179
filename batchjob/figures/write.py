"""RUN/figures: which pictures a run gets, by what it holds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from batchjob.errors import UserError, nearest
from batchjob.figures import canvas, codebook, maps, statistics
from batchjob.figures.grid import study_grid
from batchjob.figures.photos import choose_rows, open_run, photo_of
from batchjob.metrics import catalogue
from batchjob.store.run import Run

FORMATS = ("png", "svg", "pdf")
_HEADS_ACROSS = 12


@dataclass(frozen=True, slots=True)
class Look:
    """What the pictures show and how; the defaults are those of `batchjob figures RUN`."""

    images: str = "spread"  # spread, random, best, worst, or ids with commas
    count: int = 8
    seed: int = 0
    layer: int | None = None  # of the pictures of one layer; None: the last
    head: int | None = None  # of the pictures of one head; None: the best by the statistics, else the first
    query: tuple[int, int] | None = (
        None  # (row, column) of the patch whose row is shown; None: of the greatest CLS attention
    )
    heads_across: int = _HEADS_ACROSS  # 6 cuts twelve heads into two figures
    formats: tuple[str, ...] = ("png",)
    smooth: bool = False

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("heads_across", 1), ("seed", 0)):
            if getattr(self, name) < least:
                option = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise UserError(f"{option} is too small; give {least} or more")


def formats(text: str) -> tuple[str, ...]:
    """The file formats that `png,svg` names. Raises UserError for an unknown one."""
    found = tuple(part.strip().lower() for part in text.split(",") if part.strip())
    if wrong := [name for name in found if name not in FORMATS]:
        raise UserError(f"--format {wrong[0]!r} is unknown; {nearest(wrong[0], list(FORMATS))}")
    return found or FORMATS[:1]


def query(text: str | None) -> tuple[int, int] | None:
    """(row, column) of `4,7`; None for nothing. Raises UserError for anything else."""
    if not text:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise UserError(f"--query {text!r} is not a patch; give its row and column, counted from 0: --query 4,7")
    return int(parts[0]), int(parts[1])


def write_figures(runs: Path | Sequence[Path], look: Look | None = None) -> list[Path]:
    """The files written under the first run's figures/. Several runs add a picture of the models side by side.

    Raises UserError where there is no run, no labelled image, or an image, layer or head that the run doesn't have.
    """
    look = look or Look()
    folders = [runs] if isinstance(runs, Path) else list(runs)
    views = [open_run(folder) for folder in folders]
    written: list[Path] = []
    for name, figure in _pictures(views, look):
        written += canvas.save(figure, folders[0] / "figures" / name, formats=look.formats)
    return written


def _pictures(views: Sequence[Run], look: Look) -> Iterator[tuple[str, Figure]]:
    view = views[0]
    layer, head = chosen_layer(view, look), chosen_head(view, look)
    _check_query(view, look.query)
    rows = chosen_rows(view, look, look.count)
    yield from grids(view, rows, layer, look)
    if "centroids" in view.data:
        yield f"codebook-{head}-layer-{layer}", codebook_of(view, layer, head)
    many = chosen_rows(view, look, 3 * look.count)
    yield f"head-{head}-layer-{layer}", head_gallery(view, many, layer, head, look)
    yield f"masks-layer-{layer}", masks(view, rows, layer)
    yield from layers(view, rows[0], look)
    if len(views) > 1:
        yield "models", models(views, rows, look)
    yield from charts(view)


def _check_query(view: Run, patch: tuple[int, int] | None) -> None:
    rows, columns = view.geometry.grid
    if patch is not None and not (patch[0] < rows and patch[1] < columns):
        where = f"--query {patch[0]},{patch[1]} is outside the grid of {rows}×{columns} patches"
        raise UserError(f"{where}; give at most {rows - 1},{columns - 1}")
    if patch is not None and not view.kept_rows:
        raise UserError(f"--query needs stored attention, and {view.folder} has none; run again with --keep-maps N")


def grids(view: Run, rows: Sequence[int], layer: int, look: Look) -> Iterator[tuple[str, Figure]]:
    """The study's figure: one, or one for each `heads_across` heads."""
    photos = [photo_of(view, row) for row in rows]
    attention = view.stack(view.attention, rows, layer=layer)
    shape = (len(rows), 0, len(view.heads), *attention.shape[-2:])
    labels = view.stack("labels", rows, layer=layer) if view.patch_algorithms else np.zeros(shape, np.uint8)
    for start in range(0, len(view.heads), look.heads_across):
        part = slice(start, start + look.heads_across)
        heads = view.heads[part]
        several = f"-heads-{heads[0]}-{heads[-1]}" if len(view.heads) > look.heads_across else ""
        figure = study_grid(
            [photo.pixels for photo in photos],
            attention[:, part],
            labels[:, :, part],
            titles=[view.ids[row] for row in rows],
            algorithms=view.patch_algorithms,
            heads=heads,
            heading=headline(view, layer),
            attention_name=view.attention_name,
            spans=[photo.span for photo in photos],
            match=not view.has_shared_centroids,
            smooth=look.smooth,
        )
        yield f"grid-layer-{layer}{several}", figure


def codebook_of(view: Run, layer: int, head: int, *, most: int = codebook.MOST) -> Figure:
    """The centroids of one head of a dataset-wide run, with the photos they are typical of."""
    entries = codebook.entries_of(view, layer, head, most=most)
    return codebook.codebook(
        entries,
        heading=f"{headline(view, layer)}, head {head}",
        note=codebook.explain(view, len(entries)),
        is_relative=view.options["features"] == "relative",
    )


def head_gallery(view: Run, rows: Sequence[int], layer: int, head: int, look: Look) -> Figure:
    """One head over many images."""
    return maps.one_head(
        [panel(view, row, layer, head) for row in rows],
        heading=f"{headline(view, layer)}, head {head}",
        attention_name=view.attention_name,
        smooth=look.smooth,
    )


def masks(view: Run, rows: Sequence[int], layer: int) -> Figure:
    """The patches that hold 60 % of each head's attention, outlined."""
    photos = [photo_of(view, row) for row in rows]
    return maps.mask_grid(
        [photo.pixels for photo in photos],
        view.stack(view.attention, rows, layer=layer),
        titles=[view.ids[row] for row in rows],
        heads=view.heads,
        heading=headline(view, layer),
        spans=[photo.span for photo in photos],
        attention_name=view.attention_name,
    )


def layers(view: Run, row: int, look: Look) -> Iterator[tuple[str, Figure]]:
    """Layers × heads of one image: its CLS rows, and a query patch's rows of an image whose maps were kept."""
    model = f"{view.model}, {view.spec['input_px'][0]} px"
    if len(view.layers) > 1:
        photo = photo_of(view, row)
        yield (
            "layers-cls",
            maps.layer_grid(
                photo.pixels,
                view.stack(view.attention, [row])[0],
                layers=view.layers,
                heads=view.heads,
                heading=f"{model}: {view.ids[row]}",
                what=view.attention_name,
                span=photo.span,
                smooth=look.smooth,
            ),
        )
    if view.kept_rows:
        row = row if row in view.kept_rows else view.kept_rows[0]
        photo, grid = photo_of(view, row), view.geometry.grid
        query = look.query or brightest(view.stack(view.attention, [row])[0])
        kept = view.data["attention_rows"].sel(kept_image=row).isel(query=query[0] * grid[1] + query[1])
        yield (
            "layers-query",
            maps.layer_grid(
                photo.pixels,
                kept.values.reshape(len(view.layers), len(view.heads), *grid),
                layers=view.layers,
                heads=view.heads,
                heading=f"{model}: {view.ids[row]}, {view.rows_name} of the marked patch",
                what=f"{view.rows_name.capitalize()} of the marked patch",
                span=photo.span,
                query=query,
                smooth=look.smooth,
            ),
        )


def brightest(attention: NDArray[np.floating[Any]]) -> tuple[int, int]:
    """(row, column) of the patch with the greatest attention, mean over layers and heads of [L, H, rows, columns]."""
    mean = attention.astype(np.float64).mean(axis=(0, 1))
    row, column = np.unravel_index(int(mean.argmax()), mean.shape)
    return int(row), int(column)


def models(views: Sequence[Run], rows: Sequence[int], look: Look) -> Figure:
    """The same photos through each run's model, the best head of each; joined by the images' ids."""
    first = views[0]
    places = [{name: row for row, name in enumerate(view.ids)} for view in views]
    shared = [row for row in rows if all(first.ids[row] in place for place in places)]
    if not shared:
        raise UserError(
            f"the runs share no image of {first.ids[rows[0]]!r} and the others shown; give runs of one DATA"
        )
    heads = [(chosen_layer(v, Look()), chosen_head(v, Look())) for v in views]
    panels = [
        [panel(v, place[first.ids[row]], *where) for v, place, where in zip(views, places, heads, strict=True)]
        for row in shared
    ]
    names = [f"{model_name(v)}\nlayer {w[0]}, head {w[1]}" for v, w in zip(views, heads, strict=True)]
    kinds = dict.fromkeys("saliency" if v.attention == "saliency" else "attention" for v in views)
    return maps.side_by_side(
        panels,
        models=names,
        heading="The same photos through each model",
        attention_name=" or ".join(kinds),
        smooth=look.smooth,
    )


def panel(view: Run, row: int, layer: int, head: int) -> maps.Panel:
    """One photo, its attention and the first algorithm's clusters, of one layer and head."""
    photo = photo_of(view, row)
    attention = view.stack(view.attention, [row], layer=layer, head=head)[0]
    labels = view.stack("labels", [row], layer=layer, head=head)[0, 0] if view.patch_algorithms else None
    return maps.Panel(photo.pixels, attention, labels, view.ids[row], photo.span)


def headline(view: Run, layer: int) -> str:
    """Model, weights where they are not the model's own, layer and input size."""
    height, width = view.spec["input_px"]
    size = f"{height} px" if height == width else f"{height}×{width} px"
    return f"{model_name(view)}, layer {layer}, {size}"


def model_name(view: Run) -> str:
    """The model's name, with `untrained` where its weights are random."""
    return f"{view.model} (untrained)" if view.is_random else view.model


def chosen_layer(view: Run, look: Look) -> int:
    """The layer of the pictures of one layer. Raises UserError where the run doesn't have it."""
    best = view.best[0] if view.best else view.layers[-1]
    layer = best if look.layer is None else look.layer
    if layer not in view.layers:
        raise UserError(f"--layer {layer} is not in {view.folder}; it has {', '.join(map(str, view.layers))}")
    return layer


def chosen_head(view: Run, look: Look) -> int:
    """The head of the pictures of one head. Raises UserError where the run doesn't have it."""
    layer = chosen_layer(view, look)
    best = view.best[1] if view.best and view.best[0] == layer else view.heads[0]
    head = best if look.head is None else look.head
    if head not in view.heads:
        raise UserError(f"--head {head} is not in {view.folder}; it has {', '.join(map(str, view.heads))}")
    return head


def chosen_rows(view: Run, look: Look, count: int) -> list[int]:
    """The images of a picture, as `--images` says; best and worst go by the chosen head's score."""
    score = None
    if look.images in ("best", "worst") and view.image_score is not None:
        layer, head = view.layers.index(chosen_layer(view, look)), view.heads.index(chosen_head(view, look))
        score = view.image_score[1][:, 0, layer, head]
    return choose_rows(view, look.images, count, seed=look.seed, score=score)


def charts(view: Run) -> Iterator[tuple[str, Figure]]:
    """The statistics' pictures, those that the run's tables have the figures for."""
    summary = view.table("summary")
    if summary is None or not len(summary):
        return
    name = model_name(view)
    scored = [s for s in catalogue.leading() if len(statistics.of_score(summary, s))]
    if scored:
        yield "stats-forest", statistics.forest(summary, score=scored[0], heading=name)
    gains = statistics.of_score(summary, "instance_ari", null="swap")
    if len(gains) and len(view.layers) > 1:
        yield "stats-gain", statistics.gain_map(gains, heading=f"{name}: within-category gain")
    if len(gains) and len(statistics.of_score(summary, "image_ari", null="swap")):
        yield "stats-corners", statistics.corners(summary, heading=name)
    if len(statistics.of_score(summary, "attention_distance")):
        yield "stats-distance", statistics.distance_by_layer(summary, heading=name, rows_name=view.rows_name)
    modifiers = view.table("modifiers")
    if modifiers is not None and len(modifiers) and view.best:
        mine = modifiers[(modifiers["layer"] == view.best[0]) & (modifiers["head"] == view.best[1])]
        mine = mine[(mine["modifier"] == "distance") & (mine["pairs"] > 0)]
        mine = mine[mine["algorithm"] == mine["algorithm"].iloc[0]] if len(mine) else mine
        if len(mine):
            where = f"{name}, layer {view.best[0]}, head {view.best[1]}: the images that did not choose it"
            yield "stats-instances", statistics.by_modifier(mine, heading=where)

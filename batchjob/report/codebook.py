"""Makes the codebook's part of the page: the clusters of a dataset-wide run, for each head a picture and a table."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from batchjob.figures import codebook, pictures
from batchjob.report.table import Cell, Column, Row, Table, number
from batchjob.store.run import Run

_MOST = 24  # the most clusters in a head's picture; `batchjob figures` draws up to 96
_HEADS = 12  # the most heads; more would make the page too large
_NO_CATEGORY = "no instance"
_PLACE = "from 0 to 1 of the image's width and height, counted from the upper left"


@dataclass(frozen=True)
class Book:
    """One head's clusters."""

    name: str  # of the head
    line: str  # about its clusters
    figure: Figure
    caption: str  # of the figure
    alt: str  # what the figure shows, for those who do not see it
    table: Table


def books(run: Run, layer: int) -> Iterator[Book]:
    """Makes the parts of the heads of a layer.

    Parameters
    ----------
    run
        The run.
    layer
        The layer's number.

    Yields
    ------
    A part for each of the first heads; nothing for a run that clusters image by image.
    """
    if "centroids" not in run.data:
        return
    k = int(run.options["k"])
    agreement = run.table("codebook_agreement")
    for head in run.heads[:_HEADS]:
        clusters = clusters_of(run, layer, head)
        shown = f"the {_MOST} most common of {k} clusters" if k > _MOST else f"all {k} clusters"
        yield Book(
            f"Head {head}",
            _line(clusters, agreement, layer, head),
            pictures.codebook_of(run, layer, head, most=_MOST),
            f"Layer {layer}, head {head}: {shown}. The centroid first, then photos that show it most.",
            f"Centroids of layer {layer}, head {head} as small maps, each with its share and three photos.",
            table_of(clusters, f"layer {layer} head {head}"),
        )


def note(run: Run, layer: int) -> str:
    """Says what the numbers of clusters mean, for all heads.

    Parameters
    ----------
    run
        A run in dataset scope.
    layer
        The layer's number.
    """
    options, rows = run.options, int(run.data["centroids"].attrs["rows"])
    what = "CLS rows, one an image" if options["queries"] == "cls" else codebook.clustered(run)
    text = f"Layer {layer}. {options['k']} centroids a head, fitted to {rows:,} {what}: a number means the same in "
    text += "every image. "
    if len(run.heads) > _HEADS:
        text += f"The first {_HEADS} of {len(run.heads)} heads; batchjob figures --head N draws any other. "
    if run.table("codebook") is None:
        text += f"Categories and positions come with: batchjob stats {run.folder}"
    elif options["queries"] == "cls":
        text += f"Mean x and y: where the centroid attends, {_PLACE}."
    else:
        text += f"Mean x and y: where the cluster's patches are, {_PLACE}."
    return text


def clusters_of(run: Run, layer: int, head: int) -> pd.DataFrame:
    """Lists the clusters of a head, the most common first.

    Parameters
    ----------
    run
        A run in dataset scope.
    layer, head
        Their numbers.

    Returns
    -------
    A row a cluster: `cluster` and `share`; with statistics the other columns of stats/codebook.parquet, and `y` and
    `x`. These are the mean position of the cluster's patches, from 0 at the top and on the left to 1, or that of the
    centroid's attention where CLS rows were clustered. They are NaN for a cluster that no image shows.
    """
    found = run.table("codebook")
    if found is None:
        entries = codebook.entries_of(run, layer, head, most=int(run.options["k"]), photos=0)
        return pd.DataFrame({"cluster": [e.number for e in entries], "share": [e.share for e in entries]})
    found = found[(found["layer"] == layer) & (found["head"] == head)].sort_values("share", ascending=False)
    positions = run.table("codebook_positions")
    if positions is not None:
        positions = positions[(positions["layer"] == layer) & (positions["head"] == head)]
        places = pd.DataFrame({"cluster": positions["cluster"], "w": positions["share"]})
        for name, size in zip("yx", run.geometry.grid, strict=True):
            places[name] = (positions[name] + 0.5) / size * positions["share"]
        sums = places.groupby("cluster").sum()
        means = sums[["y", "x"]].div(sums["w"], axis=0)
    else:
        centroids = run.data["centroids"].sel(layer=layer, head=head).values[0]
        maps = [codebook.shown_centroid(run, centroid) for centroid in centroids]
        means = pd.DataFrame([_centre(shown) for shown in maps if shown is not None], columns=["y", "x"])
    return found.join(means, on="cluster")


def _centre(values: np.ndarray) -> tuple[float, float]:
    """Returns (y, x) of the centre of mass of a map [rows, columns], as fractions of its height and width."""
    total = float(values.sum())
    if not total > 0:
        return float("nan"), float("nan")
    rows, columns = values.shape
    y = float(values.sum(1) @ (np.arange(rows) + 0.5)) / total / rows
    return y, float(values.sum(0) @ (np.arange(columns) + 0.5)) / total / columns


def table_of(clusters: pd.DataFrame, find: str) -> Table:
    """Makes the table of one head's clusters; columns without a value are left out.

    Parameters
    ----------
    clusters
        What `clusters_of` returns.
    find
        What the search field finds the rows by, before the cluster's number.
    """
    has_stats = "images" in clusters
    has_categories = has_stats and bool((clusters["category"] != _NO_CATEGORY).any())
    columns = [Column("Cluster", "number"), Column("Share of rows", "number", "of all rows, those in the cluster")]
    if has_stats:
        columns.append(Column("Images", "number", "in which it occurs"))
    if has_categories:
        columns.append(
            Column("Best category", "text", "which it says most about; in small, its share of the cluster's rows")
        )
        columns.append(Column("Lift", "number", "how many times as often as in all annotated rows of the head"))
    if has_stats:
        columns.append(Column("Mean x", "number", "0–1 of the width, from the left"))
        columns.append(Column("Mean y", "number", "0–1 of the height, from the top"))
    rows = []
    for line in clusters.to_dict("records"):
        cluster, share = int(line["cluster"]), float(line["share"])
        cells = [Cell(str(cluster), str(cluster)), Cell(f"{share:.2%}".replace("%", " %"), repr(share))]
        if has_stats:
            cells.append(Cell(f"{line['images']:,}", str(line["images"])))
        if has_categories and line["category"] != _NO_CATEGORY and line["images"] > 0:
            cells.append(Cell(line["category"], small=f"{100 * line['category_share']:.0f} % of its rows"))
            cells.append(number(line["lift"], 1))
        elif has_categories:
            cells += [Cell("–"), Cell("–", "")]
        if has_stats:
            cells += [number(line["x"], 2), number(line["y"], 2)]
        rows.append(Row(f"{find} cluster {cluster}", [], cells))
    return Table(columns, rows, [], "")


def _line(clusters: pd.DataFrame, agreement: pd.DataFrame | None, layer: int, head: int) -> str:
    used = int((clusters["share"] > 0).sum())
    text = f"{used} of {len(clusters)} clusters in use, the most common {clusters['share'].max():.0%} of rows"
    if agreement is not None:
        of_head = agreement[(agreement["layer"] == layer) & (agreement["head"] == head) & agreement["ami"].notna()]
        for against in ("classes", "categories"):
            own = of_head[of_head["against"] == against]
            if len(own):
                text += f"; agreement with {against} (AMI) {own['ami'].iloc[0]:.3f}".replace("-", "−")
    return text.replace("%", " %")

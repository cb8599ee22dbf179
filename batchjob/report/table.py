"""The page's table of heads: what each column shows, how it sorts, and the small interval drawn beside a gain."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchjob.figures.view import RunView


@dataclass(frozen=True)
class Column:
    """What a column is called, how it sorts, and what its head says on hovering."""

    name: str
    kind: str  # text or number
    hint: str = ""


@dataclass(frozen=True)
class Cell:
    """What a cell shows and sorts by."""

    text: str
    sort: str | None = None  # a number as text, empty where there is none; None: sorts by the text
    small: str = ""
    mark: str = ""  # up, down
    left: float | None = None  # percent of the drawn interval
    wide: float = 0.0
    at: float = 0.0


@dataclass(frozen=True)
class Row:
    """A head, and what the filters look at."""

    find: str  # what the search field looks through
    keys: list[tuple[str, str]]  # of the select fields
    cells: list[Cell]
    clear: bool = False


@dataclass(frozen=True)
class Table:
    """The table, ready to be written out."""

    columns: list[Column]
    rows: list[Row]
    filters: list[tuple[str, str, list[str]]]  # key, name, values
    note: str
    has_gain: bool = False
    zero: float = 0.0  # percent, where the drawn intervals have their zero


def number(value: float, digits: int = 3) -> Cell:
    """A cell with the value, a true minus, and a dash where there is none."""
    if not np.isfinite(value):
        return Cell("–", "")
    return Cell(f"{value:.{digits}f}".replace("-", "−"), repr(float(value)))


def plain(view: RunView) -> Table:
    """The table of a run without statistics: what labelling itself knows of each head, mean over the images."""
    ok = view.ok_rows
    data = {name: view.data[name].values[ok].astype(np.float64) for name in ("k", "inertia", "prefix_mass")}
    columns = [Column("Method", "text"), Column("Layer", "number"), Column("Head", "number")]
    columns += [
        Column("k", "number", "clusters found, mean over images"),
        Column("Inertia", "number", "sum of squared distances to the own centroid, mean over images"),
        Column("Prefix mass", "number", "attention of patches on CLS and registers, mean over images"),
    ]
    methods = [str(m) for m in view.data["method"].values]
    rows = []
    for m, method in enumerate(methods):
        for x, layer in enumerate(view.layers):
            for h, head in enumerate(view.heads):
                cells = [Cell(method), Cell(str(layer), str(layer)), Cell(str(head), str(head))]
                cells.append(number(mean(data["k"][:, m, x, h]), 1))
                cells.append(number(mean(data["inertia"][:, m, x, h]), 4))
                cells.append(number(mean(data["prefix_mass"][:, x, h])))
                rows.append(Row(searchable(method, layer, head), keys(method, layer), cells))
    return Table(columns, rows, filters(methods, view.layers), f"Means over {len(ok):,} images.")


def filters(methods: Sequence[str], layers: Sequence[int]) -> list[tuple[str, str, list[str]]]:
    """The select fields worth having: those with more than one value."""
    found = [("method", "Method", list(methods)), ("layer", "Layer", [str(v) for v in layers])]
    return [one for one in found if len(one[2]) > 1]


def keys(method: str, layer: int) -> list[tuple[str, str]]:
    """What the select fields compare."""
    return [("method", method), ("layer", str(layer))]


def searchable(method: str, layer: int, head: int) -> str:
    """What the search field looks through."""
    return f"{method} layer {layer} head {head}".lower()


def mean(values: Any) -> float:
    """Over the finite values; NaN where there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")

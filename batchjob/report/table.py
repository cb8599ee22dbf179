"""Makes the page's table of heads: what each column shows, how it sorts, and the interval drawn beside a gain."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from batchjob.errors import counted
from batchjob.figures.statistics import NULLS, of_score, score_name
from batchjob.metrics import catalogue
from batchjob.stats import numbers
from batchjob.store.run import Run


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    kind: str  # how it sorts: text or number
    hint: str = ""  # shown when its name is hovered over
    shown: bool = True  # at first
    first: str = ""  # how the first click sorts, ascending or descending; empty: numbers from the largest, text from A


@dataclass(frozen=True)
class Cell:
    """A cell of a table. `left`, `wide` and `at` are percent of the width in which intervals are drawn."""

    text: str
    sort: str | None = None  # a number as text, empty where there is none; None sorts by the text
    small: str = ""  # small print behind the text
    mark: str = ""  # up or down for a sure gain or loss
    left: float | None = None  # where the drawn interval begins; None where none is drawn
    wide: float = 0.0  # the width of the interval
    at: float = 0.0  # where the mean is
    link: str = ""  # the part of the page's address that it leads to


@dataclass(frozen=True)
class Row:
    """A row of a table, and what the filters look at."""

    find: str  # what the search field looks through
    keys: list[tuple[str, str]]  # what the select fields compare: key and value
    cells: list[Cell]
    clear: bool = False  # whether the gain is sure


@dataclass(frozen=True)
class Table:
    """A table of the page."""

    columns: list[Column]
    rows: list[Row]
    filters: list[tuple[str, str, list[str]]]  # the select fields: key, name, values
    note: str
    has_gain: bool = False
    zero: float = 0.0  # where zero is in the drawn intervals, in percent of their width


def number(value: float, digits: int = 3) -> Cell:
    """Makes the cell of a number.

    Parameters
    ----------
    value
        The number. NaN and infinity are shown as a dash.
    digits
        How many follow the decimal point.
    """
    return Cell(numbers.number(value, digits), repr(float(value)) if np.isfinite(value) else "")


def plain(run: Run) -> Table:
    """Makes the table of a run without statistics: what labelling knows of each head, averaged over the images."""
    ok = run.ok_rows
    data = {name: run.data[name].values[ok].astype(np.float64) for name in ("k", "inertia", "prefix_mass")}
    columns = _place_columns(len(run.algorithms))
    columns += [
        Column("k", "number", "clusters found, mean over images"),
        Column("Inertia", "number", "sum of squared distances to the own centroid, mean over images"),
        Column("Prefix mass", "number", "attention of patches on CLS and registers, mean over images"),
    ]
    algorithms = [str(m) for m in run.data["algorithm"].values]
    rows = []
    for m, algorithm in enumerate(algorithms):
        for x, layer in enumerate(run.layers):
            for h, head in enumerate(run.heads):
                cells = _place(algorithm, layer, head)
                cells.append(number(_mean(data["k"][:, m, x, h]), 1))
                cells.append(number(_mean(data["inertia"][:, m, x, h]), 4))
                cells.append(number(_mean(data["prefix_mass"][:, x, h])))
                rows.append(_row(algorithm, layer, head, cells))
    return Table(columns, rows, _filters(algorithms, run.layers), f"Means over {counted(len(ok), 'image')}.")


def _filters(algorithms: Sequence[str], layers: Sequence[int]) -> list[tuple[str, str, list[str]]]:
    """Lists the select fields that have more than one value."""
    found = [("algorithm", "Algorithm", list(algorithms)), ("layer", "Layer", [str(v) for v in layers])]
    return [one for one in found if len(one[2]) > 1]


def _row(algorithm: str, layer: int, head: int, cells: list[Cell], *, clear: bool = False) -> Row:
    find = f"{algorithm} layer {layer} head {head}".lower()
    return Row(find, [("algorithm", algorithm), ("layer", str(layer))], cells, clear)


def _mean(values: Any) -> float:
    """Returns the mean of the finite values, or NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _hint(run: Run, score: str) -> str:
    """Says what a column shows, in the words of the run: a CNN has self-similarity and saliency, and no attention."""
    row = catalogue.score(score)
    found = row.hint if row else ""
    return found.replace("CLS attention", run.attention_name).replace("attention", run.rows_name)


def scored(run: Run, summary: pd.DataFrame) -> Table:
    """Makes the table of a run with statistics: the leading score with its null and gain, then the other scores.

    Parameters
    ----------
    run
        The run.
    summary
        stats/summary.parquet.
    """
    lead = next((s for s in catalogue.leading() if len(of_score(summary, s))), "")
    if not lead:
        return plain(run)
    null = catalogue.main_null(lead)
    algorithms = list(dict.fromkeys(summary[summary["score"] == lead]["algorithm"]))
    rows = summary[(summary["score"] == lead) & (summary["head"] >= 0)]
    rows = (
        rows[rows["null"] == null]
        if null in set(rows["null"])
        else rows.drop_duplicates(["algorithm", "layer", "head"])
    )
    rows = rows[rows["mean"].notna()].sort_values("mean", ascending=False)
    others = [s.name for s in catalogue.SCORES if s.is_column and s.name != lead and len(of_score(summary, s.name))]
    values = {s: _means(summary, s) for s in others}
    low, high = _reach(rows)
    has_gain = bool(rows["gain"].notna().any())
    columns = _place_columns(len(algorithms))
    columns.append(Column(score_name(lead), "number", _hint(run, lead)))
    if has_gain:
        words = NULLS[null][1] if null in NULLS else null
        columns.append(Column(words[0].upper() + words[1:], "number", "the null model's mean on the same images"))
        columns.append(Column("Gain", "number", f"over {words}, with its 95 % interval over images"))
        p = "sign flips, corrected over all heads and layers (Holm)"
        columns.append(Column("p", "number", p, first="ascending"))
    second = _over(summary, lead, "position") if null != "position" else {}
    if second:
        columns.append(Column("Over position", "number", "gain over position alone, with its 95 % interval"))
    columns.append(Column("n", "number", "images; in brackets those of the gain, where they are fewer"))
    columns += [Column(score_name(s), "number", _hint(run, s), shown=False) for s in others]
    made = []
    for row in rows.to_dict("records"):
        algorithm, layer, head = str(row["algorithm"]), int(row["layer"]), int(row["head"])
        cells = _place(algorithm, layer, head)
        cells.append(_with_interval(number(row["mean"]), row["low"], row["high"]))
        if has_gain:
            cells += [number(row["null_mean"]), _gain(row, low, high), _p_value(row)]
        if second:
            cells.append(second.get((algorithm, layer, head), Cell("–", "")))
        fewer = f" ({row['gain_n']:,})" if has_gain and row["gain_n"] < row["n"] else ""
        cells.append(Cell(f"{row['n']:,}{fewer}", str(row["n"])))
        cells += [
            number(values[s].get((algorithm, layer, head), values[s].get(("", layer, head), np.nan))) for s in others
        ]
        made.append(_row(algorithm, layer, head, cells, clear=bool(row["sure"])))
    note = (
        f"By {score_name(lead)}, best first; means over images with 95 % intervals. A click on a column's name sorts "
        "the table; a click on a head shows its images."
    )
    zero = 100 * (0 - low) / (high - low)
    return Table(columns, made, _filters(algorithms, sorted(set(rows["layer"]))), note, has_gain, zero)


def _place_columns(algorithms: int) -> list[Column]:
    return [Column("Algorithm", "text", shown=algorithms > 1), Column("Layer", "number"), Column("Head", "number")]


def _place(algorithm: str, layer: int, head: int) -> list[Cell]:
    return [
        Cell(algorithm or "–"),
        Cell(str(layer), str(layer)),
        Cell(str(head), str(head), link=address(algorithm, layer, head)),
    ]


def address(algorithm: str, layer: int, head: int, number: int = 0) -> str:
    """Writes the part of the page's address that shows a head's images.

    Parameters
    ----------
    algorithm, layer, head
        Those of the head; an empty algorithm stands for the one that is shown.
    number
        Which of the page's runs, counted from 0.
    """
    which = "" if number == 0 else str(number + 1)
    named = f"&algorithm{which}={quote(algorithm)}" if algorithm else ""
    return f"#layer{which}={layer}&head{which}={head}{named}"


def _over(summary: pd.DataFrame, score: str, null: str) -> dict[tuple[str, int, int], Cell]:
    """Makes the cell of each head's gain over a null."""
    rows = summary[(summary["score"] == score) & (summary["null"] == null) & summary["gain"].notna()]
    return {(str(r["algorithm"]), int(r["layer"]), int(r["head"])): _plain_gain(r) for r in rows.to_dict("records")}


def _means(summary: pd.DataFrame, score: str) -> dict[tuple[str, int, int], float]:
    rows = summary[(summary["score"] == score) & (summary["head"] >= 0)].drop_duplicates(["algorithm", "layer", "head"])
    places = zip(rows["algorithm"], rows["layer"], rows["head"], rows["mean"], strict=True)
    return {(str(algorithm), int(layer), int(head)): float(value) for algorithm, layer, head, value in places}


def _reach(rows: pd.DataFrame) -> tuple[float, float]:
    """Returns the range of the drawn intervals: it holds all of them, and zero."""
    ends = rows[["gain_low", "gain_high"]].to_numpy(dtype=np.float64)
    ends = ends[np.isfinite(ends)]
    low, high = (min(0.0, float(ends.min())), max(0.0, float(ends.max()))) if ends.size else (-1.0, 1.0)
    return (low, high) if high > low else (-1.0, 1.0)


def _with_interval(cell: Cell, low: float, high: float) -> Cell:
    if not (np.isfinite(low) and np.isfinite(high)):
        return cell
    return replace(cell, small=f"[{number(low).text}, {number(high).text}]")


def _gain(row: Any, low: float, high: float) -> Cell:
    if not np.isfinite(row["gain"]):
        return Cell("–", "")
    if not np.isfinite(row["gain_low"]):
        return _plain_gain(row)
    scale = 100 / (high - low)
    return replace(
        _plain_gain(row),
        mark="" if not row["sure"] else "up" if row["gain"] > 0 else "down",
        left=round((row["gain_low"] - low) * scale, 2),
        wide=round((row["gain_high"] - row["gain_low"]) * scale, 2),
        at=round((row["gain"] - low) * scale, 2),
    )


def _plain_gain(row: Any) -> Cell:
    is_known = np.isfinite(row["gain_low"])
    interval = numbers.gain_interval(row["gain_low"], row["gain_high"]) if is_known else ""
    return Cell(numbers.gain(row["gain"]), repr(float(row["gain"])), interval)


def _p_value(row: Any) -> Cell:
    value, enough = float(row["p_holm"]), bool(row["enough"])
    return Cell(numbers.p_number(value, enough=enough), repr(value) if enough and np.isfinite(value) else "")

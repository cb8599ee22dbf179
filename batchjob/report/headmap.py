"""Makes the map of layers × heads on the page: each head's gain over its main null, linked to the head's images."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from batchjob.figures.statistics import NULLS, of_score, score_name
from batchjob.metrics import catalogue
from batchjob.metrics.uncertainty import SURE
from batchjob.report.table import address
from batchjob.stats.numbers import gain, number
from batchjob.store.run import Run


@dataclass(frozen=True)
class Tile:
    """One head of the map."""

    text: str  # its value
    share: int  # strength of its colour in percent
    side: str  # of zero: up, down, or empty
    is_sure: bool  # whether the gain is sure, as in `sure` of the summary
    link: str  # to the head's images
    title: str  # shown on hovering


@dataclass(frozen=True)
class HeadMap:
    """The map of one run."""

    name: str  # of the run
    caption: str
    heads: list[int]  # the numbers of the columns
    rows: list[tuple[int, list[Tile]]]  # the number of each layer and its tiles, the first layer on top
    limit: str  # the value of the strongest colour
    is_gain: bool  # whether the values are gains; else they are means


def head_map(run: Run, place: int) -> HeadMap | None:
    """Makes the map of a run by the first leading score that it has.

    Parameters
    ----------
    run
        The run.
    place
        Which of the page's runs it is, counted from 0.

    Returns
    -------
    The map, or None without statistics.
    """
    summary = run.table("summary")
    score = next((s for s in catalogue.leading() if summary is not None and len(of_score(summary, s))), "")
    if summary is None or not score:
        return None
    null = catalogue.main_null(score)
    rows = of_score(summary, score, null=null)
    is_gain = bool(len(rows)) and bool(rows["gain"].notna().any())
    rows = rows if is_gain else of_score(summary, score).drop_duplicates(["layer", "head"])
    value = "gain" if is_gain else "mean"
    limit = float(np.nanmax(np.abs(rows[value].to_numpy(np.float64)))) or 1.0
    by_place = {(int(r["layer"]), int(r["head"])): r for r in rows.to_dict("records")}
    tiles = [
        (layer, [_tile(by_place.get((layer, head)), value, limit, place, (layer, head)) for head in run.heads])
        for layer in run.layers
    ]
    algorithm = str(rows["algorithm"].iloc[0])
    of = f" of {algorithm}" if algorithm and len(run.algorithms) > 1 else ""
    over = f": gain over {NULLS[null][1] if null in NULLS else null}" if is_gain else ""
    return HeadMap(run.name, f"{score_name(score)}{of}{over}", list(run.heads), tiles, number(limit, 2), is_gain)


def _tile(row: Any, value: str, limit: float, place: int, at: tuple[int, int]) -> Tile:
    layer, head = at
    if row is None or pd.isna(row[value]):
        return Tile("–", 0, "", False, address("", layer, head, place), f"layer {layer}, head {head}: not defined")
    found = float(row[value])
    text = gain(found, 2) if value == "gain" else number(found, 2)
    is_sure = value == "gain" and bool(row["sure"])
    title = f"layer {layer}, head {head}: {text}" + (f", p ≤ {SURE} by Holm" if is_sure else "")
    side = "up" if found > 0 else "down" if found < 0 else ""
    link = address(str(row["algorithm"]), layer, head, place)
    return Tile(text, round(100 * abs(found) / limit), side, is_sure, link, title)

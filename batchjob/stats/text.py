"""The tables as a person reads them: the best heads first, the null beside them, and sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from batchjob.metrics import catalogue
from batchjob.metrics.uncertainty import ENOUGH_IMAGES
from batchjob.store.run import Run

MOST_ROWS = 16
THAN = {
    "position": "than position does",
    "distance": "than distance does",
    "half": "than chance at equal distance",
    "locality": "than the head's own locality does",
    "centre": "than the data set's mean map does",
}


def number(value: float) -> str:
    """Three decimals with a true minus sign; a dash for nothing."""
    return "–" if not np.isfinite(value) else f"{value:z.3f}".replace("-", "−")


def gain(value: float, digits: int = 3) -> str:
    """A difference, with its sign unless it rounds to nothing."""
    if not np.isfinite(value):
        return "–"
    text = f"{value:+z.{digits}f}".replace("-", "−")
    return text if text.strip("+0.") else text[1:]


def claim(score: str, rows_name: str) -> str:
    """What a score says that a head does; of a CNN's self-similarity not that it attends."""
    row = catalogue.score(score)
    found = row.claim if row and row.claim else "scores"
    return found if rows_name == "attention" else found.replace("attends", f"finds more {rows_name}")


def p_value(value: float) -> str:
    """`p = 0.012`, or the bound that the number of flips allows."""
    return "p unknown" if not np.isfinite(value) else "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def head_name(view: Run, layer: int, head: int) -> str:
    """`head 3`, with its layer where the run has several."""
    return f"head {head}" if len(view.layers) == 1 else f"layer {layer} head {head}"


def head_table(view: Run, summary: pd.DataFrame, score: str = "instance_ari") -> list[str]:
    """A table of one score, a line a head, the best first: mean, interval, its first null, the gain over it, p, n."""
    null = catalogue.main_null(score)
    found = summary[(summary.score == score) & summary["mean"].notna()]
    found = (
        found[found.null == null] if null in set(found.null) else found.drop_duplicates(["algorithm", "layer", "head"])
    )
    if found.empty:
        return []
    found = found.sort_values(["mean", "layer", "head"], ascending=[False, True, True])
    widths = (14, 6, 6, 9, 19, 10, 9, 19, 10, 8)
    heading = ("algorithm", "layer", "head", "mean", "interval", null or "null", "gain", "interval", "p", "n")
    lines = [
        f"{score} by head, best first ({null or 'no'} null beside it; 95 % intervals over images; p by Holm)",
        heading[0].ljust(14) + "".join(h.rjust(w) for h, w in zip(heading[1:], widths[1:], strict=True)),
    ]
    records: list[dict[str, Any]] = found.head(MOST_ROWS).to_dict("records")  # type: ignore[assignment]
    for row in records:
        cells = (
            str(row["layer"]),
            str(row["head"]),
            number(row["mean"]),
            f"[{number(row['low'])}, {number(row['high'])}]",
            number(row["null_mean"]),
            gain(row["gain"]),
            f"[{gain(row['gain_low'])}, {gain(row['gain_high'])}]" if np.isfinite(row["gain"]) else "–",
            p_value(row["p_holm"]).removeprefix("p = ").removeprefix("p ").replace("unknown", "–"),
            str(row["n"]),
        )
        name = row["algorithm"] or "–"
        lines.append(name.ljust(14) + "".join(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True)))
    if len(found) > MOST_ROWS:
        lines.append(f"… {len(found) - MOST_ROWS} more in {view.folder / 'stats' / 'summary.parquet'}")
    return lines


def sentence(view: Run, row: Mapping[str, Any]) -> str:
    """What the head chosen on one half of the images does on the other half, in words and figures."""
    score, null = str(row["score"]), str(row["null"])
    better = row["gain"] >= 0
    # of a few images an interval may leave zero out by luck: the test must agree
    sure = (row["gain_low"] > 0 or row["gain_high"] < 0) and row["p"] <= 0.05
    # what a reader remembers is how a sentence begins: a difference that may be chance is not stated first
    verdict = ("" if sure else "no evidence that ", "better" if better else "worse")
    text = (
        f"{score}: {verdict[0]}{head_name(view, row['layer'], row['head'])}, chosen on the first half, "
        f"{claim(score, view.rows_name)} {verdict[1]} {THAN.get(null, f'than {null} does')}: "
        f"{gain(row['gain'])} [{gain(row['gain_low'])}, {gain(row['gain_high'])}] on the other half, "
        f"n = {row['n']}, {p_value(row['p'])}"
    )
    if len(view.algorithms) > 1 and row["algorithm"]:
        text = text.replace(f"{score}:", f"{score} ({row['algorithm']}):", 1)
    rest = f"{row['worse']} of {row['heads']} heads do worse {THAN.get(null, '')}, {row['better']} better"
    return f"{text}; {rest}"


def describe(view: Run, counts: Mapping[str, int], summary: pd.DataFrame, selection: pd.DataFrame) -> list[str]:
    """What `batchjob stats` prints about one run: what it holds, its heads, a sentence a score."""
    height, width = view.geometry.grid
    weights = ", untrained" if view.is_random else ""
    lines = [f"{view.name}: {view.model}{weights}, {height}×{width} patches, k = {view.options['k']}"]
    if view.rows_name != "attention":
        lines.append(
            f"a CNN has no attention: its one head is the {view.rows_name} of features, its map their "
            f"{view.attention}; scores keep their names (attention_distance is the distance of similar patches)"
        )
    pending = f", {counts['pending']:,} not labelled yet" if counts.get("pending") else ""
    lines.append(f"{counts.get('images', 0):,} images, {counts.get('failed', 0):,} of them failed{pending}")
    if counts.get("annotated"):
        total, kept = counts.get("instances", 0), counts.get("instances kept", 0)
        share = f" ({kept / total:.0%}; the grid is too coarse for the rest)" if total else ""
        lines.append(
            f"{counts['annotated']:,} annotated, {counts.get('with two of a category', 0):,} with two instances of a "
            f"category; {total:,} instances, {kept:,} own two patches or more{share}"
        )
        for cause in ("not annotated", "annotated at another size"):
            if counts.get(cause):
                lines.append(f"{counts[cause]:,} images are {cause}: left out")
    tables = [head_table(view, summary, s) for s in ("instance_ari", "pair_auc_exact")]
    if not any(tables):
        tables = [head_table(view, summary, s) for s in ("coherence", "attention_distance")]
    for table in tables:
        lines += ["", *table] if table else []
    if len(selection):
        records: list[dict[str, Any]] = selection.to_dict("records")  # type: ignore[assignment]
        lines += ["", *(sentence(view, row) for row in records)]
        smallest = int(selection["n"].min())
        if smallest < ENOUGH_IMAGES:
            lines.append(
                f"With n below {ENOUGH_IMAGES} (here {smallest}) a 95 % interval covers less than it says: "
                "about 0.93 at n = 20, 0.88 at n = 8."
            )
    return lines


def missing_inputs(view: Run, names: Sequence[str], *, has_annotations: bool, has_random: bool) -> list[str]:
    """For every score that could not be had, the command that would give it."""
    hints = []
    again = f"batchjob run DATA --model {view.model} --k {view.options['k']}"
    if not has_annotations:
        hints.append(
            f"scores against objects need masks; give them: batchjob stats {view.folder} --annotations instances.json"
        )
    if not view.has_labels:
        hints.append(
            f"{', '.join(catalogue.names('labels'))} need labels of patches, which --queries cls does not make"
        )
    if "entropy" not in names:
        hints.append(
            f"attention_distance, entropy, query_key_nmi, sink and the locality null need the {view.rows_name} itself; "
            f"they come from: {again} --scores attention,pairs"
        )
    if "pair_auc" not in names:
        hints.append(
            f"pair_auc, pair_auc_matched and pair_auc_exact need the {view.rows_name} itself; they come from: {again} "
            "--scores attention,pairs --annotations instances.json"
        )
    if not has_random and not view.is_random:
        hints.append(
            f"the random null needs an untrained run: {again} --weights random, three seeds; "
            f"then batchjob stats {view.folder} RANDOM_RUN …"
        )
    return hints

"""Writes docs/results.md and its pictures from the tables that docs/results.py gathered."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from batchjob.errors import counted
from batchjob.metrics.catalogue import QUESTION
from batchjob.metrics.uncertainty import SURE, holm, is_enough
from batchjob.stats.numbers import gain, gain_interval, listed, number, p_value
from batchjob.stats.stream import CLUSTERINGS, SETTLED
from docs import results_pictures

NAMES = {"vits14": "DINOv2 ViT-S/14", "vitb16": "supervised ViT-B/16", "resnet18": "ResNet-18"}
SIZES = (224, 448)
REFERENCES = ("query", "key", "value", "token")
PLURALS = {"query": "queries", "key": "keys", "value": "values", "token": "tokens"}


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of the runs of one model at one size."""

    short: str  # the model's key in NAMES
    size: int  # of the input, in pixels
    folder: Path  # its name begins the names of the runs

    @property
    def title(self) -> str:
        """Names the model, the size of its input, and whether these are the runs of all layers."""
        return f"{NAMES[self.short]}, {self.size} px" + ", all layers" * self.folder.name.endswith("all")

    def run(self, name: str) -> Path:
        """Returns the folder with the tables of a run: `attention`, `key`, `seed1`, …"""
        return self.folder / f"{self.folder.name}-{name}"

    def has(self, run: str) -> bool:
        """Says whether a run was made."""
        return self.run(run).is_dir()

    def read(self, run: str, table: str) -> pd.DataFrame:
        """Reads a table of a run.

        Parameters
        ----------
        run
            As `run`.
        table
            The table's name, as `batchjob.stats` returns it.
        """
        return pd.read_parquet(self.run(run) / f"{table}.parquet")

    def heads(self, run: str, null: str) -> pd.DataFrame:
        """Returns the question's score of each head, and its gain over a null model.

        Parameters
        ----------
        run
            As `run`.
        null
            The null model.
        """
        summary = self.read(run, "summary")
        return summary[(summary.score == QUESTION) & (summary.null == null) & (summary["head"] >= 0)]

    def chosen(self, run: str, null: str) -> pd.Series:
        """Returns the head that one half of the images chose, with the figures of the other half.

        Parameters
        ----------
        run, null
            As `heads`.
        """
        selection = self.read(run, "selection")
        return selection[(selection.score == QUESTION) & (selection.null == null)].iloc[0]

    def compared(self, other: str, of: str) -> pd.DataFrame:
        """Returns the differences of attention minus another run, paired by image.

        Parameters
        ----------
        other
            The other run.
        of
            What is compared: `best head`, `mean of heads` or each `head`.
        """
        t = self.read("attention", "comparison")
        a, b = (self.run(run).name for run in ("attention", other))
        return t[(t.run_a == a) & (t.run_b == b) & (t.of == of) & (t.score == QUESTION)]


def write(tables: Path, docs: Path, wanted: Sequence[str]) -> None:
    """Writes results.md, results_map.png, results_layers.png and results_paired.png.

    Parameters
    ----------
    tables
        The folder of the tables, with a folder for each model and size.
    docs
        Where the files are written.
    wanted
        Names of runs. The page names those that have no tables.
    """
    found = [Tables(short, size, tables / f"{short}-{size}") for size in SIZES for short in NAMES]
    found = [t for t in found if t.has("attention")]
    deep = [
        t for short in NAMES if (t := Tables(short, SIZES[-1], tables / f"{short}-{SIZES[-1]}all")).has("attention")
    ]
    every = [*found, *deep]
    deepest = list({(t.short, t.size): t for t in every}.values())
    results_pictures.draw(found, deep, docs)
    counts = json.loads((found[0].run("attention") / "counts.json").read_text())
    text = Path(__file__).with_name("results.md.in").read_text()
    for name, part in {
        "images": f"{counts['images']:,}",
        "missing": missing(every, wanted),
        "verdict": verdict(found, deepest),
        "answer": answer(every),
        "question": _question_table(every),
        "counts": _count_table(every),
        "references": _reference_table(every),
        "seeds": _seed_table(found),
        "last": "\n".join(_last_layer_table(t) for t in found),
    }.items():
        text = text.replace(f"{{{name}}}", part)
    (docs / "results.md").write_text(text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def missing(found: Sequence[Tables], wanted: Sequence[str]) -> str:
    """Names in a sentence the runs that were not made.

    Parameters
    ----------
    found
        The tables that are there.
    wanted
        As `write`.

    Returns
    -------
    The sentence; empty where all runs were made.
    """
    there = {run.name for t in found for run in t.folder.iterdir()}
    names = [f"`{name}`" for name in wanted if name not in there]
    return f"Of the runs that the script asks for, these were not made: {', '.join(names)}." if names else ""


def verdict(found: Sequence[Tables], deepest: Sequence[Tables]) -> str:
    """Answers the page's two questions in a paragraph: do heads separate objects, and is it attention?

    Heads are counted with p-values that are corrected over the heads of their run. The mean over heads of attention
    minus a reference is one test for each model, size and reference; these are corrected together. Those with too few
    images are counted as neither.

    Parameters
    ----------
    found
        The tables of each model and size with all references.
    deepest
        Those with the most layers, whose heads are counted.

    Returns
    -------
    The paragraph.
    """
    networks = [t for t in found if t.has("key")]
    deep = [t for t in deepest if t.short in {n.short for n in networks}]
    over, position = ([t.heads("attention", null) for t in deep] for null in ("swap", "position"))
    pairs = [
        (other, t.compared(other, "mean of heads").iloc[0]) for t in networks for other in REFERENCES if t.has(other)
    ]
    corrected = holm(np.array([row.p for _, row in pairs]))
    higher, lower = (
        Counter(
            other
            for (other, row), p in zip(pairs, corrected, strict=True)
            if row.enough and p <= SURE and sign * row.difference > 0
        )
        for sign in (1, -1)
    )
    of_each = Counter(other for other, _ in pairs)
    few = sum(not row.enough for _, row in pairs)
    ways = ("query", "key")  # what attention is made of
    is_higher, is_lower = (any(side[other] for other in ways) for side in (higher, lower))
    said = {
        (False, True): "These photos show no sign of that",
        (True, False): "On these photos, yes",
        (True, True): "That depends on the model and the size",
    }.get((is_higher, is_lower), "These photos do not decide it")
    told = "; ".join(
        f"{PLURALS[other]}: attention lower in {lower[other]}, higher in {higher[other]} of {of_each[other]}"
        for other in REFERENCES
        if of_each[other]
    )
    better = sum(map(_better, over))
    do_so = "does so better than it separates" if better == 1 else "do so better than they separate"
    return (
        f"**Do heads separate objects of one class?** Of the {counted(sum(map(len, over)), 'attention head')} of "
        f"{_models(deep)} at all sizes, {better} {do_so} other photos' objects, and {sum(map(_better, position))} "
        f"better than position alone does{_unknown(sum(map(_too_few, over)))}.{_not_counted(deepest, deep)} **Is it "
        f"attention itself, rather than the queries and keys that it is made of?** {said}. The mean over heads of "
        f"attention rows was compared with that of the same heads' {told}. (A model at one size is one comparison; "
        f"p ≤ {SURE} after Holm's correction over all {len(pairs)}{_unknown(few)}.)"
    )


def _models(found: Sequence[Tables]) -> str:
    return listed(list(dict.fromkeys(NAMES[t.short] for t in found)))


def _not_counted(found: Sequence[Tables], networks: Sequence[Tables]) -> str:
    """Names in a sentence the models that have no attention heads; empty where all have."""
    others = _models([t for t in found if t not in networks])
    return f" (The maps of {others} are not among them: without attention there are no heads.)" if others else ""


def answer(found: Sequence[Tables]) -> str:
    """Writes a sentence for each model and size, from what was counted, and one for attention against keys."""
    lines = []
    for t in found:
        over, position = (t.heads("attention", null) for null in ("swap", "position"))
        best = t.chosen("attention", "swap")
        where = "its one map" if t.short == "resnet18" else f"head {best['head']} of layer {best.layer}"
        better, verb = _better(over), "separates" if 1 in (_better(over), len(over)) else "separate"
        lines.append(
            f"- **{t.title}**: {better} of {counted(len(over), 'head')} {verb} objects of one class better than the "
            f"same head does with other photos' objects, and {_better(position)} better than position alone does"
            f"{_unknown(_too_few(over))}; half of the images choose {where}, which scores "
            f"{number(best['mean'])} on the other half (n = {best.n}), {_gain(best)} over other photos' objects"
            f"{'' if is_enough(best.n, best.informative) else ', too few images for a claim'}."
        )
        if t.has("key"):
            gaps = t.compared("key", "head")
            above, below = (gaps.sure & (sign * gaps.difference > 0) for sign in (1, -1))
            mean = t.compared("key", "mean of heads").iloc[0]
            lines.append(
                f"    Its keys: attention is above them in {int(above.sum())} of {counted(len(gaps), 'head')} and "
                f"below in {int(below.sum())}{_unknown(_too_few(gaps))}; on the mean of all heads the difference is "
                f"{_gain(mean, 'difference')} ({p_value(mean.p, enough=mean.enough)})."
            )
    return "\n".join(lines)


def _question_table(found: Sequence[Tables]) -> str:
    """Tabulates the chosen head of each model on the images that did not choose it, against each null model."""
    rows = []
    for t in found:
        swap = t.chosen("attention", "swap")
        cells = [t.title, str(swap.n), f"{swap.layer}.{swap['head']}", number(swap["mean"])]
        for null in ("swap", "position"):
            row = t.chosen("attention", null)
            cells.append(
                f"{number(row.null_mean)}: {_gain(row)}, {p_value(row.p, enough=is_enough(row.n, row.informative))}"
            )
        rows.append(cells)
    return _table(["model", "n", "layer.head", "ARI", "other photos' objects", "position alone"], rows)


def _count_table(found: Sequence[Tables]) -> str:
    """Counts the heads whose gain is sure, on all images."""
    rows = []
    for t in found:
        for run in ("attention", *REFERENCES, "random0"):
            if t.has(run):
                over, position = t.heads(run, "swap"), t.heads(run, "position")
                cells = [t.title, "untrained attention" if run == "random0" else run, str(len(over))]
                cells += [number(over["mean"].mean()), number(over["mean"].max()), number(over.gain.mean())]
                cells += [str(_better(over)), str(_better(position)), str(_better(position, -1)), str(_too_few(over))]
                rows.append(cells)
    head = ["model", "clustered", "heads", "mean ARI", "best ARI", "mean gain over swap"]
    return _table([*head, "better than swap", "better than position", "worse than position", "too few to say"], rows)


def _reference_table(found: Sequence[Tables]) -> str:
    """Tabulates the differences of attention minus queries, keys, values and tokens, paired by image."""
    rows = []
    for t in found:
        for other in REFERENCES:
            if not t.has(other):
                continue
            best, mean, heads = (t.compared(other, of) for of in ("best head", "mean of heads", "head"))
            cells = [t.title, other]
            for row in (best.iloc[0], mean.iloc[0]):
                cells.append(f"{_gain(row, 'difference')}, {p_value(row.p, enough=row.enough)}")
            sure = heads[heads.sure]
            above, below = int((sure.difference > 0).sum()), int((sure.difference < 0).sum())
            few = f", {_too_few(heads)} too few to say" if _too_few(heads) else ""
            rows.append([*cells, f"{above} / {below} of {len(heads)}{few}" if len(heads) else "–"])
    head = ["model", "attention minus", "best heads, other half", "mean of heads, all images"]
    return _table([*head, "heads above / below"], rows)


def _seed_table(found: Sequence[Tables]) -> str:
    """Tabulates what differs between three seeds: the scores, the labels, the head that is chosen."""
    rows = []
    for t in found:
        runs = [run for run in ("attention", "seed1", "seed2") if t.has(run)]
        if len(runs) < 2:
            continue
        means = np.array([t.heads(run, "swap").sort_values(["layer", "head"])["mean"].to_numpy() for run in runs])
        alike = t.read("attention", "agreement_runs")
        seeds = [t.run(run).name for run in runs]
        alike = alike[alike.run_a.isin(seeds) & alike.run_b.isin(seeds)]
        chosen = [t.chosen(run, "swap") for run in runs]
        spread = np.abs(means - means.mean(axis=0)).max(axis=0)
        cells = [
            t.title,
            _settled(t, runs),
            number(alike["mean"].mean()),
            number(float(np.median(spread))),
            number(spread.max()),
        ]
        cells.append(", ".join(f"{c.layer}.{c['head']}: {number(c['mean'])}" for c in chosen))
        rows.append(cells)
    head = ["model", "settled", "ARI of two seeds' labels", "a head's score moves by (median)", "(most)"]
    return _table([*head, "chosen head and its score, each seed"], rows)


def _settled(t: Tables, runs: Sequence[str]) -> str:
    """Writes the share of the runs' clusterings in which the search settled; a dash where `stats` did not count it."""
    counts = [json.loads((t.run(run) / "counts.json").read_text()) for run in runs]
    found, total = (sum(one.get(f"{name}kmeans", 0) for one in counts) for name in (SETTLED, CLUSTERINGS))
    return f"{100 * found / total:.0f} %" if total else "–"


def _last_layer_table(t: Tables) -> str:
    """Tabulates every head of the last layer, on all images."""
    swap, position, random = (t.heads("attention", null) for null in ("swap", "position", "random"))
    rows = []
    for _, row in swap[swap.layer == swap.layer.max()].sort_values("head").iterrows():
        cells = [str(row["head"]), f"{number(row['mean'])} [{number(row.low)}, {number(row.high)}]"]
        for null in (swap, position, random):
            same = null[(null.layer == row.layer) & (null["head"] == row["head"])]
            cells += [
                f"{number(n.null_mean)}: {_gain(n)}, {p_value(n.p_holm, enough=n.enough)}" for _, n in same.iterrows()
            ] or ["–"]
        rows.append(cells)
    head = ["head", "ARI", "other photos' objects", "position alone", "untrained"]
    return f"**{t.title}**, n = {int(swap.n.max())}\n\n{_table(head, rows)}"


def _better(heads: pd.DataFrame, sign: int = 1) -> int:
    return int((heads.sure & (sign * heads.gain > 0)).sum())


def _too_few(rows: pd.DataFrame) -> int:
    return int((~rows.enough).sum())


def _unknown(count: int) -> str:
    return f"; of {count} too little is known to say" if count else ""


def _gain(row: pd.Series, name: str = "gain") -> str:
    low, high = ("low", "high") if name == "difference" else ("gain_low", "gain_high")
    return f"{gain(row[name])} {gain_interval(row[low], row[high])}"

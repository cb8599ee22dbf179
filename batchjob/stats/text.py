"""Writes what `batchjob stats` prints: what a run holds, its best heads with their nulls, and what is missing."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from batchjob import retries
from batchjob.config import as_arguments
from batchjob.errors import counted
from batchjob.metrics import catalogue
from batchjob.stats.numbers import gain, gain_interval, listed, mean_interval, number, p_number, seeds
from batchjob.stats.stream import CLUSTERINGS, SEARCHES, SETTLED
from batchjob.store.run import Run

_MOST_ROWS = 16  # of a table of heads
LEFT_OUT = "left out: "  # in counts.json, begins the keys that count annotations by what is wrong with them


def _head_table(run: Run, summary: pd.DataFrame, score: str) -> list[str]:
    """Writes a table of one score, a line a head, the best first; no line where no head has the score.

    A line has the mean and its interval; for each null model its mean, the gain over it and the p-value; and n. A null
    model that lacks some of the n images has an n of its own.
    """
    found = summary[(summary.score == score) & summary["mean"].notna() & (summary["head"] >= 0)]
    if found.empty:
        return []
    nulls = [n for n in (*catalogue.nulls_of(score), catalogue.RANDOM) if n in set(found.null)]
    key = ["algorithm", "layer", "head"]
    by_null = {null: found[found.null == null].set_index(key) for null in nulls}
    main = found[found.null == nulls[0]] if nulls else found.drop_duplicates(key)
    main = main.sort_values(["mean", "layer", "head"], ascending=[False, True, True])
    fewer = {null for null in nulls if (by_null[null]["gain_n"] < by_null[null]["n"]).any()}
    widths, heading = [14, 6, 6, 8, 17], ["algorithm", "layer", "head", "mean", "interval"]
    for null in nulls:
        widths += [9, 9, 18, 10, *[6] * (null in fewer)]
        heading += [null, "gain", "interval", "p", *["n"] * (null in fewer)]
    widths, heading = [*widths, 7], [*heading, "n"]
    against = f" against {listed(nulls)}; p by Holm" if nulls else ""
    if catalogue.RANDOM in nulls:
        against += f"; {catalogue.RANDOM} is of {seeds(int(by_null[catalogue.RANDOM]['seeds'].iloc[0]))}"
    lines = [f"{score} by head, best first, with 95 % intervals over images{against}", _line(heading, widths)]
    records: list[dict[str, Any]] = main.head(_MOST_ROWS).to_dict("records")  # type: ignore[assignment]
    for row in records:
        place = (row["algorithm"], row["layer"], row["head"])
        cells = [row["algorithm"] or "–", str(row["layer"]), str(row["head"])]
        cells += [number(row["mean"]), mean_interval(row["low"], row["high"])]
        for null in nulls:
            against_it = by_null[null].loc[[place]].iloc[0]
            cells += [*_against(against_it), *[str(against_it["gain_n"])] * (null in fewer)]
        lines.append(_line([*cells, str(row["n"])], widths))
    if len(main) > _MOST_ROWS:
        lines.append(f"… {len(main) - _MOST_ROWS} more in {run.folder / 'stats' / 'summary.parquet'}")
    return lines


def _against(row: Any) -> list[str]:
    if not np.isfinite(row["gain"]):
        return ["–"] * 4
    interval = gain_interval(row["gain_low"], row["gain_high"])
    return [number(row["null_mean"]), gain(row["gain"]), interval, p_number(row["p_holm"], enough=row["enough"])]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return cells[0].ljust(widths[0]) + "".join(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))


def describe(run: Run, counts: Mapping[str, int], summary: pd.DataFrame, said: Sequence[str]) -> list[str]:
    """Says all that the statistics found about one run: what it holds, its heads, and the sentences about them.

    Parameters
    ----------
    run
        The run that was scored.
    counts
        stats/counts.json.
    summary
        stats/summary.parquet.
    said
        The answer in sentences, and those about the other scores.

    Returns
    -------
    Lines to print.
    """
    height, width = run.geometry.grid
    weights = ", untrained" if run.is_random else ""
    lines = [f"{run.name}: {run.model}{weights}, {height}×{width} patches, k = {run.options['k']}"]
    if run.rows_name != "attention":
        is_of_tokens = run.options.get("cluster_on") == "token" and run.spec.get("kind") != "cnn"
        lines.append(
            f"{run.clustered} belong to a whole layer, so each layer has one head, and its map is their {run.attention}"
            if is_of_tokens
            else f"a CNN has no attention: its one head is the {run.rows_name} of features, its map their "
            f"{run.attention}; scores keep their names (attention_distance is the distance of similar patches)"
        )
    lines.append(
        f"{counted(counts.get('images', 0), 'image')}, {counts.get('failed', 0):,} of them failed{_pending(counts)}"
    )
    lines += _retry(run, counts) + settled(counts, run.options)
    if counts.get("annotated"):
        total, kept = counts.get("instances", 0), counts.get("instances kept", 0)
        share = f" ({kept / total:.0%}; the grid is too coarse for the rest)" if total else ""
        lines.append(
            f"{counts['annotated']:,} annotated, {counts.get('with two of a category', 0):,} with two instances of a "
            f"category; {counted(total, 'instance')}, {kept:,} with two patches or more{share}"
        )
        for cause in ("not annotated", "annotated at another size"):
            if counts.get(cause):
                lines.append(f"{counted(counts[cause], 'image')} {cause}: left out")
    lines += left_out(counts)
    tables = [_head_table(run, summary, s) for s in (catalogue.QUESTION, "pair_auc_matched")]
    if not any(tables):
        tables = [_head_table(run, summary, s) for s in ("coherence", "attention_distance")]
    for table in tables:
        lines += ["", *table] if table else []
    return lines + (["", *said] if said else [])


def fold(run: Run, counts: Mapping[str, int], answer: Mapping[str, Any], hints: Sequence[str]) -> list[str]:
    """Says in a few lines what the statistics found: the run, the question and its answer.

    Parameters
    ----------
    run, counts
        As `describe`.
    answer
        stats/answer.json: `question` and `lines`.
    hints
        What `missing_inputs` returns. The first one takes the place of an answer that has no lines.

    Returns
    -------
    Lines to print.
    """
    untrained = ", untrained" if run.is_random else ""
    images = counted(counts.get("images", 0), "image")
    lines = [f"{run.name}: {run.model}{untrained}, {images}, {counts.get('failed', 0):,} failed{_pending(counts)}"]
    lines += _retry(run, counts) + settled(counts, run.options) + left_out(counts)
    if answer["lines"]:
        lines += ["", answer["question"], *answer["lines"]]
    else:
        lines += hints[:1]
    folder = run.folder / "stats"
    return [*lines, "", f"tables: {folder}", f"heads, other scores and nulls: batchjob stats {run.folder} --verbose"]


def _pending(counts: Mapping[str, int]) -> str:
    return f", {counts['pending']:,} not labelled yet" if counts.get("pending") else ""


def _retry(run: Run, counts: Mapping[str, int]) -> list[str]:
    said = retries.sentence(counts.get(retries.COUNT, 0), run.data_asked, run.folder, run.options)
    return [said] if said else []


def left_out(counts: Mapping[str, int]) -> list[str]:
    """Writes a line for each cause for which annotations were left out, the most common first."""
    found = [(n, name.removeprefix(LEFT_OUT)) for name, n in counts.items() if name.startswith(LEFT_OUT)]
    return [f"{counted(n, 'annotation')} left out: {cause}" for n, cause in sorted(found, reverse=True)]


def settled(counts: Mapping[str, int], options: Mapping[str, Any]) -> list[str]:
    """Says for each algorithm that starts at random how often it found its best partition again.

    Parameters
    ----------
    counts
        stats/counts.json.
    options
        The run's result options.

    Returns
    -------
    One sentence an algorithm; none for agglomerative and hdbscan, which draw nothing, and none in dataset scope.
    """
    lines = []
    for algorithm, name in SEARCHES.items():
        total, found = counts.get(CLUSTERINGS + algorithm, 0), counts.get(SETTLED + algorithm, 0)
        if not total:
            continue
        if str(options.get("n_init")) == "1":
            lines.append(f"{name} had one start a clustering (--n-init 1), so nothing says whether it would settle.")
        elif found == total:
            lines.append(f"{name} settled in all {total:,} clusterings.")
        elif not found:
            lines.append(
                f"{name} settled in none of {total:,} clusterings: no best partition was found twice, or the engine "
                "does not say so (sklearn, cuml)."
            )
        else:
            percent = min(max(round(100 * found / total), 1), 99)  # neither none nor all
            how = "the score stability shows" if int(options.get("repeats", 1)) > 1 else "a run with --repeats 3 shows"
            lines.append(
                f"{name} settled in {percent} % of {total:,} clusterings. In the others it found its best partition "
                f"only once: {how} what moves."
            )
    return lines


def missing_inputs(run: Run, names: Sequence[str], *, has_annotations: bool, has_random: bool) -> list[str]:
    """Says for each group of missing scores which command would give them.

    Parameters
    ----------
    run
        The run that was scored.
    names
        The arrays of scores.zarr.
    has_annotations
        Whether objects are known.
    has_random
        Whether untrained runs were given.

    Returns
    -------
    One line a group; none where nothing is missing.
    """
    hints = []
    again = f"batchjob run DATA {shlex.join(as_arguments(run.options, without=('scores', 'annotations')))}".rstrip()
    of_attention = run.options.get("cluster_on", "attention") == "attention"
    if not has_annotations:
        hints.append(
            f"scores against objects need masks; give them: batchjob stats {run.folder} --annotations instances.json"
        )
    if not run.has_labels:
        of_labels = ", ".join(catalogue.names("labels"))
        hints.append(f"{of_labels} need labels of patches, which --queries cls does not make")
    if of_attention and "entropy" not in names:
        words = as_arguments(run.options, without=("scores",))
        more = "attention,pairs" if "pairs" in str(run.options.get("scores")) else "attention"
        hints.append(
            f"attention_distance, entropy, query_key_nmi and sink need the {run.rows_name} itself; they come from: "
            f"{shlex.join(['batchjob', 'run', 'DATA', *words, '--scores', more])}"
        )
    pairs = catalogue.names(*(catalogue.LABELLING["pairs"] if of_attention else catalogue.OF_VECTORS))
    if not set(pairs) & set(names):
        is_one = len(pairs) == 1
        if set(pairs) & set(run.score_names):
            verb = "was" if is_one else "were"
            why = f"{verb} computed for other objects, while {run.folder} was labelled; for these "
        else:
            what = f"the {run.clustered} {'itself' if of_attention else 'themselves'}"
            why = f"{'needs' if is_one else 'need'} {what}; "
        given = "attention,pairs" if of_attention else "pairs"
        source = f"{'it comes' if is_one else 'they come'} from: {again} --scores {given}"
        hints.append(f"{', '.join(pairs)} {why}{source} --annotations instances.json")
    if not has_random and not run.is_random:
        same = f"batchjob run DATA {shlex.join(as_arguments(run.options, without=('weights', 'seed')))}".rstrip()
        hints.append(
            f"the random null needs untrained runs that are equal but for the seed: {same} --weights random --seed N, "
            f"three seeds; then batchjob stats {run.folder} RANDOM_RUN …"
        )
    return hints

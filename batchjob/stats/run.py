"""`batchjob stats RUN …`: makes tables under RUN/stats of runs and their annotations, and sentences of the tables."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from batchjob import retries
from batchjob.data.annotations import AnnotationFiles, Annotations, open_annotations
from batchjob.errors import UserError, counted
from batchjob.inputs import hashes_of_annotations, raise_for_changes
from batchjob.metrics import catalogue
from batchjob.stats import codebook, differences, sentences, text
from batchjob.stats.compare import comparable, compare
from batchjob.stats.modifiers import describe as describe_modifiers
from batchjob.stats.modifiers import modifier_table
from batchjob.stats.pool import Pool, choose_jobs
from batchjob.stats.randoms import match_randoms
from batchjob.stats.stream import score_run
from batchjob.stats.summary import agreement_table, select_heads, summarise
from batchjob.stats.tables import Tables
from batchjob.stats.truth import lay_out
from batchjob.store.outputs import writing_stats
from batchjob.store.run import ANNOTATIONS_SCORED, COMPARED_RUNS, Run, tell_apart


@dataclass(frozen=True, slots=True)
class _Manner:
    """How the tables of all runs are made."""

    pool: Pool
    csv: bool  # whether a CSV file is written beside each Parquet file
    are_planned: bool  # whether the annotations are those that the runs were planned with


def run_stats(
    runs: Sequence[str | Path],
    *,
    annotations: str = "",
    csv: bool = False,
    jobs: int = 0,
    verbose: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Writes the tables of every run and says what they hold.

    Parameters
    ----------
    runs
        Folders of runs. An untrained run (`--weights random`) is the random null of the trained runs that have the
        same options. Several trained runs are compared.
    annotations
        As `--annotations`; by default the annotations that each run was planned with.
    csv
        Whether to write a CSV file beside each Parquet file.
    jobs
        How many processes; with 0, as many as are worth starting.
    verbose
        Whether to say everything. Otherwise only the question, its answer, and where the rest can be read.
    say
        Called with a line about each step as it begins.

    Returns
    -------
    Lines for a person to read.

    Raises
    ------
    UserError
        If a folder is not a run or is named twice, a run has no labelled image, or the annotations have none of its
        images.
    """
    opened = [Run.checked(folder, stats=False) for folder in runs]
    if len({v.folder.resolve() for v in opened}) < len(opened):
        raise UserError("one RUN is named twice; name each once")
    if jobs < 0:
        raise UserError(f"--jobs {jobs} is not a number of processes; give 1 or more, or leave it out")
    for run in opened:
        if not len(run.ok_rows):
            status = run.read(0, run.rows, only=()).status
            raise UserError(retries.without_images(status, run.data_asked, run.folder, run.options))
    tell_apart(opened)
    randoms = match_randoms(opened)
    known = _open_each(opened, annotations, say)
    lines: list[str] = []
    with ExitStack() as stack:
        for run in opened:
            stack.enter_context(writing_stats(run.folder))
        pool = stack.enter_context(Pool(jobs or max(choose_jobs(v.rows) for v in opened)))
        manner = _Manner(pool, csv, are_planned=not annotations)
        given = hashes_of_annotations(annotations)
        names = {}
        for run in opened:
            say(f"{run.folder}: scoring {counted(run.rows, 'image')} with {counted(pool.jobs, 'process')}")
            names[run.folder] = _score(run, known[run.folder], manner)
            (run.folder / ANNOTATIONS_SCORED).write_text(json.dumps(given, indent=1))
        for run in opened:
            folded, full = _tabulate(run, names[run.folder], randoms[run.folder], known[run.folder], manner)
            lines += ["", *(full if verbose else folded)]
        # untrained runs are not compared: they are a null in the trained runs' own tables
        sides = [v for v in opened if not v.is_random] or opened
        if len(sides) > 1:
            lines += ["", *_compare(sides, known, manner)]
    return lines[1:]


def _open_each(runs: Sequence[Run], annotations: str, say: Callable[[str], None]) -> dict[Path, Annotations | None]:
    """Opens the annotations of each run. A file that several runs share is read once."""
    opened: dict[str, AnnotationFiles] = {}
    found: dict[Path, Annotations | None] = {}
    for run in runs:
        source = annotations or run.annotations
        if source and source not in opened:
            say(f"reading {source}")
            if not annotations:
                raise_for_changes(run.folder, run.plan["inputs"], index=False, annotations=True)
            opened[source] = open_annotations(source)
        found[run.folder] = opened[source].join(run.ids, str(run.folder)) if source else None
    return found


def _score(run: Run, annotations: Annotations | None, manner: _Manner) -> set[str]:
    """Writes the scores of every image to RUN/scores.zarr and the tidy tables; returns the names of the scores."""
    from tqdm import tqdm

    try:
        with (
            tempfile.TemporaryDirectory(prefix="batchjob-stats-") as folder,
            tempfile.TemporaryDirectory(prefix="batchjob-stats-") as scratch,
            Tables(run, Path(scratch), csv=manner.csv) as tables,
            tqdm(total=run.rows, desc="stats", unit="image", disable=None) as bar,
        ):
            truth = None
            if annotations is not None:
                truth, found = lay_out(run, annotations, Path(folder), manner.pool, are_planned=manner.are_planned)
                tables.counts += found
                tables.counts.update({f"{text.LEFT_OUT}{cause}": n for cause, n in annotations.left_out.items()})
            for scored in score_run(run, truth, manner.pool):
                tables.add(scored)
                bar.update(scored.counts["images"])
            _write(agreement_table(run, tables.agreement), run, "agreement", csv=manner.csv)
            (run.folder / "stats" / "counts.json").write_text(json.dumps(tables.counts, indent=1))
            return tables.written
    except PermissionError as error:
        raise UserError(f"{run.folder} can't be written: {error.filename}; copy the run, or ask its owner") from error


def _tabulate(
    run: Run, names: set[str], randoms: Sequence[Run], annotations: Annotations | None, manner: _Manner
) -> tuple[list[str], list[str]]:
    """Writes the tables that sum the scores of a run up; returns what they say, in a few lines and in full."""
    pool, csv = manner.pool, manner.csv
    summary = summarise(run, sorted(names), randoms, pool)
    selection = select_heads(run, summary, randoms, pool)
    _write(summary, run, "summary", csv=csv)
    _write(selection, run, "selection", csv=csv)
    modifiers = modifier_table(run, pool)
    _write(modifiers, run, "modifiers", csv=csv)
    counts = json.loads((run.folder / "stats" / "counts.json").read_text())
    hints = text.missing_inputs(run, sorted(names), has_annotations=annotations is not None, has_random=bool(randoms))
    said = sentences.answer(run, selection)
    if not said and catalogue.QUESTION in names and annotations is not None:
        said = sentences.why_none(counts)
    lines = text.describe(run, counts, summary, [*said, *sentences.exploratory(run, selection)])
    answer = {"question": sentences.question([run]), "lines": said}
    (run.folder / "stats" / "answer.json").write_text(json.dumps(answer, indent=1, ensure_ascii=False))
    main = catalogue.main_null("pair_ari")
    for row in selection[(selection.score == "pair_ari") & (selection.null == main)].to_dict("records"):
        of_pairs = describe_modifiers(modifiers, row["layer"], row["head"], row["algorithm"])
        lines += ["", *of_pairs] if of_pairs else []
    clusters: list[str] = []
    if run.options.get("scope") == "dataset":
        found = codebook.tables(codebook.count(run, annotations, are_planned=manner.are_planned))
        for name, table in found.items():
            _write(table, run, name, csv=csv)
        clusters = codebook.describe(found, is_annotated=annotations is not None)
        lines += ["", *clusters]
    tables = f"tables: {run.folder / 'stats'}"
    folded = text.fold(run, counts, answer, hints)
    return [*folded[:1], *clusters, *folded[1:]], [*lines, *([""] if hints else []), *hints, "", tables]


def _compare(runs: Sequence[Run], known: Mapping[Path, Annotations | None], manner: _Manner) -> list[str]:
    """Writes the paired tables into the first run's folder and returns what they say."""
    if reason := comparable(runs):
        return [f"the runs are not compared patch by patch: {reason}"]
    if reason := _other_annotations(runs) if manner.are_planned else "":
        return [f"the runs are not compared: {reason}; give all the same: batchjob stats … --annotations FILE"]
    annotations = next((found for run in runs if (found := known[run.folder]) is not None), None)
    common = compare(runs, annotations, manner.pool)
    if not common.ids:
        return [f"the runs are not compared: {differences.why_none(common)}"]
    table = differences.differences(runs, common)
    _write(table, runs[0], "comparison", csv=manner.csv)
    _write(differences.agreements(runs, common), runs[0], "agreement_runs", csv=manner.csv)
    digests = {run.name: run.stats_digest for run in runs}
    (runs[0].folder / COMPARED_RUNS).write_text(json.dumps(digests, indent=1))
    return [*differences.describe(runs, common, table), "", f"comparison: {runs[0].folder / 'stats'}"]


def _other_annotations(runs: Sequence[Run]) -> str:
    """Says with which annotations each run was planned, if their contents differ; empty if they don't."""
    of_run = {run.name: run.annotations for run in runs if run.annotations}
    contents = {
        frozenset(digest for path, digest in run.plan["inputs"].items() if Path(path).is_absolute())
        for run in runs
        if run.annotations
    }
    return (
        "their annotations differ: " + ", ".join(f"{p} of {n}" for n, p in of_run.items()) if len(contents) > 1 else ""
    )


def _write(table: pd.DataFrame, run: Run, name: str, *, csv: bool) -> None:
    table.to_parquet(run.folder / "stats" / f"{name}.parquet", index=False)
    if csv:
        table.to_csv(run.folder / "stats" / f"{name}.csv", index=False)

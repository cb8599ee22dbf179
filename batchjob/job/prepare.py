"""Makes a planned run on disk from DATA and options; looks up and checks everything before any work."""

import csv
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from batchjob import inputs
from batchjob import plan as plans
from batchjob.codebook import rows as sample_rows
from batchjob.config import K_RULES, MAX_K, Options
from batchjob.data import sources
from batchjob.data.reading import escape
from batchjob.errors import UserError, counted
from batchjob.files import LOCK, clear_disk_errors, new_scratch, only_one
from batchjob.geometry import Geometry
from batchjob.job.checks import check_input, choose_heads, raise_for_patches
from batchjob.model import weights
from batchjob.plan import Plan

if TYPE_CHECKING:
    from batchjob.data.index import ImageIndex
    from batchjob.data.instances import GridInstances


def prepare(data: str, run: Path, options: Options, *, say: Callable[[str], None]) -> Plan:
    """Returns the plan of a run: the one that is there, or a new one, with its index and empty arrays.

    Makes a damaged or lost plan.json again, where DATA and the options still give the plan that the labels are of.

    Parameters
    ----------
    data
        DATA as the user gave it.
    run
        The folder of the run, which need not be there.
    options
        The result options.
    say
        Gets a line for each choice that the options leave open.

    Returns
    -------
    The plan.

    Raises
    ------
    UserError
        Something is wrong with DATA, RUN or the options, or the plan that is there differs; nothing was written.
    WorkLeft
        The disk is full.
    """
    if found := _planned(data, run, options, say):
        return found
    _check_folder(run)
    from batchjob.model import describe as model
    from batchjob.model.precision import choose_half
    from batchjob.store import lifecycle as store

    spec = model.describe(options)
    layers, heads = choose_heads(options, spec)
    located = weights.locate(options.model, options.weights, say=say)
    trial = model.load_model(
        spec, weights.state_dict(located, say=say), precision="fp32", device="cpu"
    )  # refuses wrong weights
    index = sources.index_images(data, split=options.split, limit=options.limit, progress=True)
    precision, reason, is_for_gpu = _choose_precision(options.precision)
    if options.precision == "auto":
        if precision != "fp32":
            precision, fitting = choose_half(trial)
            reason += f" and {fitting}"
        say(f"precision: {precision}, since {reason}")
    del trial
    annotations = options.annotations or index.annotations
    rows = plans.choose_rows_per_partition(options.rows_per_partition, len(index), is_for_gpu=is_for_gpu)
    geometry = plans.geometry_of(spec, options)
    if options.scope == "dataset":
        sample_rows.check_rows(options, geometry.grid, len(index))
    k, instances, categories = _known(data, options, index, annotations, geometry, say=say)
    kept = kept_rows(options.keep_maps, index)
    with clear_disk_errors(run, f"RUN {run} can't be written"), only_one(run):
        if found := _planned(data, run, options, say):  # another process has planned it meanwhile
            return found
        annotations = ",".join(os.path.abspath(path) for path in annotations.split(",") if path)
        with _index_aside(run, index, k, instances) as aside:
            plan = Plan(
                options=options,
                data=os.path.abspath(data),
                model=spec,
                weights=located.to_json(),
                annotations=annotations,
                layers=layers,
                heads=heads,
                precision=precision,
                row_count=len(index),
                rows_per_partition=rows,
                kept_rows=kept,
                inputs=inputs.hashes(aside, annotations),
                versions=plans.versions(),
                categories=categories,
            )
            if store.is_of(run, plan):  # raises where it is of another
                say(f"{run / 'plan.json'} was damaged or lost and is made again: it is the plan of the labels in {run}")
            _replace_index(run, aside)
        store.create(run, plan, index)
        plans.save(plan, run)
        return plan


def _planned(data: str, run: Path, options: Options, say: Callable[[str], None]) -> Plan | None:
    """Reads the plan of RUN and checks that it is what is asked for; None where RUN has no plan, or a damaged one.

    Makes a damaged index again, where the data have not changed.
    """
    plan = check_input(data, run, options)
    if plan is not None and (damaged := inputs.differences(run, plan.inputs)):
        index = sources.index_images(plan.data, split=options.split, limit=options.limit)
        k, instances, _ = _known(data, options, index, plan.annotations, plan.geometry, say=lambda line: None)
        with (
            clear_disk_errors(run, f"RUN {run} can't be written"),
            only_one(run),
            _index_aside(run, index, k, instances) as aside,
        ):
            if inputs.differences(run, plan.inputs) and not inputs.differences(aside, plan.inputs):
                _replace_index(run, aside)
        inputs.raise_for_changes(run, plan.inputs)
        say(f"the index is made again: {damaged[0]}")
    return plan


def _known(
    data: str,
    options: Options,
    index: "ImageIndex",
    annotations: str,
    geometry: Geometry,
    *,
    say: Callable[[str], None],
) -> "tuple[NDArray[np.uint8], GridInstances | None, dict[str, str]]":
    """k of every image; where there are annotations, also all instances and the names of the categories.

    Raises UserError where an option needs annotations and there are none.
    """
    from batchjob.data import annotations as coco
    from batchjob.data.instances import find_instances

    needs = ["--k instances"] * (options.k == "instances") + ["--scores pairs"] * ("pairs" in options.score_groups)
    if needs and not annotations:
        raise UserError(f"{needs[0]} needs masks, and the data has none; give --annotations FILE")
    instances: GridInstances | None = None
    categories: dict[str, str] = {}
    if annotations:
        known = coco.open_annotations(annotations).join(index.ids(), data)
        for line in known.remarks():
            say(line)
        categories = {str(number): name for number, name in sorted(known.categories.items())}
        instances = find_instances(known, index.ids(), geometry, needs_sizes=bool(needs))
    return _read_k(options, index, instances, geometry), instances, categories


@contextmanager
def _index_aside(
    run: Path, index: "ImageIndex", k: NDArray[np.uint8], instances: "GridInstances | None"
) -> Iterator[Path]:
    """Writes the index to a scratch folder, as `index/`, so that it can be checked before it replaces the run's."""
    scratch = new_scratch(run)
    try:
        index.save(scratch / "index")
        np.save(scratch / "index" / "k.npy", k)
        if instances is not None:
            instances.save(scratch / "index")
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace_index(run: Path, aside: Path) -> None:
    shutil.rmtree(run / "index", ignore_errors=True)
    (aside / "index").rename(run / "index")


def _choose_precision(asked: str) -> tuple[str, str, bool]:
    """(precision, why, whether the run is for a GPU); `auto` is half precision where a GPU is seen or planned for."""
    import torch

    seen = torch.cuda.is_available()
    planned = os.environ.get("BATCHJOB_PLAN_FOR_GPU", "") not in ("", "0")
    is_for_gpu = seen or planned
    why = (
        f"there is a GPU ({torch.cuda.get_device_name()})"
        if seen
        else "the job is planned for GPUs"
        if planned
        else "no GPU is seen"
    )
    if asked != "auto":
        return asked, "it was asked for", is_for_gpu
    return ("fp16" if is_for_gpu else "fp32"), why, is_for_gpu


def _check_folder(run: Path) -> None:
    if run.exists() and not run.is_dir():
        raise UserError(f"RUN {run} is a file; give a folder that is new or empty")
    if not str(run).isprintable():  # pages and tables name it, and Parquet opens no path that is not UTF-8
        raise UserError(
            f"RUN {escape(os.fsencode(run))!r} has bytes that are not UTF-8, or no print; give another name"
        )
    if run.is_dir():
        # an interrupted plan leaves our lock beside its files; without the lock they belong to somebody
        ours = {"done", "logs"}
        if (run / LOCK).exists():
            ours |= {"index", "labels.zarr", "scores.zarr", "work"}
            ours |= {"fit", "failures.csv", "stats", "figures", "report.html"}  # of a run whose plan.json was lost
        strange = sorted(p.name for p in run.iterdir() if p.name not in ours and not p.name.startswith("plan.json"))
        if strange:
            names = escape(os.fsencode(", ".join(strange[:3])))
            raise UserError(f"RUN {run} holds something else ({names}); give a folder that is new or empty")
    parent = run.absolute()
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK) or _is_read_only(parent):
        raise UserError(f"RUN {run} can't be written: {parent} is read-only for you; give another RUN")


def _is_read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def kept_rows(asked: str, index: "ImageIndex") -> tuple[int, ...]:
    """Chooses the images whose attention rows are stored.

    Parameters
    ----------
    asked
        `--keep-maps`: a number N for N images spread evenly, or a file with an image id on each line.
    index
        The images.

    Returns
    -------
    Rows of images, ascending.

    Raises
    ------
    UserError
        The file can't be read, or names an image that the data do not have.
    """
    if asked.isdigit():
        count = min(int(asked), len(index))
        return tuple(sorted({int(row) for row in np.linspace(0, len(index) - 1, count)})) if count else ()
    path = Path(asked)
    try:
        wanted = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--keep-maps {asked} is not readable text ({error}); give N, or a file of image ids") from None
    rows = {index.id(row): row for row in range(len(index))}
    if unknown := [name for name in wanted if name not in rows]:
        raise UserError(
            f"--keep-maps {asked} names {counted(len(unknown), 'image')} that the data has not: "
            f"{', '.join(unknown[:3])}"
        )
    return tuple(sorted({rows[name] for name in wanted}))


def _read_k(
    options: Options, index: "ImageIndex", instances: "GridInstances | None", geometry: Geometry
) -> NDArray[np.uint8]:
    """uint8 [n]: k of every image; 0 where a rule chooses it while labelling.

    Raises UserError for one patch or a k above the number of patches, and for a CSV that is wrong or incomplete.
    """
    patches = geometry.grid[0] * geometry.grid[1]
    if options.scope == "image":
        raise_for_patches(options.k, patches)
    if options.k.lstrip("+-").isdigit():
        return np.full(len(index), int(options.k), np.uint8)
    if options.k == "instances":
        from batchjob.data.annotations import k_instances

        assert instances is not None
        return np.array([k_instances(owner) for owner in instances.owner], np.uint8)
    if options.k in K_RULES:
        return np.zeros(len(index), np.uint8)
    return _k_from_csv(options.k, index, patches)


def _k_from_csv(path_text: str, index: "ImageIndex", patches: int) -> NDArray[np.uint8]:
    path = Path(path_text)
    known: dict[str, int] = {}
    try:
        lines = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--k {path} is not a CSV file that can be read ({error}); give a file of image_id,k") from None
    for number, row in enumerate(lines, start=1):
        if not row or (number == 1 and row[-1].strip() == "k"):
            continue
        if len(row) != 2 or not row[1].strip().isdigit() or not 1 <= int(row[1]) <= min(MAX_K, patches):
            most = min(MAX_K, patches)
            raise UserError(f"--k {path}: line {number} is {','.join(row)!r}; give image_id,k with k from 1 to {most}")
        known[row[0]] = int(row[1])
    ids = [index.id(row) for row in range(len(index))]
    if missing := [name for name in ids if name not in known]:
        raise UserError(
            f"--k {path} has no line for {len(missing)} of {counted(len(ids), 'image')}, "
            f"such as {missing[0]!r}; add them"
        )
    return np.array([known[name] for name in ids], np.uint8)

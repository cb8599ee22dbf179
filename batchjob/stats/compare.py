"""Scores several runs on the same images, on one grid, with the same instances and equal k.

Labels are laid on the finest grid. An instance counts only if it owns enough patches on the grid of every run. Equal k
means that the same k was asked for. How many clusters were found is a result, and to choose images by a result would
bias what is compared.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.codes import NO_LABEL
from batchjob.config import RULES
from batchjob.data.annotations import Annotations, ImageAnnotations, PatchInstances, instances_on_grid
from batchjob.data.index import sizes_in_bytes
from batchjob.geometry import Geometry
from batchjob.metrics import catalogue
from batchjob.metrics.agreement import ari, contingency
from batchjob.metrics.objects import Labelled, Mapped, Objects
from batchjob.metrics.saliency import normalise
from batchjob.stats.image import count_groups
from batchjob.stats.pool import ROWS_AT_ONCE, Pool
from batchjob.stats.position import position_labels
from batchjob.store.part import Part
from batchjob.store.run import Run

Floats = NDArray[np.float64]
COMPARED = tuple(s.name for s in catalogue.SCORES if s.is_compared)


@dataclass(frozen=True, slots=True)
class Common:
    """The scores of several runs on the n images that they have in common."""

    ids: list[str]  # of the images
    grid: tuple[int, int]  # (rows, columns) of the finest grid
    # of each run, by score: [n, C], NaN where undefined. `SCORE.position` is the position null of the run's own grid,
    # laid on the finest grid as its labels are.
    values: list[dict[str, Floats]]
    agreement: dict[tuple[int, int], Floats]  # [n, C] adjusted Rand index of each head, for two runs of equal heads
    other_k: int = 0  # images left out because other k was asked for in the runs
    other_file: int = 0  # images left out because the runs saw other files of the same id


def comparable(runs: Sequence[Run]) -> str:
    """Says why these runs can't be laid on one grid; empty if they can."""
    first = runs[0].geometry
    for run in runs[1:]:
        other = run.geometry
        if other.resize != first.resize:
            return f"{run.name} was resized by {other.resize}, {runs[0].name} by {first.resize}"
        if other.height * first.width != other.width * first.height:
            return f"the inputs of {run.name} and {runs[0].name} have different aspect ratios"
    if not all(v.has_labels for v in runs):
        return "a run has no labels of patches"
    asked = {run.name: str(run.options["k"]) for run in runs if takes_k(run)}
    if set(asked.values()) & set(RULES) and len(set(asked.values())) > 1:
        return f"k was chosen otherwise: {', '.join(f'{k} in {name}' for name, k in asked.items())}"
    return ""


def takes_k(run: Run) -> bool:
    """Whether an algorithm of the run divides into the k clusters that it is asked for; hdbscan finds its own."""
    return any(algorithm != "hdbscan" for algorithm in run.algorithms)


def shape_of_model(run: Run) -> tuple[object, ...]:
    """Returns what two networks must share for equal numbers of layer and head to name the same place in both."""
    shape = [run.spec.get(name) for name in ("kind", "num_layers", "num_heads", "stage")]
    return *shape, run.options.get("cluster_on") == "token"


def _asked_k(run: Run) -> NDArray[np.int64] | None:
    """Returns [rows], the k that was asked for; None where each head has its own, found by a rule or by hdbscan."""
    asked = str(run.options["k"])
    if asked in RULES or not takes_k(run):
        return None
    if asked.isdigit():
        return np.full(run.rows, int(asked))
    path = run.folder / "index" / "k.npy"
    if path.exists():
        return np.asarray(np.load(path), np.int64)
    found, asks = run.read(0, run.rows, only=()).k, [algorithm != "hdbscan" for algorithm in run.algorithms]
    return None if found is None else found[:, asks].max(axis=(1, 2, 3)).astype(np.int64)


def _finest(runs: Sequence[Run]) -> Geometry:
    """Returns a geometry whose grid has as many rows and columns as the runs' grids have at most."""
    best = max((v.geometry for v in runs), key=lambda g: g.grid[0] * g.grid[1])
    rows, columns = (max(v.geometry.grid[i] for v in runs) for i in range(2))
    if best.grid == (rows, columns):
        return best
    return Geometry(
        rows * best.patch_height, columns * best.patch_width, best.patch_height, best.patch_width, best.resize
    )


def upsample(values: NDArray[Any], grid: tuple[int, int], finer: tuple[int, int]) -> NDArray[Any]:
    """Lays values on a finer grid by nearest neighbour.

    Parameters
    ----------
    values
        [..., P] on `grid`.
    grid, finer
        (rows, columns) of the two grids.

    Returns
    -------
    [..., P of the finer grid].
    """
    y = (np.arange(finer[0]) * 2 + 1) * grid[0] // (2 * finer[0])
    x = (np.arange(finer[1]) * 2 + 1) * grid[1] // (2 * finer[1])
    return values[..., (y[:, None] * grid[1] + x[None, :]).ravel()]


def compare(runs: Sequence[Run], annotations: Annotations | None, pool: Pool) -> Common:
    """Scores several runs on the images that all of them labelled, from one file and with one k.

    Parameters
    ----------
    runs
        Two or more that are `comparable`.
    annotations
        Those of the images. With None, all scores are NaN and only `agreement` is known.
    pool
        The processes that share the images.
    """
    places = [{name: row for row, name in enumerate(run.ids)} for run in runs]
    shared = [name for name in runs[0].ids if all(name in p for p in places)]
    rows = np.array([[p[name] for name in shared] for p in places], np.int64).reshape(len(runs), -1)
    ok = np.all([np.isin(of_run, run.ok_rows) for run, of_run in zip(runs, rows, strict=True)], axis=0)
    same_file = _equal([sizes_in_bytes(run.folder / "index") for run in runs], rows)
    same_file &= _equal([run.image_sizes for run in runs], rows)
    same_k = _equal([_asked_k(run) for run in runs], rows)
    used = np.flatnonzero(ok & same_file & same_k)
    blocks = [used[start : start + ROWS_AT_ONCE] for start in range(0, len(used), ROWS_AT_ONCE)]
    tasks = (
        (rows[:, block], [annotations.image(shared[i]) if annotations else None for i in block]) for block in blocks
    )
    parts = list(pool.map(functools.partial(_compare_block, tuple(runs)), tasks))
    values = [
        {name: np.concatenate([p[0][r][name] for p in parts]) for name in parts[0][0][r]} if parts else {}
        for r in range(len(runs))
    ]
    pairs = list(parts[0][1]) if parts else []
    return Common(
        ids=[shared[i] for i in used],
        grid=_finest(runs).grid,
        values=values,
        agreement={pair: np.concatenate([p[1][pair] for p in parts]) for pair in pairs},
        other_k=int((ok & same_file & ~same_k).sum()),
        other_file=int((ok & ~same_file).sum()),
    )


def _equal(known: Sequence[NDArray[Any] | None], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns [n]: whether all runs that know a value have the same one, in their own `rows` [runs, n]."""
    found = [values[of_run] for values, of_run in zip(known, rows, strict=True) if values is not None]
    equal = np.ones(rows.shape[1], bool)
    for values in found[1:]:
        equal &= (values == found[0]).reshape(len(equal), -1).all(axis=1)
    return equal


def _compare_block(
    runs: Sequence[Run], task: tuple[NDArray[np.int64], list[ImageAnnotations | None]]
) -> tuple[list[dict[str, Floats]], dict[tuple[int, int], Floats]]:
    rows, annotated = task
    parts = [run.read_rows(of_run) for run, of_run in zip(runs, rows, strict=True)]
    fine = _finest(runs)
    names = [*COMPARED, *(f"{n}.position" for n in COMPARED if "position" in catalogue.nulls_of(n))]
    values: list[dict[str, list[Floats]]] = [{name: [] for name in names} for _ in runs]
    places = [(shape_of_model(run), run.algorithms, run.layers, run.heads) for run in runs]
    alike = [(a, b) for a in range(len(runs)) for b in range(a + 1, len(runs)) if places[a] == places[b]]
    agreement: dict[tuple[int, int], list[Floats]] = {pair: [] for pair in alike}
    for i in range(rows.shape[1]):
        truths = _surviving(annotated[i], [*(v.geometry for v in runs), fine], parts[0], i)
        stacks = []
        for r, (run, part) in enumerate(zip(runs, parts, strict=True)):
            stack, found = _score_one(run, part, i, fine, (truths[r], truths[-1]) if truths else None)
            stacks.append(stack)
            for name in names:
                values[r][name].append(found.get(name, np.full(_size(run, name), np.nan)))
        for a, b in alike:
            agreement[a, b].append(_same_head(stacks[a], stacks[b]))
    whole = [
        {name: np.array(v).reshape(-1, _size(run, name)) for name, v in of_run.items()}
        for run, of_run in zip(runs, values, strict=True)
    ]
    same = {pair: np.array(v).reshape(-1, int(np.prod(runs[pair[0]].shape))) for pair, v in agreement.items()}
    return whole, same


def _size(run: Run, name: str) -> int:
    algorithms, layers, heads = run.shape
    return layers * heads * (algorithms if catalogue.is_of_labels(name) else 1)


def _surviving(
    image: ImageAnnotations | None, geometries: Sequence[Geometry], part: Part, i: int
) -> list[PatchInstances] | None:
    """Returns the image's instances on each grid, without those that some grid lacks; None if it is not annotated."""
    height, width = int(part.height[i]), int(part.width[i])
    if image is None or not image.fits(height, width):
        return None
    made = {g: instances_on_grid(image, g, height, width) for g in dict.fromkeys(geometries)}
    on_all = functools.reduce(np.intersect1d, [t.index for t in made.values()])
    return [made[g].only(on_all) for g in geometries]


def _score_one(
    run: Run, part: Part, i: int, fine: Geometry, truths: tuple[PatchInstances, PatchInstances] | None
) -> tuple[NDArray[np.uint8], dict[str, Floats]]:
    """Returns the run's labels [C, P] of one image on the fine grid, and its scores.

    CLS maps are scored on the run's own grid. The two `truths` are the instances on the own and on the fine grid.
    """
    assert part.labels is not None
    assert part.k is not None
    assert part.maps is not None
    grid = run.geometry.grid
    coarse = part.labels[i].reshape(-1, part.labels.shape[-1])
    labels = upsample(coarse, grid, fine.grid)
    if truths is None:
        return labels, {}
    own, on_fine = (_objects(t, g) for t, g in zip(truths, (run.geometry, fine), strict=True))
    of_labels = [s for s in catalogue.SCORES if s.is_compared and s.source == "labels"]
    beside = Labelled(labels, fine.grid, on_fine)
    found = {s.name: s.compute(beside) for s in of_labels if s.compute}
    k = count_groups(coarse, part.k[i].ravel())
    for value in np.unique(k[k > 0]):
        keep = np.all(coarse != NO_LABEL, axis=0)
        places = position_labels(grid, int(value), seed=int(run.options["seed"]), keep=keep)
        null = Labelled(upsample(places, grid, fine.grid), fine.grid, on_fine)
        for s in of_labels:
            if s.compute and "position" in s.nulls:
                found.setdefault(f"{s.name}.position", np.full(len(k), np.nan))[k == value] = s.compute(null).mean()
    content = None
    if run.geometry.resize == "pad":
        content = run.geometry.content_patches(int(part.height[i]), int(part.width[i])).ravel()
    maps = normalise(part.maps[i].reshape(-1, part.maps.shape[-1]), content)
    mapped = Mapped(maps, grid, len(run.heads), own)
    of_maps = [s for s in catalogue.SCORES if s.is_compared and s.source == "maps"]
    return labels, found | {s.name: s.compute(mapped) for s in of_maps if s.compute}


def _objects(found: PatchInstances, geometry: Geometry) -> Objects:
    patch = np.array([geometry.patch_width, geometry.patch_height] * 2, np.float64)
    return Objects(found.owner, found.category, found.boxes / patch, found.coverage)


def _same_head(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> Floats:
    """Returns [C]: the adjusted Rand index between row c of one stack of labels [C, P] and row c of the other."""
    values = []
    for a, b in zip(first, second, strict=True):
        groups = np.where(b == NO_LABEL, -1, b.astype(np.int64))
        values.append(ari(contingency(a[None], groups))[0])
    return np.array(values)

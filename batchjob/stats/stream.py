"""The pass over a run: what its images share first, then every image's scores, some hundred rows at a time."""

import functools
import math
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from batchjob.children import ChildPool
from batchjob.codes import OK, PENDING
from batchjob.data.annotations import Annotations, ImageAnnotations, PatchInstances, instances_on_grid
from batchjob.metrics import nulls
from batchjob.metrics.clusters import agreement
from batchjob.metrics.saliency import normalise
from batchjob.stats.image import Context, PairTable, locality_attention, locality_pairs, score_labels, score_maps
from batchjob.store.run import Part, Run, locality_sums

ROWS_AT_ONCE = 512  # of one task; an inner chunk of the store
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True)
class Scored:
    """The scores of rows `start` on: arrays [n, M, L, H], [n, L, H] or [n, L], NaN where there is nothing to say."""

    start: int
    arrays: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    pairs: list[tuple[int, PairTable]] = field(default_factory=list)  # (row, its pairs)
    agreement: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # kind -> [3, …] n, sum, sum of squares
    counts: Counter[str] = field(default_factory=Counter)


class Pool:
    """Worker processes that keep one argument between tasks; none at all for one job, everything inline."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        # spawned: zarr's own threads do not survive a fork
        self._pool = ChildPool(jobs, start=_one_thread) if jobs > 1 else None

    def map(self, work: Callable[[Item], Result], items: Iterator[Item] | Sequence[Item]) -> Iterator[Result]:
        """Results in order; only a few items are taken from `items` ahead of them, so that memory stays bounded."""
        if self._pool is None:
            yield from map(work, items)
            return
        waiting: list[Future[Result]] = []
        for item in items:
            waiting.append(self._pool.submit(work, item))
            if len(waiting) >= 3 * self.jobs:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()

    def __enter__(self) -> Self:
        # here too: threads that share k-means of some hundred coordinates mostly spin until the others are done
        self._limit = _one_thread()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._limit.restore_original_limits()
        if self._pool is not None:
            self._pool.__exit__(kind, error, tb)


def choose_jobs(rows: int) -> int:
    """Processes worth starting for so many rows: all cores for many, one for a few."""
    return max(1, min(len(os.sched_getaffinity(0)), rows // ROWS_AT_ONCE))


def _one_thread() -> Any:
    import sklearn.cluster  # noqa: F401  its thread pool can be limited only once it is loaded
    import threadpoolctl

    return threadpoolctl.threadpool_limits(1)  # every core has its own process


def blocks(view: Run) -> list[tuple[int, int]]:
    """(first row, past the last row) of each task."""
    return [(start, min(start + ROWS_AT_ONCE, view.rows)) for start in range(0, view.rows, ROWS_AT_ONCE)]


# ---- what all images share ----


def gather(view: Run, pool: Pool) -> Context:
    """The context of a run: its mean CLS maps, its mean attention by offset and k-means of that, for every k in it."""
    patches = view.geometry.grid[0] * view.geometry.grid[1]
    heads = len(view.layers) * len(view.heads)
    total, count, ks = np.zeros((heads, patches)), 0, set[int]()
    for sums, images, found in pool.map(functools.partial(_sum_maps, view), blocks(view)):
        total, count, ks = total + sums, count + images, ks | found
    n_init, seed = int(view.options["n_init"]), int(view.options["seed"])
    locality, labels = None, dict[int, NDArray[np.uint8]]()
    gathered = locality_sums(view)
    if gathered is not None and gathered[1].sum() > 0:
        sums, pairs = gathered
        counts = np.broadcast_to(pairs[:, None], sums.shape).reshape(heads, *sums.shape[2:])
        locality = nulls.locality_rows(sums.reshape(heads, *sums.shape[2:]), counts, view.geometry.grid)
        work = functools.partial(_cluster_locality, n_init=n_init, seed=seed)
        tasks = [(rows, k) for k in sorted(ks) for rows in locality]
        stacks = list(pool.map(work, tasks))
        for i, k in enumerate(sorted(ks)):
            labels[k] = np.stack(stacks[i * heads : (i + 1) * heads], axis=1)
    return Context(
        geometry=view.geometry,
        layers=len(view.layers),
        heads=len(view.heads),
        n_init=n_init,
        seed=seed,
        centre=normalise(total) if count else None,
        locality=locality,
        locality_labels=labels,
    )


def _sum_maps(view: Run, rows: tuple[int, int]) -> tuple[NDArray[np.float64], int, set[int]]:
    part = view.read(*rows, only=("maps",))
    ok = part.status == OK
    assert part.maps is not None
    maps = part.maps[ok]
    # -1 for the heads would not do: of no image at all it is any number
    heads, patches = math.prod(maps.shape[1:-1]), maps.shape[-1]
    flat = normalise(maps.reshape(-1, patches)).reshape(len(maps), heads, patches)
    return flat.sum(axis=0), int(ok.sum()), set() if part.k is None else {int(k) for k in np.unique(part.k[ok])} - {0}


def _cluster_locality(task: tuple[NDArray[np.float64], int], *, n_init: int, seed: int) -> NDArray[np.uint8]:
    return nulls.cluster_rows(task[0], task[1], n_init, seed, nulls.LOCALITY_SEEDS)


# ---- every image ----


def score_run(view: Run, context: Context, annotations: Annotations | None, pool: Pool) -> Iterator[Scored]:
    """The scores of all rows in order, block by block."""
    ids = view.ids if annotations is not None else []
    tasks = (
        (start, stop, None if annotations is None else [annotations.image(i) for i in ids[start:stop]])
        for start, stop in blocks(view)
    )
    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:  # all layers' locality is tens of MB: once a worker
        pickle.dump(context, file)
        file.flush()
        yield from pool.map(functools.partial(_score_block, view, file.name), tasks)


@functools.lru_cache(maxsize=1)
def _load_context(path: str) -> Context:
    with open(path, "rb") as file:
        context: Context = pickle.load(file)
    return context


def _score_block(view: Run, context_path: str, task: tuple[int, int, list[ImageAnnotations | None] | None]) -> Scored:
    start, stop, annotated = task
    context = _load_context(context_path)
    part = view.read(start, stop)
    result = Scored(start)
    shape = {"mlh": (*view.shape,), "lh": view.shape[1:], "l": view.shape[1:2]}
    for name, values in {**part.scores, "prefix_mass": part.prefix_mass}.items():
        result.arrays[name] = np.where((part.status == OK)[:, None, None], values, np.nan)
    fixed = locality_attention(context) if part.scores else {}
    for i in range(stop - start):
        result.counts["images"] += 1
        if part.status[i] != OK:
            result.counts["pending" if part.status[i] == PENDING else "failed"] += 1
            continue
        truth = _truth(annotated[i], view, part, i, result.counts) if annotated is not None else None
        keep = None
        if view.geometry.resize == "pad":
            keep = view.geometry.content_patches(int(part.height[i]), int(part.width[i])).ravel()
        found: dict[str, tuple[str, Any]] = {name: ("lh", v) for name, v in fixed.items() if name[:-9] in part.scores}
        if part.labels is not None and part.k is not None:
            labels = part.labels[i].reshape(-1, part.labels.shape[-1])
            scored, table = score_labels(labels, part.k[i].ravel(), truth, start + i, context)
            found |= {name: ("mlh", v) for name, v in scored.items()}
            if table is not None:
                result.pairs.append((start + i, table))
            _add_agreement(result.agreement, part.labels[i])
        if truth is not None and part.maps is not None:
            maps = part.maps[i].reshape(-1, part.maps.shape[-1])
            for name, v in score_maps(maps, truth, keep, context).items():
                found[name] = ("l" if "oracle" in name else "lh", v)
            if "pair_auc" in part.scores:
                found |= {name: ("lh", v) for name, v in locality_pairs(truth, start + i, context).items()}
        for name, (dims, v) in found.items():
            if name not in result.arrays:
                result.arrays[name] = np.full((stop - start, *shape[dims]), np.nan, np.float32)
            result.arrays[name][i] = np.reshape(v, shape[dims])
    return result


def _truth(
    image: ImageAnnotations | None, view: Run, part: Part, i: int, counts: Counter[str]
) -> PatchInstances | None:
    """The image's instances; None, and counted, where nobody annotated it or the annotation is of another size."""
    height, width = int(part.height[i]), int(part.width[i])
    if image is None:
        counts["not annotated"] += 1
        return None
    if not image.fits(height, width):
        counts["annotated at another size"] += 1
        return None
    truth = instances_on_grid(image, view.geometry, height, width)
    counts["annotated"] += 1
    counts["instances"] += truth.total
    counts["instances kept"] += len(truth.category)
    categories = np.bincount(truth.category) if len(truth.category) else np.zeros(1, np.int64)
    counts["with two of a category"] += int(categories.max() >= 2)
    return truth


def _add_agreement(into: dict[str, NDArray[np.float64]], labels: NDArray[np.uint8]) -> None:
    """Adds the indices between heads [M, L, H, H] and between algorithms [L, H, M, M] of an image's labels."""
    algorithms, layers, heads, _ = labels.shape
    tables = {}
    if heads > 1:
        tables["heads"] = np.array(
            [[agreement(labels[m, x], labels[m, x]) for x in range(layers)] for m in range(algorithms)]
        )
    if algorithms > 1:
        tables["algorithms"] = np.array(
            [[agreement(labels[:, x, h], labels[:, x, h]) for h in range(heads)] for x in range(layers)]
        )
    for kind, values in tables.items():
        known = np.isfinite(values)
        values = np.where(known, values, 0)
        into[kind] = into.get(kind, 0) + np.stack([known.astype(np.float64), values, values**2])

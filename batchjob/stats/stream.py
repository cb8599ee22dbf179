"""Scores every image of a run, a block of rows at a time."""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from batchjob import retries
from batchjob.codes import OK, PENDING, STATUS
from batchjob.metrics import catalogue
from batchjob.metrics.clusters import agreement
from batchjob.metrics.nulls import BY_LENDER, Donors
from batchjob.metrics.saliency import normalise
from batchjob.metrics.uncertainty import first_half
from batchjob.stats.image import PairTable, Scene, pair_table, score_labels, score_maps, stability
from batchjob.stats.lent import Added, Lent, planned_donors
from batchjob.stats.pool import Pool, blocks
from batchjob.stats.truth import Truth
from batchjob.store.part import Part
from batchjob.store.run import Run

_MAY_PASS = [STATUS[cause] for cause in retries.MAY_PASS]
# Begin the keys of `Scored.counts` that end in an algorithm: its clusterings, and those of them that are settled.
CLUSTERINGS, SETTLED = "clusterings by ", "settled by "
SEARCHES = {"kmeans": "k-means", "spectral": "the k-means of spectral"}  # start at random; others are always settled


@dataclass(slots=True)
class Scored:
    """The scores of a block of n rows."""

    start: int  # the first row
    # by score: [n, M, L, H], [n, L, H] or [n, L], NaN where the score is not defined
    arrays: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    pairs: list[tuple[int, PairTable]] = field(default_factory=list)  # (row, its pairs)
    # `heads` [3, M, L, H, H] and `algorithms` [3, L, H, M, M]: how many images, sum and sum of squares of the indices
    agreement: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    # images, pending, failed, of these retries.COUNT, and by algorithm CLUSTERINGS and SETTLED
    counts: Counter[str] = field(default_factory=Counter)
    lent: list[Added] = field(default_factory=list)  # what photos lent to the rows, in `stats` and while labelling


def score_run(run: Run, truth: Truth | None, pool: Pool) -> Iterator[Scored]:
    """Scores all rows of a run.

    Parameters
    ----------
    run
        The run, finished or not.
    truth
        The objects of its images; with None, only the scores that need none are computed.
    pool
        The processes that share the blocks.

    Yields
    ------
    The blocks, in the order of the rows.
    """
    half = (~first_half(run.ids)).astype(np.int8)
    tasks = ((*rows, half[slice(*rows)]) for rows in blocks(run))
    return pool.map(functools.partial(_score_block, run, truth, planned_donors(run)), tasks)


def _score_block(
    run: Run, truth: Truth | None, planned: Donors | None, task: tuple[int, int, NDArray[np.int8]]
) -> Scored:
    start, stop, half = task
    part = run.read(start, stop)
    result, lent, lent_before = Scored(start), Lent(stop - start), Lent(stop - start)
    left_out = catalogue.labelling_arrays()["pairs"] if truth and not truth.are_planned else ()  # of other objects
    held = {name: values for name, values in part.scores.items() if name not in left_out}
    by_lender = {name: values for name, values in held.items() if name.endswith(BY_LENDER)}
    for name, values in {**held, "prefix_mass": part.prefix_mass}.items():
        if name not in by_lender:
            result.arrays[name] = np.where((part.status == OK)[:, None, None], values, np.nan)
    _count_settled(run, part, result.counts)
    for i in range(stop - start):
        result.counts["images"] += 1
        if part.status[i] != OK:
            result.counts["pending" if part.status[i] == PENDING else "failed"] += 1
            if part.status[i] in _MAY_PASS:
                result.counts[retries.COUNT] += 1
            continue
        scene = _scene(run, part, i, truth)
        scored = _score_image(run, part, i, scene, result)
        lent.lend(i, np.array(list(scene.donors), np.intp))
        for name, found in scored.items():
            if name.endswith(BY_LENDER):
                score = name.removesuffix(BY_LENDER)
                lent.add(score, i, found, scored[score], int(half[i]))
                continue
            if name not in result.arrays:
                sizes = dict(zip(("algorithm", "layer", "head"), run.shape, strict=True))
                shape = [sizes[dim] for dim in catalogue.dims_of(name)]
                result.arrays[name] = np.full((stop - start, *shape), np.nan, np.float32)
            result.arrays[name][i] = found.reshape(result.arrays[name].shape[1:])
        donors = planned.of(start + i) if planned else np.zeros(0, np.intp)
        lent_before.lend(i, donors)
        for name, values in by_lender.items():
            score = name.removesuffix(BY_LENDER)
            each = np.moveaxis(values[i], -1, 0)[: len(donors)].astype(np.float64)  # [R, L, H]
            own = part.scores[score][i].ravel()
            lent_before.add(score, i, each.reshape(len(donors), own.size), own, int(half[i]))
    result.lent = [lent.sums(), lent_before.sums()]
    return result


def _count_settled(run: Run, part: Part, into: Counter[str]) -> None:
    """Counts the clusterings of labelled images, and the settled ones, for each algorithm that may not settle."""
    if part.settled is None:
        return
    found = part.settled[part.status == OK]
    for m, algorithm in enumerate(run.algorithms):
        if algorithm in SEARCHES:
            into[CLUSTERINGS + algorithm] += found[:, m].size
            into[SETTLED + algorithm] += int(found[:, m].sum())


def _scene(run: Run, part: Part, i: int, truth: Truth | None) -> Scene:
    keep = None
    if run.geometry.resize == "pad":
        keep = run.geometry.content_patches(int(part.height[i]), int(part.width[i])).ravel()
    row, seed = part.start + i, int(run.options["seed"])
    objects = truth.of(row) if truth else None
    if truth is None or objects is None:
        return Scene(run.geometry.grid, seed, keep)
    return Scene(run.geometry.grid, seed, keep, objects.inside(keep, run.geometry.grid), truth.donors(row, keep))


def _score_image(run: Run, part: Part, i: int, scene: Scene, result: Scored) -> Mapping[str, NDArray[np.float64]]:
    found: dict[str, NDArray[np.float64]] = {}
    if part.labels is not None and part.k is not None:
        labels, k = part.labels[i].reshape(-1, part.labels.shape[-1]), part.k[i].ravel()
        found |= score_labels(labels, k, scene)
        if (table := pair_table(labels, k, scene)) is not None:
            result.pairs.append((part.start + i, table))
        _add_agreement(result.agreement, part.labels[i])
    if part.repeats is not None:
        found["stability"] = stability(part.repeats[i].reshape(-1, *part.repeats.shape[-2:]))
    if part.maps is not None and scene.objects is not None:
        maps = normalise(part.maps[i].reshape(-1, part.maps.shape[-1]), scene.keep)
        found |= score_maps(maps, len(run.heads), scene)
    return found


def _add_agreement(into: dict[str, NDArray[np.float64]], labels: NDArray[np.uint8]) -> None:
    """Adds one image's indices between heads [M, L, H, H] and between algorithms [L, H, M, M]."""
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

"""The arrays of one partition on the host, filled batch by batch in row order, before the store takes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.clustering import Clusters
from batchjob.codes import STATUS
from batchjob.data.sources import ImageIndex
from batchjob.loader.loader import Batch
from batchjob.model.attention import LayerMaps
from batchjob.plan import Plan
from batchjob.store.arrays import layout, shards_of

Failure = tuple[str, str, str]  # image id, cause, message


@dataclass(slots=True)
class Buffers:
    """All arrays of one partition, at their fill values until a batch is put in."""

    plan: Plan
    partition: int
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    def rows(self, batch: Batch) -> slice:
        """Where the batch's rows are in the partition."""
        start = self.plan.partitions[self.partition][0]
        return slice(int(batch.rows[0]) - start, int(batch.rows[-1]) + 1 - start)


def blank(plan: Plan, partition: int) -> Buffers:
    """Empty buffers for a partition."""
    start, stop = plan.partitions[partition]
    buffers = Buffers(plan, partition)
    for name, spec in layout(plan).items():
        rows = stop - start if spec.dims[0] == "image" else len(shards_of(spec, plan, partition))
        buffers.arrays[name] = np.full((rows, *spec.shape[1:]), spec.fill, spec.dtype)
    return buffers


def put_images(buffers: Buffers, batch: Batch) -> None:
    """What the loader knows: status and size."""
    rows = buffers.rows(batch)
    buffers.arrays["status"][rows] = batch.status
    buffers.arrays["height"][rows] = batch.heights
    buffers.arrays["width"][rows] = batch.widths


def put_maps(buffers: Buffers, layer: int, maps: LayerMaps, batch: Batch) -> None:
    """The CLS rows, the mass on prefix tokens and, for kept images, the attention rows; `layer` is a position."""
    plan, rows = buffers.plan, buffers.rows(batch)
    name = "saliency" if plan.model.kind == "cnn" else "cls_attention"
    grid = buffers.arrays[name].shape[-2:]
    buffers.arrays[name][rows, layer] = maps.cls.reshape(*maps.cls.shape[:2], *grid).half().cpu().numpy()
    if maps.component is not None:
        component = maps.component.reshape(*maps.component.shape[:2], *grid)
        buffers.arrays["saliency_component"][rows, layer] = component.half().cpu().numpy()
    buffers.arrays["prefix_mass"][rows, layer] = maps.prefix_mass.half().cpu().numpy()
    overflowed = ~maps.finite.cpu().numpy() & (buffers.arrays["status"][rows] == STATUS["ok"])
    buffers.arrays["status"][rows][overflowed] = STATUS["not_finite"]
    start, stop = plan.partitions[buffers.partition]
    kept = [row for row in plan.kept_rows if start <= row < stop]
    for slot, row in enumerate(kept):
        if batch.rows[0] <= row <= batch.rows[-1]:
            own = maps.rows[row - int(batch.rows[0])]
            buffers.arrays["attention_rows"][slot, layer] = own.half().cpu().numpy()


def put_clusters(buffers: Buffers, layer: int, found: list[Clusters], batch: Batch) -> None:
    """Labels, inertia and k of each algorithm; `layer` is a position, problems run [B * H] with the head fastest."""
    rows, heads = buffers.rows(batch), len(buffers.plan.heads)
    name = "image_labels" if "image_labels" in buffers.arrays else "labels"
    shape = buffers.arrays[name].shape[4:]  # the grid, or nothing where an image has one label
    for algorithm, clusters in enumerate(found):
        labels = clusters.labels.view(-1, heads, *shape).cpu().numpy()
        buffers.arrays[name][rows, algorithm, layer] = labels
        buffers.arrays["inertia"][rows, algorithm, layer] = clusters.inertia.view(-1, heads).cpu().numpy()
        buffers.arrays["k"][rows, algorithm, layer] = clusters.k.view(-1, heads).cpu().numpy()


def put_scores(buffers: Buffers, layer: int, scores: Mapping[str, NDArray[np.float32]], batch: Batch) -> None:
    """The scores of `--scores`, [B, H] each; `layer` is a position."""
    rows = buffers.rows(batch)
    for name, values in scores.items():
        buffers.arrays[name][rows, layer] = values


def drop_failed(buffers: Buffers, batch: Batch, index: ImageIndex) -> list[Failure]:
    """The failures of the batch; everything computed from an image that failed is set back to its fill value."""
    first = buffers.rows(batch).start
    failures = [(index.id(row), cause, message) for row, cause, message in batch.failures]
    known = {row for row, _, _ in batch.failures}
    specs = layout(buffers.plan)
    start, stop = buffers.plan.partitions[buffers.partition]
    kept = [row for row in buffers.plan.kept_rows if start <= row < stop]
    for offset, row in enumerate(int(r) for r in batch.rows):
        if buffers.arrays["status"][first + offset] == STATUS["ok"]:
            continue
        if row not in known:
            message = "the network's activations overflowed; try --precision bf16 or fp32"
            failures.append((index.id(row), "not_finite", message))
        for name, spec in specs.items():
            if name in ("status", "height", "width"):
                continue
            if spec.dims[0] == "image":
                buffers.arrays[name][first + offset] = spec.fill
            elif spec.dims[0] == "kept_image" and row in kept:
                buffers.arrays[name][kept.index(row)] = spec.fill
    return failures

"""The arrays of one partition on the host, filled batch by batch in the order of the rows for the store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from batchjob.clustering import Clusters
from batchjob.clustering.base import raise_for_nan
from batchjob.codes import STATUS
from batchjob.data.index import ImageIndex
from batchjob.data.instances import GridInstances
from batchjob.job.upload import Download
from batchjob.loader.loader import Batch
from batchjob.model.attention import LayerMaps
from batchjob.plan import Plan
from batchjob.store.arrays import layout, shards_of
from batchjob.store.writer import Failure

_FINITE = "finite"  # which images did not overflow; the store has no such array


@dataclass(frozen=True, slots=True)
class _Pending:
    """A batch whose results are on their way to the host, and where each of them goes."""

    batch: Batch
    places: Sequence[tuple[str, Any]]  # (name of the array, index into it) of each result
    results: Download


@dataclass(slots=True)
class Buffers:
    """The arrays of one partition, which hold their fill values until a batch is put in, and the images that failed.

    A batch's results are copied to the host together, once all of its layers are there. They are stored when the next
    batch is done, so that a GPU works on that one while they arrive.
    """

    plan: Plan
    partition: int
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    _queued: list[tuple[str, Any, Tensor]] = field(default_factory=list)
    _pending: _Pending | None = None

    def __post_init__(self) -> None:
        start, stop = self.plan.rows_of(self.partition)
        for name, spec in layout(self.plan).items():
            rows = stop - start if spec.dims[0] == "image" else len(shards_of(spec, self.plan, self.partition))
            self.arrays[name] = np.full((rows, *spec.shape[1:]), spec.fill, spec.dtype)

    def rows(self, batch: Batch) -> slice:
        """Where the batch's rows are among those of the partition."""
        start = self.plan.rows_of(self.partition)[0]
        return slice(int(batch.rows[0]) - start, int(batch.rows[-1]) + 1 - start)

    def kept_rows(self) -> list[int]:
        """The rows of this partition whose attention rows are kept."""
        start, stop = self.plan.rows_of(self.partition)
        return [row for row in self.plan.kept_rows if start <= row < stop]

    def put_images(self, batch: Batch, instances: GridInstances | None = None) -> None:
        """Stores what is known before the model sees the images: status, size, and which instance owns each patch.

        Parameters
        ----------
        batch
            The images, in the order of their rows.
        instances
            What the annotations say of all images; None for a run without annotations.
        """
        rows = self.rows(batch)
        self.arrays["status"][rows] = batch.status
        self.arrays["height"][rows] = batch.heights
        self.arrays["width"][rows] = batch.widths
        if instances is not None:
            sizes = zip(batch.heights.tolist(), batch.widths.tolist(), strict=True)
            owned = [instances.owners(int(row), size) for row, size in zip(batch.rows, sizes, strict=True)]
            for name, values in zip(("instance", "category"), zip(*owned, strict=True), strict=True):
                self.arrays[name][rows] = np.reshape(values, (-1, *self.arrays[name].shape[1:]))

    def put(
        self, layer: int, maps: LayerMaps, found: Sequence[Clusters], scores: Mapping[str, Tensor], batch: Batch
    ) -> None:
        """Takes what was found in one layer of a batch; `finish` sends it to the host.

        Parameters
        ----------
        layer
            The position of the layer among the run's layers.
        maps
            The layer's maps.
        found
            Clusters of each algorithm, of the problems [B * H], where the head changes fastest.
        scores
            [B, H, ...] by the score's name.
        batch
            The images.
        """
        rows = self.rows(batch)
        self._queue_maps(rows, layer, maps, batch)
        self._queue_clusters(rows, layer, found)
        for name, values in scores.items():
            self._queued.append((name, (rows, layer), values))

    def finish(self, batch: Batch, index: ImageIndex) -> None:
        """Sends a batch's results to the host, and stores those of the batch before.

        Parameters
        ----------
        batch
            The images, whose layers were all put in.
        index
            The run's images, for the ids of those that failed.

        Raises
        ------
        NotFiniteError
            A clustering of the batch before has an inertia that is not finite.
        """
        places = [(name, place) for name, place, _ in self._queued]
        following = _Pending(batch, places, Download([tensor for _, _, tensor in self._queued]))
        self._queued = []
        self.store_pending(index)
        self._pending = following

    def store_pending(self, index: ImageIndex) -> None:
        """Waits for the results of the last batch and stores them. Raises NotFiniteError as `finish` does."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        status = self.arrays["status"][self.rows(pending.batch)]
        for (name, place), values in zip(pending.places, pending.results.arrays(), strict=True):
            if name == _FINITE:
                status[~values & (status == STATUS["ok"])] = STATUS["not_finite"]
                continue
            if name == "inertia":
                raise_for_nan(values.ravel())
            self.arrays[name][place] = values
        self._drop_failed(pending.batch, index)

    def _queue_maps(self, rows: slice, layer: int, maps: LayerMaps, batch: Batch) -> None:
        """Queues the maps [B, H, P], the mass on prefix tokens and, for kept images, the attention rows."""
        name = "saliency" if not self.plan.has_attention else "cls_attention"
        grid = self.arrays[name].shape[-2:]
        self._queued.append((name, (rows, layer), maps.cls.reshape(*maps.cls.shape[:2], *grid).half()))
        if maps.component is not None:
            component = maps.component.reshape(*maps.component.shape[:2], *grid)
            self._queued.append(("saliency_component", (rows, layer), component.half()))
        self._queued.append(("prefix_mass", (rows, layer), maps.prefix_mass.half()))
        self._queued.append((_FINITE, (), maps.finite))
        for slot, row in enumerate(self.kept_rows()):
            if maps.rows is not None and batch.rows[0] <= row <= batch.rows[-1]:
                own = maps.rows[row - int(batch.rows[0])]
                self._queued.append(("attention_rows", (slot, layer), own.half()))

    def _queue_clusters(self, rows: slice, layer: int, found: Sequence[Clusters]) -> None:
        """Queues each algorithm's labels, inertia and k, and where the store has them, `settled` and repeats."""
        heads = len(self.plan.heads)
        name = "image_labels" if "image_labels" in self.arrays else "labels"
        shape = self.arrays[name].shape[4:]  # the grid, or nothing where an image has one label
        for algorithm, clusters in enumerate(found):
            place = (rows, algorithm, layer)
            self._queued.append((name, place, clusters.labels.view(-1, heads, *shape)))
            self._queued.append(("inertia", place, clusters.inertia.view(-1, heads)))
            self._queued.append(("k", place, clusters.k.view(-1, heads)))
            if "settled" in self.arrays:
                self._queued.append(("settled", place, clusters.settled.view(-1, heads)))
            if clusters.repeats is not None:
                repeats = clusters.repeats.view(-1, heads, clusters.repeats.shape[1], *shape)
                self._queued.append(("labels_repeats", place, repeats))

    def _drop_failed(self, batch: Batch, index: ImageIndex) -> None:
        """Notes the batch's failures, and resets all values of images that failed to the fill value."""
        first = self.rows(batch).start
        self.failures += [(index.id(row), cause, message) for row, cause, message in batch.failures]
        known = {row for row, _, _ in batch.failures}
        specs, kept = layout(self.plan), self.kept_rows()
        for offset, row in enumerate(int(r) for r in batch.rows):
            if self.arrays["status"][first + offset] == STATUS["ok"]:
                continue
            if row not in known:
                message = "the network's activations overflowed; try --precision bf16 or fp32"
                self.failures.append((index.id(row), "not_finite", message))
            for name, spec in specs.items():
                if name in ("status", "height", "width"):
                    continue
                if spec.dims[0] == "image":
                    self.arrays[name][first + offset] = spec.fill
                elif spec.dims[0] == "kept_image" and row in kept:
                    self.arrays[name][kept.index(row)] = spec.fill

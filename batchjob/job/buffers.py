"""The arrays of one partition on the host, filled batch by batch in row order, before the store takes them."""

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

Failure = tuple[str, str, str]  # image id, cause, message
_FINITE = "finite"  # which images did not overflow: not an array of the store


@dataclass(frozen=True, slots=True)
class _Pending:
    """A batch whose results are on their way to the host: where each of them goes."""

    batch: Batch
    places: Sequence[tuple[str, Any]]  # array, index into it
    results: Download


@dataclass(slots=True)
class Buffers:
    """The arrays of one partition, at their fill values until a batch is put in, and what failed.

    A batch's results are copied together once all its layers are there, and stored when the next batch is done: a GPU
    then works on that one while they arrive.
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
        """Where the batch's rows are in the partition."""
        start = self.plan.rows_of(self.partition)[0]
        return slice(int(batch.rows[0]) - start, int(batch.rows[-1]) + 1 - start)

    def kept_rows(self) -> list[int]:
        """The rows of this partition whose attention rows are kept."""
        start, stop = self.plan.rows_of(self.partition)
        return [row for row in self.plan.kept_rows if start <= row < stop]

    def put_images(self, batch: Batch, instances: GridInstances | None = None) -> None:
        """Stores what is known before the model sees the images: status, size, which instance owns each patch."""
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
        """Takes what was found in one layer; `finish` stores it.

        Parameters
        ----------
        layer : int
            Its position among the run's layers.
        maps : LayerMaps
        found : sequence of Clusters
            One entry an algorithm; problems run [B * H] with the head fastest.
        scores : mapping of str to Tensor
            [B, H] each.
        batch : Batch
        """
        rows = self.rows(batch)
        self._queue_maps(rows, layer, maps, batch)
        self._queue_clusters(rows, layer, found)
        for name, values in scores.items():
            self._queued.append((name, (rows, layer), values))

    def finish(self, batch: Batch, index: ImageIndex) -> None:
        """Sends the batch's results to the host, and stores those of the batch before."""
        places = [(name, place) for name, place, _ in self._queued]
        following = _Pending(batch, places, Download([tensor for _, _, tensor in self._queued]))
        self._queued = []
        self.store_pending(index)
        self._pending = following

    def store_pending(self, index: ImageIndex) -> None:
        """Stores the results of the last batch that was finished; waits for them. Raises NotFiniteError."""
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
        """The CLS rows, the mass on prefix tokens and, for kept images, the attention rows."""
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
        """Labels, inertia, k and settled of each algorithm."""
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
        """Notes the batch's failures, and sets what was computed from an image that failed to its fill value."""
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

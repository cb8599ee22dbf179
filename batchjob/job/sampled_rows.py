"""The rows of a process's images that a fit sees, on the device."""

from collections.abc import Iterable

import torch
from torch import Tensor

from batchjob.clustering.base import problem_seeds
from batchjob.codebook import kmeans as dataset
from batchjob.codebook.features import features
from batchjob.codebook.processes import Group
from batchjob.codebook.rows import RowKind, Sample, row_numbers
from batchjob.job.read_rows import ReadRows
from batchjob.loader.loader import Batch
from batchjob.model.attention import LayerMaps, renormalise
from batchjob.plan import Plan

AUTO_STARTS = 4  # of a dataset-wide k-means on its sample, for --n-init auto


class SampledRows:
    """The rows of this process's images that the fit sees, in all layers and heads: [L, H, n, D], allocated at once."""

    def __init__(
        self, plan: Plan, kind: RowKind, sample: Sample, shares: Iterable[tuple[int, int]], device: torch.device
    ):
        self._plan, self._kind, self._sample = plan, kind, sample
        most = sum(sample.most_rows(start * kind.per_image, stop * kind.per_image) for start, stop in shares)
        self._x = torch.empty(len(plan.layers), len(plan.heads), most, kind.width, device=device)
        self._numbers = torch.empty(most, dtype=torch.int64, device=device)
        self._filled = 0

    def __len__(self) -> int:
        return self._filled

    @property
    def bytes(self) -> int:
        """Memory that all rows take on the device, found or not yet."""
        return self._x.nbytes + self._numbers.nbytes

    def drop_after(self, count: int) -> None:
        """Forgets all rows but the first `count`."""
        self._filled = count

    def add(self, batch: Batch, layers: Iterable[LayerMaps]) -> None:
        """Keeps the chosen rows of a batch. An image that failed, or overflowed in any layer, gives none."""
        numbers = row_numbers(batch.rows, self._kind)
        wanted = torch.from_numpy(self._sample.chosen(numbers) & (batch.status == 0)[:, None]).to(self._x.device)
        if batch.mask is not None and self._kind.queries == "rows":
            wanted = wanted & batch.mask
        chosen = wanted.flatten().nonzero()[: len(self._numbers) - self._filled, 0]
        source, place = chosen // self._kind.per_image, chosen % self._kind.per_image
        finite = torch.ones(len(batch.rows), dtype=torch.bool, device=self._x.device)
        end = self._filled + len(chosen)
        for layer, maps in enumerate(layers):
            own = self._own_rows(maps, source, place, batch.mask)
            x = features(own, place, self._kind, distance=self._plan.options.distance)
            self._x[layer, :, self._filled : end] = x.transpose(0, 1)
            finite &= maps.finite
        self._numbers[self._filled : end] = torch.from_numpy(numbers).to(self._x.device).flatten()[chosen]
        good = finite[source]
        if not bool(good.all()):
            kept = self._filled + good.nonzero()[:, 0]
            end = self._filled + len(kept)
            self._x[:, :, self._filled : end] = self._x[:, :, kept]
            self._numbers[self._filled : end] = self._numbers[kept]
        self._filled = end

    def _own_rows(self, maps: LayerMaps, source: Tensor, place: Tensor, mask: Tensor | None) -> Tensor:
        """[n, H, D]: the rows of the images `source` at their patches `place`, attention renormalised."""
        if maps.vectors is not None:
            return maps.vectors[source, :, place]
        assert maps.rows is not None
        own = maps.cls[source] if self._kind.queries == "cls" else maps.rows[source, :, place]
        return renormalise(own[:, :, None], None if mask is None else mask[source])[:, :, 0]

    def take(self, kept: ReadRows) -> int:
        """Takes the rows that an earlier attempt kept; of how many partitions they are."""
        done, self._filled = kept.load_into(self._x, self._numbers)
        return done

    def keep(self, kept: ReadRows, count: int, partitions: int) -> None:
        """Keeps the first `count` rows, all of the first `partitions` partitions."""
        kept.save(self._x[:, :, :count], self._numbers[:count], partitions)

    def problem(self, layer: int, head: int, group: Group) -> dataset.Problem:
        """The k-means of one layer and head, counted as in the plan; its rows are a view."""
        options, plan = self._plan.options, self._plan
        no_image = torch.zeros(1, dtype=torch.int64)
        seed = problem_seeds(no_image, plan.layers[layer], [plan.heads[head]], int(options.k), options.seed)
        x, numbers = self._x[layer, head, : self._filled], self._numbers[: self._filled]
        return dataset.Problem(x, numbers, int(options.k), int(seed[0]), options.starts or AUTO_STARTS, group)

"""Holds on the device the rows of a process's images that a fit sees."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchjob.clustering.base import problem_seeds
from batchjob.codebook import kmeans as dataset
from batchjob.codebook.features import features
from batchjob.codebook.processes import Group
from batchjob.codebook.rows import RowKind, Sample, row_numbers
from batchjob.job.read_rows import ReadRows
from batchjob.job.upload import DeviceBatch, Download, pinned
from batchjob.model.attention import LayerMaps, renormalise
from batchjob.plan import Plan

_AUTO_STARTS = 4  # starts of a dataset-wide k-means for --n-init auto


@dataclass(frozen=True, slots=True)
class _Unsettled:
    """The rows of the last batch, of which it is not known yet whether all are finite."""

    rows: int
    image: NDArray[np.int64]  # [rows]: which image of the batch each of them is of
    finite: Download  # bool [B]


class SampledRows:
    """The rows of this process's images that the fit sees, in all layers and heads: [L, H, n, D]."""

    def __init__(
        self, plan: Plan, kind: RowKind, sample: Sample, shares: Iterable[tuple[int, int]], device: torch.device
    ):
        """Allocates the memory of all rows at once.

        Parameters
        ----------
        plan
            The run's plan.
        kind
            What a row is.
        sample
            Which rows the fit sees.
        shares
            This process's ranges of images [start, stop).
        device
            Where the rows are.
        """
        self._plan, self._kind, self._sample = plan, kind, sample
        most = sum(sample.most_rows(start * kind.per_image, stop * kind.per_image) for start, stop in shares)
        self._x = torch.empty(len(plan.layers), len(plan.heads), most, kind.width, device=device)
        self._numbers = torch.empty(most, dtype=torch.int64, device=device)
        self._filled = 0
        self._unsettled: _Unsettled | None = None

    def __len__(self) -> int:
        return self._filled

    @property
    def bytes(self) -> int:
        """The bytes that all rows take on the device, those that are not read yet among them."""
        return self._x.nbytes + self._numbers.nbytes

    def drop_after(self, count: int) -> None:
        """Drops all rows except the first `count`, which must be settled."""
        self._filled, self._unsettled = count, None

    def add(self, batch: DeviceBatch, layers: Iterable[LayerMaps]) -> None:
        """Takes the chosen rows of a batch. An image that failed, or overflowed in any layer, gives none.

        Which images overflowed is asked when the next batch is under way, so that a GPU need not stand idle: `settle`
        asks it of the last one.

        Parameters
        ----------
        batch
            The images; `mask` is on the device.
        layers
            The batch's maps, layer by layer.
        """
        numbers = row_numbers(batch.rows, self._kind)
        wanted = self._sample.chosen(numbers) & (batch.status == 0)[:, None]
        if batch.host_mask is not None and self._kind.queries == "rows":
            wanted &= batch.host_mask.numpy()
        chosen = np.flatnonzero(wanted)[: len(self._numbers) - self._filled]
        image = chosen // self._kind.per_image
        source, place, own_numbers = self._upload(
            np.stack([image, chosen % self._kind.per_image, numbers.flat[chosen]])
        )
        finite = torch.ones(len(batch.rows), dtype=torch.bool, device=self._x.device)
        end = self._filled + len(chosen)
        for layer, maps in enumerate(layers):
            own = self._own_rows(maps, source, place, batch.mask)
            x = features(own, place, self._kind, distance=self._plan.options.distance)
            self._x[layer, :, self._filled : end] = x.transpose(0, 1)
            finite &= maps.finite
        self._numbers[self._filled : end] = own_numbers
        following = _Unsettled(len(chosen), image, Download([finite]))
        self._filled = end
        self._drop_overflowed(behind=len(chosen))
        self._unsettled = following

    def settle(self) -> None:
        """Drops the rows of images of the last batch that overflowed; waits for the device."""
        self._drop_overflowed(behind=0)

    def _drop_overflowed(self, *, behind: int) -> None:
        """Drops such rows of the batch that is not settled yet; the last `behind` rows are of another and stay."""
        unsettled, self._unsettled = self._unsettled, None
        if unsettled is None:
            return
        (finite,) = unsettled.finite.arrays()
        if finite[unsettled.image].all():
            return
        start = self._filled - behind - unsettled.rows
        good = np.flatnonzero(np.append(finite[unsettled.image], np.ones(behind, bool)))
        kept = self._upload(start + good)
        self._filled = start + len(good)
        self._x[:, :, start : self._filled] = self._x[:, :, kept]
        self._numbers[start : self._filled] = self._numbers[kept]

    def _upload(self, values: NDArray[np.int64]) -> Tensor:
        return pinned(torch.from_numpy(values), self._x.device).to(self._x.device, non_blocking=True)

    def _own_rows(self, maps: LayerMaps, source: Tensor, place: Tensor, mask: Tensor | None) -> Tensor:
        """[n, H, D]: the rows of the images `source` at the patches `place`; attention rows are renormalised."""
        if maps.vectors is not None:
            return maps.vectors[source, :, place]
        assert maps.rows is not None
        own = maps.cls[source] if self._kind.queries == "cls" else maps.rows[source, :, place]
        return renormalise(own[:, :, None], None if mask is None else mask[source])[:, :, 0]

    def take(self, kept: ReadRows) -> int:
        """Takes the rows that an earlier attempt kept. Returns from how many partitions they come."""
        done, self._filled = kept.load_into(self._x, self._numbers)
        return done

    def keep(self, kept: ReadRows, count: int, partitions: int) -> None:
        """Keeps rows on disk for another attempt.

        Parameters
        ----------
        kept
            The file.
        count
            How many rows to keep, from the first on.
        partitions
            From how many of this process's partitions these rows come.

        Raises
        ------
        WorkLeft, UserError
            As `ReadRows.save` does.
        """
        kept.save(self._x[:, :, :count], self._numbers[:count], partitions)

    def problem(self, layer: int, head: int, group: Group) -> dataset.Problem:
        """Makes the k-means problem of one layer and head.

        Parameters
        ----------
        layer, head
            Positions among the run's layers and heads.
        group
            The processes that fit together.

        Returns
        -------
        The problem; its rows [n, D] are a view.
        """
        options, plan = self._plan.options, self._plan
        no_image = torch.zeros(1, dtype=torch.int64)
        seed = problem_seeds(no_image, plan.layers[layer], [plan.heads[head]], int(options.k), options.seed)
        x, numbers = self._x[layer, head, : self._filled], self._numbers[: self._filled]
        return dataset.Problem(x, numbers, int(options.k), int(seed[0]), options.starts or _AUTO_STARTS, group)

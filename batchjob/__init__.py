"""Cluster the self-attention of vision transformers, head by head, over a whole dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchjob.codes import VERSION

if TYPE_CHECKING:
    from os import PathLike

    import xarray

__version__ = VERSION


def open(run: str | PathLike[str]) -> xarray.Dataset:
    """The arrays of RUN/labels.zarr as one Dataset, read lazily; see docs/store.md. Raises UserError if RUN is none."""
    from batchjob.store.run import Run

    return Run(run).data

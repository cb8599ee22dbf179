"""A made-up plan and its arrays, for the tests of the store: no model, no images."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob import config
from batchjob.store import arrays as layout
from batchjob.store import lifecycle as store


@dataclass(frozen=True)
class Model:
    grid: tuple[int, int] = (2, 3)
    kind: str = "vit"

    def to_json(self) -> dict[str, Any]:
        return {"name": "made-up", "grid": list(self.grid)}


@dataclass(frozen=True)
class MadeUpPlan:
    row_count: int = 20
    rows_per_partition: int = 8
    layers: tuple[int, ...] = (3, 7)
    heads: tuple[int, ...] = (0, 1, 2)
    options: config.Options = field(default_factory=config.Options)
    model: Model = field(default_factory=Model)
    digest: str = "d1"
    kept_rows: tuple[int, ...] = ()
    score_names: tuple[str, ...] = ()

    @property
    def partitions(self) -> list[tuple[int, int]]:
        return [layout.rows_of(self, i) for i in range(layout.partition_count(self))]


class Ids:
    """An index of `count` images, with the ids that cause trouble."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def id(self, row: int) -> str:
        return f"a/été, “{row}”\n.jpg" if row % 2 else f"bytes\\xff/{row}.jpg"


def arrays_of(plan: MadeUpPlan, partition: int) -> dict[str, NDArray[Any]]:
    """All arrays of a partition, a function of the rows alone."""
    start, stop = layout.rows_of(plan, partition)
    arrays = {}
    for number, (name, spec) in enumerate(layout.layout(plan).items()):
        rows = range(start, stop)
        kept = [r for r in plan.kept_rows if r in rows]
        chosen = {"image": list(rows), "partition": [partition]}.get(spec.dims[0], kept)
        parts = [np.random.default_rng((r, number)).integers(0, 200, spec.shape[1:]) for r in chosen]
        arrays[name] = np.stack(parts).astype(spec.dtype) if parts else np.zeros((0, *spec.shape[1:]), spec.dtype)
    return arrays


def label(run: Path, plan: MadeUpPlan, partitions: list[int]) -> None:
    """Publishes the partitions, as the job's loop does."""
    with store.Writer(run, plan) as writer:
        for i in partitions:
            assert writer.claim(i)
            writer.write(i, arrays_of(plan, i), [(Ids(20).id(layout.rows_of(plan, i)[0]), "truncated", "cut, off\n")])


def contents(run: Path) -> Mapping[str, bytes]:
    """Path -> bytes of everything that is a result: two runs are the same run where this is equal."""
    results = [run / "failures.csv", *(run / "labels.zarr").rglob("*"), *(run / "scores.zarr").rglob("*")]
    return {str(p.relative_to(run)): p.read_bytes() for p in results if p.is_file()}

"""Makes up a plan and its arrays for the tests of the store, without a model or images."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from batchjob import inputs
from batchjob import plan as plans
from batchjob.config import Options
from batchjob.plan import ModelSpec, Plan
from batchjob.store import arrays as layout
from batchjob.store import lifecycle as store
from batchjob.store.writer import Writer


def made_up_model(*, grid: tuple[int, int] = (2, 3), kind: Literal["vit", "cnn"] = "vit") -> ModelSpec:
    """Describes a made-up model of two layers and three heads."""
    return ModelSpec(
        name="made-up",
        kind=kind,
        input_px=(grid[0] * 16, grid[1] * 16),
        patch_px=(16, 16),
        grid=grid,
        num_prefix_tokens=1,
        num_layers=12,
        num_heads=3,
        has_cls=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        head_dim=64,
        embed_dim=192,
        parameters=1000,
        activation_numbers=1000,
    )


def made_up_plan(**changes: Any) -> Plan:
    """Makes a plan of 20 images in three partitions; `changes` are fields of Plan."""
    fields: dict[str, Any] = {
        "options": Options(),
        "data": "photos",
        "model": made_up_model(),
        "weights": {"kind": "random", "path": "", "sha256": ""},
        "annotations": "",
        "layers": (3, 7),
        "heads": (0, 1, 2),
        "precision": "fp32",
        "row_count": 20,
        "rows_per_partition": 8,
        "kept_rows": (),
        "inputs": {},
        "versions": {},
    }
    return Plan(**fields | changes)


def plan_what_is_there(run: Path) -> None:
    """Makes the run's index, which a test has changed, the planned one."""
    plan = plans.load(run, checks_index=False)
    plans.save(dataclasses.replace(plan, inputs=inputs.hashes(run, plan.annotations)), run)


class Ids:
    """Makes an index of `count` images, some with unusual ids."""

    columns = ("class",)

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def id(self, row: int) -> str:
        return f"a/été, “{row}”\n.jpg" if row % 2 else f"bytes\\xff/{row}.jpg"

    def column(self, name: str, start: int, stop: int) -> list[str]:
        return [f"{name} {row % 3}" for row in range(start, stop)]


def arrays_of(plan: Plan, partition: int) -> dict[str, NDArray[Any]]:
    """Makes all arrays of a partition; they depend on the rows alone."""
    start, stop = plan.rows_of(partition)
    arrays = {}
    for number, (name, spec) in enumerate(layout.layout(plan).items()):
        rows = range(start, stop)
        kept = [r for r in plan.kept_rows if r in rows]
        chosen = {"image": list(rows), "partition": [partition]}.get(spec.dims[0], kept)
        parts = [np.random.default_rng((r, number)).integers(0, 200, spec.shape[1:]) for r in chosen]
        arrays[name] = np.stack(parts).astype(spec.dtype) if parts else np.zeros((0, *spec.shape[1:]), spec.dtype)
    return arrays


def label(run: Path, plan: Plan, partitions: list[int]) -> None:
    """Publishes partitions as the job's loop does."""
    with Writer(run, plan) as writer:
        for i in partitions:
            assert writer.claim(i)
            writer.write(i, arrays_of(plan, i), [(Ids(20).id(plan.rows_of(i)[0]), "truncated", "cut, off\n")])


def contents(run: Path) -> Mapping[str, bytes]:
    """Returns path -> bytes of all results: two runs have the same result if these are equal."""
    results = [run / "failures.csv", *(run / "labels.zarr").rglob("*"), *(run / "scores.zarr").rglob("*")]
    return {str(p.relative_to(run)): p.read_bytes() for p in results if p.is_file()}


SCORED_PLAN = made_up_plan(kept_rows=(2, 9, 15), options=Options(scores="attention"))


@pytest.fixture
def empty_run(tmp_path: Path) -> Path:
    """A run of `SCORED_PLAN` without labels."""
    store.create(tmp_path / "run", SCORED_PLAN, Ids(20))
    return tmp_path / "run"


@pytest.fixture
def finished_run(empty_run: Path) -> Path:
    """A run of `SCORED_PLAN`, labelled and finished."""
    label(empty_run, SCORED_PLAN, [0, 1, 2])
    store.finish(empty_run)
    return empty_run

"""Measures writing at 10,000 images a second, writing against an image at a time, and reading one head."""

import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import zarr

from batchjob.plan import Plan
from batchjob.store import arrays as layout
from batchjob.store import lifecycle as store
from batchjob.store.writer import Writer
from tests.benchmarks.harness import Contest
from tests.runs import Ids, made_up_model, made_up_plan

RATE = 10_000  # images a second that a machine full of GPUs may label
CORES = 0.25  # the share of one core that publishing them may take


def contests(*, smoke: bool) -> Iterator[Contest]:
    """Yields contests on ViT-B/16's last layer: 12 heads, 14×14 patches, labels and CLS rows, 4,096 images a shard."""
    rows = 512 if smoke else 4096
    plan = made_up_plan(
        row_count=rows * 4,
        rows_per_partition=rows,
        layers=(11,),
        heads=tuple(range(12)),
        model=made_up_model(grid=(14, 14)),
    )
    arrays = _arrays(plan)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        store.create(run, plan, Ids(plan.row_count))
        images = plan.row_count
        yield Contest(
            name="publish shards",
            peer=f"{CORES} core at {RATE:,} images/s",
            unit="image",
            items=images,
            ours=lambda: _write(run, plan, arrays),
            theirs=lambda: time.sleep(1.0),
            theirs_items=int(RATE / CORES),
            aim=None,
            note=_cost(lambda: _write(run, plan, arrays), images),
        )
        few = 64 if smoke else 256
        yield Contest(
            name="publish shards",
            peer="zarr, an image at a time",
            unit="image",
            items=images,
            ours=lambda: _write(run, plan, arrays),
            theirs=lambda: _write_one_by_one(Path(folder) / "peer.zarr", plan, arrays, few),
            theirs_items=few,
            aim=50,
        )
        labels = zarr.open_array(run / "labels.zarr" / "labels", mode="r")
        yield Contest(
            name="read one head of all images",
            peer="reading all heads",
            unit="image",
            items=images,
            ours=lambda: labels[:, 0, 0, 5],
            theirs=lambda: labels[:],
            aim=4,
        )


def _cost(work: Callable[[], object], images: int) -> str:
    """Returns the CPU seconds of all threads over the time that the images take at the wanted rate."""
    best = min(_cpu_seconds(work) for _ in range(3))
    cores = best / images * RATE
    return f"{cores:.2f} of a core at {RATE:,} images/s (at most {CORES})"


def _cpu_seconds(work: Callable[[], object]) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _arrays(plan: Plan) -> dict[str, np.ndarray]:
    """Makes arrays like those of a model: labels in connected regions, CLS rows peaked and noisy."""
    random = np.random.default_rng(0)
    arrays = {}
    for name, spec in layout.layout(plan).items():
        shape = (plan.rows_per_partition, *spec.shape[1:])
        if name == "labels":
            coarse = random.integers(0, 5, (*shape[:-2], 5, 5), np.uint8)
            arrays[name] = coarse.repeat(3, -1).repeat(3, -2)[..., :14, :14].copy()
        elif name == "cls_attention":
            row = np.exp(1.5 * random.standard_normal(shape, np.float32))
            arrays[name] = (row / row.sum((-1, -2), keepdims=True)).astype(np.float16)
        else:
            arrays[name] = random.integers(0, 200, shape).astype(spec.dtype)
    return arrays


def _write(run: Path, plan: Plan, arrays: dict[str, np.ndarray]) -> None:
    with Writer(run, plan) as writer:
        for partition in range(plan.partition_count):
            writer.write(partition, arrays)


def _write_one_by_one(path: Path, plan: Plan, arrays: dict[str, np.ndarray], images: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    spec = layout.layout(plan)["labels"]
    chunks = (64, *spec.shape[1:])  # a usual choice; each image rewrites its chunk
    array = zarr.create_array(str(path), name="labels", shape=spec.shape, dtype="u1", chunks=chunks, fill_value=255)
    for row in range(images):
        array[row] = arrays["labels"][row]

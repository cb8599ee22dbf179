"""Measures statistics: scores and null models of an image against scikit-learn, and the cost as runs grow."""

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from threadpoolctl import threadpool_limits

from batchjob.data.annotations import PatchInstances, instances_on_grid, open_annotations
from batchjob.data.instances import GridInstances
from batchjob.geometry import Geometry
from batchjob.metrics.objects import Objects
from batchjob.stats import position, run_stats
from batchjob.stats.image import Scene, pair_table, score_labels
from tests import made_up_runs, scenes
from tests.benchmarks.harness import Contest

HEADS = ("class", "instance", "local", "random") * 3
SEEDS = 20


def contests(*, smoke: bool) -> Iterator[Contest]:
    """Yields scores of 12 heads with the position null, then four times the images against the same cost an image."""
    images = 2 if smoke else 6
    with tempfile.TemporaryDirectory() as folder:
        scenes_run = made_up_runs.write_run(Path(folder) / "scenes", images, kinds=HEADS)
        annotations = made_up_runs.write_annotations(Path(folder) / "scenes.json", images)
        with threadpool_limits(1):  # with more, the peer's k-means mostly waits for its own threads
            yield _against_scikit_learn(scenes_run, annotations, images, times=1 if smoke else 8)
        few = 16 if smoke else 512
        small, large = (tiled(Path(folder), scenes_run, annotations, images, count) for count in (few, 4 * few))
        yield Contest(
            name="an image's cost in a run of four times the images",
            peer="the small run",
            unit="images",
            items=4 * few,
            ours=lambda: _stats(*large),
            theirs=lambda: _stats(*small),
            theirs_items=few,
            aim=0.9,
            note="12 heads, one process, all scores, nulls, intervals and tables; 1 = linear",
        )


def _stats(run: Path, annotations: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        run_stats([run], annotations=str(annotations), jobs=1)


def _against_scikit_learn(run: Path, annotations: Path, images: int, times: int) -> Contest:
    group: Any = zarr.open_group(str(run / "labels.zarr"), mode="r")
    labels = group["labels"][:].reshape(images, len(HEADS), -1)
    geometry = Geometry(56, 56, 4, 4)
    truths = [instances_on_grid(image, geometry, 56, 56) for image in open_annotations(annotations)]
    objects = [Objects(t.owner, t.category, t.boxes / 4, t.coverage) for t in truths]

    def ours() -> None:
        position._position_labels.cache_clear()  # each round computes the null models anew, once for each k
        for i, truth in list(enumerate(truths)) * times:
            k = np.full(len(HEADS), len(truth.category) + 1, np.uint8)
            donors = dict(enumerate(objects))  # objects of as many photos as there are
            scene = Scene(geometry.grid, 0, None, objects[i], donors)
            score_labels(labels[i], k, scene)
            pair_table(labels[i], k, scene)

    return Contest(
        name="cluster scores of an image: ARI, AMI, pairs, two nulls",
        peer="scikit-learn, a call each, ARI and AMI with the position null alone",
        unit="images",
        items=images * times,
        ours=ours,
        theirs=lambda: _scikit_learns(labels[0], truths[0]),
        theirs_items=1,
        aim=10,
        note=f"12 heads, 20 seeds of the null, one thread; ours draws nulls once for {images * times} images, the "
        "peer for each, and scores fewer things; with few images (smoke) drawing it is all the work of both",
    )


def _scikit_learns(labels: Any, truth: PatchInstances) -> None:
    y, x = np.divmod(np.arange(labels.shape[1]), scenes.GRID[1])
    k = len(truth.category) + 1
    places = np.stack([y, x], axis=1)
    nulls = [KMeans(k, n_init=4, random_state=seed).fit(places).labels_ for seed in range(SEEDS)]
    inside = truth.owner >= 0
    for row in (*labels, *nulls):
        adjusted_rand_score(truth.owner[inside], row[inside])
        adjusted_mutual_info_score(truth.owner[inside], row[inside])
        adjusted_rand_score(truth.owner, row)


def tiled(folder: Path, run: Path, annotations: Path, images: int, count: int) -> tuple[Path, Path]:
    """Makes a run of `count` images that repeats those of another, and its annotations."""
    target = folder / f"tiled-{count}"
    shutil.copytree(run, target)
    names = made_up_runs.image_ids(count)
    for store in ("labels", "scores"):
        group: Any = zarr.open_group(str(target / f"{store}.zarr"), mode="r+")
        for name, array in list(group.arrays()):
            dims = array.metadata.dimension_names
            if dims[0] != "image":
                continue
            values = np.resize(array[:], (count, *array.shape[1:])) if name != "image_id" else np.array(names, object)
            dtype = "str" if name == "image_id" else array.dtype
            size = {"image": min(1024, count), "algorithm": 1, "layer": 1, "head": 1}  # as the job's store is chunked
            chunks = tuple(size.get(dim, length) for dim, length in zip(dims, values.shape, strict=True))
            made = group.create_array(
                name, shape=values.shape, chunks=chunks, dtype=dtype, dimension_names=dims, overwrite=True
            )
            made[:] = values
        group.attrs["rows"] = count
        group.attrs["rows_per_partition"] = count
    owner = np.asarray(GridInstances.load(run / "index").owner)
    made_up_runs.save_objects(target / "index", np.resize(owner, (count, owner.shape[1])))
    content = json.loads(annotations.read_text())
    repeated: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": content["categories"]}
    for i, name in enumerate(names):
        repeated["images"].append(content["images"][i % images] | {"id": i, "file_name": Path(name).name})
        mine = [a for a in content["annotations"] if a["image_id"] == i % images]
        repeated["annotations"] += [a | {"image_id": i} for a in mine]
    path = folder / f"tiled-{count}.json"
    path.write_text(json.dumps(repeated))
    return target, path

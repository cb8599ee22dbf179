"""Writes runs for the statistics without a model: scenes whose heads attend by a known rule (tests/scenes.py)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from batchjob.data.instances import GridInstances
from batchjob.metrics import attention, nulls
from batchjob.metrics.uncertainty import mean_known
from tests import scenes

KINDS = ("class", "instance", "local", "random")
PATCH_PX = 4


def image_ids(count: int) -> list[str]:
    return [f"val/{i:04d}.jpg" for i in range(count)]


def write_run(
    folder: Path,
    count: int = 12,
    *,
    kinds: Sequence[str] = KINDS,
    grid: tuple[int, int] = scenes.GRID,
    weights: str = "",
    k: str = "instances",
    with_scores: bool = True,
    failed: Sequence[int] = (),
    pending: Sequence[int] = (),
    without_objects: Sequence[int] = (),
    seed: int = 0,
    scene_seed: int = 0,
    unsettled: Sequence[tuple[int, int]] | None = None,
    **more: Any,
) -> Path:
    """Writes labels.zarr (and scores.zarr) of `count` scenes, one head for each kind; rows `failed` are unreadable.

    Those `without_objects` look like the others, but were not annotated when the run was planned.
    With `unsettled`, it writes which clusterings are settled: all but these (row, head). `more` are result options.
    """
    patches, heads = grid[0] * grid[1], len(kinds)
    owners = [scene(i, scene_seed) for i in range(count)]
    random = np.random.default_rng(seed)
    labels = np.full((count, 1, 1, heads, patches), 255, np.uint8)
    maps = np.full((count, 1, heads, patches), np.nan, np.float32)
    found_k = np.zeros((count, 1, 1, heads), np.uint8)
    scored: dict[str, NDArray[np.float32]] = {}
    steps = scenes.GRID[0] // grid[0], scenes.GRID[1] // grid[1]
    owners = [owner.reshape(scenes.GRID)[:: steps[0], :: steps[1]].ravel() for owner in owners]
    known = [np.full_like(owner, -1) if i in without_objects else owner for i, owner in enumerate(owners)]
    counts = np.array([int(owner.max()) + 1 for owner in known])
    drawn = [
        attention.draw_pairs(o, np.zeros(n, int), row=i, seed=seed)
        for i, (o, n) in enumerate(zip(known, counts, strict=True))
    ]
    donors = nulls.Donors(counts, counts > 1, seed=seed)
    for i, own in enumerate(owners):
        if i in failed:
            continue
        rows = np.stack([scenes.attention(kind, own, random, grid) for kind in kinds])
        instances = int(own.max()) + 1
        found_k[i] = instances + 1
        labels[i, 0, 0] = [scenes.k_means(r, instances + 1, seed + i)[0] for r in rows]
        maps[i, 0] = [cls_map(kind, r, own) for kind, r in zip(kinds, rows, strict=True)]
        found = attention.attention_scores(rows, grid) | attention.pair_scores(rows, drawn[i], grid)
        lent = [attention.pair_scores(rows, drawn[j], grid) for j in donors.of(i)]
        for name in ("pair_auc", "pair_auc_matched") if lent else ():
            each = np.stack([one[name] for one in lent], axis=1)  # [heads, lenders]
            found[f"{name}.swap"] = mean_known(each, axis=1)
            slots = np.full((heads, nulls.SWAPS), np.nan)
            slots[:, : len(lent)] = each
            found[name + nulls.BY_LENDER] = slots
        for name, values in found.items():
            scored.setdefault(name, np.full((count, 1, *values.shape), np.nan, np.float32))[i, 0] = values
    options = {"resize": "squash", "n_init": 4, "seed": seed, "k": k, "weights": weights} | more
    model = {
        "name": "made_up",
        "input_px": [grid[0] * PATCH_PX, grid[1] * PATCH_PX],
        "patch_px": [PATCH_PX, PATCH_PX],
    }
    attributes = {"rows": count, "rows_per_partition": 8, "options": options, "model": model, "weights": {}}
    group = zarr.open_group(str(folder / "labels.zarr"), mode="w", zarr_format=3, attributes=attributes)
    status = np.array([2 if i in failed else 255 if i in pending else 0 for i in range(count)], np.uint8)
    size = np.where(status == 0, scenes.GRID[0] * PATCH_PX, 0).astype(np.int32)
    shape = (count, 1, 1, heads, *grid)
    _put(group, "labels", labels.reshape(shape), "image algorithm layer head y x")
    _put(group, "cls_attention", maps.reshape(count, 1, heads, *grid).astype(np.float16), "image layer head y x")
    _put(group, "k", found_k, "image algorithm layer head")
    if unsettled is not None:
        is_settled = np.ones(found_k.shape, bool)
        is_settled[list(failed)] = False
        for row, head in unsettled:
            is_settled[row, 0, 0, head] = False
        _put(group, "settled", is_settled, "image algorithm layer head")
    _put(group, "prefix_mass", np.full((count, 1, heads), 0.25, np.float16), "image layer head")
    for name, values in (("status", status), ("height", size), ("width", size)):
        _put(group, name, values, "image")
    instance = np.where((status == 0)[:, None], known, -1).reshape(count, *grid)
    _put(group, "instance", instance.astype(np.int16), "image y x")
    _put(group, "category", np.where(instance < 0, -1, 1).astype(np.int32), "image y x")
    _coordinates(group, heads, count)
    if with_scores:
        save_objects(folder / "index", np.array(known, np.int16))
        group = zarr.open_group(str(folder / "scores.zarr"), mode="w", zarr_format=3)
        for name, values in scored.items():
            _put(group, name, values, "image layer head lender" if values.ndim == 4 else "image layer head")
        _coordinates(group, heads, count)
    return folder


def cls_map(kind: str, rows: NDArray[Any], owner: NDArray[Any]) -> NDArray[Any]:
    """Returns [P], the map of a head of this kind: its row for one object, for all objects, or its mean row."""
    if kind == "instance":
        return np.asarray(rows[owner == 0].mean(axis=0))
    return np.asarray(rows[owner >= 0].mean(axis=0) if kind == "class" else rows.mean(axis=0))


def spoil_labels(run: Path, head: int, share: float = 0.1) -> None:
    """Gives a share of a head's patches the label 0, so that a head that is right everywhere scores below 1.

    A score that is the same in nearly all images is one of which too little is known to say.
    """
    labels: Any = zarr.open_group(str(run / "labels.zarr"), mode="r+")["labels"]
    mine = labels[:, :, :, head]
    labels[:, :, :, head] = np.where(np.random.default_rng(0).random(mine.shape) < share, 0, mine)


def save_objects(folder: Path, owner: NDArray[np.int16]) -> None:
    """Writes to a new folder what `plan` stores of the objects [n, P], all of one category."""
    folder.mkdir(exist_ok=True)
    counts = owner.max(axis=1) + 1
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    number = np.arange(start[-1], dtype=np.int32) - np.repeat(start[:-1], counts).astype(np.int32)
    size = np.full((len(owner), 2), scenes.GRID[0] * PATCH_PX, np.int32)
    GridInstances(owner, np.ones(start[-1], np.int32), number, start, size).save(folder)


def scene(i: int, seed: int = 0) -> NDArray[np.int64]:
    """Returns [P]: the owner of each patch of image i."""
    return scenes.disks((2, 3, 6)[i % 3], np.random.default_rng((seed, i)))


def write_annotations(
    path: Path, count: int = 12, *, missing: Sequence[int] = (), wrong_size: Sequence[int] = (), scene_seed: int = 0
) -> Path:
    """Writes COCO JSON of the scenes' disks, without the images `missing` and with a wrong size for `wrong_size`."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, name in enumerate(image_ids(count)):
        if i in missing:
            continue
        side = scenes.GRID[0] * PATCH_PX + (i in wrong_size)
        images.append({"id": i, "file_name": Path(name).name, "height": side, "width": side})
        owner = scene(i, scene_seed).reshape(scenes.GRID).repeat(PATCH_PX, axis=0).repeat(PATCH_PX, axis=1)
        owner = np.pad(owner, ((0, side - len(owner)),) * 2, constant_values=-1)
        for instance in range(owner.max() + 1):
            rle = coco_mask.encode(np.asfortranarray((owner == instance).astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": i,
                    "category_id": 1,
                    "iscrowd": 0,
                    "segmentation": {"size": list(owner.shape), "counts": rle["counts"].decode()},
                }
            )
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "disk"}]}
    path.write_text(json.dumps(content))
    return path


def _put(group: zarr.Group, name: str, values: NDArray[Any], dims: str) -> None:
    fill = np.nan if values.dtype.kind == "f" else 0
    array = group.create_array(
        name, shape=values.shape, dtype=values.dtype, dimension_names=dims.split(), fill_value=fill
    )
    array[...] = values


def _coordinates(group: zarr.Group, heads: int, count: int) -> None:
    texts = {"algorithm": ("algorithm", ["kmeans"]), "image_id": ("image", image_ids(count))}
    for name, (dim, values) in texts.items():
        array = group.create_array(name, shape=(len(values),), dtype="str", dimension_names=(dim,))
        array[:] = np.array(values, object)
    _put(group, "layer", np.array([11], np.int16), "layer")
    _put(group, "head", np.arange(heads, dtype=np.int16), "head")


def table(run: Path, name: str) -> pd.DataFrame:
    """Reads a table that `stats` wrote."""
    return pd.read_parquet(run / "stats" / f"{name}.parquet")

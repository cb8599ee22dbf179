"""The arrays of a plan's stores: names, dimensions, types, shards and chunks. docs/store.md has the reasons."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from batchjob.codes import NO_LABEL
from batchjob.metrics.nulls import BY_LENDER, SWAPS
from batchjob.plan import Plan, rows_per_chunk


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of a store. Its first dimension is cut into shards; one process writes each shard."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    fill: float
    chunks: tuple[int, ...]  # the least that a reader must load
    shards: tuple[int, ...] | None  # what one file holds; None where that is one chunk
    meaning: str
    store: Literal["labels", "scores"] = "labels"
    # by zstd; maps in float16 are not: it would save an eighth of them for a third of the writer's time
    compressed: bool = True

    @property
    def rows_per_shard(self) -> int:
        """How many entries of the first dimension one file holds."""
        return (self.shards or self.chunks)[0]


def layout(plan: Plan) -> dict[str, ArraySpec]:
    """Returns the spec of every array that labelling writes, by its name."""
    options, n, rows = plan.options, plan.row_count, plan.rows_per_partition
    sizes = {
        "image": n,
        "algorithm": len(options.algorithms),
        "layer": len(plan.layers),
        "head": len(plan.heads),
        "y": plan.model.grid[0],
        "x": plan.model.grid[1],
        "repeat": options.repeats,
        "lender": SWAPS,
    }
    patches = sizes["y"] * sizes["x"]
    inner = rows_per_chunk(rows)

    def by_head(dims: str, dtype: str, fill: float, meaning: str) -> ArraySpec:
        names = tuple(dims.split())
        one_head = {"algorithm": 1, "layer": 1, "head": 1}
        return ArraySpec(
            dims=names,
            shape=tuple(sizes[d] for d in names),
            dtype=dtype,
            fill=fill,
            chunks=tuple(inner if d == "image" else one_head.get(d, sizes[d]) for d in names),
            shards=tuple(rows if d == "image" else sizes[d] for d in names),
            meaning=meaning,
            compressed=dtype != "float16",
        )

    def whole(dims: str, dtype: str, fill: float, meaning: str) -> ArraySpec:
        names = tuple(dims.split())
        shape = tuple(sizes[d] for d in names)
        return ArraySpec(names, shape, dtype, fill, (rows, *shape[1:]), None, meaning)

    arrays: dict[str, ArraySpec] = {}
    if options.scope == "dataset" and options.queries == "cls":
        arrays["image_labels"] = whole(
            "image algorithm layer head", "uint8", NO_LABEL, "number of the centroid nearest to the CLS row; 255 = none"
        )
    else:
        arrays["labels"] = by_head(
            "image algorithm layer head y x",
            "uint8",
            NO_LABEL,
            "cluster of each patch; 255 = none (failed, padding), 254 = noise (hdbscan)",
        )
    if not plan.has_attention:
        what = "CNN's features" if plan.model.kind == "cnn" else "tokens behind the layer"
        norm = f"no attention: norm of the {what} over the image's sum; NaN = failed"
        arrays["saliency"] = by_head("image layer head y x", "float16", math.nan, norm)
        component = f"no attention: the {what} on their first principal component in the image, largest = 1"
        arrays["saliency_component"] = by_head("image layer head y x", "float16", math.nan, component)
    else:
        row = "the CLS row after the softmax over all tokens, prefix columns dropped, not renormalised; NaN = failed"
        arrays["cls_attention"] = by_head("image layer head y x", "float16", math.nan, row)
    arrays["k"] = whole("image algorithm layer head", "uint8", 0, "clusters found; 0 = failed")
    arrays["inertia"] = whole(
        "image algorithm layer head", "float32", math.nan, "sum of squared distances to the own centroid; NaN = failed"
    )
    if options.scope == "image":
        meaning = "the lowest inertia was found from two independent starts at least; False = failed, too"
        arrays["settled"] = whole("image algorithm layer head", "bool", 0, meaning)
    if options.repeats > 1:
        meaning = "clusters of each patch in every repeat, as labels has them; labels is the one of lowest inertia"
        arrays["labels_repeats"] = by_head("image algorithm layer head repeat y x", "uint8", NO_LABEL, meaning)
    arrays["prefix_mass"] = whole(
        "image layer head", "float16", math.nan, "mean over patch queries of the mass on CLS and registers"
    )
    arrays["status"] = whole("image", "uint8", 255, "0 = ok; the other codes are in the attribute 'codes'")
    arrays["height"] = whole("image", "int32", 0, "pixels, after the EXIF rotation; 0 = unknown")
    arrays["width"] = whole("image", "int32", 0, "pixels, after the EXIF rotation; 0 = unknown")
    if plan.annotations:
        owner = "which of the image's annotations owns the patch, counted from 0; -1 = none"
        arrays["instance"] = by_head("image y x", "int16", -1, owner)
        arrays["category"] = by_head("image y x", "int32", -1, "its category, named in 'categories'; -1 = none")
    kept = len(plan.kept_rows)
    if kept:
        shape = (kept, sizes["layer"], sizes["head"], patches, patches)
        what = "attention of each patch to each patch, not renormalised"
        if plan.model.kind == "cnn":
            what = "no attention: softmax of the cosine of a CNN's features over the temperature 0.2"
        arrays["attention_rows"] = ArraySpec(
            ("kept_image", "layer", "head", "query", "key"),
            shape,
            "float16",
            math.nan,
            (1, 1, 1, patches, patches),
            (1, *shape[1:]),
            what + "; kept_image holds the rows of the images",
        )
    for name in plan.score_names:
        if name.endswith(BY_LENDER):
            meaning = "score with the objects of each photo that lends them; NaN = none; docs/metrics.md"
            spec = whole("image layer head lender", "float16", math.nan, meaning)
        else:
            spec = whole("image layer head", "float32", math.nan, "score of one image and head; docs/metrics.md")
        arrays[name] = replace(spec, store="scores")
    return arrays


def shards_of(spec: ArraySpec, plan: Plan, partition: int) -> range:
    """Finds which shards of an array a partition writes.

    Parameters
    ----------
    spec
        The array.
    plan
        The run's plan.
    partition
        The number of the partition.

    Returns
    -------
    Numbers of shards: one, or one for each kept image of the partition where the array holds kept images.
    """
    start, stop = plan.rows_of(partition)
    if spec.dims[0] == "image":
        return range(partition, partition + 1)
    inside = [j for j, row in enumerate(plan.kept_rows) if start <= row < stop]
    return range(inside[0], inside[-1] + 1) if inside else range(0)


def shard_key(shard: int, spec: ArraySpec) -> str:
    """Names the file of a shard: one name with dots, since a folder a dimension would cost six folders a shard.

    Parameters
    ----------
    shard
        Its number along the first dimension.
    spec
        The array.

    Returns
    -------
    The name in the array's folder, such as `c.3.0.0`.
    """
    return ".".join(["c", str(shard), *["0"] * (len(spec.dims) - 1)])


def shard_paths(specs: Mapping[str, ArraySpec], plan: Plan, partition: int) -> list[str]:
    """Names the files that a partition writes.

    Parameters
    ----------
    specs
        The arrays by name, as `layout` returns them.
    plan
        The run's plan.
    partition
        The number of the partition.

    Returns
    -------
    Paths relative to RUN.
    """
    return [
        f"{spec.store}.zarr/{name}/{shard_key(shard, spec)}"
        for name, spec in specs.items()
        for shard in shards_of(spec, plan, partition)
    ]

"""Offers from Python, and in a notebook, what the command line does. Heavy imports wait until a function is called."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from batchjob.config import RULES, Options, Runtime
from batchjob.errors import UserError, counted, nearest, tell

if TYPE_CHECKING:
    import xarray
    from torch import nn

__all__ = ["attention", "cluster", "open", "plot", "run"]
DEFAULT_MODEL = Options().model
_FIELDS = {kind: [f.name for f in dataclasses.fields(kind)] for kind in (Options, Runtime)}
_ONE_IMAGE = ("weights", "image_size", "resize", "stage", "seed")  # the options that `attention` takes


def open(run: str | PathLike[str], *, chunks: Any = None, verify: bool = False) -> "xarray.Dataset":
    """Opens the result of a run. Its arrays are read when they are used.

    Checks the content of metadata, coordinates and ids, and the size of every published file. A flipped bit in a file
    of the right size is found with `verify` only.

    Parameters
    ----------
    run : path
        The folder of a run, finished or not.
    chunks : optional
        With None, the arrays become NumPy arrays when they are used. With `{}`, they are dask arrays with a block for
        each chunk of the store. Any other value is passed to xarray as its `chunks`. All but None need dask.
    verify : bool
        Whether to read every byte of the labels first and compare the checksums, as `stats`, `figures` and `report` do.

    Returns
    -------
    xarray.Dataset
        The arrays of `RUN/labels.zarr` (docs/store.md lists them), with the images' ids as the index of `image`:
        `data.sel(image="val2017/000000139.jpg")`.

    Raises
    ------
    UserError
        If the folder is not a run or is of another schema, something in it is damaged, or dask is missing.

    Examples
    --------
    >>> data = batchjob.open("runs/photos")
    >>> data.labels.sel(image="val2017/000000184324.jpg", algorithm="kmeans", layer=11, head=2).shape
    (14, 14)
    """
    from batchjob.store.lifecycle import check_static, open_labels
    from batchjob.store.outputs import raise_for_damage

    folder = Path(run)
    if (folder / "plan.json").exists():
        raise_for_damage(folder, lambda: check_static(folder, contents=True), stats=False, contents=verify)
    data = open_labels(folder, chunks=chunks)
    return data.assign_coords(image=("image", data["image_id"].values.astype(object)))


def run(
    data: str | PathLike[str],
    run: str | PathLike[str] | None = None,
    *,
    model: "str | nn.Module" = DEFAULT_MODEL,
    **options: Any,
) -> "xarray.Dataset":
    """Labels every image of a data set, as `batchjob run DATA RUN` does, and opens the result.

    After an interruption, the same call on the same run goes on where it stopped. Finished work is not repeated.

    Parameters
    ----------
    data : path
        A folder of images, a COCO root, tars, Parquet files or a list (docs/input.md).
    run : path, optional
        The folder of the run. By default it is `runs/DATA-MODEL-HASH`, which is another folder for other options.
    model : str or torch.nn.Module
        A timm name, or a network that timm made. The network's present weights are used. A copy of them is kept in the
        cache under its checksum, with which the run can go on later.
    **options
        The options of the command line by their names with underscores (docs/options.md), as text or as Python values:
        `k=6`, `layers="all"`, `layers=[0, 5, 11]`, `image_size=(224, 336)`, `batch_size=32`.

    Returns
    -------
    xarray.Dataset
        What `open` returns.

    Raises
    ------
    UserError
        If an option, the data or the model is wrong. It is raised before any work.
    WorkLeft
        If the work was interrupted. The same call goes on with it.

    Warns
    -----
    UserWarning
        If more images failed than `max_failures` allows. The result is stored, and complete for the other images.

    Examples
    --------
    >>> data = batchjob.run("photos/", "runs/photos", model="vit_tiny_patch16_224", weights="random", k=3)
    >>> data.labels.dims
    ('image', 'algorithm', 'layer', 'head', 'y', 'x')
    """
    if not isinstance(model, str):
        from batchjob.model.module import name_and_weights

        model, options["weights"] = name_and_weights(model)
    wanted, runtime = _pick(Options, {"model": model, **options}), _pick(Runtime, options)
    _refuse_unknown(options, _FIELDS[Options] + _FIELDS[Runtime])
    from batchjob import plan as plans
    from batchjob.data.index import ImageIndex
    from batchjob.job import dispatch
    from batchjob.job.prepare import prepare
    from batchjob.store import lifecycle as store

    folder = plans.default_run(os.fspath(data), wanted) if run is None else Path(run)
    dispatch.check_runtime(runtime, wanted)
    planned = prepare(os.fspath(data), folder, wanted, say=tell)
    store.mend(folder, planned, ImageIndex.load(folder / "index"))
    dispatch.fit(folder, planned, runtime, say=tell)
    dispatch.label(folder, planned, runtime, None, say=tell)
    done = store.finish(folder)
    if done.failed > runtime.max_failures * done.images:
        said = (
            f"{done.failed} of {counted(done.images, 'image')} failed, more than max_failures {runtime.max_failures:g}"
        )
        warnings.warn(f"{said}; see {folder / 'failures.csv'}", stacklevel=2)
    return open(folder)


def attention(
    images: Any,
    *,
    model: "str | nn.Module" = DEFAULT_MODEL,
    layers: int | str | Sequence[int] = -1,
    heads: int | str | Sequence[int] = "all",
    device: str = "auto",
    **options: Any,
) -> "xarray.Dataset":
    """Computes the attention of one or several images in float32. Nothing is written to disk.

    Parameters
    ----------
    images : path, PIL image, uint8 array [H, W, 3] or [H, W], or a list of these
        They are rotated by their EXIF tag and resized as in a run.
    model : str or torch.nn.Module
        A timm name, or a network. A network may be one that timm made. It may also be any other that has a
        `patch_size`, itself or in its `config`, and whose blocks attend from all tokens to all tokens by
        `torch.nn.functional.scaled_dot_product_attention`. The network is copied and not changed.
    layers, heads : int, sequence of int or "all"
        Numbers from 0; negative numbers count from the end.
    device : {"auto", "cuda", "cpu"}
    **options
        `weights`, `image_size`, `resize`, `stage` and `seed` of the command line.

    Returns
    -------
    xarray.Dataset
        `attention_rows` float32 [image, layer, head, query, key]: the attention of patches after the softmax over all
        tokens. Prefix columns are dropped, and the rest is not renormalised. The P patches are in row-major order of
        the grid. A head has P² numbers: 4 MB with 448 px and patches of 14 px.
        `cls_attention` float32 [image, layer, head, y, x], or `saliency` for a CNN.
        `prefix_mass` float32 [image, layer, head]: the mean attention of patches on CLS and registers.
        `pixels` uint8 [image, row, column, channel]: what the model saw.
        `height`, `width` [image]: of the photos.
        `is_image` bool [image, query]: False for padding.
        The attribute `grid` is (rows, columns) of patches.

    Raises
    ------
    UserError
        If an image can't be read, or the model has no attention between patches.

    Examples
    --------
    >>> maps = batchjob.attention("cat.jpg", model="vit_tiny_patch16_224", weights="random", layers=[0, -1])
    >>> maps.attention_rows.shape
    (1, 2, 3, 196, 196)
    """
    _refuse_unknown(options, _ONE_IMAGE)
    from batchjob.job import one_image

    several = isinstance(images, (list, tuple))
    sources = list(images) if several else [images]
    if not sources:
        raise UserError("attention was asked of an empty list of images; give at least one")
    name = model if isinstance(model, str) else type(model).__name__
    wanted = _pick(Options, {"model": name, "layers": layers, "heads": heads, **options})
    opened = one_image.open_model(model, wanted, device)
    return one_image.attend([one_image.as_bytes(source) for source in sources], opened, wanted)


def cluster(
    rows: Any,
    k: int | str = 5,
    *,
    algorithm: str = "kmeans",
    distance: str = "euclidean",
    seed: int = 0,
    normalise: bool = True,
) -> Any:
    """Clusters patches by what they attend to, or rows of any other features.

    Parameters
    ----------
    rows : array [..., P, D]
        P rows of D numbers for each problem: `attention(…).attention_rows`, or any NumPy array. Each problem is
        clustered by itself.
    k : int, "silhouette" or "eigengap"
        The number of clusters, 2 to 254, or the rule that finds it.
    algorithm : {"kmeans", "spectral", "agglomerative", "hdbscan"}
        `spectral`, and the rule `eigengap`, need D = P.
    distance : {"euclidean", "cosine", "hellinger"}
    seed : int
        Of the random numbers. The labels of a problem do not depend on the other problems.
    normalise : bool
        Whether to divide each row by its sum, as a run does with attention. Give False for other features.

    Returns
    -------
    array uint8 [..., P]
        Clusters numbered by first appearance, 254 for noise (hdbscan), 255 for padding. A DataArray of xarray gives a
        DataArray with the same coordinates. With the attention of a run's images and the run's options, the labels
        are the run's own.

    Raises
    ------
    UserError
        If an option is wrong, a number is NaN or infinite, or a negative number is to be normalised.

    Examples
    --------
    >>> batchjob.cluster(np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), k=2)
    array([0, 0, 1], dtype=uint8)
    """
    from batchjob.job import one_image

    wanted = _pick(Options, {"k": k, "algorithm": algorithm, "distance": distance, "seed": seed})
    if len(wanted.algorithms) != 1:
        raise UserError(f"cluster takes one algorithm, found {algorithm!r}; call it once for each")
    if not (wanted.k.isdigit() or wanted.k in RULES):
        raise UserError(f"cluster takes k as a number, 'silhouette' or 'eigengap', found {k!r}")
    return one_image.cluster(rows, wanted, normalise=normalise)


def plot(data: Any, *, query: tuple[int, int] | None = None, image: int | str = 0, photo: Any = None) -> NDArray[Any]:
    """Draws the attention of one image, or its clusters, in the style of the figures.

    Parameters
    ----------
    data : xarray.Dataset or array
        What `attention` returns, or labels: [..., P] from `cluster`, or [..., y, x] from a run.
    query : (row, column), optional
        The patch whose attention is drawn. It is marked in the photo. By default the CLS token's attention is drawn.
    image : int or str
        The image, by number or by id.
    photo : xarray.Dataset or uint8 array [H, W, 3], optional
        What is drawn under clusters: what `attention` returned, or any picture.

    Returns
    -------
    array of matplotlib Axes [layers, 1 + heads]
        The photo in the first column, then a map for each head. A notebook shows the figure by itself.

    Raises
    ------
    UserError
        If the patch or the image is not in the data, or the data are neither attention nor labels.

    Examples
    --------
    >>> maps = batchjob.attention("cat.jpg", model="vit_tiny_patch16_224", weights="random")
    >>> batchjob.plot(maps, query=(7, 9)).shape
    (1, 4)
    """
    from batchjob.figures.notebook import draw

    return draw(data, query=query, image=image, photo=photo)


def _pick(kind: type[Any], values: dict[str, Any]) -> Any:
    return kind(**{name: _as_option(kind, name, values[name]) for name in _FIELDS[kind] if name in values})


def _as_option(kind: type[Any], name: str, value: Any) -> Any:
    """Turns a Python value into that of an option: 6 into "6", [0, 5] into "0,5", an image size into "224x336"."""
    wanted = next(f.type for f in dataclasses.fields(kind) if f.name == name)
    if wanted is not str:
        return value
    if isinstance(value, PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple, range, np.ndarray)):
        return ("x" if name == "image_size" else ",").join(str(v) for v in value)
    return str(value)


def _refuse_unknown(options: dict[str, Any], known: Sequence[str]) -> None:
    for name in options:
        if name not in known:
            raise UserError(f"option {name!r} is unknown; {nearest(name, list(known))}")

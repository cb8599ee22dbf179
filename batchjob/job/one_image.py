"""Takes a few images through a model, and any rows through the clustering; plans nothing and writes nothing."""

import io
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from batchjob import clustering
from batchjob.config import Options
from batchjob.data.decode import decode
from batchjob.data.reading import ReadFailure
from batchjob.errors import UserError
from batchjob.machine import choose_device
from batchjob.model import weights
from batchjob.model.attention import Extractor, LayerMaps, renormalise
from batchjob.model.choices import resolve_heads, resolve_layers
from batchjob.model.describe import Model, describe, load_model
from batchjob.plan import geometry_of

if TYPE_CHECKING:
    import xarray
    from torch import nn

_CHUNK_BYTES = 2**28  # of rows that are clustered in one call


def open_model(model: "str | nn.Module", options: Options, device: str) -> Model:
    """Opens a model with its weights, in float32.

    Parameters
    ----------
    model
        A timm name, which is also `options.model`, or a module that is at hand.
    options
        What says image size, weights and seed.
    device
        `auto`, `cuda` or `cpu`.

    Returns
    -------
    The model on its device.

    Raises
    ------
    UserError
        The model has no map from patches to patches, or its weights can't be found.
    """
    where = choose_device(device)
    if not isinstance(model, str):
        from batchjob.model.module import wrap

        return wrap(model, options.image_size, device=where)
    spec = describe(options)
    state = weights.state_dict(weights.locate(options.model, options.weights))
    return load_model(spec, state, precision="fp32", device=where, seed=options.seed)


def as_bytes(source: Any) -> tuple[str, bytes | str]:
    """Turns a path, a PIL image or a uint8 array into (name, path or bytes of a file). Raises UserError for others."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source), os.fspath(source)
    from PIL import Image, ImageOps

    if isinstance(source, Image.Image):
        picture: Image.Image = ImageOps.exif_transpose(source)
    else:
        array = np.asarray(source)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
            raise UserError(
                f"an image is a path, a PIL image or a uint8 array [H, W, 3], found {type(source).__name__} of "
                f"{array.dtype} {list(array.shape)}; convert it, e.g. (255 * x).astype('uint8')"
            )
        picture = Image.fromarray(array)
    if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):  # what PNG holds without loss
        picture = picture.convert("RGB")
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=0)
    return "", file.getvalue()


def attend(sources: Sequence[tuple[str, bytes | str]], model: Model, options: Options) -> "xarray.Dataset":
    """Takes images through a model, one after the other; see `batchjob.attention`.

    Parameters
    ----------
    sources
        (name, path or bytes of a file) of each image, as `as_bytes` returns them.
    model
        The opened model.
    options
        What says layers, heads and how images are resized.

    Returns
    -------
    attention_rows [image, layer, head, query, key], cls_attention [image, layer, head, y, x] (`saliency` for a CNN),
    prefix_mass, pixels and sizes.

    Raises
    ------
    UserError
        An image can't be read, or the network overflows on it.
    """
    import xarray

    spec = model.spec
    geometry = geometry_of(spec, options)
    layers, heads = resolve_layers(options.layers, spec), resolve_heads(options.heads, spec)
    extract = Extractor(model, layers, heads)
    red, green, blue = (round(255 * channel) for channel in spec.mean)
    decoded, maps = [], []
    for position, (name, data) in enumerate(sources):
        try:
            photo = decode(data, geometry, (red, green, blue), interpolation=spec.interpolation)
        except ReadFailure as error:
            raise UserError(f"image {name or position} can't be read: {error.message}") from None
        decoded.append(photo)
        maps.append(_arrays(list(extract(torch.from_numpy(photo.pixels)[None])), name or str(position)))
    inside = np.stack([geometry.content_patches(photo.height, photo.width).ravel() for photo in decoded])
    cls_name = "saliency" if spec.kind == "cnn" else "cls_attention"
    rows, cls, mass = (np.stack([one[i] for one in maps]) for i in range(3))
    attributes = {
        "grid": list(spec.grid),
        "model": spec.name,
        "resize": options.resize,
        "patch_px": list(spec.patch_px),
    }
    axes = ("image", "layer", "head")
    return xarray.Dataset(
        {
            "attention_rows": ((*axes, "query", "key"), rows, {"grid": list(spec.grid)}),
            cls_name: ((*axes, "y", "x"), cls.reshape(*cls.shape[:3], *spec.grid)),
            "prefix_mass": (axes, mass),
            "pixels": (("image", "row", "column", "channel"), np.stack([p.pixels.transpose(1, 2, 0) for p in decoded])),
            "height": ("image", np.array([p.height for p in decoded], np.int32)),
            "width": ("image", np.array([p.width for p in decoded], np.int32)),
        },
        coords={
            "image": np.array([name or str(i) for i, (name, _) in enumerate(sources)], object),
            "layer": np.array(layers, np.int16),
            "head": np.array(heads, np.int16),
            "is_image": (("image", "query"), inside),
        },
        attrs=attributes,
    )


def _arrays(layers: list[LayerMaps], name: str) -> tuple[NDArray[np.float32], ...]:
    """Rows [L, H, P, P], CLS rows [L, H, P] and prefix mass [L, H] of one image. Raises UserError on an overflow."""
    if not all(bool(layer.finite.all()) for layer in layers):
        raise UserError(f"image {name}: the network overflowed, so its attention means nothing; check its weights")
    rows = torch.cat([layer.rows for layer in layers if layer.rows is not None])
    cls = torch.cat([layer.cls for layer in layers])
    mass = torch.cat([layer.prefix_mass for layer in layers])
    return tuple(x.float().cpu().numpy() for x in (rows, cls, mass))


def cluster(rows: Any, options: Options, *, normalise: bool) -> Any:
    """Clusters rows, each [P, D] by itself; see `batchjob.cluster`.

    Parameters
    ----------
    rows
        Numbers [..., P, D], an array or a DataArray.
    options
        What says k, algorithm, distance and seed.
    normalise
        Whether to scale each row to the sum 1 first, as attention.

    Returns
    -------
    uint8 [..., P]: the labels, a DataArray where the rows are one.

    Raises
    ------
    UserError
        The rows have another shape, hold NaN or infinity, or do not go with the options.
    """
    import xarray

    array = np.asarray(rows)
    if array.ndim < 2 or not array.size or array.dtype.kind not in "fiu":
        raise UserError(f"cluster takes numbers [..., P, D], found {array.dtype} {list(array.shape)}")
    if not np.isfinite(array).all():
        raise UserError("cluster was given NaN or infinity, which no distance can be told from; leave those rows out")
    if normalise and (array < 0).any():
        raise UserError("cluster was given negative numbers, which are not attention; give normalise=False")
    *outer, count, width = array.shape
    needs_square = options.algorithm == "spectral" or options.k == "eigengap"
    if needs_square and count != width:
        raise UserError(f"spectral clustering needs rows [..., P, P], found {list(array.shape)}; take kmeans")
    if options.k.isdigit() and int(options.k) > count:
        raise UserError(f"k {options.k} is more than the {count} rows of a problem; give 2 to {count}")
    problems = array.reshape(-1, count, width)
    seeds, mask = _seeds(rows, problems, options), _mask(rows, outer, count)
    step = max(1, _CHUNK_BYTES // (4 * count * width))
    parts = [
        _labels(
            problems[i : i + step],
            seeds[i : i + step],
            None if mask is None else mask[i : i + step],
            options,
            normalise,
        )
        for i in range(0, len(problems), step)
    ]
    labels = np.concatenate(parts).reshape(*outer, count)
    if not isinstance(rows, xarray.DataArray):
        return labels
    last = rows.dims[-1]
    coords = {name: value for name, value in rows.coords.items() if last not in value.dims}
    return xarray.DataArray(labels, dims=rows.dims[:-1], coords=coords, name="labels", attrs=dict(rows.attrs))


def _labels(
    problems: NDArray[Any], seeds: torch.Tensor, mask: torch.Tensor | None, options: Options, normalise: bool
) -> NDArray[np.uint8]:
    device = choose_device("auto")
    engine = clustering.find_engine("auto", device, rows=problems.shape[1])[0]
    vectors = problems.shape[1] != problems.shape[2]
    x = torch.from_numpy(np.ascontiguousarray(problems, np.float32)).to(device)
    mask = None if mask is None else mask.to(device)
    if normalise:
        x = renormalise(x[:, None], mask)[:, 0]
    if options.k.isdigit():
        k = torch.full((len(x),), int(options.k), dtype=torch.int64, device=device)
    else:
        from batchjob.clustering.choose_k import choose_k

        k = choose_k(
            options.k, x, seeds.to(device), engine=engine, distance=options.distance, mask=mask, are_vectors=vectors
        ).to(device)
    found = clustering.cluster(
        options.algorithm,
        x,
        k,
        seeds.to(device),
        engine=engine,
        distance=options.distance,
        mask=mask,
        are_vectors=vectors,
    )
    return found.labels.cpu().numpy()


def _seeds(rows: Any, problems: NDArray[Any], options: Options) -> torch.Tensor:
    """int64 [N]: the seed of each problem. Maps [image, layer, head, …] get those of a run with the same images."""
    k = int(options.k) if options.k.isdigit() else 0
    if getattr(rows, "dims", ())[:3] != ("image", "layer", "head") or not {"layer", "head"} <= set(rows.coords):
        return clustering.problem_seeds(torch.arange(len(problems)), 0, [0], k, options.seed)
    images, heads = torch.arange(rows.sizes["image"]), [int(h) for h in rows["head"].values]
    layers = [int(layer) for layer in rows["layer"].values]
    each = [clustering.problem_seeds(images, layer, heads, k, options.seed) for layer in layers]
    return torch.stack([seeds.reshape(len(images), len(heads)) for seeds in each], dim=1).flatten()


def _mask(rows: Any, outer: list[int], count: int) -> torch.Tensor | None:
    """bool [N, P]: which patches are not padding; None where no patch is padding."""
    inside = getattr(rows, "coords", {}).get("is_image")
    if inside is None or bool(inside.all()):
        return None
    image = inside.transpose(..., "query").values.reshape(*(-1,) * ("image" in inside.dims), count)
    if image.ndim == 1:
        image = image[None]
    repeats = math.prod(outer) // len(image)
    return torch.from_numpy(np.repeat(image, repeats, axis=0))

"""Draws maps and clusters of one image in a notebook, on the axes of a pyplot figure, as the study's figure does."""

import math
from typing import Any

import numpy as np
import xarray
from matplotlib.axes import Axes
from numpy.typing import NDArray

from batchjob.errors import UserError
from batchjob.figures import canvas
from batchjob.figures.palette import match_colours

_CELL = 1.5  # inches


def draw(data: Any, *, query: tuple[int, int] | None, image: int | str, photo: Any) -> NDArray[Any]:
    """Draws what `batchjob.attention` or `batchjob.cluster` returned.

    Parameters
    ----------
    data, query, image, photo
        As `batchjob.plot`, which says what is returned and raised.
    """
    if isinstance(data, xarray.Dataset):
        if "attention_rows" not in data:
            names = ", ".join(map(str, data.data_vars))
            raise UserError(f"plot takes what attention gave, or labels; this Dataset has {names}")
        return _draw_maps(data, query, image)
    if query is not None:
        raise UserError("query is for attention; labels have no query to choose")
    return _draw_labels(data, image, photo)


def _draw_maps(data: xarray.Dataset, query: tuple[int, int] | None, image: int | str) -> NDArray[Any]:
    one = _one(data, image)
    rows, columns = data.attrs["grid"]
    if query is None:
        name = "saliency" if "saliency" in data else "cls_attention"
        maps = one[name].values
    else:
        if not (0 <= query[0] < rows and 0 <= query[1] < columns):
            raise UserError(f"query {query} is not in the grid of {rows} × {columns} patches; give (row, column)")
        maps = (
            one["attention_rows"]
            .values[:, :, query[0] * columns + query[1]]
            .reshape(*one["attention_rows"].shape[:2], rows, columns)
        )
    axes = _sheet(data["layer"].values, data["head"].values, _shape(one))
    for row, layer in enumerate(axes):
        canvas.show_photo(layer[0], one["pixels"].values)
        if query is not None:
            x, y = (query[1] + 0.5) / columns, (query[0] + 0.5) / rows
            layer[0].plot([x], [y], marker="s", markersize=5, markerfacecolor="none", markeredgecolor="#ffb000")
        for column, values in enumerate(maps[row]):
            canvas.show_heat(layer[1 + column], values)
    return axes


def _draw_labels(data: Any, image: int | str, photo: Any) -> NDArray[Any]:
    labels, layers, heads = _labels(data, image)
    pixels, shape = _photo(photo, image, labels.shape[-2:])
    matched = match_colours(labels.reshape(-1, *labels.shape[-2:])).reshape(labels.shape)
    axes = _sheet(layers, heads, shape)
    for row, layer in enumerate(axes):
        canvas.show_photo(layer[0], pixels)
        for column, values in enumerate(matched[row]):
            canvas.show_labels(layer[1 + column], pixels, values)
    return axes


def _labels(data: Any, image: int | str) -> tuple[NDArray[np.uint8], list[Any], list[Any]]:
    """Returns labels [L, H, rows, columns] of one image, and the numbers of its layers and heads."""
    layers: list[Any] = []
    heads: list[Any] = []
    grid = None
    if isinstance(data, xarray.DataArray):
        data = _one(data, image)
        if "algorithm" in data.dims:
            data = data.isel(algorithm=0)
        layers, heads = (list(np.atleast_1d(data[n].values)) if n in data.coords else [] for n in ("layer", "head"))
        grid = data.attrs.get("grid")
        values = data.values
        on_grid = data.dims[-2:] == ("y", "x")
    else:
        values, on_grid = np.asarray(data), False
    if values.dtype != np.uint8 or not values.ndim:
        raise UserError(
            f"plot takes what attention gave, or labels as uint8, found {values.dtype} {list(values.shape)}"
        )
    if not on_grid:
        side = math.isqrt(values.shape[-1])
        grid = grid or (side, side)
        if math.prod(grid) != values.shape[-1]:
            raise UserError(
                f"{values.shape[-1]} patches are not a square; give labels [..., rows, columns] with dims y, x"
            )
        values = values.reshape(*values.shape[:-1], *grid)
    values = values[(None,) * max(0, 4 - values.ndim)]
    values = values.reshape(-1, *values.shape[-3:])
    return values, layers or list(range(values.shape[0])), heads or list(range(values.shape[1]))


def _photo(photo: Any, image: int | str, grid: tuple[int, ...]) -> tuple[NDArray[np.uint8], float]:
    """Returns what is drawn under the clusters, white where no photo was given, and its height over its width."""
    if isinstance(photo, xarray.Dataset):
        one = _one(photo, image)
        return one["pixels"].values, _shape(one)
    if photo is None:
        return np.full((*grid, 3), 255, np.uint8), grid[0] / grid[1]
    pixels = np.asarray(photo)
    return pixels, pixels.shape[0] / pixels.shape[1]


def _one(data: Any, image: int | str) -> Any:
    if "image" not in data.dims:
        return data
    if isinstance(image, str):
        if "image" not in data.coords or image not in data["image"].values:
            raise UserError(f"image {image!r} is not in the data; give its number, or one of its ids")
        return data.sel(image=image)
    if not -data.sizes["image"] <= image < data.sizes["image"]:
        raise UserError(f"image {image} is out of range; there are {data.sizes['image']}")
    return data.isel(image=image)


def _shape(one: xarray.Dataset) -> float:
    """Returns the height over width at which an image is drawn: those of the photo where it was squashed."""
    if one.attrs.get("resize") == "squash":
        return float(one["height"]) / float(one["width"])
    return one.sizes["row"] / one.sizes["column"]


def _sheet(layers: Any, heads: Any, ratio: float) -> NDArray[Any]:
    import matplotlib.pyplot as plt

    ratio = float(np.clip(ratio, 0.4, 2.5))
    size = (_CELL * (1 + len(heads)), len(layers) * (_CELL * ratio + 0.25))
    # not inside `canvas.style()`: pyplot starts its backend here, and a notebook's would then not show the figure
    _, axes = plt.subplots(len(layers), 1 + len(heads), figsize=size, squeeze=False, layout="constrained")
    for row, layer in enumerate(layers):
        for column, cell in enumerate(axes[row]):
            _plain(cell, ratio, "photo" if not column else f"layer {layer}, head {heads[column - 1]}")
    return np.asarray(axes)


def _plain(axes: Axes, ratio: float, title: str) -> None:
    axes.set_axis_off()
    axes.set_box_aspect(ratio)
    axes.set_title(title, fontsize=7)

"""What the page's image browser needs of each run, in few bytes: a sample of images, packed and base64-encoded."""

import base64
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from batchjob.figures.maps import peak
from batchjob.figures.palette import MAP_COLOURS, label_colours, match_colours
from batchjob.figures.photos import photo_of
from batchjob.store.run import Run

PHOTO_PX = 400
MAX_IMAGES = 80
IMAGES_BYTES = 9_000_000  # of base64 in the page; photos, clusters and CLS maps
ROWS_BYTES = 4_500_000  # of base64; attention rows of kept images
_MAX_CELLS = 400  # of a grid whose attention rows are shown: finer ones are averaged
_MAX_MATCHED = 64  # partitions of one image whose colours are matched in one go


@dataclass
class Parcel:
    """The page's data: one JSON value, and texts that are read only when they are looked at."""

    json: dict[str, Any] = field(default_factory=dict)
    blobs: dict[str, str] = field(default_factory=dict)  # element id -> base64
    size: int = 0
    rows_size: int = 0

    def add(self, name: str, data: bytes) -> str:
        """The name, after filing `data` under it."""
        text = base64.b64encode(data).decode()
        self.blobs[name] = text
        self.size += len(text)
        return name


def pack(
    views: Sequence[Run],
    wanted: Iterable[int],
    scores: Sequence[NDArray[np.floating[Any]] | None],
) -> Parcel:
    """The browser's data of as many images as fit: kept ones first, then `wanted` rows of the first run, in order.

    scores: for each run what orders the images of a head, [image, algorithm, layer, head], or None.
    """
    parcel = Parcel()
    first = views[0]
    places = [{name: row for row, name in enumerate(view.ids)} if view is not first else {} for view in views]
    chosen: dict[int, dict[str, Any]] = {}
    for row in _in_turn(first.kept_rows[:8], wanted):
        if row in chosen:
            continue
        if len(chosen) >= MAX_IMAGES or parcel.size > IMAGES_BYTES:
            break
        rows = [row if view is first else place.get(first.ids[row]) for view, place in zip(views, places, strict=True)]
        chosen[row] = _image(parcel, views, rows, scores)
    for number, view in enumerate(views):
        _pack_rows(parcel, view, number, list(chosen.values()))
    parcel.json = {
        "palette": _bytes(label_colours(254)),
        "heat": _bytes(matplotlib.colormaps[MAP_COLOURS](np.arange(256))),
        "runs": [_run(view) for view in views],
        "images": [chosen[row] for row in sorted(chosen)],
    }
    return parcel


def _run(view: Run) -> dict[str, Any]:
    grid = view.geometry.grid
    return {
        "model": view.model,
        "layers": view.layers,
        "heads": view.heads,
        "algorithms": view.patch_algorithms,
        "grid": list(grid),
        "cell": _cell(grid),
        "attention": view.attention_name,
        "rows_name": view.rows_name,
        "matched": not view.has_shared_centroids,
    }


def _image(
    parcel: Parcel,
    views: Sequence[Run],
    rows: Sequence[int | None],
    scores: Sequence[NDArray[np.floating[Any]] | None],
) -> dict[str, Any]:
    first, row = views[0], rows[0]
    assert row is not None
    photo = photo_of(first, row, side=PHOTO_PX)
    name = f"photo-{row}"
    file = io.BytesIO()
    Image.fromarray(photo.pixels).save(file, "JPEG", quality=74, optimize=True)
    parcel.add(name, file.getvalue())
    inside: list[dict[str, Any] | None] = []
    for number, (view, at, score) in enumerate(zip(views, rows, scores, strict=True)):
        if at is None or int(view.data["status"][at]) != 0:
            inside.append(None)
            continue
        span = photo.span if view is first else photo_of(view, at, side=32).span
        inside.append(
            {
                "row": at,
                "span": [round(v, 5) for v in span],
                "maps": parcel.add(f"maps-{number}-{row}", zlib.compress(_maps(view, at), 9)),
                "score": None if score is None else _rounded(score[at]),
                "rows": {},
            }
        )
    height, width = photo.pixels.shape[:2]
    return {"id": first.ids[row], "height": height, "width": width, "photo": name, "found": photo.found, "runs": inside}


def _maps(view: Run, row: int) -> bytes:
    """Labels [M, L, H, P] with matched colours, then the CLS maps [L, H, P] as indices of the colour map."""
    attention = view.data[view.attention].isel(image=row).values
    cells = attention.reshape(-1, *attention.shape[-2:])
    packed = b"".join(_index(one) for one in cells)
    if not view.patch_algorithms:
        return packed
    labels = view.data["labels"].isel(image=row).values
    if not view.has_shared_centroids:
        # matched to each other within one layer, where there are many: matching all of them grows with their number
        flat = labels.reshape(-1, *labels.shape[-2:])
        if len(flat) <= _MAX_MATCHED:
            labels = match_colours(flat).reshape(labels.shape)
        else:
            for layer in range(labels.shape[1]):
                part = labels[:, layer]
                labels[:, layer] = match_colours(part.reshape(-1, *part.shape[-2:])).reshape(part.shape)
    return bytes(labels.astype(np.uint8).tobytes()) + packed


def _pack_rows(parcel: Parcel, view: Run, number: int, images: Sequence[dict[str, Any]]) -> None:
    """Adds attention rows of the kept images, the last layer of each first, while there is room."""
    kept = set(view.kept_rows)
    shown = [image["runs"][number] for image in images]
    shown = [one for one in shown if one is not None and one["row"] in kept]
    grid = view.geometry.grid
    for place in reversed(range(len(view.layers))):
        for one in shown:
            for head in range(len(view.heads)):
                if parcel.rows_size > ROWS_BYTES:
                    return
                rows = view.data["attention_rows"].sel(kept_image=one["row"]).isel(layer=place, head=head).values
                pooled = pool(rows.astype(np.float32), grid, _cell(grid))
                before = parcel.size
                name = f"rows-{number}-{one['row']}-{place}-{head}"
                one["rows"][f"{place},{head}"] = parcel.add(
                    name, zlib.compress(b"".join(_index(row) for row in pooled), 9)
                )
                parcel.rows_size += parcel.size - before
                parcel.size = before


def pool(rows: NDArray[np.float32], grid: tuple[int, int], cell: int) -> NDArray[np.float32]:
    """[p, p]: attention [P, P] averaged over cells of `cell` × `cell` patches (less at the edges), queries and keys."""
    if cell == 1:
        return rows
    tall, wide = -(-grid[0] // cell), -(-grid[1] // cell)
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    membership = np.zeros((tall * wide, grid[0] * grid[1]), np.float32)
    membership[(y // cell) * wide + x // cell, np.arange(grid[0] * grid[1])] = 1
    membership /= membership.sum(axis=1, keepdims=True)
    return np.asarray(membership @ rows @ membership.T)


def _cell(grid: tuple[int, int]) -> int:
    return int(np.ceil(np.sqrt(max(1.0, grid[0] * grid[1] / _MAX_CELLS))))


def _index(values: NDArray[np.floating[Any]]) -> bytes:
    """The map as bytes: 0 for 0, 255 for its 99th percentile and more; NaN is 0."""
    scaled = np.nan_to_num(values.astype(np.float32) / peak(values))
    return bytes(np.round(np.clip(scaled, 0, 1) * 255).astype(np.uint8).tobytes())


def _in_turn(first: Iterable[int], then: Iterable[int]) -> Iterator[int]:
    yield from first
    yield from then


def _rounded(values: NDArray[np.floating[Any]]) -> Any:
    rounded = np.round(values.astype(np.float64), 3).astype(object)
    rounded[~np.isfinite(values)] = None  # JSON knows no NaN
    return rounded.tolist()


def _bytes(colours: NDArray[np.floating[Any]]) -> list[list[int]]:
    return [[round(float(v) * 255) for v in colour[:3]] for colour in colours]

"""Packs what the page's image browser needs of each run into few bytes: a sample of images, base64-encoded."""

import base64
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from batchjob.figures.canvas import decimals, peak
from batchjob.figures.look import scores_of_head
from batchjob.figures.objects import objects_of
from batchjob.figures.outlines import count_words, sharing
from batchjob.figures.palette import MAP_COLOURS, label_colours, match_colours
from batchjob.figures.photos import photo_of
from batchjob.metrics.uncertainty import first_half
from batchjob.store.run import Run

MAX_IMAGES = 80
IMAGES_BYTES = 9_000_000  # the most base64 of photos, clusters and CLS maps in the page
ROWS_BYTES = 4_500_000  # the most base64 of attention rows in the page
_PHOTO_PX = 400  # the longer side of a photo
_MAX_CELLS = 400  # of a grid whose attention rows are shown; finer grids are averaged
_MAX_MATCHED = 64  # maps of one image whose colours are matched to each other


@dataclass
class PageData:
    """The page's data: one JSON value, and texts that the page decodes only when they are shown."""

    json: dict[str, Any] = field(default_factory=dict)
    blobs: dict[str, str] = field(default_factory=dict)  # base64 by the id of the page's element
    categories: dict[str, str] = field(default_factory=dict)  # the colours of the categories that are outlined
    size: int = 0  # characters of the blobs but the attention rows
    rows_size: int = 0  # characters of the attention rows

    def add(self, name: str, data: bytes) -> str:
        """Adds a blob.

        Parameters
        ----------
        name
            The id of its element in the page.
        data
            What it holds.

        Returns
        -------
        The name.
        """
        text = base64.b64encode(data).decode()
        self.blobs[name] = text
        self.size += len(text)
        return name


def pack(
    runs: Sequence[Run],
    wanted: Iterable[int],
    scores: Sequence[NDArray[np.floating[Any]] | None],
    starts: Sequence[tuple[int, int]],
) -> PageData:
    """Packs as many images as fit: first those whose attention was kept, then those that are wanted.

    Parameters
    ----------
    runs
        The runs on the page.
    wanted
        Rows of the first run, the most wanted first.
    scores
        For each run the scores that order the images of a head, [image, algorithm, layer, head], or None.
    starts
        For each run the places of the layer and head that are shown first. Their attention rows are packed first.
    """
    page_data = PageData()
    first = runs[0]
    places = [{name: row for row, name in enumerate(run.ids)} if run is not first else {} for run in runs]
    chose = [_chose(run) for run in runs]
    chosen: dict[int, dict[str, Any]] = {}
    for row in _in_turn(first.kept_rows[:8], wanted):
        if row in chosen:
            continue
        if len(chosen) >= MAX_IMAGES or page_data.size > IMAGES_BYTES:
            break
        rows = [row if run is first else place.get(first.ids[row]) for run, place in zip(runs, places, strict=True)]
        chosen[row] = _image(page_data, runs, rows, scores, chose)
    for number, run in enumerate(runs):
        limit = ROWS_BYTES * (number + 1) // len(runs)  # for all runs so far, so that each run gets its part
        _pack_rows(page_data, run, list(chosen.values()), (number, *starts[number]), limit)
    images = [chosen[row] for row in sorted(chosen)]
    page_data.json = {
        "categories": page_data.categories,
        "palette": _bytes(label_colours()),
        "heat": _bytes(matplotlib.colormaps[MAP_COLOURS](np.arange(256))),
        "runs": [_run(run) for run in runs],
        "images": images,
    }
    return page_data


def _chose(run: Run) -> NDArray[np.bool_]:
    """Marks the images that are not ordered by the score of the head that they chose, as the figures do."""
    leaves_out = run.best is not None and scores_of_head(run, *run.best).leaves_out
    return first_half(run.ids) if leaves_out else np.zeros(len(run.ids), bool)


def _run(run: Run) -> dict[str, Any]:
    grid = run.geometry.grid
    chosen = None
    if run.best and run.image_score is not None:
        layer, head = run.best
        note = scores_of_head(run, layer, head).note
        chosen = {"layer": run.layers.index(layer), "head": run.heads.index(head), "note": note}
    return {
        "chosen": chosen,
        "model": run.model,
        "layers": run.layers,
        "heads": run.heads,
        "algorithms": run.patch_algorithms,
        "grid": list(grid),
        "cell": _cell(grid),
        "attention": run.attention_name,
        "rows_name": run.rows_name,
    }


def _image(
    page_data: PageData,
    runs: Sequence[Run],
    rows: Sequence[int | None],
    scores: Sequence[NDArray[np.floating[Any]] | None],
    chose: Sequence[NDArray[np.bool_]],
) -> dict[str, Any]:
    first, row = runs[0], rows[0]
    assert row is not None
    photo = photo_of(first, row, side=_PHOTO_PX)
    name = f"photo-{row}"
    file = io.BytesIO()
    Image.fromarray(photo.pixels).save(file, "JPEG", quality=74, optimize=True)
    page_data.add(name, file.getvalue())
    inside: list[dict[str, Any] | None] = []
    for number, (run, at, score) in enumerate(zip(runs, rows, scores, strict=True)):
        if at is None or int(run.data["status"][at]) != 0:
            inside.append(None)
            continue
        span = photo.span if run is first else photo_of(run, at, side=32).span
        inside.append(
            {
                "row": at,
                "span": [round(v, 5) for v in span],
                "maps": page_data.add(f"maps-{number}-{row}", zlib.compress(_maps(run, at), 9)),
                "score": None if score is None else rounded(score[at]),
                "chose": bool(chose[number][at]),
                "rows": {},
            }
        )
    height, width = photo.pixels.shape[:2]
    shape = {"height": height, "width": width, "found": photo.found}
    return {"id": first.ids[row], **shape, "photo": name, "runs": inside, **_objects(page_data, first, row)}


def _objects(page_data: PageData, run: Run, row: int) -> dict[str, Any]:
    """Packs the outlines of an image's objects, in thousandths of its width and height, and the words of its key."""
    outlines = objects_of(run, row)
    counts, rest = count_words(outlines)
    shared = "; ".join(f"one colour for {' and '.join(names)}" for names in sharing(outlines).values())
    told = {"key": [{"name": name, "count": count} for name, count in counts], "rest": rest, "shared": shared}
    if not outlines:
        return told
    page_data.categories.update({o.category: o.colour for o in outlines})
    drawn = [
        [o.category, o.kind, [np.round(1000 * line).astype(int).ravel().tolist() for line in o.lines]] for o in outlines
    ]
    text = json.dumps(drawn, separators=(",", ":"))
    return told | {"objects": page_data.add(f"objects-{row}", zlib.compress(text.encode(), 9))}


def _maps(run: Run, row: int) -> bytes:
    """Packs labels [M, L, H, P] with matched colours, and behind them CLS maps [L, H, P] as indices of the colours."""
    attention = run.data[run.attention].isel(image=row).values
    cells = attention.reshape(-1, *attention.shape[-2:])
    packed = b"".join(_index(one) for one in cells)
    if not run.patch_algorithms:
        return packed
    labels = run.data["labels"].isel(image=row).values
    if not run.has_shared_centroids:
        # Many maps are matched within their layer only, because the cost of matching grows with their number.
        flat = labels.reshape(-1, *labels.shape[-2:])
        if len(flat) <= _MAX_MATCHED:
            labels = match_colours(flat).reshape(labels.shape)
        else:
            for layer in range(labels.shape[1]):
                part = labels[:, layer]
                labels[:, layer] = match_colours(part.reshape(-1, *part.shape[-2:])).reshape(part.shape)
    return bytes(labels.astype(np.uint8).tobytes()) + packed


def _pack_rows(
    page_data: PageData, run: Run, images: Sequence[dict[str, Any]], start: tuple[int, int, int], limit: int
) -> None:
    """Adds attention rows of the kept images until a limit is reached.

    `start` is the run's number and the places of the layer and head that are shown first. The rows of that head are
    added first, then those of its layer, then those of the other layers from the last to the first.
    """
    number, first = start[0], start[1:]
    kept = set(run.kept_rows)
    shown = [image["runs"][number] for image in images]
    shown = [one for one in shown if one is not None and one["row"] in kept]
    grid = run.geometry.grid
    places = [(place, head) for place in reversed(range(len(run.layers))) for head in range(len(run.heads))]
    places.sort(key=lambda at: (at != first, at[0] != first[0]))  # the others stay in order
    for place, head in places:
        for one in shown:
            if page_data.rows_size > limit:
                return
            rows = run.data["attention_rows"].sel(kept_image=one["row"]).isel(layer=place, head=head).values
            pooled = pool(rows.astype(np.float32), grid, _cell(grid))
            before = page_data.size
            name = f"rows-{number}-{one['row']}-{place}-{head}"
            packed = zlib.compress(b"".join(_index(row) for row in pooled), 9)
            one["rows"][f"{place},{head}"] = page_data.add(name, packed)
            page_data.rows_size += page_data.size - before
            page_data.size = before


def pool(rows: NDArray[np.float32], grid: tuple[int, int], cell: int) -> NDArray[np.float32]:
    """Averages attention over cells of several patches, both its queries and its keys.

    Parameters
    ----------
    rows
        [P, P].
    grid
        (rows, columns) of the P patches.
    cell
        Patches along the side of a cell. Cells at the lower and right edge may be smaller.

    Returns
    -------
    [p, p] for p cells.
    """
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
    """Turns a map into bytes: 0 for 0 and NaN, 255 for its `peak` and above."""
    scaled = np.nan_to_num(values.astype(np.float32) / peak(values))
    return bytes(np.round(np.clip(scaled, 0, 1) * 255).astype(np.uint8).tobytes())


def _in_turn(first: Iterable[int], then: Iterable[int]) -> Iterator[int]:
    yield from first
    yield from then


def rounded(values: NDArray[np.floating[Any]]) -> Any:
    """Shortens scores for the page, which shows two decimals of them.

    Parameters
    ----------
    values
        Any shape.

    Returns
    -------
    Lists of numbers with four decimals, and of None for NaN. A score keeps all its digits if the shorter one would be
    shown as another number than in the figures: −0.00496 has three decimals −0.005, which are shown as −0.01.
    """
    found = np.empty(values.shape, object)
    for at, value in np.ndenumerate(values.astype(np.float64)):
        short = round(float(value), 4) if np.isfinite(value) else None  # JSON knows no NaN
        found[at] = float(value) if short is not None and decimals(short) != decimals(value) else short
    return found.tolist()


def _bytes(colours: NDArray[np.floating[Any]]) -> list[list[int]]:
    return [[round(float(v) * 255) for v in colour[:3]] for colour in colours]

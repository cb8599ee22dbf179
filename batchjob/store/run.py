"""A run as `stats` sees it: its arrays, read a partition at a time, and what their attributes say about them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from batchjob.codes import OK
from batchjob.config import SCORE_ARRAYS
from batchjob.errors import UserError
from batchjob.geometry import Geometry


@dataclass(frozen=True, slots=True)
class View:
    """What a run is. Cheap to hand to another process; the arrays are opened where they are read."""

    folder: Path
    geometry: Geometry
    algorithms: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    rows: int
    rows_per_partition: int
    options: Mapping[str, Any]
    model: str
    weights: str  # sha256, empty for random weights
    map_name: str  # cls_attention or saliency
    has_labels: bool
    score_names: tuple[str, ...]  # arrays that labelling wrote into scores.zarr
    annotations: str  # that the run was planned with

    @property
    def partitions(self) -> list[tuple[int, int]]:
        """(first row, past the last row) of each."""
        step = self.rows_per_partition
        return [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    @property
    def is_random(self) -> bool:
        """Whether its weights are untrained: a null model of the others."""
        return self.options.get("weights") == "random"

    @property
    def rows_name(self) -> str:
        """What its rows are called: a CNN's, which come with a saliency map, are no attention."""
        return "self-similarity" if self.map_name == "saliency" else "attention"

    @property
    def name(self) -> str:
        """The folder's name: what tables call the run."""
        return self.folder.absolute().name

    @property
    def shape(self) -> tuple[int, int, int]:
        """(algorithms, layers, heads)."""
        return len(self.algorithms), len(self.layers), len(self.heads)

    def image_ids(self) -> list[str]:
        """Every row's id."""
        return [str(i) for i in _array(_group(self.folder / "labels.zarr"), "image_id")[:]]

    def has_labelled_images(self) -> bool:
        """Whether any image is labelled: of a run where all failed, or none was begun, there is nothing to score."""
        return bool((_array(_group(self.folder / "labels.zarr"), "status")[:] == OK).any())


@dataclass(frozen=True, slots=True)
class Part:
    """The arrays of rows `start` to `stop`; None where the run has none of that name."""

    start: int
    status: NDArray[np.uint8]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    labels: NDArray[np.uint8] | None  # [n, M, L, H, P]
    k: NDArray[np.uint8] | None  # [n, M, L, H]
    maps: NDArray[np.float32] | None  # [n, L, H, P]
    prefix_mass: NDArray[np.float32]  # [n, L, H]
    scores: Mapping[str, NDArray[np.float32]]  # [n, L, H] each, from labelling


def open_view(run: str | Path) -> View:
    """What RUN is. Raises UserError where it is no run."""
    folder = Path(run)
    group = _group(folder / "labels.zarr")
    attributes: dict[str, Any] = dict(group.attrs)
    names = set(group.array_keys())
    options, model = attributes["options"], attributes["model"]
    (height, width), (patch_height, patch_width) = model["input_px"], model["patch_px"]
    scored: tuple[str, ...] = ()
    if (folder / "scores.zarr").is_dir():
        scores = _group(folder / "scores.zarr")
        # others there are from an earlier `stats`
        scored = tuple(n for names in SCORE_ARRAYS.values() for n in names if n in set(scores.array_keys()))
    return View(
        folder=folder,
        geometry=Geometry(height, width, patch_height, patch_width, options["resize"]),
        algorithms=tuple(str(m) for m in _array(group, "algorithm")[:]),
        layers=tuple(int(v) for v in _array(group, "layer")[:]),
        heads=tuple(int(v) for v in _array(group, "head")[:]),
        rows=int(attributes["rows"]),
        rows_per_partition=int(attributes["rows_per_partition"]),
        options=options,
        model=str(model["name"]),
        weights=str(attributes.get("weights", {}).get("sha256", "")),
        map_name="saliency" if "saliency" in names else "cls_attention",
        has_labels="labels" in names,
        score_names=scored,
        annotations=_planned_annotations(folder),
    )


def read_part(view: View, start: int, stop: int, *, only: tuple[str, ...] = ()) -> Part:
    """Rows `start` to `stop` of a run; of `labels`, `maps` and `scores` only those named, all by default."""
    group = _group(view.folder / "labels.zarr")
    wanted = only or ("labels", "maps", "scores")
    rows = slice(start, stop)

    def flat(name: str) -> Any:
        values = _array(group, name)[rows]
        return values.reshape(*values.shape[:-2], -1)

    has_labels = view.has_labels and "labels" in wanted
    scores: dict[str, NDArray[np.float32]] = {}
    if view.score_names and "scores" in wanted:
        held = _group(view.folder / "scores.zarr")
        scores = {name: _array(held, name)[rows] for name in view.score_names}
    return Part(
        start=start,
        status=_array(group, "status")[rows],
        height=_array(group, "height")[rows],
        width=_array(group, "width")[rows],
        labels=flat("labels") if has_labels else None,
        k=_array(group, "k")[rows] if view.has_labels else None,
        maps=flat(view.map_name).astype(np.float32) if "maps" in wanted else None,
        prefix_mass=_array(group, "prefix_mass")[rows].astype(np.float32),
        scores=scores,
    )


def read_rows(view: View, rows: NDArray[np.integer[Any]]) -> Part:
    """Any rows of a run, in the order given, as `read_part` reads them; rows in sequence cost least."""
    low, high = int(rows.min()), int(rows.max()) + 1
    if high - low <= 4 * len(rows):
        part = read_part(view, low, high, only=("labels", "maps"))
        return _pick(part, rows - low)
    parts = [read_part(view, int(row), int(row) + 1, only=("labels", "maps")) for row in rows]
    return _join(parts)


def _pick(part: Part, rows: NDArray[np.integer[Any]]) -> Part:
    def pick(values: Any) -> Any:
        return None if values is None else values[rows]

    fields = ("status", "height", "width", "labels", "k", "maps", "prefix_mass")
    return Part(start=part.start, scores={}, **{name: pick(getattr(part, name)) for name in fields})


def _join(parts: list[Part]) -> Part:
    fields = ("status", "height", "width", "labels", "k", "maps", "prefix_mass")
    joined = {n: [getattr(p, n) for p in parts] for n in fields}
    whole: dict[str, Any] = {n: None if v[0] is None else np.concatenate(v) for n, v in joined.items()}
    return Part(start=parts[0].start, scores={}, **whole)


def locality_sums(view: View) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """[L, H, dy, dx] of attention and [L, dy, dx] of pairs over all partitions; None where labelling kept none."""
    path = view.folder / "scores.zarr"
    if not path.is_dir() or "locality_sum" not in set(_group(path).array_keys()):
        return None
    group = _group(path)
    total = np.zeros(_array(group, "locality_sum").shape[1:])
    pairs = np.zeros(_array(group, "locality_count").shape[1:])
    for partition in range(len(view.partitions)):
        total += _array(group, "locality_sum")[partition]
        pairs += _array(group, "locality_count")[partition]
    return total, pairs


def kept_maps(view: View) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(row, attention rows [L, H, P, P]) of every image whose maps were kept."""
    group = _group(view.folder / "labels.zarr")
    if "attention_rows" not in set(group.array_keys()):
        return
    for slot, row in enumerate(_array(group, "kept_image")[:]):
        yield int(row), np.asarray(_array(group, "attention_rows")[slot], np.float32)


def _planned_annotations(folder: Path) -> str:
    import json

    try:
        return str(json.loads((folder / "plan.json").read_text()).get("annotations", ""))
    except (OSError, ValueError):
        return ""  # labels.zarr by itself can be scored too


def _group(path: Path) -> zarr.Group:
    try:
        return zarr.open_group(str(path), mode="r", zarr_format=3)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path.parent} is no run: there is no {path.name}; make one with: batchjob run DATA"
        ) from error


def _array(group: zarr.Group, name: str) -> Any:
    return group[name]

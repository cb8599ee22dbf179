"""A run as the pictures need it: its plan, its arrays, and its photos as the model saw them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray
from numpy.typing import NDArray

import batchjob
from batchjob.errors import UserError
from batchjob.geometry import Geometry

Choice = Literal["spread", "random", "best", "worst"]
_MISSING_GREY = 205
# Scores that images and heads are put in order by: the first that is there.
ORDERING = ("instance_ari", "image_ari", "pair_auc_matched", "jaccard_60", "coherence")


@dataclass(frozen=True)
class Photo:
    """The part of a photo that the model saw, and how much of it the patch grid covers."""

    pixels: NDArray[np.uint8]  # [height, width, 3], at the photo's own aspect ratio
    span: tuple[float, float]  # (height, width) of the grid in photo heights and widths; over 1 where padded
    found: bool  # False: the file is gone, `pixels` are grey


@dataclass(frozen=True)
class RunView:
    """What figures and report read of a run; nothing here knows a device."""

    folder: Path
    plan: dict[str, Any]
    data: xarray.Dataset

    @cached_property
    def geometry(self) -> Geometry:
        """From photo to patch grid."""
        return Geometry(**self.plan["geometry"])

    @cached_property
    def ids(self) -> list[str]:
        """The images' original ids, in the order of the rows."""
        return [str(i) for i in self.data["image_id"].values]

    @property
    def model(self) -> str:
        return str(self.plan["options"]["model"])

    @property
    def weights(self) -> str:
        """Where the weights came from, in a word: hub, file, wheel, cache, random."""
        return str(self.plan["weights"].get("source", ""))

    @property
    def layers(self) -> list[int]:
        return [int(v) for v in self.data["layer"].values]

    @property
    def heads(self) -> list[int]:
        return [int(v) for v in self.data["head"].values]

    @property
    def algorithms(self) -> list[str]:
        """The clustering algorithms whose labels lie on the patch grid; none where whole images were clustered."""
        return [str(v) for v in self.data["algorithm"].values] if "labels" in self.data else []

    @property
    def attention(self) -> str:
        """The name of the array of CLS rows: `cls_attention`, or `saliency` of a CNN."""
        return "saliency" if "saliency" in self.data else "cls_attention"

    @property
    def attention_name(self) -> str:
        if self.attention == "saliency":
            return "saliency"
        return "CLS attention" if self.plan["model"].get("has_cls", True) else "mean attention"

    @property
    def rows_name(self) -> str:
        """What a patch's row is called: a CNN's is the self-similarity of features, which is no attention."""
        return "self-similarity" if self.attention == "saliency" else "attention"

    @property
    def numbers_mean_centroids(self) -> bool:
        """Whether a label is a centroid of the data set, the same in all images."""
        return bool(self.plan["options"].get("scope") == "dataset")

    @cached_property
    def ok_rows(self) -> NDArray[np.intp]:
        """Rows of images that were labelled."""
        return np.flatnonzero(self.data["status"].values == 0)

    @cached_property
    def kept_rows(self) -> list[int]:
        """Rows whose attention was stored (`--keep-maps`) and did not fail."""
        if "attention_rows" not in self.data:
            return []
        ok = set(self.ok_rows.tolist())
        return [int(r) for r in self.data["kept_image"].values if int(r) in ok]

    def table(self, name: str) -> pd.DataFrame | None:
        """RUN/stats/NAME.parquet, or None where `stats` has not written it."""
        path = self.folder / "stats" / f"{name}.parquet"
        return pd.read_parquet(path) if path.exists() else None

    @cached_property
    def best(self) -> tuple[int, int] | None:
        """(layer, head) that the statistics chose on one half of the images; None without statistics."""
        selection = self.table("selection")
        if selection is None or not len(selection):
            return None
        for score in ORDERING:
            rows = selection[selection["score"] == score]
            if len(rows):
                return int(rows["layer"].iloc[0]), int(rows["head"].iloc[0])
        return None

    @cached_property
    def image_score(self) -> tuple[str, NDArray[np.float32]] | None:
        """What tells good images from bad ones: (name, [image, algorithm, layer, head]); None without statistics."""
        path = self.folder / "scores.zarr"
        if self.table("summary") is None or not path.exists():
            return None
        scores = xarray.open_zarr(path, chunks=None)
        for name in ORDERING:
            if name in scores and np.isfinite(values := scores[name].values).any():
                shape = (len(values), len(self.data["algorithm"]), len(self.layers), len(self.heads))
                return name, np.asarray(np.broadcast_to(values if values.ndim == 4 else values[:, None], shape))
        return None

    @cached_property
    def _index(self) -> Any:
        from batchjob.data.sources import ImageIndex

        return ImageIndex.load(self.folder / "index")

    def photo(self, row: int, *, side: int = 448) -> Photo:
        """The photo of a row, its longer side `side` pixels; grey where its file can't be read any more."""
        from batchjob.data.decode import ReadFailure, decode

        height, width = int(self.data["height"][row]), int(self.data["width"][row])
        shown, span = display(self.geometry, height, width, side)
        try:
            pixels = decode(self._index.read(row), shown, (255, 255, 255)).pixels.transpose(1, 2, 0)
        except (ReadFailure, OSError):
            grey = np.full((shown.height, shown.width, 3), _MISSING_GREY, np.uint8)
            return Photo(grey, span, False)
        return Photo(np.ascontiguousarray(pixels), span, True)

    def row_of(self, image_id: str) -> int:
        """The row of an id, or of its end (`000000000139.jpg`, `000000000139`). Raises UserError."""
        from batchjob.errors import nearest

        if image_id in self.ids:
            return self.ids.index(image_id)
        ends = [r for r, name in enumerate(self.ids) if name.endswith("/" + image_id) or _stem(name) == image_id]
        if len(ends) == 1:
            return ends[0]
        if ends:
            raise UserError(f"image {image_id!r} is {len(ends)} images of {self.folder}; give the whole id")
        raise UserError(f"image {image_id!r} is not in {self.folder}; {nearest(image_id, self.ids[:2000])[:200]}")

    def choose(
        self, how: str, count: int, *, seed: int = 0, score: NDArray[np.floating[Any]] | None = None
    ) -> list[int]:
        """Rows of at most `count` labelled images: `spread` evenly, `random`, `best`, `worst`, or ids with commas.

        `best` and `worst` go by `score` [images], NaN left out. Raises UserError where there is none.
        """
        rows = self.ok_rows
        if how == "spread":
            return [int(r) for r in rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]]
        if how == "random":
            chosen = np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False)
            return sorted(int(r) for r in chosen)
        if how in ("best", "worst"):
            if score is None:
                raise UserError(
                    f"--images {how} goes by a score, and there is none; make it: batchjob stats {self.folder}"
                )
            scored = rows[np.isfinite(score[rows])]
            order = scored[np.argsort(score[scored], kind="stable")]
            return [int(r) for r in (order[::-1] if how == "best" else order)[:count]]
        return [self.row_of(name) for name in _split_ids(how, self.ids)]

    def stack(self, name: str, rows: Sequence[int], **where: int) -> NDArray[Any]:
        """The array `name` for these rows, one read a row: 8 images of a million cost 8 chunks."""
        array = self.data[name].sel({k: v for k, v in where.items() if k in self.data[name].dims})
        return np.stack([array.isel(image=row).values for row in rows])


def open_run(folder: Path) -> RunView:
    """The run, read lazily. Raises UserError where it is none or has no labelled image."""
    data = batchjob.open(folder)
    try:
        plan = json.loads((folder / "plan.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}/plan.json can't be read ({error}); make the run with: batchjob run DATA RUN"
        ) from None
    view = RunView(folder, plan, data)
    if not len(view.ok_rows):
        raise UserError(f"{folder} has no labelled image to show; go on with: batchjob run {plan['data']} {folder}")
    return view


def display(geometry: Geometry, height: int, width: int, side: int) -> tuple[Geometry, tuple[float, float]]:
    """How to decode a photo for people: what the model saw of it, unsquashed; and the grid's span over it."""
    left, top, right, bottom = geometry.source_box(height, width)
    tall, wide = bottom - top, right - left
    scale = side / max(tall, wide)
    pixels = max(1, round(tall * scale)), max(1, round(wide * scale))
    content = geometry.content_size(height, width)
    kind: Any = "crop" if geometry.resize == "crop" else "squash"
    return Geometry(*pixels, 1, 1, kind), (geometry.height / content[0], geometry.width / content[1])


def _stem(name: str) -> str:
    return name.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _split_ids(text: str, ids: Sequence[str]) -> list[str]:
    """The ids that `text` names; an id may hold a comma itself."""
    return [text] if text in ids else [part.strip() for part in text.split(",") if part.strip()]

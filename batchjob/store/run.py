"""A run as `stats`, `figures` and `report` read it: what it is, its arrays, and the tables that `stats` wrote."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from batchjob.codes import OK, PENDING
from batchjob.errors import UserError
from batchjob.geometry import Geometry
from batchjob.metrics import catalogue
from batchjob.plan import load as load_plan
from batchjob.store.outputs import raise_for_damage
from batchjob.store.part import Part, join

if TYPE_CHECKING:
    import pandas as pd
    import xarray

ANNOTATIONS_SCORED = "stats/annotations.json"
COMPARED_RUNS = "stats/comparison.json"  # the runs of comparison.parquet: name -> `stats_digest`
_VECTORS = {"query": "queries", "key": "keys", "value": "values", "token": "tokens"}  # by --cluster-on


class Run:
    """A run and what it holds; reads arrays when they are asked for.

    Another process that it is handed to opens the folder again. Raises UserError where the folder is not a run.
    """

    def __init__(self, folder: str | PathLike[str], name: str = "") -> None:
        self.folder = Path(folder)
        self.name = name or self.folder.absolute().name  # what tables call the run by
        attributes: dict[str, Any] = dict(_open(self.folder / "labels.zarr").attrs)
        self.options: Mapping[str, Any] = attributes["options"]  # the result options, as plan.json has them
        self.spec: Mapping[str, Any] = attributes["model"]  # the fields of `plan.ModelSpec`
        self.model = str(self.spec["name"])
        self.rows = int(attributes["rows"])
        self.rows_per_partition = int(attributes["rows_per_partition"])
        self.weights: Mapping[str, Any] = attributes.get("weights", {})
        self.precision = str(attributes.get("precision", ""))  # fp32, fp16 or bf16: what `auto` came to

    def __reduce__(self) -> tuple[type["Run"], tuple[Path, str]]:
        return Run, (self.folder, self.name)

    @cached_property
    def geometry(self) -> Geometry:
        """How a photo becomes the model's input and its grid of patches."""
        (height, width), (patch_height, patch_width) = self.spec["input_px"], self.spec["patch_px"]
        return Geometry(height, width, patch_height, patch_width, self.options["resize"])

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The content of plan.json. Raises UserError where it can't be read, or the index is not the planned one."""
        return load_plan(self.folder).to_json()

    @classmethod
    def checked(cls, folder: str | PathLike[str], *, stats: bool = True) -> "Run":
        """Opens a run and checks that it is what was planned and published. Reads every byte of it.

        Parameters
        ----------
        folder
            The folder of the run. Where it holds labels.zarr but not plan.json, nothing is checked.
        stats
            Whether to check the statistics as well.

        Returns
        -------
        The run.

        Raises
        ------
        UserError
            The folder is not a run, or something in it changed or is damaged.
        """
        from batchjob.store.lifecycle import check_static

        if (Path(folder) / "plan.json").exists():
            load_plan(Path(folder))
            raise_for_damage(Path(folder), lambda: check_static(Path(folder), contents=True), stats=stats)
        return cls(folder)

    @property
    def annotations(self) -> str:
        """The annotations that the run was planned with; empty where there are none, or plan.json is not there."""
        return str(self.plan.get("annotations", "")) if (self.folder / "plan.json").exists() else ""

    @property
    def data_asked(self) -> str:
        """DATA as an absolute path; the word `DATA` where plan.json is not there."""
        return str(self.plan["data"]) if (self.folder / "plan.json").exists() else "DATA"

    @property
    def annotations_scored(self) -> dict[str, str]:
        """Absolute path -> sha256 of the annotations that `stats --annotations` was given; empty where it had none."""
        return self._written(ANNOTATIONS_SCORED)

    # ---- the coordinates ----

    @cached_property
    def _group(self) -> zarr.Group:
        return _open(self.folder / "labels.zarr")

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self._group.array_keys())

    @cached_property
    def algorithms(self) -> tuple[str, ...]:
        """The clustering algorithms, in the order of the arrays."""
        return tuple(str(m) for m in self._array("algorithm")[:])

    @property
    def patch_algorithms(self) -> tuple[str, ...]:
        """The algorithms that labelled patches; none where whole images were clustered."""
        return self.algorithms if self.has_labels else ()

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers, counted from 0."""
        return tuple(int(v) for v in self._array("layer")[:])

    @cached_property
    def heads(self) -> tuple[int, ...]:
        """The numbers of the heads, counted from 0."""
        return tuple(int(v) for v in self._array("head")[:])

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many algorithms, layers and heads the run has."""
        return len(self.algorithms), len(self.layers), len(self.heads)

    @cached_property
    def ids(self) -> list[str]:
        """The original id of every image."""
        return [str(i) for i in self._array("image_id")[:]]

    @cached_property
    def classes(self) -> list[str] | None:
        """The class of every image, such as its folder's name, "" where it has none; None where the data have none."""
        names = str(self._group.attrs.get("coordinates", "")).split()
        return [str(value) for value in self._array(names[0])[:]] if names else None

    @cached_property
    def ok_rows(self) -> NDArray[np.intp]:
        """The rows of the images that are labelled."""
        return np.flatnonzero(self._status == OK)

    @cached_property
    def pending_rows(self) -> NDArray[np.intp]:
        """The rows of the images that are neither labelled nor failed."""
        return np.flatnonzero(self._status == PENDING)

    @cached_property
    def _status(self) -> NDArray[np.uint8]:
        return np.asarray(self._array("status")[:], np.uint8)

    @cached_property
    def image_sizes(self) -> NDArray[np.int32]:
        """[rows, 2]: the height and width of each photo in pixels, 0 where it is not labelled."""
        return np.stack([self._array("height")[:], self._array("width")[:]], axis=1)

    @cached_property
    def kept_rows(self) -> list[int]:
        """The rows of the images whose attention rows are stored (`--keep-maps`) and that did not fail."""
        if "attention_rows" not in self._names:
            return []
        ok = set(self.ok_rows.tolist())
        return [int(r) for r in self._array("kept_image")[:] if int(r) in ok]

    # ---- what its arrays are called ----

    @property
    def is_random(self) -> bool:
        """Whether the weights are random, so that the run is a null model of others."""
        return self.options.get("weights") == "random"

    @property
    def has_labels(self) -> bool:
        """Whether patches have labels. They do not where whole images were clustered."""
        return "labels" in self._names

    @property
    def has_shared_centroids(self) -> bool:
        """Whether a label is the number of a centroid that all images share."""
        return bool(self.options.get("scope") == "dataset")

    @property
    def attention(self) -> str:
        """The name of the array with a map for each head: `cls_attention`, or `saliency` where it is not attention."""
        return "saliency" if "saliency" in self._names else "cls_attention"

    @property
    def attention_name(self) -> str:
        """What the array `attention` holds, in words."""
        if self.attention == "saliency":
            return "saliency"
        return "CLS attention" if self.spec.get("has_cls", True) else "mean attention"

    @property
    def rows_name(self) -> str:
        """What a patch's row is called: `attention`, or `self-similarity` where it is computed from features."""
        return "self-similarity" if self.attention == "saliency" else "attention"

    @property
    def clustered(self) -> str:
        """What was clustered: attention, queries, keys, values or tokens; self-similarity or features of a CNN."""
        what = str(self.options.get("cluster_on", "attention"))
        if what == "attention":
            return self.rows_name
        return "features" if self.spec.get("kind") == "cnn" else _VECTORS[what]

    @cached_property
    def score_names(self) -> tuple[str, ...]:
        """The names of the arrays of scores.zarr that labelling filled; `stats` may have written others there."""
        if not (self.folder / "scores.zarr").is_dir():
            return ()
        held = set(_open(self.folder / "scores.zarr").array_keys())
        return tuple(n for names in catalogue.labelling_arrays().values() for n in names if n in held)

    # ---- reading ----

    @cached_property
    def data(self) -> "xarray.Dataset":
        """All arrays of labels.zarr as one Dataset, read lazily."""
        from batchjob.store.lifecycle import open_labels

        return open_labels(self.folder)

    def stack(self, name: str, rows: Sequence[int], **where: int) -> NDArray[Any]:
        """Reads an array for some images, one after the other: 8 images of a million cost 8 chunks.

        Parameters
        ----------
        name
            The array of labels.zarr; its first dimension is `image`.
        rows
            Rows of images.
        where
            Coordinates by dimension, such as `layer=11`; those of dimensions that the array lacks are ignored.

        Returns
        -------
        [n, ...]: the images' values.
        """
        array = self.data[name].sel({k: v for k, v in where.items() if k in self.data[name].dims})
        return np.stack([array.isel(image=row).values for row in rows])

    def read(self, start: int, stop: int, *, only: tuple[str, ...] = ("labels", "repeats", "maps", "scores")) -> "Part":
        """Reads the arrays of consecutive images.

        Parameters
        ----------
        start, stop
            The range of rows [start, stop).
        only
            Which of the large arrays to read, of `labels`, `repeats`, `maps`, `objects` and `scores`.

        Returns
        -------
        The small arrays and those named.
        """
        rows = slice(start, stop)

        def flat(name: str) -> Any:
            values = self._array(name)[rows]
            return values.reshape(*values.shape[:-2], -1)

        scores: dict[str, NDArray[np.float32]] = {}
        if self.score_names and "scores" in only:
            held = _open(self.folder / "scores.zarr")
            scores = {name: _values(held, name)[rows] for name in self.score_names}
        return Part(
            start=start,
            status=self._array("status")[rows],
            height=self._array("height")[rows],
            width=self._array("width")[rows],
            labels=flat("labels") if self.has_labels and "labels" in only else None,
            k=self._array("k")[rows] if self.has_labels else None,
            settled=self._array("settled")[rows] if "settled" in self._names else None,
            repeats=flat("labels_repeats") if "labels_repeats" in self._names and "repeats" in only else None,
            maps=flat(self.attention).astype(np.float32) if "maps" in only else None,
            prefix_mass=self._array("prefix_mass")[rows].astype(np.float32),
            scores=scores,
            instance=flat("instance") if "instance" in self._names and "objects" in only else None,
            category=flat("category") if "category" in self._names and "objects" in only else None,
        )

    def read_rows(self, rows: NDArray[np.integer[Any]]) -> "Part":
        """Reads labels and maps of images at any rows, in this order. Rows close to each other are read together."""
        low, high = int(rows.min()), int(rows.max()) + 1
        if high - low <= 4 * len(rows):
            return self.read(low, high, only=("labels", "maps")).pick(rows - low)
        return join([self.read(int(row), int(row) + 1, only=("labels", "maps")) for row in rows])

    def read_score(self, name: str) -> NDArray[np.float64] | None:
        """Reads an array of scores.zarr as [n, C], all dimensions but `image` flattened; None where it is not there."""
        path = self.folder / "scores.zarr"
        if not (path / name).is_dir():
            return None
        group = zarr.open_group(str(path), mode="r", zarr_format=3, use_consolidated=False)
        return np.asarray(_values(group, name)[:].reshape(self.rows, -1), np.float64)

    def table(self, name: str) -> "pd.DataFrame | None":
        """Reads the table RUN/stats/NAME.parquet; None where `stats` has not written it."""
        import pandas as pd

        path = self.folder / "stats" / f"{name}.parquet"
        return pd.read_parquet(path) if path.exists() else None

    @property
    def stats_digest(self) -> str:
        """The sha256 of the heads' figures, which tells whether a comparison is of these; empty without statistics."""
        paths = [self.folder / "stats" / f"{name}.parquet" for name in ("summary", "selection")]
        if not all(path.exists() for path in paths):
            return ""
        return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()

    @property
    def compared(self) -> dict[str, str]:
        """The runs that the table `comparison` is of: name -> `stats_digest` when they were compared."""
        return self._written(COMPARED_RUNS)

    def _written(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return dict(json.loads(path.read_text())) if path.exists() else {}

    @cached_property
    def answer(self) -> tuple[str, list[str]]:
        """The study's question, and the sentences of the answer that `stats` wrote; none where it could not answer."""
        found = self._written("stats/answer.json")
        return found.get("question", ""), found.get("lines", [])

    @cached_property
    def best(self) -> tuple[int, int] | None:
        """The numbers (layer, head) that `stats` chose on one half of the images, by the first algorithm.

        None where it has chosen none by `image_score`: a head that another score chose is not told beside this one.
        """
        rows = [] if self.image_score is None else self.chosen(self.image_score[0])
        return (int(rows[0]["layer"]), int(rows[0]["head"])) if rows else None

    def chosen(self, score: str) -> list[dict[str, Any]]:
        """Lists the rows of the table `selection` of the head that a score chose, by the first algorithm.

        There is one for each null model, and none where the score chose no head.
        """
        selection = self.table("selection")
        if selection is None or not len(selection):
            return []
        mine = (selection["score"] == score) & selection["algorithm"].isin([self.algorithms[0], ""])
        return selection[mine].to_dict("records")  # type: ignore[return-value]

    @cached_property
    def image_score(self) -> tuple[str, NDArray[np.float32]] | None:
        """The score that orders the images: (name, [image, algorithm, layer, head]); None without statistics."""
        if self.table("summary") is None:
            return None
        for name in catalogue.leading():
            values = self.read_score(name)
            if values is not None and np.isfinite(values).any():
                shape = (self.rows, *self.shape)
                by_head = values.reshape(
                    shape if values.shape[1] == np.prod(self.shape) else (self.rows, 1, *shape[2:])
                )
                return name, np.broadcast_to(by_head, shape).astype(np.float32)
        return None

    def _array(self, name: str) -> Any:
        return _values(self._group, name)


def tell_apart(runs: Sequence[Run]) -> None:
    """Names runs whose folders have one name by as many folders above them as tell all of them apart: `a/run`, `b/run`.

    Parameters
    ----------
    runs
        Runs of different folders; their `name` is set.
    """
    paths, names = [run.folder.absolute().parts for run in runs], [run.name for run in runs]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(runs):
            break
    for run, name in zip(runs, names, strict=True):
        run.name = name


def _open(path: Path) -> zarr.Group:
    try:
        return zarr.open_group(str(path), mode="r", zarr_format=3)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path.parent} is not a run: it has no {path.name}; make one with: batchjob run DATA"
        ) from error


def _values(group: zarr.Group, name: str) -> Any:
    return group[name]

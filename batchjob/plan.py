"""The frozen plan of a run, RUN/plan.json: the resolved options, the model, the rows and their partitions."""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, overload

from batchjob.codes import SCHEMA, VERSION
from batchjob.config import Options, difference, options_from_json, to_json
from batchjob.errors import UserError
from batchjob.files import new_scratch, write_file
from batchjob.geometry import Geometry
from batchjob.inputs import raise_for_changes
from batchjob.metrics import catalogue

_CHUNK_ROWS = (
    1024  # images of one inner chunk; chunks of 512 took a sixth longer to write, and as long to read one image
)
_LEAST_CHUNK_ROWS = 64
_MOST_ROWS = 4096
_AGAIN = "where DATA is unchanged, it is made again by the command that made the run: batchjob run DATA"
_MOST_ROWS_ON_CPU = 256  # a kill then costs two minutes at 2 images/s; a GPU labels 4096 images in seconds
_FEWEST_ROWS = 8
_FEWEST_ROWS_ON_GPU = 64  # batches don't cross partitions


class DamagedPlan(UserError):
    """RUN/plan.json is there, and its content is not what was written."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the other packages need to know of a model. Pairs are (height, width)."""

    name: str
    kind: Literal["vit", "cnn"]
    input_px: tuple[int, int]
    patch_px: tuple[int, int]  # input pixels of a patch; of a CNN, its stage's stride
    grid: tuple[int, int]
    num_prefix_tokens: int  # CLS, distillation and register tokens, which come before the patches
    num_layers: int
    num_heads: int
    has_cls: bool  # if so, the CLS token is the first
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    head_dim: int  # numbers of a query; of a CNN, channels of the stage
    embed_dim: int  # numbers of a token; of a CNN, channels of the stage
    parameters: int
    activation_numbers: int  # of one image in the forward pass, alive at once
    stage: int = -1  # of a CNN's feature stages, counted from 0; -1 for a ViT

    @property
    def num_patches(self) -> int:
        """P, how many patches an image has."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """T, how many tokens an image has: patches and prefix tokens."""
        return self.num_prefix_tokens + self.num_patches

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Makes the spec from what `to_json` returned."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)


class Partitions(Sequence[tuple[int, int]]):
    """The range [start, stop) of each partition's rows; all are of one size, except that the last may be shorter."""

    def __init__(self, row_count: int, rows_per_partition: int) -> None:
        self._row_count, self._size = row_count, rows_per_partition

    def __len__(self) -> int:
        return -(-self._row_count // self._size)

    @overload
    def __getitem__(self, at: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, at: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, at: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        start = range(0, self._row_count, self._size)[at]
        return start, min(start + self._size, self._row_count)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that decides the result of a run, with every `auto` resolved. Row i is image i, whatever fails."""

    options: Options  # as asked, so that asking again compares equal
    data: str
    model: ModelSpec
    weights: dict[str, str]
    annotations: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    precision: str  # fp32, fp16 or bf16
    row_count: int
    rows_per_partition: int
    kept_rows: tuple[int, ...]  # images whose attention rows are stored
    inputs: dict[str, str]  # path -> sha256 of what is read again: RUN/index, annotations
    versions: dict[str, str]
    categories: dict[str, str] = dataclasses.field(default_factory=dict)  # names by number, of the annotations

    @property
    def geometry(self) -> Geometry:
        """How a photo becomes the model's input and its grid of patches."""
        return geometry_of(self.model, self.options)

    @property
    def has_attention(self) -> bool:
        """Whether the run's maps are attention. They are not for a CNN, nor where a layer's tokens are clustered."""
        return self.model.kind == "vit" and self.options.cluster_on != "token"

    @property
    def vector_size(self) -> int:
        """D, how many numbers a query, key, value or token has where these are clustered; 0 for attention rows."""
        sizes = {"attention": 0, "token": self.model.embed_dim}
        return sizes.get(self.options.cluster_on, self.model.head_dim)

    @property
    def score_names(self) -> tuple[str, ...]:
        """The names of the arrays of scores.zarr that labelling fills, in order."""
        groups = self.options.score_groups
        arrays = catalogue.labelling_arrays(of_vectors=self.vector_size > 0)
        return tuple(name for group, names in arrays.items() if group in groups for name in names)

    @property
    def partitions(self) -> Partitions:
        """The range [start, stop) of each partition's rows."""
        return Partitions(self.row_count, self.rows_per_partition)

    @property
    def partition_count(self) -> int:
        """How many partitions the run has."""
        return len(self.partitions)

    def rows_of(self, partition: int) -> tuple[int, int]:
        """The range [start, stop) of a partition's rows. Raises IndexError where there is no such partition."""
        return self.partitions[partition]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values.

        `digest` is the sha256 of all that decides the result; `versions_digest` is that of `versions`, which do not.
        """
        values: dict[str, Any] = {"schema": SCHEMA} | {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {"options": to_json(self.options), "model": self.model.to_json(), "geometry": self.geometry.to_json()}
        values = json.loads(json.dumps(values))
        decisive = {name: value for name, value in values.items() if name != "versions"}
        return values | {"digest": _digest(decisive), "versions_digest": _digest(values["versions"])}

    @property
    def digest(self) -> str:
        """The sha256 (hex) of all that decides the result."""
        return str(self.to_json()["digest"])


def _digest(decisive: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def geometry_of(model: ModelSpec, options: Options) -> Geometry:
    """Tells how a photo becomes the model's input and its patches.

    Parameters
    ----------
    model
        Its input and patches, in pixels.
    options
        `resize` is read.

    Returns
    -------
    The geometry of every image of a run.
    """
    (height, width), (patch_height, patch_width) = model.input_px, model.patch_px
    resize: Any = options.resize
    return Geometry(height, width, patch_height, patch_width, resize)


def choose_rows_per_partition(asked: str, row_count: int, *, is_for_gpu: bool) -> int:
    """Chooses how many images make a partition.

    Parameters
    ----------
    asked
        `--rows-per-partition`: a number, or `auto` for what `rows_per_partition` chooses.
    row_count
        Images of the run.
    is_for_gpu
        Whether the run is meant for a GPU.

    Returns
    -------
    Images of a partition, 1 to 4096.

    Raises
    ------
    UserError
        `asked` is not a number, is out of range, or can't be cut into chunks.
    """
    if asked == "auto":
        return rows_per_partition(row_count, on_gpu=is_for_gpu)
    if not asked.isdigit():
        raise UserError(f"--rows-per-partition {asked!r} is not a number of images; give 1 to {_MOST_ROWS}, or auto")
    rows_per_chunk(int(asked))
    return int(asked)


def rows_per_partition(row_count: int, *, on_gpu: bool) -> int:
    """Chooses a power of two near the square root of the number of images, for `--rows-per-partition auto`.

    There are then about as many partitions as images in each. This lets many processes share the work and keeps small
    what a kill loses, at any scale: COCO val2017 gets 79 partitions, train2017 462, a billion images 244,141.

    Parameters
    ----------
    row_count
        Images of the run.
    on_gpu
        Whether the run is meant for a GPU: 64 to 4096 images a partition, else 8 to 256.

    Returns
    -------
    Images of a partition.
    """
    low, high = (_FEWEST_ROWS_ON_GPU, _MOST_ROWS) if on_gpu else (_FEWEST_ROWS, _MOST_ROWS_ON_CPU)
    return max(low, min(high, 1 << max(0, math.isqrt(row_count).bit_length() - 1)))


def rows_per_chunk(rows: int) -> int:
    """Finds how many images make an inner chunk of a shard of `rows` images: the largest divisor up to 1024.

    Raises UserError where `rows` is out of range or its divisors are too small; names the next number that works.
    """
    found = _largest_divisor(rows)
    if rows > _MOST_ROWS:
        raise UserError(f"--rows-per-partition {rows} is more than {_MOST_ROWS}; give {_MOST_ROWS} or less, or auto")
    if rows < 1:
        raise UserError(f"--rows-per-partition {rows} holds no image; give 1 to {_MOST_ROWS}, or auto")
    if rows > _CHUNK_ROWS and found < _LEAST_CHUNK_ROWS:
        better = next(n for n in range(rows, _MOST_ROWS + 1) if _largest_divisor(n) >= _LEAST_CHUNK_ROWS)
        raise UserError(
            f"--rows-per-partition {rows} has no divisor from {_LEAST_CHUNK_ROWS} to {_CHUNK_ROWS} "
            f"to cut shards into chunks; try {better}"
        )
    return found


def _largest_divisor(rows: int) -> int:
    return next((n for n in range(min(_CHUNK_ROWS, rows), 0, -1) if rows % n == 0), 1)


def default_run(data: str, options: Options) -> Path:
    """Names the folder of a run where the user names none, so that other data or options get another folder.

    Parameters
    ----------
    data
        DATA as the user gave it.
    options
        The result options.

    Returns
    -------
    runs/DATA-MODEL-HASH, relative to the working folder.
    """
    where = os.path.abspath(data) if "{" not in data else data
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(data).name or Path(where).name).strip("_") or "data"
    digest = hashlib.sha256(os.fsencode(f"{where}\0{options.digest}")).hexdigest()
    on = "" if options.cluster_on == "attention" else f"-{options.cluster_on}"
    return Path("runs") / f"{name[:60]}-{options.model.replace('/', '_')}{on}-{digest[:8]}"


def save(plan: Plan, run: Path) -> None:
    """Writes RUN/plan.json whole. It makes the folder a run, so everything else of the run must be there.

    Parameters
    ----------
    plan
        The plan.
    run
        The folder of the run.
    """
    scratch = new_scratch(run)
    write_file(run / "plan.json", json.dumps(plan.to_json(), indent=1).encode(), scratch)
    scratch.rmdir()


def load(run: Path, *, checks_index: bool = True) -> Plan:
    """Reads the plan of a run.

    Parameters
    ----------
    run
        The folder of the run.
    checks_index
        Whether to read the files of RUN/index and compare them with the plan.

    Returns
    -------
    A plan that equals the saved one.

    Raises
    ------
    UserError
        RUN is not a run, has another schema version, or its index is not the planned one.
    DamagedPlan
        plan.json is not what was written; a kind of UserError.
    """
    path = run / "plan.json"
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{run} is not a run: it has no plan.json ({error.strerror}); make one with: batchjob plan DATA {run}"
        ) from error
    except ValueError as error:
        raise DamagedPlan(f"{path} is not JSON ({error}); {_AGAIN} {run} …") from error
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        found = values.get("schema") if isinstance(values, dict) else None
        raise UserError(f"{path} has schema {found}, this version reads {SCHEMA}; use the version that wrote it")
    decisive = {name: v for name, v in values.items() if name not in ("versions", "digest", "versions_digest")}
    versions_digest = _digest(values.get("versions", {}))
    if _digest(decisive) != values.get("digest") or values.get("versions_digest", versions_digest) != versions_digest:
        raise DamagedPlan(f"{path} is damaged or was changed by hand: its hash is not its content's; {_AGAIN} {run} …")
    fields = {f.name: values.get(f.name, {}) for f in dataclasses.fields(Plan)}
    fields |= {"options": options_from_json(values["options"]), "model": ModelSpec.from_json(values["model"])}
    fields |= {name: tuple(values[name]) for name in ("layers", "heads", "kept_rows")}
    plan = Plan(**fields)
    if checks_index:
        raise_for_changes(run, plan.inputs)
    return plan


def check_same(plan: Plan, run: Path, data: str, options: Options) -> None:
    """Checks that a run was planned with these data and options.

    Parameters
    ----------
    plan, run
        The plan that is there, and the folder that it is in.
    data, options
        What is asked for now.

    Raises
    ------
    UserError
        They differ; says in what.
    """
    parts = [difference(options, plan.options)]
    if os.path.abspath(data) != os.path.abspath(plan.data):
        parts.insert(0, f"DATA: planned {plan.data!r}, asked {data!r}")
    if changes := "; ".join(p for p in parts if p):
        raise UserError(f"{run} was planned with other options: {changes}; give another RUN, or leave RUN away")


def versions() -> dict[str, str]:
    """Returns the versions of what computes the result: this package, Python, and the libraries that matter."""
    import platform

    names = ("torch", "timm", "numpy", "zarr", "pillow", "scikit-learn")
    return {"batchjob": VERSION, "python": platform.python_version()} | {
        n: importlib.metadata.version(n) for n in names
    }

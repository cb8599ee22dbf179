"""The frozen plan of a run: rows, partitions of whole store shards, everything resolved; RUN/plan.json."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchjob.codes import SCHEMA
from batchjob.config import SCORE_ARRAYS, Options, difference, options_from_json, to_json
from batchjob.errors import UserError
from batchjob.geometry import Geometry
from batchjob.store import arrays as layout

if TYPE_CHECKING:
    from batchjob.model.describe import ModelSpec


@dataclass(frozen=True, slots=True)
class Plan:
    """All that decides the result of a run, resolved: RUN/plan.json. Row i is image i, whatever fails."""

    options: Options  # as asked, so that asking again compares equal
    data: str
    model: "ModelSpec"
    weights: dict[str, str]
    annotations: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    precision: str  # fp32, fp16 or bf16
    row_count: int
    rows_per_partition: int
    kept_rows: tuple[int, ...]  # images whose attention rows are stored
    index_sha256: str
    versions: dict[str, str]

    @property
    def geometry(self) -> Geometry:
        """From photo to patch grid."""
        return geometry_of(self.model, self.options)

    @property
    def score_names(self) -> tuple[str, ...]:
        """The arrays of scores.zarr that labelling fills, in order."""
        groups = self.options.score_groups
        return tuple(name for group, names in SCORE_ARRAYS.items() if group in groups for name in names)

    @property
    def partitions(self) -> list[tuple[int, int]]:
        """(first row, past the last row) of each partition."""
        return partition_bounds(self.row_count, self.rows_per_partition)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `digest` is the sha256 of the others but the versions."""
        values: dict[str, Any] = {"schema": SCHEMA} | {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {"options": to_json(self.options), "model": self.model.to_json(), "geometry": self.geometry.to_json()}
        values = json.loads(json.dumps(values))
        decisive = {name: value for name, value in values.items() if name != "versions"}
        return values | {"digest": hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()}

    @property
    def digest(self) -> str:
        """sha256 (hex) of all that decides the result."""
        return str(self.to_json()["digest"])


def geometry_of(model: "ModelSpec", options: Options) -> Geometry:
    """From photo to the model's input and its patches."""
    (height, width), (patch_height, patch_width) = model.input_px, model.patch_px
    resize: Any = options.resize
    return Geometry(height, width, patch_height, patch_width, resize)


def partition_bounds(row_count: int, rows_per_partition: int) -> list[tuple[int, int]]:
    """The rows cut into partitions of equal size, the last one shorter; none for no rows."""
    return [(start, min(start + rows_per_partition, row_count)) for start in range(0, row_count, rows_per_partition)]


def choose_rows_per_partition(asked: str, row_count: int, *, is_for_gpu: bool) -> int:
    """Images of one partition: `asked`, or what `layout.rows_per_partition` makes of their number.

    Raises UserError where it is no number, out of range, or can't be cut into chunks.
    """
    if asked == "auto":
        return layout.rows_per_partition(row_count, on_gpu=is_for_gpu)
    if not asked.isdigit():
        raise UserError(f"--rows-per-partition {asked!r} is no number of images; give 1 to {layout.MOST_ROWS}, or auto")
    layout.rows_per_chunk(int(asked))
    return int(asked)


def default_run(data: str, options: Options) -> Path:
    """runs/DATA-MODEL-HASH: other data or other options make another run by themselves."""
    where = os.path.abspath(data) if "{" not in data else data
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(data).name or Path(where).name).strip("_") or "data"
    digest = hashlib.sha256(os.fsencode(f"{where}\0{options.digest}")).hexdigest()
    return Path("runs") / f"{name[:60]}-{options.model.replace('/', '_')}-{digest[:8]}"


def save(plan: Plan, run: Path) -> None:
    """Writes RUN/plan.json whole: it is what makes a folder a run, so it comes last."""
    part = run / f"plan.json.part{os.getpid()}"
    with part.open("w") as file:
        json.dump(plan.to_json(), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(run / "plan.json")


def load(run: Path) -> Plan:
    """The plan of a run; equal to the one saved. Raises UserError where RUN is none, or of another schema version."""
    from batchjob.model.describe import ModelSpec

    path = run / "plan.json"
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{run} is no run: no plan.json to read ({error.strerror}); make one with: batchjob plan DATA {run}"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); the run is damaged, delete it and plan again") from error
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        found = values.get("schema") if isinstance(values, dict) else None
        raise UserError(f"{path} has schema {found}, this version reads {SCHEMA}; use the version that wrote it")
    fields = {f.name: values[f.name] for f in dataclasses.fields(Plan)}
    fields |= {"options": options_from_json(values["options"]), "model": ModelSpec.from_json(values["model"])}
    fields |= {name: tuple(values[name]) for name in ("layers", "heads", "kept_rows")}
    plan = Plan(**fields)
    if plan.digest != values["digest"]:
        raise UserError(f"{path} was changed by hand: its hash is not its content's; restore it or plan again")
    return plan


def check_same(plan: Plan, run: Path, data: str, options: Options) -> None:
    """Raises UserError with the difference where RUN was planned with other data or options."""
    parts = [difference(options, plan.options)]
    if os.path.abspath(data) != os.path.abspath(plan.data):
        parts.insert(0, f"DATA: planned {plan.data!r}, asked {data!r}")
    if changes := "; ".join(p for p in parts if p):
        raise UserError(f"{run} was planned with other options: {changes}; give another RUN, or leave RUN away")


def versions() -> dict[str, str]:
    """What computed the result: this package, Python's libraries that matter."""
    import platform

    from batchjob import __version__

    names = ("torch", "timm", "numpy", "zarr", "pillow", "scikit-learn")
    return {"batchjob": __version__, "python": platform.python_version()} | {
        n: importlib.metadata.version(n) for n in names
    }

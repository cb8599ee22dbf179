"""Gathers what the page says about a run: options, failures, timing, and the command that runs it again."""

import csv
import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchjob import retries
from batchjob.config import Options, command_of
from batchjob.errors import tell
from batchjob.figures.pictures import model_name
from batchjob.stats.text import left_out, settled
from batchjob.store.run import Run

_WAY_OUT = {
    "images": "decoding: more --workers, or photos on a faster disk",
    "model": "the model: a GPU, a smaller --image-size, or fp16",
    "clustering": "the clustering: a GPU, fewer --n-init, a smaller k or fewer heads",
    "scores": "the scores: leave out --scores, or fewer layers",
    "results": "what is stored: fewer --keep-maps",
    "store": "the disk that the store is written to",
}
_SHOWN_FAILURES = 20


@dataclass(frozen=True)
class Failure:
    """One line of failures.csv."""

    image_id: str
    cause: str
    message: str


@dataclass(frozen=True)
class Timing:
    """Where the time of labelling went, over all processes."""

    images: int
    seconds: float  # summed over all processes
    rate: float  # images a second of all processes together
    stages: list[tuple[str, float]]  # name and share of the seconds, the largest first, the rest last
    where: str  # the devices
    bottleneck: str  # the slowest stage and what speeds it up


@dataclass(frozen=True)
class Facts:
    """What the page says about one run."""

    folder: str
    title: str  # the model's name
    images: int
    labelled: int
    pending: int  # images that were not tried yet
    causes: list[tuple[str, int]]  # of failures, with how many images failed by each
    failures: list[Failure]  # the first few
    settled: list[str]  # how often each algorithm found its best partition again; empty without statistics
    retry: str  # how images are tried again whose cause of failure may pass; empty where there are none
    timing: Timing | None  # None where no times were logged
    command: str  # that makes the run again
    rows: list[tuple[str, str]]  # what was run: name and value
    options: list[tuple[str, str, bool]]  # name, value, whether it is the default
    versions: list[tuple[str, str]]  # of libraries
    plan: str  # JSON


def gather(run: Run) -> Facts:
    """Gathers the facts of a run from its folder; those that the folder does not have are left out."""
    plan = run.plan
    causes, failures = _failures(run.folder / "failures.csv")
    defaults = {f.name: f.default for f in dataclasses.fields(Options)}
    options = [(n.replace("_", "-"), str(v), v == defaults.get(n)) for n, v in plan["options"].items()]
    return Facts(
        folder=str(run.folder),
        title=model_name(run),
        images=len(run.ids),
        labelled=len(run.ok_rows),
        pending=int((run.data["status"].values == 255).sum()),
        causes=causes,
        failures=failures,
        settled=settled(_counts(run), run.options),
        retry=retries.sentence(retries.count_of(dict(causes)), run.data_asked, run.folder, run.options),
        timing=_timing(run.folder / "logs"),
        command=command_of(plan["data"], run.folder, plan["options"]),
        rows=_rows(run),
        options=options,
        versions=[(name, str(value)) for name, value in plan.get("versions", {}).items()],
        plan=json.dumps(plan, indent=1),
    )


def _rows(run: Run) -> list[tuple[str, str]]:
    plan, options, model = run.plan, run.options, run.spec
    weights = plan["weights"]
    origin = weights.get("origin") or weights.get("source") or "unknown"
    height, width = model["input_px"]
    grid = run.geometry.grid
    rows = [
        ("Images", f"{len(run.ids):,} of {plan['data']}"),
        ("Model", run.model),
        ("Weights", f"{origin}, sha256 {weights['sha256'][:12]}" if weights.get("sha256") else origin),
        ("Input", f"{height} × {width} pixels ({options['resize']}), {grid[0]} × {grid[1]} patches"),
        ("Layers", _ranges(run.layers)),
        ("Heads", _ranges(run.heads)),
        (
            "Clustering",
            f"{', '.join(options['algorithm'].split(','))}; k = {options['k']}; {options['distance']} distance",
        ),
        ("Scope", "each image by itself" if options["scope"] == "image" else "one set of centroids for the data set"),
        ("Precision", str(plan["precision"])),
    ]
    if options["cluster_on"] != "attention":
        rows.append(("Clustered", f"{options['cluster_on']} vectors in place of attention rows"))
    rows += [("Annotations", str(plan["annotations"]))] if plan.get("annotations") else []
    for name, lines in (("Settled", settled(_counts(run), options)), ("Left out", left_out(_counts(run)))):
        rows += [(name, "; ".join(lines))] if lines else []
    return rows


def _counts(run: Run) -> dict[str, int]:
    """Reads what `stats` counted; empty without statistics."""
    path = run.folder / "stats" / "counts.json"
    found: dict[str, int] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _ranges(numbers: Sequence[int]) -> str:
    """Writes ascending numbers as ranges: `0–5, 11` for 0, 1, 2, 3, 4, 5 and 11."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}–{p[-1]}" for p in parts)


def _failures(path: Path) -> tuple[list[tuple[str, int]], list[Failure]]:
    if not path.exists():
        return [], []
    causes: Counter[str] = Counter()
    first: list[Failure] = []
    with path.open(newline="", encoding="utf-8", errors="backslashreplace") as file:
        for row in csv.DictReader(file):
            causes[row["cause"]] += 1
            if len(first) < _SHOWN_FAILURES:
                first.append(Failure(row["image_id"], row["cause"], row["message"]))
    return causes.most_common(), first


def _timing_of_process(path: Path) -> dict[str, Any] | None:
    """Reads the times that a process logged; None where the file is damaged, since no result depends on it."""
    try:
        one = json.loads(path.read_text())
        stages = {str(name): float(seconds) for name, seconds in one["stages"].items()}
        facts = {"seconds": float(one["seconds"]), "images": int(one["images"]), "device": str(one["device"])}
    except (ValueError, LookupError, TypeError, AttributeError):
        tell(f"{path} is damaged; no result depends on it, and the page leaves it out")
        return None
    return facts | {"stages": stages}


def _timing(folder: Path) -> Timing | None:
    read = [_timing_of_process(path) for path in sorted(folder.glob("timing-*.json"))]
    found = [one for one in read if one is not None and one["seconds"] > 0 and one["images"] > 0]
    if not found:
        return None
    seconds = sum(one["seconds"] for one in found)
    stages: Counter[str] = Counter()
    for one in found:
        stages.update(one["stages"])
    shares = [(name, spent / seconds) for name, spent in stages.most_common()]
    rest = 1 - sum(share for _, share in shares)
    if rest > 0.005:
        shares.append(("other", rest))
    devices = Counter(str(one["device"]) for one in found)
    where = ", ".join(f"{count} × {name}" if count > 1 else name for name, count in devices.items())
    slowest = shares[0][0]
    images = sum(one["images"] for one in found)
    return Timing(images, seconds, images / seconds * len(found), shares, where, _WAY_OUT.get(slowest, slowest))

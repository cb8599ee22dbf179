"""`make gpu-proof`: runs every check that needs a GPU, in under eight minutes; writes Markdown and JSON.

The table names every part: one that lacks a library with that library, one that fails with its reason, and one for
which no time is left. Exits with 1 if a part failed, 2 without a GPU.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from sklearn.metrics import adjusted_rand_score

from batchjob.clustering import open_engine
from batchjob.clustering.self_check import find_refusal
from batchjob.codebook.kmeans import open_refiner
from batchjob.codebook.processes import ALONE
from batchjob.config import Options, Runtime
from batchjob.job import label as job
from batchjob.job.prepare import prepare
from batchjob.plan import load
from tests.benchmarks import bench_attention, bench_clustering, bench_dataset, bench_job
from tests.benchmarks.__main__ import machine
from tests.benchmarks.harness import Contest, measure
from tests.conftest import ROOT, SAMPLE

BUDGET_S = 8 * 60


@dataclass(frozen=True, slots=True)
class Part:
    """One check: `run` yields (what, result) as it goes; `needs` are the modules that it needs."""

    name: str
    run: Callable[[], Iterator[tuple[str, str]]]
    needs: tuple[str, ...] = ()
    seconds: float = 60.0  # at most; the part is not begun with less time left


@dataclass(frozen=True, slots=True)
class Shown:
    """One row of the table."""

    part: str
    what: str
    result: str
    state: str  # shown, failed, left out


def run_parts(parts: Sequence[Part], budget_s: float, tell: Callable[[str], None]) -> list[Shown]:
    """Yields the rows of all parts, in order; a failure of one does not end the others."""
    began, rows = time.monotonic(), []

    def add(part: str, what: str, result: str, state: str) -> None:
        rows.append(Shown(part, what, result, state))
        tell(f"| {part} | {what} | {result} | {state} |")

    for part in parts:
        lacking = [name for name in part.needs if importlib.util.find_spec(name) is None]
        left = budget_s - (time.monotonic() - began)
        if lacking or left < part.seconds:
            add(part.name, "–", f"needs {', '.join(lacking)}" if lacking else f"{left:.0f} s were left", "left out")
            continue
        try:
            for what, result in part.run():
                add(part.name, what, result, "failed" if result.startswith("FAILED") else "shown")
        except Exception as error:  # whatever the failure is, the other parts can still run
            add(part.name, "–", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "failed")
    return rows


def tests_of_the_gpu() -> Iterator[tuple[str, str]]:
    """Runs `make test-gpu`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no output"
    yield "pytest -m gpu", last if done.returncode == 0 else f"FAILED: {last}"


def engines_agree() -> Iterator[tuple[str, str]]:
    """Runs the check of the triton engine for the sizes of common models, and cuml's in dataset scope."""
    device = torch.device("cuda", 0)
    for rows in (196, 256, 1369):
        for n_init in (4, 0):
            refusal = find_refusal(lambda: open_engine("triton", device), device, rows=rows, n_init=n_init)
            yield f"triton, {rows} rows, n_init {n_init or 'auto'}", f"FAILED: {refusal}" if refusal else "agrees"
    refiner, why = open_refiner("auto", device, ALONE)
    yield "dataset scope", f"{refiner.name}: {why}"


def contests(found: Iterator[Contest]) -> Callable[[], Iterator[tuple[str, str]]]:
    """Returns a function that yields the ratios of these contests, from three rounds each."""

    def run() -> Iterator[tuple[str, str]]:
        for contest in found:
            r = measure(contest, rounds=3)
            aim = "" if r.aim is None else f", aim {r.aim:g}"
            yield (
                f"{r.name} / {r.peer}",
                f"{r.ratio:.2f} ({r.low:.2f}–{r.high:.2f}){aim}; {r.ours_per_s:.4g} {r.unit}/s",
            )

    return run


def half_precision_keeps_labels() -> Iterator[tuple[str, str]]:
    """Compares labels of the sample in fp16 and fp32, and of two seeds in fp32 as the scatter of the search."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for precision, seed in (("fp32", 0), ("fp16", 0), ("fp32", 1)):
            run = Path(folder) / f"{precision}-{seed}"
            prepare(str(SAMPLE), run, Options(k="instances", precision=precision, seed=seed), say=lambda line: None)
            runtime = Runtime(device="cuda", workers="2")
            job.label(run, runtime, range(load(run).partition_count), say=lambda line: None)
            labels = np.asarray(zarr.open_group(run / "labels.zarr", mode="r")["labels"])
            found[precision, seed] = labels.reshape(-1, labels.shape[-2] * labels.shape[-1])
        for other, words in ((("fp16", 0), "fp16 against fp32"), (("fp32", 1), "two seeds in fp32")):
            scores = [adjusted_rand_score(a, b) for a, b in zip(found["fp32", 0], found[other], strict=True)]
            yield f"mean ARI of labels, {words}", f"{np.mean(scores):.3f}"


def parts() -> list[Part]:
    """Returns all parts, the most important first."""
    rows = bench_clustering.attention_rows(8)
    return [
        Part("engines", engines_agree, ("triton",), 90),
        Part("clustering", contests(bench_clustering.gpu_contests(rows, smoke=False)), (), 60),
        Part("attention", contests(bench_attention.contests(smoke=False)), (), 40),
        Part("job", contests(bench_job.contests(smoke=False)), (), 60),
        Part("precision", half_precision_keeps_labels, (), 30),
        Part("dataset scope", contests(bench_dataset.contests(smoke=False)), ("cuml",), 40),
        Part("tests", tests_of_the_gpu, (), 120),
    ]


def table(rows: Sequence[Shown], facts: dict[str, Any]) -> str:
    """Returns the Markdown of all rows."""
    head = f"# What this card showed\n\n{', '.join(f'{name} {value}' for name, value in facts.items())}\n"
    lines = [f"| {r.part} | {r.what} | {r.result} | {r.state} |" for r in rows]
    return "\n".join([head, "| part | what | result | |", "| --- | --- | --- | --- |", *lines, ""])


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-proof: torch sees no GPU here; run it on a machine that has one", file=sys.stderr)
        return 2
    rows = run_parts(parts(), BUDGET_S, lambda line: print(line, flush=True))
    out = ROOT / "build"
    out.mkdir(exist_ok=True)
    (out / "gpu-proof.md").write_text(table(rows, machine()))
    (out / "gpu-proof.json").write_text(
        json.dumps({"machine": machine(), "rows": [dataclasses.asdict(row) for row in rows]}, indent=1)
    )
    print(f"written to {out / 'gpu-proof.md'} and gpu-proof.json", file=sys.stderr)
    return 1 if any(row.state == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

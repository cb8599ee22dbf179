"""The benchmarks: each runs on little data, and the harness computes the right ratio."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.benchmarks import harness
from tests.benchmarks.harness import Contest, measure
from tests.conftest import ROOT

NAMES = sorted(p.stem.removeprefix("bench_") for p in (ROOT / "tests" / "benchmarks").glob("bench_*.py"))
NAMES.remove("launches")  # it counts launches and does not have contests


@pytest.mark.parametrize("name", NAMES)
def test_the_benchmark_runs_and_gives_finite_ratios(name: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "tests.benchmarks", "--smoke", "--out", str(out), name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert results, "the benchmark measured nothing"
    for result in results:
        assert 0 < result["low"] <= result["ratio"] <= result["high"] < float("inf")
        assert result["peer"]
    assert done.stdout.count("| ") >= len(results)


@pytest.mark.slow
def test_the_cost_of_stats_is_measured_as_runs_grow() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.stats_at_scale", "--images", "24", "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if " MB" in line]
    assert [row[0] for row in rows] == ["| 24", "| 30"]
    assert all(float(row[2]) > 1 and 100 < float(row[4].split()[0].replace(",", "")) < 4000 for row in rows)
    assert "118,000 images on 16 cores" in done.stdout


def test_the_ratio_is_peer_seconds_over_our_seconds_for_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    seconds = {"ours": 2.0, "theirs": 4.0}
    clock = SimpleNamespace(perf_counter=lambda: sum(seconds[call] for call in calls))
    monkeypatch.setattr(harness, "time", clock)

    def ours() -> None:
        calls.append("ours")

    def theirs() -> None:
        calls.append("theirs")

    result = measure(Contest("nap", "longer nap", "nap", 4, ours, theirs, theirs_items=1), rounds=3)
    assert result.ratio == 8  # the peer takes twice as long for a quarter of the work
    assert result.rounds == 3
    assert calls[2:6] == ["ours", "theirs", "theirs", "ours"], "who goes first alternates"


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "speed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "job" in done.stderr


@pytest.mark.slow
def test_launches_are_counted_a_line_each(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "--smoke", "--out", str(tmp_path / "bench.json"), "launches"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert "clustering, triton, P = 196, 4 starts, k = 5: 5 kernels, 0 waits" in done.stdout
    assert "loop, 1 layer, --scores pairs, 2 batches, all: " in done.stdout

"""The job scripts by themselves, Slurm's commands played: when an attempt got on, and what each ending says."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

PLAYED = {
    # what a step does is in STEP; with the number of the attempt in $attempt, and the file of its end in $ends
    "srun": """
attempt=$(($(cat "$COUNT" 2>/dev/null || echo 0) + 1)); echo $attempt >"$COUNT"
while [ "${1##*/}" != task.sh ]; do shift; done
ends=$2
eval "$STEP"
""",
    # Slurm ends a job that is requeued
    "scontrol": """
case "$1" in
  show) echo node1 ;;
  requeue) kill -KILL $PPID ;;
esac""",
}
KILLED = 'echo "137 node1" >"$ends/0"; exit 137'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that is a plan.json and the folders of a fit and of published partitions."""
    (tmp_path / "bin").mkdir()
    for name, script in PLAYED.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("fit", "done", "logs"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "plan.json").write_text("{}")
    return tmp_path / "run"


def job(run: Path, name: str, step: str) -> "subprocess.CompletedProcess[str]":
    """The job script `name` on `run`, whose steps do `step`."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("BATCHJOB_", "SLURM_"))}
    own = {
        "PATH": f"{run.parent / 'bin'}:{os.environ['PATH']}",
        "BATCHJOB_HOME": str(ROOT),
        "BATCHJOB_PYTHON": "/usr/bin/true",
        "BATCHJOB_SCRATCH": str(run.parent / "scratch"),
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node1",
        "COUNT": str(run.parent / "count"),
        "STEP": step,
        "RUN": str(run),
    }
    command = ["bash", ROOT / "slurm" / f"{name}.sbatch", run]
    return subprocess.run(command, env=clean | own, capture_output=True, text=True, check=False, timeout=60)


KEEPS = {
    "fit": ('touch -d "$when" "$RUN/fit/new"; mv "$RUN/fit/new" "$RUN/fit/checkpoint.npz"', "done: the centroids are"),
    "label": (
        'echo \'{"job": "slurm-7"}\' >"$RUN/done/00000$attempt.json"; touch -d "$when" "$RUN/done/00000$attempt.json"',
        "done: 3 partitions are published",
    ),
}


@pytest.mark.parametrize("when", ["yesterday", "tomorrow", "now"])
@pytest.mark.parametrize("name", KEEPS)
def test_an_attempt_that_got_on_is_followed_by_another_whatever_the_clock_says(run: Path, name: str, when: str) -> None:
    keep, end = KEEPS[name]
    ended = job(
        run, name, f'when={when}; {keep}; [ $attempt -lt 3 ] || {{ echo "0 node1" >"$ends/0"; exit 0; }}; {KILLED}'
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("a task failed (exit 137)") == 2
    assert "going on from what the fit has kept" in ended.stdout or "after 1 partitions: going on" in ended.stdout
    assert end in ended.stdout


@pytest.mark.parametrize(("name", "told"), [("fit", "this attempt kept nothing new"), ("label", "no partition was")])
def test_an_attempt_that_kept_nothing_new_is_the_last(run: Path, name: str, told: str) -> None:
    (run / "fit" / "rows-0-of-1.bin").write_bytes(b"of an earlier job")
    (run / "done" / "000000.json").write_text('{"job": "slurm-7"}')
    others = 'echo \'{"job": "slurm-8"}\' >"$RUN/done/000004.json"; '  # another job on the same run got on
    ended = job(run, name, (others if name == "label" else "") + KILLED)
    assert ended.returncode == 137
    assert told in ended.stdout
    assert (run.parent / "count").read_text() == "1\n"


@pytest.mark.parametrize(("name", "advice"), [("fit", "fewer --fit-rows"), ("label", "fewer --rows-per-partition")])
def test_the_third_attempt_in_a_row_that_a_limit_stopped_too_early_is_the_last_with_the_advice_of_its_kind(
    run: Path, name: str, advice: str
) -> None:
    step = 'kill -USR1 $PPID; echo "75 node1" >"$ends/0"; exit 75'
    for _ in range(2):
        ended = job(run, name, step)
        assert ended.returncode == -9
        assert "back into the queue" in ended.stdout
    ended = job(run, name, step)
    assert ended.returncode == 75
    assert "three attempts in a row were stopped before they finished anything: not requeued" in ended.stdout
    assert advice in ended.stdout


def test_attempts_that_a_limit_stopped_are_counted_anew_once_one_got_on(run: Path) -> None:
    step = 'kill -USR1 $PPID; echo "75 node1" >"$ends/0"; exit 75'
    assert [job(run, "fit", step).returncode for _ in range(2)] == [-9, -9]
    assert job(run, "fit", f'touch "$RUN/fit/rows-0-of-1.bin"; {step}').returncode == -9
    assert [job(run, "fit", step).returncode for _ in range(3)] == [-9, -9, 75]

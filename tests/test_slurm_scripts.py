"""The job scripts with imitated Slurm commands: progress of attempts, messages at each ending, and `status`."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

PLAYED = {
    # STEP holds what a step does; it finds the number of the attempt in $attempt and the folder of exit codes in $ends
    "srun": """
echo "$*" >"$COUNT.asked"
attempt=$(($(cat "$COUNT" 2>/dev/null || echo 0) + 1)); echo $attempt >"$COUNT"
while [ "${1##*/}" != task.sh ]; do shift; done
ends=$2
eval "$STEP"
""",
    # Slurm ends a requeued job
    "scontrol": """
case "$1" in
  show) echo node1 ;;
  requeue) kill -KILL $PPID ;;
esac""",
}
KILLED = 'echo "137 node1" >"$ends/0"; exit 137'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Makes a run of a plan.json and the folders of a fit and of published partitions."""
    (tmp_path / "bin").mkdir()
    for name, script in PLAYED.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("fit", "done", "logs"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "plan.json").write_text("{}")
    return tmp_path / "run"


def job(run: Path, name: str, step: str) -> "subprocess.CompletedProcess[str]":
    """Runs the job script `name` on `run`, whose steps do `step`."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("BATCHJOB_", "SLURM_"))}
    own = {
        "PATH": f"{run.parent / 'bin'}:{os.environ['PATH']}",
        "BATCHJOB_HOME": str(ROOT),
        "BATCHJOB_PYTHON": "/usr/bin/true",
        "BATCHJOB_SCRATCH": str(run.parent / "scratch"),
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "1",
        "SLURM_CPUS_PER_TASK": "3",
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
        "done: 3 partitions published",
    ),
}


@pytest.mark.parametrize("when", ["yesterday", "tomorrow", "now"])
@pytest.mark.parametrize("name", KEEPS)
def test_an_attempt_with_progress_is_followed_by_another_whatever_the_clock_says(
    run: Path, name: str, when: str
) -> None:
    keep, end = KEEPS[name]
    ended = job(
        run, name, f'when={when}; {keep}; [ $attempt -lt 3 ] || {{ echo "0 node1" >"$ends/0"; exit 0; }}; {KILLED}'
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("a task failed (exit 137)") == 2
    assert "going on from what the fit has kept" in ended.stdout or "after 1 partition: going on" in ended.stdout
    assert end in ended.stdout


@pytest.mark.parametrize(("name", "told"), [("fit", "this attempt kept nothing new"), ("label", "no partition was")])
def test_an_attempt_that_kept_nothing_new_is_the_last(run: Path, name: str, told: str) -> None:
    (run / "fit" / "rows-0-of-1.bin").write_bytes(b"of an earlier job")
    (run / "done" / "000000.json").write_text('{"job": "slurm-7"}')
    others = 'echo \'{"job": "slurm-8"}\' >"$RUN/done/000004.json"; '  # another job on the same run makes progress
    ended = job(run, name, (others if name == "label" else "") + KILLED)
    assert ended.returncode == 137
    assert told in ended.stdout
    assert (run.parent / "count").read_text() == "1\n"


@pytest.mark.parametrize(("name", "advice"), [("fit", "fewer --fit-rows"), ("label", "fewer --rows-per-partition")])
def test_after_three_attempts_in_a_row_that_a_time_limit_stopped_too_early_the_job_ends_with_advice(
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


def test_each_step_asks_for_the_cpus_of_each_task(run: Path) -> None:
    job(run, "label", KILLED)
    asked = (run.parent / "count.asked").read_text()
    assert "--cpus-per-task=3 " in asked, "srun does not inherit them since Slurm 22.05"


def test_stopped_attempts_are_counted_anew_after_one_with_progress(run: Path) -> None:
    step = 'kill -USR1 $PPID; echo "75 node1" >"$ends/0"; exit 75'
    assert [job(run, "fit", step).returncode for _ in range(2)] == [-9, -9]
    assert job(run, "fit", f'touch "$RUN/fit/rows-0-of-1.bin"; {step}').returncode == -9
    assert [job(run, "fit", step).returncode for _ in range(3)] == [-9, -9, 75]


def status(here: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs `jobs.sh status` in a folder, with a Slurm that knows two jobs and an imitated `show`."""
    played = here / "bin"
    played.mkdir()
    known = "*101*) echo JobState=RUNNING ;; *102*) echo 'JobState=PENDING Reason=Dependency' ;;"
    (played / "scontrol").write_text(f"#!/bin/bash\ncase $* in {known} esac\n")
    (played / "python").write_text('#!/bin/bash\necho "shown $*"\n')
    for name in ("scontrol", "python"):
        (played / name).chmod(0o755)
    own = {"PATH": f"{played}:{os.environ['PATH']}", "BATCHJOB_PYTHON": str(played / "python")}
    command = [ROOT / "slurm" / "jobs.sh", "status", *arguments]
    return subprocess.run(command, cwd=here, env=os.environ | own, capture_output=True, text=True, check=False)


def test_status_without_a_run_lists_the_newest_five_and_how_to_see_more(tmp_path: Path) -> None:
    for number in range(7):
        folder = tmp_path / "runs" / f"a run {number}"
        (folder / "logs").mkdir(parents=True)
        (folder / "done").mkdir()
        (folder / "plan.json").write_text("{}")
        os.utime(folder / "plan.json", (1000 + number, 1000 + number))
        for partition in range(number):
            (folder / "done" / f"{partition:06d}.json").write_text("{}")
    (tmp_path / "runs" / "a run 6" / "logs" / "jobs.txt").write_text("101 label\n102 report\n")
    ended = status(tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "runs/a run 6: 6 partitions published",
        "  label job 101: RUNNING",
        "  report job 102: PENDING (Dependency)",
        *(f"runs/a run {number}: {number} partitions published" for number in (5, 4, 3, 2)),
        "more of one of them: make status RUN=runs/a\\ run\\ 6",
    ]


def test_status_without_any_run_says_how_to_make_one(tmp_path: Path) -> None:
    ended = status(tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"no run in {tmp_path}/runs; make submit DATA=… makes one there" in ended.stdout

"""Faults of a cluster's nodes and settings on a real Slurm: the final state of a job, and its log."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from batchjob.store import lifecycle as store
from tests.slurm_jobs import PARTITIONS, ROOT, Job, on_slurm, sh, wait_until

pytestmark = on_slurm


def python_with(folder: Path, lines: str) -> str:
    """Makes a program in place of Python: `lines` of bash, then Python with the same arguments."""
    folder.mkdir(exist_ok=True)
    program = folder / "python"
    program.write_text(f'#!/bin/bash\n{lines}\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"BATCHJOB_PARTITION": "nights"}, "check BATCHJOB_PARTITION (now 'nights'; here are: batch short urgent)"),
        ({"BATCHJOB_ACCOUNT": "nobody"}, "check BATCHJOB_ACCOUNT (now 'nobody')"),
        ({"BATCHJOB_EXTRA": "--qos=nothing"}, "check --qos in BATCHJOB_EXTRA (now '--qos=nothing')"),
        ({"BATCHJOB_EXTRA": "--qos=single"}, "check how many jobs you have queued"),
        ({"BATCHJOB_GPU_TYPE": "h100"}, "BATCHJOB_GPU_TYPE=h100"),
        ({"BATCHJOB_CPUS_PER_GPU": "64"}, "the job would never start"),
        ({"NODES": "3"}, "3 nodes of 2 GPUs each were asked for"),
        (
            {"BATCHJOB_PARTITION": "short", "BATCHJOB_TIME": "2:00:00"},
            "is longer than partition short allows (1:00:00)",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value.items()),
)
def test_a_job_that_slurm_would_refuse_or_never_start_ends_submit_and_nothing_is_queued(
    cluster: Path, tmp_path: Path, settings: dict[str, str], told: str
) -> None:
    played = tmp_path / "python"  # plans at once
    run = tmp_path / "run"
    played.write_text(f"#!/bin/bash\ncase $* in *-m*) mkdir -p {run}; echo {run} ;; *load*) echo image ;; esac\n")
    played.chmod(0o755)
    with pytest.raises(AssertionError) as ended:
        sh(ROOT / "slurm" / "submit.sh", "photos", GPUS="2", BATCHJOB_PYTHON=str(played), **settings)
    assert told in str(ended.value)
    assert sh("squeue", "-h") == ""
    assert not (run / "logs" / "jobs.txt").exists()


def test_tasks_that_asked_for_gpus_and_have_none_fail_and_do_not_label_on_the_cpu(submit: Callable[..., Job]) -> None:
    job = submit(flags=["--workers", "0"])
    assert job.wait() == "FAILED"
    assert job.facts()["ExitCode"] == "75:0"
    assert "--device cuda: torch sees no GPU on node1" in job.log()
    assert "tasks on node1,node2 gave up with work left, see above: no partition was finished" in job.log()
    assert job.done() == 0


@pytest.mark.slow
def test_the_share_of_a_node_whose_tasks_give_up_goes_to_the_others(
    submit: Callable[..., Job], calm: Path, tmp_path: Path
) -> None:
    broken = python_with(
        tmp_path / "bin", '[ "$SLURMD_NODENAME$3" != node2label ] || { echo "torch sees no GPU" >&2; exit 75; }'
    )
    job = submit(BATCHJOB_PYTHON=broken)
    job.check_equal(calm)
    assert "every task on node2 gave up, see above: its share goes to the other nodes" in job.log()
    assert "share 1 of 2 (SLURM_PROCID of SLURM_NTASKS) on node1" in job.log()


@pytest.mark.slow
def test_a_preempted_report_is_requeued_and_completes(submit: Callable[..., Job], calm: Path, tmp_path: Path) -> None:
    slow = python_with(tmp_path / "bin", '[ "$3 ${SLURM_RESTART_COUNT:-0}" != "finish 0" ] || exec sleep 90')
    job = submit(BATCHJOB_PYTHON=slow)
    assert job.wait() == "COMPLETED", job.log()
    wait_until("the report at work", lambda: "finish" in job.log("report"))
    sh("sbatch", "-p", "urgent", "-N2", "--exclusive", "-t1", "-o", "/dev/null", "--wrap", "true")
    job.check_equal(calm)
    assert job.facts(job.report)["Restarts"] == "1"
    assert "(attempt 1): done: " in job.log("report")


# Python that stops itself once it has put the second file in its place
HELD = """
import os, signal, sys
seen = []
def look(event, arguments):
    if event == "os.rename":
        seen.append(arguments)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
sys.addaudithook(look)
from batchjob.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_report_that_is_requeued_in_the_middle_of_finish_completes(
    submit: Callable[..., Job], calm: Path, tmp_path: Path
) -> None:
    (tmp_path / "held.py").write_text(HELD)
    arguments = f'exec {sys.executable} {tmp_path}/held.py "${{@:3}}"'
    held = python_with(tmp_path / "bin", f'[ "$3 ${{SLURM_RESTART_COUNT:-0}}" != "finish 0" ] || {arguments}')
    job = submit(BATCHJOB_PYTHON=held)
    assert job.wait() == "COMPLETED", job.log()
    wait_until("a held finish", lambda: any(is_stopped(p) for p in job.processes("finish", command="held.py")))
    sh("scontrol", "requeue", job.report)
    job.check_equal(calm)
    assert job.facts(job.report)["Restarts"] == "1"


def is_stopped(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].startswith("T")


@pytest.mark.slow
def test_data_that_is_gone_for_a_while_is_labelled_once_it_is_back(
    cluster: Path, slurm_photos: Path, calm: Path, tmp_path: Path
) -> None:
    photos, away = tmp_path / "photos", tmp_path / "away"
    shutil.copytree(slurm_photos, photos)
    job = Job(photos, tmp_path / "run")
    job.hold()
    photos.rename(away)
    job.send(signal.SIGCONT)
    assert job.wait() == "FAILED", job.log()
    assert job.facts()["ExitCode"] == "75:0"
    assert f"DATA {photos} was planned and can't be seen on node" in job.log()
    assert job.done() < PARTITIONS
    away.rename(photos)
    Job(photos, tmp_path / "run").check_complete()
    assert store.verify(tmp_path / "run") == []
    for name in ("labels", "status"):
        np.testing.assert_array_equal(*(store.open_labels(run)[name].values for run in (tmp_path / "run", calm)))


@pytest.mark.slow
def test_two_submits_of_one_run_both_complete_and_give_the_store_of_one(submit: Callable[..., Job], calm: Path) -> None:
    first, second = submit(), submit()
    first.check_equal(calm)
    second.check_equal(calm)


LONG_FIT = ["--scope", "dataset", "--layers", "all", "--k", "8", "--n-init", "8"]


@pytest.fixture(scope="session")
def calm_fit(cluster: Path, slurm_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes the undisturbed run of LONG_FIT, also with four tasks, whose sums have the same order every time."""
    job = Job(slurm_photos, tmp_path_factory.mktemp("calm") / "run", options=LONG_FIT)
    job.check_complete()
    return job.run


def held_fit(submit: Callable[..., Job]) -> Job:
    """Starts a fit of four tasks and stops it between two iterations, with some of its heads done."""
    job = submit(options=LONG_FIT)
    checkpoint = job.run / "fit" / "checkpoint.npz"

    def has_finished_a_head() -> bool:
        try:
            with np.load(checkpoint) as state:
                return bool((state["counts"].sum(-1) > 0).any())
        except FileNotFoundError:
            return False

    job.stop_when("centroids of a head", has_finished_a_head, "fit")
    assert checkpoint.exists(), job.log("fit")
    assert not (job.run / "fit" / "centroids.npz").exists(), job.log("fit")
    return job


@pytest.mark.slow
def test_after_a_killed_task_a_fit_goes_on_without_reading_images_again(
    submit: Callable[..., Job], calm_fit: Path
) -> None:
    job = held_fit(submit)
    job.send(signal.SIGKILL, "fit", SLURM_PROCID="2")
    job.send(signal.SIGCONT, "fit")
    assert job.ended(job.ids["fit"]) == "COMPLETED", job.log("fit")
    log = job.log("fit")
    assert "a task failed (exit 137): going on from what the fit has kept" in log
    assert "going on after 6 of 6 partitions of the first process, read by an earlier attempt" in log
    assert re.search(r"going on with layer \d+, head \d+ after \d+ iterations?", log)
    assert job.facts(job.ids["fit"])["Restarts"] == "0"
    job.check_equal(calm_fit)


@pytest.mark.slow
def test_a_requeued_fit_goes_on_where_it_was(submit: Callable[..., Job], calm_fit: Path) -> None:
    job = held_fit(submit)
    sh("scontrol", "requeue", job.ids["fit"])
    job.send(signal.SIGCONT, "fit")
    wait_until("the requeue", lambda: job.facts(job.ids["fit"]).get("Restarts") == "1")
    assert job.ended(job.ids["fit"]) == "COMPLETED", job.log("fit")
    assert "attempt 1): fit" in job.log("fit")
    assert "going on after 6 of 6 partitions of the first process, read by an earlier attempt" in job.log("fit")
    job.check_equal(calm_fit)


@pytest.mark.slow
def test_a_fit_that_is_cancelled_takes_its_label_along_and_goes_on_when_submitted_again(
    submit: Callable[..., Job], calm_fit: Path
) -> None:
    job = held_fit(submit)
    sh("scancel", job.ids["fit"])
    job.send(signal.SIGCONT, "fit")
    assert job.ended(job.ids["fit"]) == "CANCELLED"
    assert job.wait() == "CANCELLED", "its dependency can't be met any more"
    wait_until("what the script says", lambda: "(attempt 0): SIGTERM" in job.log("fit"))
    again = submit(options=LONG_FIT)
    again.check_equal(calm_fit)
    assert "going on after 6 of 6 partitions of the first process, read by an earlier attempt" in again.log("fit")


@pytest.mark.slow
def test_an_interpreter_that_the_nodes_do_not_have_is_not_called_wrong_input(
    submit: Callable[..., Job], tmp_path: Path
) -> None:
    absent = python_with(tmp_path / "bin", '[ -z "$SLURM_STEP_ID" ] || exit 127')
    job = submit(BATCHJOB_PYTHON=absent)
    assert job.wait() == "FAILED"
    assert f"there is no Python at {absent} on node1,node2: not tried again; make env" in job.log()
    assert "input is wrong" not in job.log()


@pytest.mark.slow
def test_a_job_that_is_cancelled_at_once_says_so(submit: Callable[..., Job], tmp_path: Path) -> None:
    held = python_with(tmp_path / "bin", '[ "$3" != label ] || exec sleep 90')
    job = submit(BATCHJOB_PYTHON=held)
    wait_until("the job's first line", lambda: "label" in job.log())
    sh("scancel", job.label)
    assert job.wait() == "CANCELLED"
    wait_until("its last line", lambda: "told to end: cancelled (submit again to go on)" in job.log())
    assert "a task failed" not in job.log()  # srun's own words for the refusal
    assert "could not start" not in job.log()


@pytest.mark.slow
def test_a_run_with_a_space_in_its_name_goes_through_every_script(submit: Callable[..., Job]) -> None:
    job = submit(name="a run with 100% $spaces")
    assert job.wait() == "COMPLETED", job.log()
    assert job.ended(job.report) == "COMPLETED", job.log("report")
    status = sh(ROOT / "slurm" / "jobs.sh", "status", job.run, BATCHJOB_PYTHON=sys.executable)
    assert "24 of 24 partitions" in status
    assert f"report job {job.report}: COMPLETED" in status
    assert "no job of this run is in the queue" in sh(ROOT / "slurm" / "jobs.sh", "cancel", job.run)


def test_the_test_cluster_takes_its_names_out_of_hosts_again(tmp_path: Path) -> None:
    script = (ROOT / "tests" / "slurm_cluster.sh").read_text()
    functions = script[script.index("# Every cluster of this") : script.index("configure() {")]
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    body = functions.replace("/etc/hosts", str(hosts))
    head = f"nodes=(node1 node2); folder={tmp_path}; hosts_mark='# of slurm_cluster.sh:'\n"
    subprocess.run(["bash", "-eu", "-c", head + body + "names_into_hosts here"], check=True)
    assert "node2" in hosts.read_text()
    subprocess.run(["bash", "-eu", "-c", head + body + "names_out_of_hosts"], check=True)
    assert hosts.read_text() == "127.0.0.1 localhost\n"

"""The real sbatch files on a real Slurm on this machine: what clusters do to jobs costs only time.

Two nodes of two tasks each, on the CPU. The processes are stopped (SIGSTOP) once a few partitions are published,
so that each fault comes in the middle of the work, however fast the machine is.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from batchjob.store import lifecycle as store
from tests.conftest import ROOT
from tests.slurm_jobs import CLUSTER, FLAGS, OPTIONS, PARTITIONS, Job, on_slurm, sh, wait_until

pytestmark = on_slurm


def test_four_tasks_on_two_nodes_give_the_store_of_one_process(submit: Callable[..., Job], calm: Path) -> None:
    job = submit()
    job.check_equal(calm)
    for rank in range(4):
        assert f"share {rank} of 4 (SLURM_PROCID of SLURM_NTASKS) on node{rank // 2 + 1}: 6 partitions" in job.log()
    status = sh(ROOT / "slurm" / "jobs.sh", "status", job.run, BATCHJOB_PYTHON=sys.executable)
    assert "24 of 24 partitions" in status


@pytest.mark.slow
def test_a_killed_task_loses_only_its_current_partition_and_the_job_goes_on_by_itself(
    submit: Callable[..., Job], calm: Path
) -> None:
    job = submit()
    job.hold()
    job.send(signal.SIGKILL, SLURM_PROCID="1")
    job.send(signal.SIGCONT)
    job.check_equal(calm)
    assert "going on with what is left" in job.log()
    assert job.facts()["Restarts"] == "0"


def test_a_wrong_option_fails_at_once_and_is_never_requeued(submit: Callable[..., Job]) -> None:
    job = submit(flags=["--device", "cpu", "--batch-size", "many"])
    assert job.wait() == "FAILED"
    facts = job.facts()
    assert (facts["ExitCode"], facts["Restarts"]) == ("2:0", "0")
    assert "--batch-size 'many' is not a number" in job.log()
    assert "the input is wrong (exit 2 on node1,node2), see above: not tried again" in job.log()
    wait_until("the report job to be dropped", lambda: job.state(job.report) == "CANCELLED")
    status = sh(ROOT / "slurm" / "jobs.sh", "status", job.run, BATCHJOB_PYTHON=sys.executable)
    assert f"label job {job.label}: FAILED (exit 2)" in status
    dropped = (
        f"report job {job.report}: dropped, since label (job {job.label}) ended FAILED; mend that and submit again"
    )
    assert dropped in status


def test_submit_refuses_wrong_input_before_anything_is_queued(cluster: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [ROOT / "slurm" / "submit.sh", tmp_path / "nowhere", tmp_path / "run", *OPTIONS],
        env=os.environ | {"BATCHJOB_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "nowhere" in ended.stderr
    assert sh("squeue", "-h") == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_requeued_job_goes_on_where_it_was(submit: Callable[..., Job], calm: Path) -> None:
    job = submit()
    job.hold()
    sh("scontrol", "requeue", job.label)
    job.send(signal.SIGCONT)
    job.check_equal(calm)
    assert job.facts()["Restarts"] == "1"


@pytest.mark.slow
def test_a_preempted_job_saves_and_comes_back(submit: Callable[..., Job], calm: Path) -> None:
    job = submit()
    job.hold()
    sh("sbatch", "-p", "urgent", "-N2", "--exclusive", "-t1", "-o", "/dev/null", "--wrap", "true")
    wait_until("the signal", lambda: "SIGUSR1" in job.log() or "SIGTERM" in job.log())
    job.send(signal.SIGCONT)
    job.check_equal(calm)
    assert job.facts()["Restarts"] == "1"


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_requeues_and_goes_on(submit: Callable[..., Job], calm: Path) -> None:
    job = submit(BATCHJOB_WARN_S="180")
    started = time.monotonic()
    job.hold()
    limit = int(time.monotonic() - started + 120) // 60 + 1  # minutes, at least two for the warning and for saving
    sh("scontrol", "update", f"JobId={job.label}", f"TimeLimit={limit}")
    wait_until("the signal before the limit", lambda: "SIGUSR1" in job.log())
    job.send(signal.SIGCONT)
    wait_until("the requeue", lambda: job.facts().get("Restarts") == "1")
    sh("scontrol", "update", f"JobId={job.label}", "TimeLimit=10")
    job.check_equal(calm)
    assert "stopped with work left: back into the queue; what is published stays" in job.log()
    assert "submit again" not in job.log()


@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled_and_submitting_again_goes_on(submit: Callable[..., Job], calm: Path) -> None:
    job = submit()
    job.hold()
    done = job.done()
    sh(ROOT / "slurm" / "jobs.sh", "cancel", job.run, BATCHJOB_PYTHON=sys.executable)
    job.send(signal.SIGCONT)
    assert job.wait() == "CANCELLED"
    wait_until("the processes to end", lambda: not job.processes())
    time.sleep(1.5)
    assert job.state() == "CANCELLED"
    assert job.facts()["Restarts"] == "0"
    assert done <= job.done() < PARTITIONS
    submit().check_equal(calm)


@pytest.mark.slow
def test_a_node_that_dies_costs_no_published_partition(submit: Callable[..., Job], calm: Path, cluster: Path) -> None:
    job = submit()
    job.hold()
    os.kill(int((cluster / "node2.pid").read_text()), signal.SIGKILL)
    job.send(signal.SIGKILL, SLURMD_NODENAME="node2")
    sh("scontrol", "update", "nodename=node2", "state=down", "reason=test")  # as Slurm itself does after SlurmdTimeout
    wait_until("the requeue", lambda: job.facts().get("Restarts") == "1")
    job.send(signal.SIGCONT)
    sh(CLUSTER, "start", cluster, "node2")
    job.check_equal(calm)


@pytest.mark.slow
def test_a_restarted_controller_does_not_disturb_the_job(submit: Callable[..., Job], calm: Path, cluster: Path) -> None:
    job = submit()
    job.hold()
    controller = int((cluster / "slurmctld.pid").read_text())
    os.kill(controller, signal.SIGTERM)
    wait_until("the controller to end", lambda: not Path(f"/proc/{controller}/exe").exists())
    job.send(signal.SIGCONT)
    sh(CLUSTER, "start", cluster, "slurmctld")
    job.check_equal(calm)
    assert job.facts()["Restarts"] == "0"


@pytest.mark.slow
def test_too_little_memory_ends_the_job_with_no_endless_loop(submit: Callable[..., Job], calm: Path) -> None:
    job = submit(BATCHJOB_MEM_PER_GPU="60M")
    assert job.wait() in {"FAILED", "OUT_OF_MEMORY", "CANCELLED"}, job.log()
    assert job.facts()["Restarts"] == "0"
    submit().check_equal(calm)


@pytest.mark.slow
def test_tasks_that_die_before_anything_is_done_are_not_tried_for_ever(submit: Callable[..., Job]) -> None:
    job = submit()
    wait_until("four processes", lambda: len(job.processes()) == 4)
    job.send(signal.SIGKILL)
    assert job.wait() == "FAILED"
    assert "no partition was finished in this attempt: not tried again" in job.log()
    assert job.facts()["Restarts"] == "0"


@pytest.mark.slow
def test_the_holes_of_a_dead_array_task_are_listed_and_filled_by_submitting_again(
    submit: Callable[..., Job], calm: Path
) -> None:
    job = submit(array="2")
    wait_until("both tasks at work", lambda: len(job.processes()) == 4)
    job.hold()
    sh("scancel", f"{job.label}_1")
    job.send(signal.SIGCONT)
    wait_until("the report job", lambda: job.state(job.report) == "FAILED")
    assert "partitions are not labelled" in job.log("report")
    assert job.facts(job.report)["ExitCode"] == "75:0"
    assert "share 0 of 4 (array task 0 of 2, SLURM_PROCID of SLURM_NTASKS)" in job.log()
    submit(array="2").check_equal(calm)


@pytest.mark.slow
def test_fit_label_and_report_of_a_whole_dataset_follow_each_other_and_give_what_one_process_gives(
    submit: Callable[..., Job], slurm_photos: Path, tmp_path: Path
) -> None:
    scope = ["--scope", "dataset"]
    sh(sys.executable, "-m", "batchjob", "run", slurm_photos, tmp_path / "calm", *OPTIONS, *scope, *FLAGS)
    job = submit(options=scope, BATCHJOB_REPORT_VERBS="finish stats report")
    wait_until("the end of the fit", lambda: job.state(job.ids["fit"]) in {"COMPLETED", "FAILED", "CANCELLED"})
    assert job.state(job.ids["fit"]) == "COMPLETED", job.log("fit")
    assert "fitting on 4 × cpu" in job.log("fit")
    assert job.facts(job.ids["fit"])["NodeList"] == "node[1-2]"
    job.check_same_fit(tmp_path / "calm")
    for before, after in (("fit", "label"), ("label", "report")):
        assert job.facts(job.ids[before])["EndTime"] <= job.facts(job.ids[after])["StartTime"]
    assert "share 3 of 4" in job.log()
    assert (job.run / "report.html").stat().st_size > 10_000
    labels = store.open_labels(job.run)["labels"].values
    assert len(np.unique(labels)) == 3 + 1  # and no cluster in the photo that cannot be read

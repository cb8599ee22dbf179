"""The shares of processes: the launcher's variables, one list for each attempt, claims, and a machine's devices."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchjob.config import Runtime
from batchjob.errors import UserError, WorkLeft
from batchjob.job import dispatch
from batchjob.launch import processes as launch
from batchjob.launch import shares
from batchjob.launch.progress import SharedProgress
from batchjob.launch.signals import Stop
from batchjob.store import lifecycle as store
from batchjob.store.writer import Writer
from tests.conftest import ROOT, TINY, Command
from tests.runs import Ids, arrays_of, contents, label, made_up_plan
from tests.test_job import make_photos

PLAN = made_up_plan()
BODY = {"SLURM_JOB_ID": "9", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
STEP = {
    "SLURM_JOB_ID": "9",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
ARRAY = {
    "SLURM_JOB_ID": "12",
    "SLURM_ARRAY_JOB_ID": "11",
    "SLURM_ARRAY_TASK_ID": "5",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_MAX": "7",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "3",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store.create(tmp_path / "run", PLAN, Ids(20))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("environment", "index", "count"),
    [
        ({}, 0, 1),
        (TORCHRUN, 1, 3),
        (STEP, 2, 4),
        (TORCHRUN | STEP, 1, 3),  # srun around torchrun
        (BODY, 0, 1),  # a plain sbatch body runs once, whatever SLURM_NTASKS says
        (BODY | TORCHRUN, 1, 3),
        (ARRAY, 1, 3),
        (ARRAY | BODY, 1, 3),
        (ARRAY | STEP, 1 * 4 + 2, 12),
        (ARRAY | TORCHRUN, 1 * 3 + 1, 9),  # an array of multi-GPU tasks
        (BODY | {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}, 0, 1),  # inherited from an outer step
    ],
)
def test_the_share_follows_the_launcher(environment: dict[str, str], index: int, count: int) -> None:
    share = shares.share_of(environment)
    assert (share.index, share.count) == (index, count)


def test_a_batch_script_that_inherits_a_steps_variables_is_one_process() -> None:
    assert shares.share_of(STEP, in_batch_body=True) == shares.Share()
    assert not shares.in_batch_body()


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"RANK": "3", "WORLD_SIZE": "3"}, "3 of 3 is not a rank"),
        ({"RANK": "one", "WORLD_SIZE": "3"}, "RANK is 'one', a number is needed"),
        (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "2"}, r"in no regular step; give --array=0-1"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(environment: dict[str, str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        shares.share_of(environment)


@given(partitions=st.lists(st.integers(0, 10**6), unique=True), count=st.integers(1, 40))
def test_each_partition_is_in_exactly_one_share(partitions: list[int], count: int) -> None:
    dealt = [partition for index in range(count) for partition in shares.Share(index, count).of(partitions)]
    assert sorted(dealt) == sorted(partitions)
    sizes = [len(shares.Share(index, count).of(partitions)) for index in range(count)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (STEP, STEP | {"SLURM_PROCID": "3"}, True),
        (STEP, STEP | {"SLURM_RESTART_COUNT": "1"}, False),
        (STEP, STEP | {"SLURM_STEP_ID": "1"}, False),
        (ARRAY, ARRAY | {"SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "13"}, True),
        (ARRAY, ARRAY | {"SLURM_RESTART_COUNT": "1"}, True),  # a task that is requeued alone
        (ARRAY | TORCHRUN | {shares.ATTEMPT: "a"}, ARRAY | TORCHRUN | {shares.ATTEMPT: "b"}, True),
        (TORCHRUN, TORCHRUN | {"RANK": "2"}, True),
        (TORCHRUN | {shares.ATTEMPT: "a"}, TORCHRUN | {shares.ATTEMPT: "b"}, False),
    ],
)
def test_processes_of_one_attempt_have_one_name_for_it(
    one: dict[str, str], other: dict[str, str], is_same: bool
) -> None:
    assert (shares.attempt_of(one) == shares.attempt_of(other)) == is_same
    assert shares.attempt_of(one) != ""


def test_a_process_alone_needs_no_list() -> None:
    assert shares.attempt_of({}) == ""
    assert shares.attempt_of(BODY) == ""


def test_the_first_process_publishes_the_list_and_the_others_read_it(run: Path) -> None:
    assert shares.agreed_partitions(run, "a", lambda: [0, 2]) == [0, 2]
    assert shares.agreed_partitions(run, "a", lambda: [1]) == [0, 2]
    assert shares.agreed_partitions(run, "b", lambda: [1]) == [1]


def test_partitions_missing_after_a_list_is_done_make_the_next_list(run: Path) -> None:
    missing = lambda: store.missing(run, PLAN)  # noqa: E731
    assert shares.agreed_partitions(run, "a", missing) == [0, 1, 2]
    label(run, PLAN, [0, 1, 2])
    assert shares.agreed_partitions(run, "a", missing) == [0, 1, 2]
    (run / "done" / "000001.json").unlink()
    (run / "done" / "000000.json").unlink()
    label(run, PLAN, [0])  # so that a part of the first list is not done
    assert shares.agreed_partitions(run, "a", missing) == [0, 1, 2]
    label(run, PLAN, [1])
    (run / "labels.zarr" / "labels" / "c.2.0.0.0.0.0").write_bytes(b"")
    assert shares.agreed_partitions(run, "a", missing) == [2]


def test_a_second_job_on_the_same_run_shares_the_work_and_both_end_well(run: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from batchjob.launch import shares; from batchjob.store import writer\n"
        "from tests.runs import made_up_plan, arrays_of\n"
        "plan, run, mine = made_up_plan(), Path(sys.argv[1]), []\n"
        "with writer.Writer(run, plan) as out:\n"
        "    for partition in shares.claimed(out, [0, 1, 2], lambda: False):\n"
        "        mine.append(partition); time.sleep(0.4); out.write(partition, arrays_of(plan, partition))\n"
        "print(mine)"
    )
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(2)
    ]
    outs = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert sorted(partition for out in outs for partition in json.loads(out)) == [0, 1, 2]
    assert store.missing(run, PLAN) == []
    assert store.verify(run) == []


def test_the_claims_of_a_dead_job_are_taken_over(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys, time; from pathlib import Path; from batchjob.store.claims import Claims\n"
        "claims = Claims(Path(sys.argv[1]) / 'work'); claims.take(0); print('claimed', flush=True); time.sleep(3600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout is not None
    assert other.stdout.readline() == "claimed\n"

    def end_the_other() -> bool:
        other.kill()
        return False

    labelled = []
    with Writer(run, PLAN) as writer:
        for partition in shares.claimed(writer, [0, 1, 2], end_the_other):  # it asks only while it waits
            labelled.append(partition)
            writer.write(partition, arrays_of(PLAN, partition))
    other.communicate()
    assert labelled == [1, 2, 0]
    assert "waiting for another job that labels partitions 0 of this RUN" in capfd.readouterr().err


def test_the_shared_progress_adds_up_what_all_have_done(run: Path) -> None:
    label(run, PLAN, [0])
    partitions = [1, 2]  # 12 of the 20 images
    with SharedProgress(run, "a", shares.Share(0, 2), PLAN, partitions) as first:
        assert first.done == 8
        assert first.post(3) == 11
    with SharedProgress(run, "a", shares.Share(1, 2), PLAN, partitions) as second:
        assert second.done == 11
        assert second.post(4) == 15
        assert second.may_report()


@pytest.mark.parametrize(
    ("gpus", "device", "visible", "numbers"),
    [
        ("all", "auto", 4, [0, 1, 2, 3]),
        ("2", "auto", 4, [0, 1]),
        ("0,2", "cuda", 4, [0, 2]),
        ("3,", "auto", 4, [3]),
        ("all", "auto", 0, [0]),
        ("all", "cpu", 4, [0]),
        ("3", "cpu", 0, [0, 1, 2]),
    ],
)
def test_the_devices_of_a_machine(gpus: str, device: str, visible: int, numbers: list[int]) -> None:
    assert launch.devices(Runtime(gpus=gpus, device=device), visible) == numbers


@pytest.mark.parametrize("gpus", ["5", "0,4", "x", "0,0", "-1", ","])
def test_gpus_that_are_not_there_are_refused(gpus: str) -> None:
    with pytest.raises(UserError, match="--gpus"):
        launch.devices(Runtime(gpus=gpus, device="cuda"), 4)


@pytest.mark.parametrize(("gpus", "device"), [("2", "auto"), ("0,", "auto"), ("2", "cuda"), ("all", "cuda")])
def test_gpus_that_are_asked_for_where_there_is_none_are_not_replaced_by_the_cpu(
    gpus: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURMD_NODENAME", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        monkeypatch.delenv(name, raising=False)
    runtime = Runtime(gpus=gpus, device=device)
    with pytest.raises(UserError, match=r"torch sees no GPU; check nvidia-smi .* or use --device cpu"):
        launch.devices(runtime, 0)
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    with pytest.raises(WorkLeft, match="torch sees no GPU on node7"):
        launch.devices(runtime, 0)


@pytest.mark.parametrize("option", [("--device", "cuda"), ("--gpus", "2")])
def test_a_run_that_is_refused_for_want_of_gpus_is_not_planned(
    option: tuple[str, str], tmp_path: Path, batchjob: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "visible_gpus", lambda device: 0)
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    ended = batchjob("run", make_photos(tmp_path / "photos", 2), tmp_path / "run", *TINY, *option, "--workers", "0")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert f"{' '.join(option)}: torch sees no GPU" in ended.err
    assert not (tmp_path / "run").exists()


def test_an_engine_that_fits_no_dataset_is_refused_before_the_plan(tmp_path: Path, batchjob: Command) -> None:
    options = [*TINY, "--scope", "dataset", "--workers", "0", "--engine", "compiled"]
    ended = batchjob("run", make_photos(tmp_path / "photos", 2), tmp_path / "run", *options)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "--engine compiled solves the k-means of single images; the fit of a dataset takes auto," in ended.err
    assert not (tmp_path / "run").exists()


def test_a_signal_or_a_lost_parent_stops_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with Stop() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop()
        assert "time limit" in stop.reason
    monkeypatch.setenv("BATCHJOB_PARENT", "1")
    with Stop() as stop:
        assert stop() == (os.getppid() != 1)


def test_processes_of_one_machine_and_one_process_give_the_same_store(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 9)
    options = [*TINY, "--rows-per-partition", "2", "--device", "cpu", "--workers", "0"]
    assert batchjob("run", photos, tmp_path / "one", *options).code == 0
    ended = batchjob("run", photos, tmp_path / "two", *options, "--gpus", "2")
    assert ended.code == 0, ended.err
    assert "share 1 of 2" in ended.err
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_stopped_label_ends_75_and_the_same_command_goes_on(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 24)
    options = [*TINY, "--rows-per-partition", "1", "--device", "cpu", "--workers", "0"]
    run = tmp_path / "run"
    command = [sys.executable, "-m", "batchjob", "run", str(photos), str(run), *options, "--gpus", "2"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while len(list((run / "done").glob("0*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=200)[1]
    assert process.returncode == 75, err
    assert "goes on with the same command" in err
    assert 2 <= len(list((run / "done").glob("0*.json"))) < 24
    assert batchjob("run", photos, run, *options).code == 0


@pytest.mark.slow
def test_torchrun_and_a_job_array_give_the_store_of_one_process(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 9)
    options = [*TINY, "--rows-per-partition", "2"]
    flags = ["--device", "cpu", "--workers", "0"]
    assert batchjob("run", photos, tmp_path / "one", *options, *flags).code == 0
    for name in ("torchrun", "array"):
        assert batchjob("plan", photos, tmp_path / name, *options).code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    label_command = ["-m", "batchjob", "label", str(tmp_path / "torchrun"), *flags]
    subprocess.run([*torchrun, *label_command], cwd=ROOT, check=True, timeout=300)
    for task in ("3", "7", "5"):
        subprocess.run(
            [sys.executable, "-m", "batchjob", "label", str(tmp_path / "array"), *flags],
            cwd=ROOT,
            check=True,
            timeout=300,
            env=os.environ | ARRAY | {"SLURM_ARRAY_TASK_ID": task},
        )
    for name in ("torchrun", "array"):
        assert batchjob("finish", tmp_path / name).code == 0
        assert contents(tmp_path / "one") == contents(tmp_path / name)


def test_a_claim_that_waits_can_be_stopped(run: Path) -> None:
    class Busy(Writer):
        def claim(self, partition: int) -> bool:
            return False

    with Busy(run, PLAN) as writer, pytest.raises(WorkLeft, match="another job labels partitions"):
        list(shares.claimed(writer, [1], lambda: True))

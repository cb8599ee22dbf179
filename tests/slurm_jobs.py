"""Starts a real Slurm on this machine for the tests, and submits runs to it."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.chaos_verbs import is_running

ROOT = Path(__file__).parent.parent
LIMIT_S = 1200  # long enough for a busy machine; on an idle one no test takes more than two minutes
OPTIONS = ["--model", "test_vit.r160_in1k", "--weights", "random", "--image-size", "64", "--k", "3", "--n-init", "1"]
OPTIONS += ["--rows-per-partition", "2", "--precision", "fp32"]
FLAGS = ["--device", "cpu", "--batch-size", "2", "--workers", "0", "--max-failures", "0.1"]
PARTITIONS = 24
TASKS = 4
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL"}
CLUSTER = ROOT / "tests" / "slurm_cluster.sh"

NEEDED = ("slurmctld", "slurmdbd", "munged", "mariadbd")
on_slurm = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(shutil.which(name) for name in NEEDED),
        reason="not run: a real Slurm needs root and Debian's packages (tests/slurm_cluster.sh install)",
    ),
]


def sh(*command: object, check: bool = True, **environment: str) -> str:
    """Returns the stdout of a command."""
    ended = subprocess.run(
        [str(c) for c in command], env=os.environ | environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert not check or ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def wait_until(what: str, is_so: Callable[[], object], *, pause_s: float = 0.02) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"waited {LIMIT_S} s for: {what}"
        time.sleep(pause_s)


def send_to(processes: Iterable[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(process, number)


def start_requeued(over: threading.Event) -> None:
    """Starts a requeued job 6 s after its end, since Slurm would hold it for two minutes (sooner it would fail)."""
    seen: dict[str, float] = {}
    while not over.wait(1):
        for line in sh("squeue", "-h", "-t", "PD", "-o", "%i %T %r", check=False).splitlines():
            job, state, reason = line.split(" ", 2)
            if state == "COMPLETING":  # what the nodes still run of the attempt before
                seen.pop(job, None)
            elif reason == "BeginTime" and time.monotonic() - seen.setdefault(job, time.monotonic()) >= 6:
                sh("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
                del seen[job]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("slurm")
    for parent in [folder, *folder.parents][:3]:
        parent.chmod(0o755)  # munged runs as root here, but everyone may use its socket
    os.environ |= {"SLURM_CONF": str(folder / "slurm.conf"), "SLURM_TEST_PORT": str(21000 + os.getpid() % 2000 * 4)}
    over = threading.Event()
    starter = threading.Thread(target=start_requeued, args=(over,))
    try:
        sh(CLUSTER, "up", folder)
        starter.start()
        yield folder
    finally:
        over.set()
        if starter.ident:
            starter.join()
        sh(CLUSTER, "down", folder)
        assert str(folder) not in Path("/etc/hosts").read_text(), "`down` takes back what `up` wrote"
        del os.environ["SLURM_CONF"], os.environ["SLURM_TEST_PORT"]


class Job:
    """A run that was submitted with slurm/submit.sh."""

    def __init__(
        self,
        photos: Path,
        run: Path,
        *,
        array: str = "",
        options: Sequence[str] = (),
        flags: Sequence[str] = FLAGS,
        **settings: str,
    ) -> None:
        self.run = run
        environment = {
            "NODES": "1" if array else "2",
            "GPUS": "2",
            "ARRAY": array,
            "OMP_NUM_THREADS": "1",
            "BATCHJOB_PYTHON": sys.executable,
            "BATCHJOB_CPUS_PER_GPU": "1",
            "BATCHJOB_MEM_PER_GPU": "3000M",
            "BATCHJOB_TIME": "10",
            "BATCHJOB_WARN_S": "30",
            "BATCHJOB_REPORT_VERBS": "finish",
        }
        out = sh(
            ROOT / "slurm" / "submit.sh", photos, run, *OPTIONS, *options, "--", *flags, **(environment | settings)
        )
        self.ids = {words[0]: words[2].rstrip(":") for line in out.splitlines() if (words := line.split())[1] == "job"}
        self.label, self.report = self.ids["label"], self.ids["report"]

    def facts(self, job: str = "") -> dict[str, str]:
        line = sh("scontrol", "show", "job", "-o", job or self.label, check=False)
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def ended(self, job: str) -> str:
        """Waits for a job of this run and returns its final state."""
        wait_until(f"the end of job {job}", lambda: self.state(job) in OVER)
        return self.state(job)

    def state(self, job: str = "") -> str:
        return self.facts(job).get("JobState", "")

    def log(self, name: str = "label") -> str:
        return "\n".join(p.read_text() for p in sorted((self.run / "logs").glob(f"{name}-*.log")))

    def done(self) -> int:
        return len(list((self.run / "done").glob("[0-9]*.json")))

    def processes(self, verb: str = "label", *, command: str = "batchjob", **variables: str) -> list[int]:
        """Returns the process ids of the label (or another) command of this run that have the given environment."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line = (folder / "cmdline").read_bytes()
                if command.encode() not in line or not {verb, str(self.run)} <= set(os.fsdecode(line).split("\0")):
                    continue
                if Path(os.readlink(folder / "exe")).name.startswith("python"):
                    given = (folder / "environ").read_bytes().split(b"\0")
                    if all(f"{name}={value}".encode() in given for name, value in variables.items()):
                        found.append(int(folder.name))
            except OSError:  # the process has ended
                continue
        return found

    def hold(self, least: int = 2) -> None:
        """Stops all processes (SIGSTOP) when at least `least` partitions are published, but not all."""
        self.stop_when(f"{least} partitions published", lambda: self.done() >= least)
        assert least <= self.done() < PARTITIONS, self.log()

    def stop_when(self, what: str, is_time: Callable[[], bool], verb: str = "label") -> None:
        """Stops all processes of a command (SIGSTOP) as soon as it is time, or lets them end where it never is.

        Their work takes less than a second, so their ids are found beforehand and Slurm isn't asked meanwhile.
        """
        born: list[int] = []

        def have_begun() -> bool:
            born[:] = self.processes(verb)
            return len(born) == TASKS or is_time() or (not born and self.state(self.ids[verb]) in OVER)

        wait_until(f"{TASKS} processes", have_begun)
        wait_until(what, lambda: is_time() or not any(map(is_running, born)), pause_s=0.005)
        send_to(born, signal.SIGSTOP)
        self.send(signal.SIGSTOP, verb)  # also to those that began later

    def send(self, number: signal.Signals, verb: str = "label", **variables: str) -> None:
        send_to(self.processes(verb, **variables), number)

    def is_over(self) -> bool:
        return self.state() in OVER

    def wait(self) -> str:
        """Waits for the label job and returns its final state."""
        wait_until("the end of the label job", self.is_over)
        return self.state()

    def check_complete(self) -> None:
        """The whole chain completed."""
        assert self.wait() == "COMPLETED", self.log()
        assert self.ended(self.report) == "COMPLETED", self.log("report")

    def check_equal(self, calm: Path) -> None:
        """Checks that all jobs completed and that the run equals an undisturbed one bit for bit."""
        from tests.runs import contents

        self.check_complete()
        assert contents(self.run) == contents(calm)

    def check_same_fit(self, alone: Path) -> None:
        """Checks that all jobs completed and that the run equals that of one process, up to sums in another order."""
        import xarray

        from batchjob.store import lifecycle as store

        self.check_complete()
        assert store.verify(self.run) == []
        one, many = store.open_labels(alone).load(), store.open_labels(self.run).load()
        rounded = ["centroids", "centroid_inertia", "inertia"]
        xarray.testing.assert_equal(one.drop_vars(rounded), many.drop_vars(rounded))
        for name in rounded:
            np.testing.assert_allclose(many[name].values, one[name].values, rtol=1e-5, atol=1e-9)


@pytest.fixture(scope="session")
def slurm_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(3)
    for i in range(2 * PARTITIONS - 1):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"{i:03d}.png")
    (folder / "010.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="session")
def calm(slurm_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes an undisturbed run with one process and without Slurm."""
    run = tmp_path_factory.mktemp("calm") / "run"
    sh(sys.executable, "-m", "batchjob", "run", slurm_photos, run, *OPTIONS, *FLAGS)
    return run


@pytest.fixture
def submit(cluster: Path, slurm_photos: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def call(*, name: str = "run", **settings: Any) -> Job:
        jobs.append(Job(slurm_photos, tmp_path / name, **settings))
        return jobs[-1]

    yield call
    for job in jobs:
        sh("scancel", *job.ids.values(), check=False)
        job.send(signal.SIGCONT)
    wait_until("an empty queue", lambda: not sh("squeue", "-h"))

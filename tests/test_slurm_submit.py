"""What `make` and slurm/submit.sh pass on, and how a refused submit ends. Scripts imitate Slurm's commands."""

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Possible names; without quoting, make, bash or sbatch would execute, expand or split each of them.
NAMES = [
    "Bob's photos",
    'say "cheese"',
    "$HOME/$(touch made)/`touch made`",
    "a; touch made",
    "a && touch made | cat > made",
    "$(shell touch made)",
    "two  spaces ",
    "line\nbreak",
    "@at -dash *glob? ~tilde #hash",
    "back\\slash\\",
    "Ünïcode 写真",
]
PLAYED = {
    # `calls` gets each call in order; REFUSE names the call that is refused, REASON is what Slurm says
    "sbatch": """
case " $* " in *" --test-only "*) kind=test ;; *) kind=real ;; esac
echo "$kind $*" >>"$CALLS"
count=$(grep -c "^$kind" "$CALLS")
if [ "$kind $count" = "$REFUSE" ]; then echo "sbatch: error: $REASON" >&2; exit 1; fi
[ $kind = test ] || echo $((100 + count))
""",
    "scancel": 'echo "cancelled $*" >>"$CALLS"',
    "sinfo": """
case "$*" in
  *%l*) echo 'gpu*|1:00:00' ;;
  *%G*) echo 'gpu*|16|64000|gpu:a100:2(S:0-1)|3'; echo 'gpu*|4|8000|(null)|5' ;;
  *%R*) echo gpu ;;
esac""",
    "python": """
case "$*" in
  -c*import\\ batchjob) ;;
  -c*) echo "${SCOPE:-image} " ;;
  *) printf '%s\\0' "$@" >>"$GIVEN"; mkdir -p "$RUN_FOLDER"; echo "$RUN_FOLDER" ;;
esac""",
}


@dataclass
class Login:
    """An imitated login node: the folder of its commands, and how a submit on it ended."""

    folder: Path

    def submit(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("BATCHJOB_", "SLURM_"))}
        own = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(self.folder / "calls"),
            "GIVEN": str(self.folder / "given"),
            "RUN_FOLDER": str(self.folder / "run"),
            "BATCHJOB_PYTHON": str(self.folder / "bin" / "python"),
            "REFUSE": "none",
        }
        (self.folder / "calls").write_text("")
        command = [ROOT / "slurm" / "submit.sh", *arguments]
        return subprocess.run(command, env=clean | own | settings, capture_output=True, text=True, check=False)

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def login(tmp_path: Path) -> Login:
    (tmp_path / "bin").mkdir()
    for name, script in PLAYED.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return Login(tmp_path)


def test_all_jobs_are_queued_in_a_chain_and_written_down(login: Login) -> None:
    ended = login.submit("photos", SCOPE="dataset", NODES="2", GPUS="2")
    assert ended.returncode == 0, ended.stderr
    real = [call for call in login.calls() if call.startswith("real")]
    assert [Path(call.split(".sbatch")[0].split()[-1]).name for call in real] == ["fit", "label", "report"]
    assert "--dependency=afterok:101" in real[1]
    assert "--dependency=afterok:102" in real[2]
    assert (login.folder / "run" / "logs" / "jobs.txt").read_text() == "101 fit\n102 label\n103 report\n"


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("kind", ["test", "real"])
def test_a_refused_job_cancels_those_queued_before_it(login: Login, kind: str, number: int) -> None:
    ended = login.submit("photos", SCOPE="dataset", REFUSE=f"{kind} {number}", REASON="Invalid account or QOS")
    name = ["fit", "label", "report"][number - 1]
    assert ended.returncode == 2
    assert (
        f"sbatch refused the {name} job: sbatch: error: Invalid account or QOS; check BATCHJOB_ACCOUNT" in ended.stderr
    )
    cancelled = [call for call in login.calls() if call.startswith("cancelled")]
    queued = [str(100 + i) for i in range(1, number)] if kind == "real" else []
    assert cancelled == ([f"cancelled {' '.join(queued)}"] if queued else [])
    assert not (login.folder / "run" / "logs" / "jobs.txt").exists()
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("reason", "setting"),
    [
        ("invalid partition specified: nights", "BATCHJOB_PARTITION (now ''; here are: gpu)"),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "squeue --me"),
        ("Invalid qos specification", "--qos in BATCHJOB_EXTRA"),
        ("Invalid generic resource (gres) specification", "BATCHJOB_GPU_TYPE"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "BATCHJOB_TIME"),
        ("Unable to contact slurm controller (connect failure)", "whether Slurm runs"),
    ],
)
def test_a_refusal_names_the_setting_to_look_at(login: Login, reason: str, setting: str) -> None:
    ended = login.submit("photos", REFUSE="test 1", REASON=reason)
    assert ended.returncode == 2
    assert reason in ended.stderr
    assert setting in ended.stderr


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"NODES": "4"}, "3 with 16 CPUs, 64000 MB, 2 GPUs"),
        ({"GPUS": "3"}, "change NODES or GPUS"),
        ({"GPUS": "1", "BATCHJOB_GPU_TYPE": "h100"}, "BATCHJOB_GPU_TYPE=h100"),
        ({"BATCHJOB_CPUS_PER_GPU": "20"}, "the job would never start"),
        ({"GPUS": "2", "BATCHJOB_MEM_PER_GPU": "40G"}, "BATCHJOB_MEM_PER_GPU"),
        ({"BATCHJOB_TIME": "2:00:00"}, "BATCHJOB_TIME=2:00:00 is longer than partition (the default) allows (1:00:00)"),
        ({"NODES": "two"}, "'two' is not a number"),
        ({"GPUS": "0", "TASKS": "0"}, "a job has 1 or more of each"),
    ],
)
def test_a_job_that_could_never_start_is_refused_before_anything_is_planned(
    login: Login, settings: dict[str, str], told: str
) -> None:
    ended = login.submit("photos", **settings)
    assert ended.returncode == 2
    assert told in ended.stderr
    assert login.calls() == []
    assert not (login.folder / "given").exists()


def test_the_unedited_site_file_asks_for_what_the_nodes_have(login: Login) -> None:
    assert login.submit("photos", GPUS="2").returncode == 0
    label = next(call for call in login.calls() if call.startswith("real") and "/label.sbatch" in call)
    for flag in ("--cpus-per-task=8", "--mem=57600M", "--time=1:00:00", "--gres=gpu:2", "--ntasks-per-node=2"):
        assert flag in label.split()


@pytest.mark.parametrize(("gpus", "device"), [("1", "cuda"), ("0", "cpu")])
def test_a_job_that_asked_for_gpus_may_not_label_on_the_cpu(login: Login, gpus: str, device: str) -> None:
    assert login.submit("photos", "--", "--workers", "3", GPUS=gpus).returncode == 0
    label = next(call for call in login.calls() if call.startswith("real") and "/label.sbatch" in call)
    assert label.endswith(f"--workers 3 --device {device}")


@pytest.mark.parametrize("name", NAMES)
def test_make_passes_names_on_unchanged(tmp_path: Path, name: str) -> None:
    environment, given = python_that_writes_down_its_arguments(tmp_path)
    make("run", f"DATA={name}", f"RUN={name}.run", f"MODEL={name}", environment=environment)
    assert given.read_bytes().split(b"\0")[:7] == [
        os.fsencode(argument) for argument in ("-m", "batchjob", "run", name, f"{name}.run", "--model", name)
    ]
    assert not list(tmp_path.rglob("made"))
    assert not (ROOT / "made").exists()


@pytest.mark.parametrize("name", NAMES[:6])
def test_make_submit_passes_names_on_unchanged(login: Login, name: str) -> None:
    python_that_writes_down_its_arguments(login.folder)
    environment = os.environ | {
        "PATH": f"{login.folder / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(login.folder / "calls"),
        "GIVEN": str(login.folder / "given"),
        "RUN_FOLDER": str(login.folder / "run"),
        "BATCHJOB_PYTHON": str(login.folder / "bin" / "python"),
        "VIRTUAL_ENV": str(login.folder / "env"),
    }
    make("submit", f"DATA={name}", f"RUN={name}.run", f"WEIGHTS={name}", "GPUS=2", environment=environment)
    given = (login.folder / "given").read_bytes().split(b"\0")
    assert given[:7] == [os.fsencode(a) for a in ("-m", "batchjob", "plan", name, f"{name}.run", "--weights", name)]
    assert any("--gres=gpu:2" in call for call in login.calls())
    assert not list(login.folder.rglob("made"))
    assert not (ROOT / "made").exists()


@pytest.mark.parametrize(("value", "asked"), [("1", True), ("0", False), ("", False)])
def test_make_asks_for_failed_images_again(tmp_path: Path, value: str, asked: bool) -> None:
    environment, given = python_that_writes_down_its_arguments(tmp_path)
    make("run", "DATA=photos", f"RETRY_FAILED={value}", environment=environment)
    assert given.read_bytes().split(b"\0")[:4] == [b"-m", b"batchjob", b"run", b"photos"]
    assert (b"--retry-failed" in given.read_bytes()) is asked


@pytest.mark.parametrize("refused", ["none", "test 2"])
def test_submit_resets_failed_images_only_after_slurm_would_take_the_jobs(login: Login, refused: str) -> None:
    ended = login.submit("photos", "--retry-failed", REFUSE=refused, REASON="Invalid account")
    planned = (login.folder / "given").read_bytes()
    assert ended.returncode == (0 if refused == "none" else 2)
    assert planned.startswith(b"-m\0batchjob\0plan\0photos\0")
    assert planned.count(b"--retry-failed") == (1 if refused == "none" else 0)


def test_the_environment_gives_make_no_options(tmp_path: Path) -> None:
    environment, given = python_that_writes_down_its_arguments(tmp_path)
    make("run", "DATA=photos", environment=environment | {"K": "9", "SEED": "4", "LIMIT": "1", "RUN": "x", "GPUS": "8"})
    assert given.read_bytes() == b"-m\0batchjob\0run\0photos\0"


def make(*arguments: str, environment: dict[str, str]) -> None:
    clean = {name: value for name, value in environment.items() if name != "CONDA_PREFIX"}
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def python_that_writes_down_its_arguments(folder: Path) -> tuple[dict[str, str], Path]:
    """Returns (environment of an active virtual environment that counts as installed, file of NUL-ended arguments)."""
    env, given = folder / "env", folder / "given"
    (env / "bin").mkdir(parents=True)
    (env / f".batchjob{str(ROOT).replace('/', '_')}").touch()
    (env / "bin" / "python").write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" >{shlex.quote(str(given))}\n")
    (env / "bin" / "python").chmod(0o755)
    return os.environ | {"VIRTUAL_ENV": str(env)}, given

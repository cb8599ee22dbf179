"""Two commands on one RUN at once: they share the work, wait for each other or are refused, and no byte differs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import batchjob as package
from batchjob import plan as plans
from batchjob.store import lifecycle as store
from tests.conftest import ROOT, SAMPLE, TINY, Command
from tests.runs import contents
from tests.test_job import make_photos

RUNTIME = ["--workers", "0", "--device", "cpu"]
SHARDS = ["--rows-per-partition", "2"]


def started(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "batchjob", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow  # five interpreters
@pytest.mark.parametrize("numbers", [(3, 3, 3, 3, 3), (3, 4, 5, 6, 7)], ids=["equal", "other k"])
def test_of_five_commands_on_one_new_run_the_equal_ones_end_0_and_the_others_are_refused(
    tmp_path: Path, numbers: tuple[int, ...]
) -> None:
    photos, run = make_photos(tmp_path / "photos", 6), tmp_path / "run"
    asked = [(started("run", photos, run, *TINY[:-1], own, *SHARDS, *RUNTIME), own) for own in numbers]
    said = [process.communicate(timeout=500)[1] for process, _ in asked]
    k = int(plans.load(run).options.k)
    for (process, own), err in zip(asked, said, strict=True):
        assert process.returncode == (0 if own == k else 2), err
        assert own == k or f"planned with other options: k: planned '{k}', asked '{own}'" in err
    assert set(np.unique(package.open(run).k.values)) == {k}
    assert store.verify(run) == []


def test_two_commands_with_different_options_on_one_new_run_do_not_mix(tmp_path: Path) -> None:
    photos, run = make_photos(tmp_path / "photos", 4), tmp_path / "run"
    both = [started("run", photos, run, *TINY[:-1], k, *SHARDS, *RUNTIME) for k in (3, 4)]
    said = [process.communicate(timeout=300)[1] for process in both]
    k = int(plans.load(run).options.k)
    assert [process.returncode for process in both] == ([0, 2] if k == 3 else [2, 0]), said
    assert set(np.unique(package.open(run).k.values)) == {k}


@pytest.fixture
def planned(tmp_path: Path, batchjob: Command) -> Path:
    """Plans a run of dataset scope whose fit has 24 heads of many iterations."""
    photos, run = make_photos(tmp_path / "photos", 8), tmp_path / "run"
    options = [*TINY[:-1], "6", "--layers", "all", "--scope", "dataset", "--n-init", "20", *SHARDS]
    assert batchjob("plan", photos, run, *options).code == 0
    return run


def test_a_second_fit_waits_for_the_first_and_takes_its_centroids(
    planned: Path, tmp_path: Path, batchjob: Command
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(planned, alone)
    assert batchjob("fit", alone, *RUNTIME).code == 0
    both = [started("fit", planned, *RUNTIME) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    fitting = [re.findall(r"layer \d+, head \d+: \d+ iterations?", one) for one in said]
    assert sorted(map(len, fitting)) == [0, 36]  # 12 layers of 3 heads, fitted by one of the two commands
    assert (planned / "fit" / "centroids.npz").read_bytes() == (alone / "fit" / "centroids.npz").read_bytes()
    assert sorted(path.name for path in (planned / "fit").iterdir()) == ["centroids.npz", "claims"]


def test_a_fit_that_waits_for_another_ends_75_when_it_is_told_to(planned: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from batchjob.store.claims import Claims\n"
        "claims = Claims(Path(sys.argv[1]) / 'fit'); claims.take(0); print('taken', flush=True); time.sleep(300)"
    )
    command = [sys.executable, "-c", code, str(planned)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        waiting = started("fit", planned, *RUNTIME)
        assert waiting.stderr is not None
        lines = []
        while not lines or (lines[-1] and "waiting for another fit" not in lines[-1]):
            lines.append(waiting.stderr.readline())
        waiting.terminate()
        assert (waiting.wait(60), other.poll()) == (75, None), lines + waiting.stderr.readlines()
        waiting.communicate()
        other.kill()
    assert not (planned / "fit" / "centroids.npz").exists()


@pytest.mark.slow  # a dozen interpreters
def test_reading_a_run_while_it_is_labelled_again_gives_equal_results_or_one_line(
    tmp_path: Path, batchjob: Command
) -> None:
    """Lets `run` finish and mend while `stats` and `report` read: equal results, or one line with the remedy."""
    run = tmp_path / "run"
    options = [SAMPLE, run, *TINY, *SHARDS, *RUNTIME, "--scores", "attention"]
    assert batchjob("run", *options).code == 0
    assert batchjob("stats", run).code == 0
    before = contents(run)
    for _ in range(3):
        (run / "done" / "000001.json").unlink()
        three = [started("run", *options), started("stats", run), started("report", run)]
        said = [process.communicate(timeout=300) for process in three]
        assert three[0].returncode == 0, said
        for process, (_, err) in zip(three[1:], said[1:], strict=True):
            assert process.returncode in (0, 2), err
            assert process.returncode == 0 or "is damaged: " in err.splitlines()[-1], err
            assert "Traceback" not in err
        assert batchjob("stats", run).code == 0
        assert contents(run) == before
        assert store.verify(run) == []

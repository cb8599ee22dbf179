"""Messages of the commands: `make run`'s last lines, and a typo on an existing run."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, Command

SAID = ["run: model, 8 images, 0 failed", "Do clusters separate objects?", "An example, 2 photos: 0.39 against 0.24."]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Makes an environment that `make` takes for installed; its Python logs its arguments and prints little."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    said = "\\n".join([SAID[0], "", *SAID[1:], "", "tables: elsewhere", "heads, other scores and nulls: --verbose"])
    script = f"""#!/bin/sh
echo "$3" >> {tmp_path}/asked
if [ "$3" = stats ]; then printf '{said}\\n'; else echo "noise of $3"; fi
[ ! -e {tmp_path}/"fail-$3" ]
"""
    python.write_text(script)
    python.chmod(0o755)
    (tmp_path / f".batchjob{str(ROOT).replace('/', '_')}").touch()
    return tmp_path


def make_run(made: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "CONDA_PREFIX"} | {"VIRTUAL_ENV": str(made)}
    return subprocess.run(["make", "run"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_make_run_ends_with_the_answer_in_three_lines_and_where_to_look(made: Path) -> None:
    done = make_run(made)
    assert done.returncode == 0, done.stderr
    assert (made / "asked").read_text().split() == ["run", "stats", "figures", "report"]
    lines = done.stdout.splitlines()
    assert lines[:5] == ["", *SAID, ""]
    assert [line.split(":")[0] for line in lines[5:]] == ["open", "figures", "arrays", "more"]
    assert "runs/sample/report.html" in lines[5]


@pytest.mark.parametrize("verb", ["run", "stats", "figures", "report"])
def test_make_run_fails_where_a_step_fails_and_goes_no_further(made: Path, verb: str) -> None:
    (made / f"fail-{verb}").touch()
    assert make_run(made).returncode != 0
    assert (made / "asked").read_text().split()[-1] == verb


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--model", "vit_tiny_patch16_244"], "vit_tiny_patch16_224"),
        (["--k", "instnces"], "--k 'instnces' is not a number, a rule"),
    ],
)
def test_a_typo_on_an_existing_run_is_reported_as_a_typo(
    runs: list[Path], batchjob: Command, wrong: list[str], said: str
) -> None:
    ended = batchjob("run", runs[0].parent / "data", runs[0], *TINY, *wrong)
    assert ended.code == 2
    assert said in ended.err
    assert "planned" not in ended.err


def test_missing_data_on_an_existing_run_is_reported_as_missing(runs: list[Path], batchjob: Command) -> None:
    ended = batchjob("run", runs[0].parent / "dat", runs[0], *TINY)
    assert ended.code == 2
    assert "planned" not in ended.err
    ended = batchjob("run", runs[0].parent / "data", runs[0], *TINY, "--seed", "5")
    assert "was planned with other options: " in ended.err
    assert "seed: planned 0, asked 5" in ended.err

"""The README and the docs: commands run, links have targets, and the tree names existing files."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "batchjob" / "sample" / "ATTRIBUTION.md"]


def commands(kind: str) -> list[str]:
    blocks = re.findall(rf"```{kind}\n(.*?)```", README, re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture
def here(sample_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a folder in which the README's paths exist: the sample and its run."""
    (tmp_path / "batchjob").symlink_to(ROOT / "batchjob")
    (tmp_path / "runs").mkdir()
    subprocess.run(["cp", "-r", str(sample_run), str(tmp_path / "runs" / "sample")], check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_of_the_readme_runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    first, second = sorted((ROOT / "batchjob" / "sample" / "val2017").glob("*.jpg"))[:2]
    (here / "photos").mkdir()
    for photo, copy in ((first, "cat.jpg"), (first, "photos/1.jpg"), (second, "photos/2.jpg")):
        shutil.copy(photo, here / copy)
    code = "\n".join(commands("python"))
    assert code.count('layers="all"') == 1
    code = code.replace('layers="all"', 'layers="all", image_size=112')  # 64 patches instead of 256, to save time
    code += "\nprint(labels.shape, sorted(tables)[-1], run.labels.shape)"
    (here / "lines.py").write_text(code)  # a script of no more than these lines, as a reader makes it
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "lines.py"], cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"val2017/\d+\.jpg has \d+ clusters in head 3", done.stdout)
    assert done.stdout.endswith("(1, 1, 6, 256) summary (2, 1, 12, 6, 8, 8)\n")


@pytest.mark.slow
def test_every_batchjob_command_of_the_readme_runs_beside_the_run_of_make(here: Path) -> None:
    lines = [shlex.split(line) for line in commands("sh") if line.startswith("batchjob ")]
    assert {line[1] for line in lines} >= {"fetch", "run", "show", "stats", "figures", "report"}
    for line in lines:
        done = subprocess.run(
            [sys.executable, "-m", *line], cwd=here, capture_output=True, text=True, timeout=1500, check=False
        )
        assert done.returncode == 0, f"{shlex.join(line)}\n{done.stderr}"


def test_every_make_command_of_the_readme_is_a_target() -> None:
    lines = [line for line in commands("sh") if line.startswith("make ")]
    assert lines[:2] == ["make run", "make test"]
    for line in lines:
        done = subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_make_passes_every_option_on() -> None:
    line = [
        "make",
        "-n",
        "run",
        "DATA=/coco",
        "MODEL=m",
        "K=instances",
        "N_INIT=2",
        "BATCH_SIZE=7",
        "ROWS_PER_PARTITION=9",
        "PY=true",
    ]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    for option in ("--model 'm'", "--k 'instances'", "--n-init '2'", "--batch-size '7'", "--rows-per-partition '9'"):
        assert option in done.stdout
    assert "--seed" not in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_of_the_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tree_of_the_readme_names_what_is_there() -> None:
    tree = README.split("```\nbatchjob/\n")[1].split("```")[0]
    for line in tree.splitlines():
        for name in re.findall(r"(?:^|\s)([a-z_]+(?:\.py|/))(?=\s|$)", line.split("   ")[0]):
            found = list((ROOT / "batchjob").glob(name.rstrip("/"))) or list(ROOT.glob(name.rstrip("/")))
            assert found, f"{name} is in the README's tree and nowhere else"


def test_the_tree_names_every_module() -> None:
    tree = (ROOT / "README.md").read_text().split("## How it is made")[1].split("## What it is not")[0]
    modules = {path.name for path in (ROOT / "batchjob").glob("*.py")} - {"__init__.py"}
    assert sorted(name for name in modules if f" {name}" not in tree) == []

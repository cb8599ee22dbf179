"""Messages of the commands: `make run`'s last lines, and a typo on an existing run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from batchjob.errors import counted
from tests.conftest import ROOT, TINY, Command
from tests.test_job import make_photos

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


WRONG_ALONE = [
    (["--model", "vit_tiny_patch16_244"], "vit_tiny_patch16_224"),
    (["--k", "instnces"], "--k 'instnces' is not a number, a rule or a file that is there; did you mean 'instances'?"),
    (["--k", "eigngap"], "did you mean 'eigengap'?"),
    (["--k", "nofile.csv"], "--k 'nofile.csv' is not a number, a rule or a file that is there"),
    (["--k", "17"], "--k 17 is more than the 16 patches of an image"),
    (["--weights", "nofile.pth"], "--weights nofile.pth is not a file"),
    (["--annotations", "nofile.json"], "--annotations nofile.json is not a file or a folder"),
    (["--keep-maps", "nofile.txt"], "--keep-maps nofile.txt is neither a number nor a file"),
    (["--split", "vla2017"], "--split 'vla2017' is not a folder"),
    (["--split", "vla2017"], "did you mean 'val2017'?"),
    (["--layers", "lal"], "--layers 'lal' is not a list of numbers"),
    (["--layers", "99"], "--layers 99 out of range: vit_tiny_patch16_224 has 12 layers; give 0 to 11"),
    (["--heads", "99"], "--heads 99 out of range: vit_tiny_patch16_224 has 3 heads"),
    (["--image-size", "22x"], "--image-size '22x' is not a size in pixels"),
    (["--image-size", "65"], "--image-size 65 is not a multiple of the model's 16x16 patches; try 64x64"),
    (["--stage", "last"], "--stage 'last' is not a number"),
    (["--rows-per-partition", "many"], "--rows-per-partition 'many' is not a number of images"),
    (["--scope", "dataset", "--k", "instances"], "--scope dataset has one k for all images"),
    (["--scope", "dataset", "--fit-rows", "many"], "--fit-rows 'many' is not a number of rows"),
]
WRONG_FOR_ANOTHER_MODEL = [
    (["--model", "vit_tiny_patch16_224.augre"], "timm knows no weights 'augre'"),
    (["--model", "vit_small_patch16_224", "--heads", "6"], "--heads 6 out of range: vit_small_patch16_224 has 6 heads"),
    (["--model", "resnet18", "--stage", "9"], "--stage 9 is not a stage of resnet18"),
    (["--stage", "2"], "--stage 2 is for a CNN's features"),
    (["--model", "mixer_b16_224", "--image-size", "256"], "--image-size 256 does not suit mixer_b16_224"),
    (["--image-size", "32", "--k", "5"], "--k 5 is more than the 4 patches of an image"),
    (["--image-size", "16"], "an image has one patch only, which no clustering can divide; give a larger --image-size"),
    (["--image-size", "16", "--k", "silhouette"], "an image has one patch only"),
]


@pytest.mark.parametrize(("wrong", "said"), [*WRONG_ALONE, *WRONG_FOR_ANOTHER_MODEL])
def test_a_typo_on_an_existing_run_is_reported_as_a_typo(
    runs: list[Path], batchjob: Command, wrong: list[str], said: str
) -> None:
    ended = batchjob("run", runs[0].parent / "data", runs[0], *TINY, *wrong)
    assert ended.code == 2
    assert said in ended.err
    assert "planned" not in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("is_planned", [True, False])
def test_typos_are_reported_without_torch(runs: list[Path], tmp_path: Path, is_planned: bool) -> None:
    run = runs[0] if is_planned else tmp_path / "new"
    of_a_model = ("99", "65", "17", "dataset")  # without a plan, it is not known what the model has
    cases = [wrong for wrong, _ in WRONG_ALONE if is_planned or not set(wrong) & set(of_a_model)]
    lines = [["run", str(runs[0].parent / "data"), str(run), *TINY, *wrong] for wrong in cases]
    code = f"import sys\nfrom batchjob.__main__ import main\nprint([main(line) for line in {lines!r}])\n"
    code += "print({'torch', 'timm', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(cases) >= 12
    assert done.stdout.splitlines() == [str([2] * len(cases)), "set()"]
    assert done.stderr.count("\n") == len(cases)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (["--k", "4"], "k: planned '3', asked '4'"),
        (["--layers", "0,-1"], "layers: planned '10,11', asked '0,-1'"),
        (["--heads", "2"], "heads: planned 'all', asked '2'"),
        (["--image-size", "96"], "image-size: planned '64', asked '96'"),
        (["--split", "val2017"], "split: planned the default, asked 'val2017'"),
        (["--keep-maps", "2"], "keep-maps: planned '3', asked '2'"),
        (["--model", "vit_small_patch16_224", "--heads", "5"], "heads: planned 'all', asked '5'"),
        (["--scope", "dataset"], "scope: planned 'image', asked 'dataset'"),
    ],
)
def test_a_valid_option_that_differs_is_reported_as_another_plan(
    runs: list[Path], batchjob: Command, other: list[str], said: str
) -> None:
    asked = ["--layers", "10,11", "--keep-maps", "3", "--scores", "attention,pairs"]
    ended = batchjob("run", runs[0].parent / "data", runs[0], *TINY, *asked, *other)
    assert ended.code == 2
    assert "was planned with other options: " in ended.err
    assert said in ended.err


def test_existing_files_that_differ_are_reported_as_another_plan(
    runs: list[Path], batchjob: Command, tmp_path: Path
) -> None:
    for option in ("--weights", "--annotations", "--keep-maps", "--k"):
        (tmp_path / "file").touch()
        ended = batchjob("run", runs[0].parent / "data", runs[0], *TINY, option, tmp_path / "file")
        assert ended.code == 2
        assert f"{option[2:]}: planned " in ended.err
        assert f"asked '{tmp_path / 'file'}'" in ended.err


def test_missing_data_on_an_existing_run_is_reported_as_missing(runs: list[Path], batchjob: Command) -> None:
    ended = batchjob("run", runs[0].parent / "dat", runs[0], *TINY)
    assert ended.code == 2
    assert "planned" not in ended.err
    ended = batchjob("run", runs[0].parent / "data", runs[0], *TINY, "--seed", "5")
    assert "was planned with other options: " in ended.err
    assert "seed: planned 0, asked 5" in ended.err


def test_what_there_is_one_of_is_said_in_the_singular(tmp_path: Path, batchjob: Command) -> None:
    photos, run = make_photos(tmp_path / "photos", 1), tmp_path / "run"
    ended = batchjob("run", photos, run, *TINY, "--workers", "1", "--device", "cpu")
    assert ended.code == 0, ended.err
    assert "labelling 1 of 1 partition on cpu" in ended.err
    assert "the model, and 1 decoding worker\n" in ended.err
    assert "1 image, 0 failed" in ended.out
    shown = batchjob("show", run).out
    assert "(1 image)" in shown
    assert "1 of 1 partition published" in shown
    assert re.findall(r"(?<![.\d,])1 [a-z]+s\b", ended.err + ended.out + shown) == []


@pytest.mark.parametrize(
    ("count", "noun", "said"), [(1, "patch", "1 patch"), (2, "patch", "2 patches"), (1204, "photo", "1,204 photos")]
)
def test_counts_have_their_plural(count: int, noun: str, said: str) -> None:
    assert counted(count, noun) == said

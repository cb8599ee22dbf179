"""Each file of a finished run is deleted, cut or gets a flipped bit: this is found, mended or harmless."""

import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from batchjob.store import lifecycle as store
from batchjob.store.outputs import check_stats
from tests.conftest import ROOT, TINY, Command
from tests.runs import contents
from tests.test_job import make_photos

OPTIONS = [*TINY, "--rows-per-partition", "3", "--scores", "attention", "--layers", "0,1", "--keep-maps", "1"]
RUNTIME = ["--workers", "0", "--device", "cpu"]
DAMAGES = ("delete", "cut", "flip")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a finished run of six photos in two partitions, with statistics and a timing log."""
    folder = tmp_path_factory.mktemp("sweep")
    photos = make_photos(folder / "photos", 6)
    (photos / "photo-004.jpg").write_bytes(b"no photo")
    for arguments in (
        ["run", photos, folder / "run", *OPTIONS, *RUNTIME, "--max-failures", 1],
        ["stats", folder / "run"],
    ):
        command = [sys.executable, "-m", "batchjob", *map(str, arguments)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=300, capture_output=True)
    return folder


def files_of(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())


def damage(path: Path, how: str, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    path.unlink()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flip":
        if data:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)


def outcome(finished: Path, run: Path, name: str, how: str, batchjob: Command) -> str:
    """Returns the fate of one damage: `found` or `mended` with the command, or `harmless`. Fails on a wrong result."""
    damage(run / name, how, random.Random(f"{name} {how}"))
    before = contents(finished / "run")
    if name.startswith(("labels.zarr/status", "scores.zarr/jaccard")):  # each takes seconds
        scored = batchjob("stats", run)
        assert scored.code == 2, "scores of damaged labels"
    shown = batchjob("show", run, "--verify")
    assert shown.code in (0, 1, 2), shown.err
    again = batchjob("run", finished / "photos", run, *OPTIONS, *RUNTIME, "--max-failures", 1)
    assert again.code in (0, 2), again.err
    for said in (shown, again):
        assert "Traceback" not in said.err
    if again.code == 2:
        return "refused by run"
    damages = store.verify(run)
    if damages and all(d in check_stats(run, contents=True) for d in damages):
        refused = batchjob("figures", run)
        assert refused.code == 2, refused.err
        assert batchjob("stats", run).code == 0
        damages = store.verify(run)
    assert damages == []
    assert contents(run) == before, f"another result after {how} of {name}"
    return "mended" if shown.code else "harmless"


def sweep(finished: Path, tmp_path: Path, names: list[str], batchjob: Command) -> Counter[tuple[str, str, str]]:
    found: Counter[tuple[str, str, str]] = Counter()
    for name in names:
        for how in DAMAGES:
            run = tmp_path / "run"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(finished / "run", run)
            found[name.split("/")[0], how, outcome(finished, run, name, how, batchjob)] += 1
    for row, count in sorted(found.items()):
        print(*row, count)
    return found


def test_damage_of_one_file_of_each_kind_is_found_mended_or_harmless(
    finished: Path, tmp_path: Path, batchjob: Command
) -> None:
    names = ["labels.zarr/status/c.1", "scores.zarr/zarr.json", "stats/summary.parquet"]
    logs = [name for name in files_of(finished / "run") if name.startswith("logs/")][:1]
    found = sweep(finished, tmp_path, [*names, *logs], batchjob)
    assert sum(found.values()) == 3 * (len(names) + len(logs))


@pytest.mark.slow
def test_damage_of_every_file_is_found_mended_or_harmless(finished: Path, tmp_path: Path, batchjob: Command) -> None:
    names = files_of(finished / "run")
    found = sweep(finished, tmp_path, names, batchjob)
    assert sum(found.values()) == 3 * len(names)
    kinds = {row[0] for row in found}
    assert {"labels.zarr", "scores.zarr", "done", "index", "logs", "stats", "plan.json", "failures.csv"} <= kinds


def test_without_work_every_command_goes_on(finished: Path, tmp_path: Path, batchjob: Command) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    assert not (run / "work").exists()
    for arguments in (
        ("show", run, "--verify"),
        ("finish", run, "--max-failures", 1),
        ("label", run, *RUNTIME),
        ("run", finished / "photos", run, *OPTIONS, *RUNTIME, "--max-failures", 1),
        ("stats", run),
        ("figures", run, "--count", 2),
        ("report", run),
    ):
        ended = batchjob(*arguments)
        assert ended.code == 0, (arguments[0], ended.err)
        shutil.rmtree(run / "work", ignore_errors=True)
    assert contents(run) == contents(finished / "run")

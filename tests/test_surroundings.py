"""The machine around a run: full disks, little shared memory, odd names, few permissions, clocks that jump."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchjob import files
from batchjob.data.sources import index_images
from batchjob.store import lifecycle as store
from batchjob.store.writer import Writer
from tests.conftest import ROOT, SAMPLE, TINY, Command
from tests.runs import Ids, arrays_of, contents, made_up_plan
from tests.test_job import make_photos

RUNTIME = ["--workers", "0", "--device", "cpu"]
SHARDS = ["--rows-per-partition", "2"]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a disk of 20 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", folder], check=False).returncode:
        pytest.skip("this machine does not let root mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, left_bytes: int) -> None:
    """Fills the disk so that this many bytes are free."""
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - left_bytes)


@as_root
@pytest.mark.slow
@pytest.mark.parametrize("scope", ["image", "dataset"])
def test_every_command_ends_75_on_a_full_disk_and_goes_on_once_there_is_room(
    disk: Path, tmp_path: Path, batchjob: Command, scope: str
) -> None:
    run, calm = disk / "run", tmp_path / "calm"
    options = [*TINY, *SHARDS, "--limit", "4", "--layers", "0,11", "--scope", scope]
    options += ["--scores", "attention"] if scope == "image" else []
    assert batchjob("run", SAMPLE, calm, *options, *RUNTIME).code == 0
    assert batchjob("stats", calm).code == 0
    commands: list[list[object]] = [["plan", SAMPLE, run, *options]]
    commands += [["fit", run, *RUNTIME]] if scope == "dataset" else []
    commands += [["label", run, *RUNTIME], ["finish", run], ["stats", run]]
    commands += [["figures", run, "--count", "2"], ["report", run]]
    seen = 0
    for command in commands:
        for left_bytes in (0, 8 << 10, 40 << 10):
            fill(disk, left_bytes)
            ended = batchjob(*command)
            assert ended.code in (0, 75), (command[0], left_bytes, ended.err)
            assert "Traceback" not in ended.err
            if ended.code:
                seen += 1
                said = ended.err.splitlines()[-1]
                assert "No space left on device" in said
                assert "free some space" in said
            (disk / "filler").unlink()
        ended = batchjob(*command)
        assert ended.code == 0, (command[0], ended.err)
    assert seen >= len(commands)
    assert contents(run) == contents(calm)
    assert store.verify(run) == []
    assert not [path for path in run.rglob("*") if "part" in path.name]


@as_root
@pytest.mark.slow
def test_stats_whose_temporary_files_find_a_full_disk_ends_75(
    disk: Path, tmp_path: Path, batchjob: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert batchjob("run", SAMPLE, run, *TINY, "--limit", "4", "--scores", "pairs", *RUNTIME).code == 0
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    codes = []
    for left_bytes in (0, 4 << 10, 16 << 10, 40 << 10, 64 << 10, 96 << 10):
        fill(disk, left_bytes)
        ended = batchjob("stats", run, "--jobs", "1")
        codes.append(ended.code)
        assert ended.code in (0, 75), (left_bytes, ended.err)
        assert "Traceback" not in ended.err
        assert ended.code == 0 or "No space left on device" in ended.err
        assert [path.name for path in disk.iterdir()] == ["filler"]
        (disk / "filler").unlink()
    assert codes[0] == 75
    assert batchjob("stats", run).code == 0
    assert store.verify(run) == []


def test_a_fit_on_a_full_disk_ends_75_and_leaves_no_half_file(
    tmp_path: Path, batchjob: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    photos, run = make_photos(tmp_path / "photos", 4), tmp_path / "run"
    assert batchjob("plan", photos, run, *TINY, *SHARDS, "--scope", "dataset").code == 0
    real, calls = os.fsync, list[int]()

    def is_full(handle: int) -> None:
        calls.append(handle)
        if len(calls) % 2 == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", is_full)
    for _ in range(3):  # while rows are written, between two iterations, at the end
        ended = batchjob("fit", run, *RUNTIME)
        assert ended.code == 75, ended.err
        assert "No space left on device" in ended.err
        assert not list((run / "fit").glob("*.part*"))
    monkeypatch.undo()
    assert batchjob("fit", run, *RUNTIME).code == 0
    assert sorted(path.name for path in (run / "fit").iterdir()) == ["centroids.npz", "claims"]


@as_root
@pytest.mark.slow
def test_a_dev_shm_of_one_megabyte_changes_no_byte(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 12)
    assert batchjob("run", photos, tmp_path / "calm", *TINY, *SHARDS, *RUNTIME).code == 0
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*small, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount")
    command = [sys.executable, "-m", "batchjob", "run", photos, tmp_path / "run", *TINY, *SHARDS]
    command += ["--workers", "2", "--device", "cpu"]
    done = subprocess.run([*small, *command], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "run") == contents(tmp_path / "calm")


def test_what_a_narrow_umask_forbids_others_stays_forbidden(tmp_path: Path, batchjob: Command) -> None:
    photos, run = make_photos(tmp_path / "photos", 4), tmp_path / "run"
    before = os.umask(0o077)
    try:
        for command in (("run", photos, run, *TINY, *SHARDS, *RUNTIME), ("stats", run), ("report", run)):
            assert batchjob(*command).code == 0
    finally:
        os.umask(before)
    assert [path for path in [run, *run.rglob("*")] if path.stat().st_mode & 0o077] == []


def test_a_clock_that_jumps_costs_no_partition_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that jumps by an hour makes a running writer on another machine look dead, so its folder is removed."""
    plan, run = made_up_plan(), tmp_path / "run"
    store.create(run, plan, Ids(plan.row_count))
    now = files.time.time()
    with Writer(run, plan) as writer:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(socket, "gethostname", lambda: "elsewhere")
            elsewhere.setattr(files.time, "time", lambda: now + 7200)
            files.drop_scratch(run)
        assert not (run / "work" / "scratch").exists()
        for partition in range(plan.partition_count):
            assert writer.claim(partition)
            writer.write(partition, arrays_of(plan, partition))
    assert store.missing(run, plan) == []
    assert store.verify(run) == []


def test_control_characters_of_names_reach_no_terminal_no_table_and_no_page(
    tmp_path: Path, batchjob: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, run = tmp_path / "ph\x1b[31motos\x07", tmp_path / "run"
    make_photos(photos, 4)
    os.rename(photos / "photo-001.jpg", photos / "r\x1b]0;title\x07ed\x9b.jpg")
    (photos / "b\x1b[2Jroken\r.jpg").write_bytes(b"no photo")
    assert "\x1b" in index_images(str(photos)).id(0)
    said = []
    for command in (
        ("run", photos, run, *TINY, *SHARDS, *RUNTIME, "--max-failures", 1),
        ("stats", run),
        ("figures", run),
        ("report", run),
        ("show", run, "--verify"),
        ("run", photos, run, *TINY[:-1], "4"),
    ):
        ended = batchjob(*command)
        assert ended.code == (2 if command[-1] == "4" else 0), ended.err
        said += [ended.out, ended.err]
    (photos / "photo-002.jpg").rename(tmp_path / "away")
    for marker in (run / "done").glob("0*.json"):
        marker.unlink()
    said.append(batchjob("run", photos, run, *TINY, *SHARDS, *RUNTIME, "--max-failures", 1).err)
    shutil.move(photos, tmp_path / "elsewhere")
    ended = batchjob("label", run, *RUNTIME)
    said += [ended.out, ended.err, (run / "failures.csv").read_text(), (run / "report.html").read_text()]
    said += [path.name for path in (run / "figures").iterdir()]
    controls = {chr(number) for number in [*range(32), *range(127, 160)]} - set("\n\r\t")
    assert [(text, controls & set(text)) for text in said if controls & set(text)] == []
    assert "\\x1b[31m" in "".join(said)

"""A dataset-wide fit that is killed, told to stop or damaged goes on to the same end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import batchjob as package
from batchjob.store import centroids
from tests.conftest import ROOT, Command
from tests.striped import IMAGES, PLANNED, SCOPE


def _until(process: subprocess.Popen[bytes], is_true: Iterator[bool]) -> None:
    deadline = time.monotonic() + 300
    while not next(is_true) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def test_a_run_killed_in_the_fit_and_again_in_the_labels_ends_the_same(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    options = [*colour_model, *SCOPE, "--layers", "all", "--n-init", 10, "--rows-per-partition", 2, "--batch-size", 2]
    assert batchjob("run", striped, tmp_path / "calm", *options).code == 0
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "batchjob", "run", str(striped), str(run), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def in_the_fit() -> Iterator[bool]:
        while True:
            path, last = run / "fit" / "checkpoint.npz", 0
            if path.exists():
                with np.load(path) as state:
                    last = int((state["counts"].sum(-1) > 0).sum())
            yield last >= 3

    def in_the_labels() -> Iterator[bool]:
        while True:
            yield len(list((run / "done").glob("*"))) >= 3

    for moment in (in_the_fit(), in_the_labels()):
        process = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, env=environment, stderr=subprocess.DEVNULL
        )
        _until(process, moment)
        assert process.poll() is None, "the kill came too late to prove anything"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert (run / "fit" / "centroids.npz").exists()
    assert len(list((run / "done").glob("*"))) < IMAGES // 2
    assert batchjob("run", striped, run, *options).code == 0
    calm, killed = package.open(tmp_path / "calm"), package.open(run)
    for name, array in calm.variables.items():
        np.testing.assert_array_equal(array.values, killed[name].values, err_msg=str(name))


def test_a_fit_that_is_told_to_stop_ends_75_and_goes_on_from_its_last_iteration(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert batchjob("plan", striped, run, *colour_model, *PLANNED, "--layers", "0,11").code == 0
    saved: list[int] = []

    def save_and_signal(where: Path, value: centroids.Centroids | centroids.Checkpoint) -> None:
        save(where, value)
        saved.append(1)
        if len(saved) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    save = centroids.save
    monkeypatch.setattr(centroids, "save", save_and_signal)
    ended = batchjob("fit", run)
    assert (ended.code, len(saved)) == (75, 4)
    assert "go on with" in ended.err
    assert batchjob("label", run).code == 2  # there are no centroids yet
    ended = batchjob("fit", run)
    assert ended.code == 0
    assert "going on with layer 11, head 0 after 1 iteration" in ended.err
    assert not (run / "fit" / "checkpoint.npz").exists()


def test_damaged_centroids_are_reported_as_damaged(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    run = tmp_path / "run"
    assert batchjob("run", striped, run, *colour_model, *SCOPE, "--limit", 4).code == 0
    path = run / "fit" / "centroids.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    next((run / "done").glob("0*.json")).unlink()
    ended = batchjob("label", run)
    assert ended.code == 2
    assert "is damaged" in ended.err


def test_damaged_centroids_in_the_store_are_shown_and_run_makes_them_again(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    run = tmp_path / "run"
    command = ["run", striped, run, *colour_model, *SCOPE, "--limit", 4]
    assert batchjob(*command).code == 0
    path = run / "labels.zarr" / "centroid_rows" / "c" / "0" / "0" / "1" / "0"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    ended = batchjob("show", run, "--verify")
    assert ended.code == 1
    assert "damaged   the store's own: labels.zarr/centroid_rows/c/0/0/1/0: its checksum differs" in ended.out
    assert batchjob(*command).code == 0
    assert path.read_bytes() == whole
    assert batchjob("show", run, "--verify").code == 0

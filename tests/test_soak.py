"""A whole run of many images keeps its memory, threads and descriptors from its first partitions to its last."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT

IMAGES = 20_000
COMMAND = [sys.executable, "-m", "batchjob", "run"]
OPTIONS = ["--model", "test_vit.r160_in1k", "--weights", "random", "--image-size", "64", "--k", "3", "--n-init", "1"]
OPTIONS += ["--rows-per-partition", "512", "--batch-size", "64", "--workers", "2", "--device", "cpu"]


def held(process: int) -> tuple[float, int, int]:
    """Returns (resident MB, threads, open descriptors) of a process."""
    folder = Path(f"/proc/{process}")
    resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return resident, len(os.listdir(folder / "task")), len(os.listdir(folder / "fd"))


@pytest.mark.slow
def test_a_run_of_20000_images_is_as_large_at_its_end_as_near_its_start(tmp_path: Path) -> None:
    photos, run = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(photos / f"{i:05d}.jpg")
    for i in range(20, IMAGES):
        os.link(photos / f"{i % 20:05d}.jpg", photos / f"{i:05d}.jpg")
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen([*COMMAND, str(photos), str(run), *OPTIONS], cwd=ROOT, stderr=log, stdout=log)
        early, late = [], []
        while job.poll() is None:
            done = len(list((run / "done").glob("[0-9]*.json")))
            if 4 <= done < 36:  # after the start, and before the workers are ended
                (early if done < 12 else late).append(held(job.pid))
            time.sleep(0.1)
    assert job.returncode == 0, (tmp_path / "log").read_text()
    assert min(len(early), len(late)) > 3, "looked at it often enough"
    before, after = np.max(early, axis=0), np.max(late, axis=0)
    print(f"MB, threads, descriptors: {before.round().tolist()}, then {after.round().tolist()}")
    assert after[0] - before[0] < 40, "the pixels of the images between, kept, would be over 100 MB"
    assert after[1] - before[1] <= 2
    assert after[2] - before[2] <= 4

"""A script without `if __name__ == "__main__":` runs once, however many processes the package starts for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, SAMPLE

SCRIPT = """
import sys
import numpy as np
import batchjob

print("the script runs", flush=True)
SMALL = dict(model="vit_tiny_patch16_224", weights="random", image_size=64, k="instances", workers=2)
data = batchjob.run(sys.argv[1], "run", **SMALL)
print(data.labels.shape)
print("summary" in batchjob.stats("run", jobs=2))
few = np.random.default_rng(0).random((520, 8, 8), dtype=np.float32)  # enough problems for worker processes
print(batchjob.cluster(few, k=2, algorithm="agglomerative").shape)
"""

MULTIPROCESSING = """
import multiprocessing, sys
import batchjob.children

def own(value):
    return value + 1

if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(pool.map(own, [1, 2]))
"""


def run_script(folder: Path, text: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script in a folder, as a user does with a file of some lines."""
    (folder / "script.py").write_text(text)
    command = [sys.executable, "script.py", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once_in_the_process_that_the_user_started(tmp_path: Path) -> None:
    done = run_script(tmp_path, SCRIPT, SAMPLE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the script runs", "(8, 1, 1, 3, 4, 4)", "True", "(520, 8)"], done.stderr
    assert "Traceback" not in done.stderr


def test_processes_that_a_user_starts_know_what_the_users_script_defines(tmp_path: Path) -> None:
    done = run_script(tmp_path, MULTIPROCESSING)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[2, 3]\n" * 2

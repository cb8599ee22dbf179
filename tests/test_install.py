"""The decisions of `make env`, which needs only Python's standard library."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batchjob import install
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("asked", "driver", "extras"),
    [
        ("auto", "", []),
        ("auto", "13.0", ["gpu"]),
        ("auto", "12.8", ["gpu-cu12"]),
        ("0", "13.0", []),
        ("1", "", ["gpu"]),
        ("1", "12.4", ["gpu-cu12"]),
    ],
)
def test_the_gpu_extra_follows_the_driver_or_the_wish(asked: str, driver: str, extras: list[str]) -> None:
    assert install.choose_extras(asked, driver, dev=False) == extras
    assert install.choose_extras(asked, driver, dev=True) == [*extras, "dev"]


def fake_program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_the_driver_s_cuda_is_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(install.shutil, "which", lambda name: str(tmp_path / name))
    fake_program(tmp_path, "nvidia-smi", "echo '| NVIDIA-SMI 580.1  Driver Version: 580.1  CUDA Version: 13.0 |'")
    assert install.driver_cuda_version() == "13.0"
    fake_program(tmp_path, "nvidia-smi", "echo 'no devices were found'; exit 6")
    assert install.driver_cuda_version() == ""


def test_a_torch_that_cannot_use_the_gpu_is_an_error_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_program(tmp_path / "bin", "python", 'case "$2" in *cuda*) exit 3;; esac')  # pip succeeds, the check fails
    monkeypatch.setattr(install, "driver_cuda_version", lambda: "12.4")
    monkeypatch.setattr(sys, "argv", ["install", str(tmp_path)])
    assert install.main() == 1
    told = capsys.readouterr().err
    assert "CUDA 12.4" in told
    assert "cuda-version=12" in told


def test_a_failed_installation_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_program(tmp_path / "bin", "python", "echo collecting; echo no space left >&2; exit 1")
    monkeypatch.setattr(sys, "argv", ["install", str(tmp_path)])
    assert install.main() == 1
    told = capsys.readouterr().err
    assert "collecting\nno space left\n" in told
    assert "run the same command again" in told


def test_pip_is_quiet_unless_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_program(tmp_path / "bin", "python", "echo collecting; echo a warning >&2")
    monkeypatch.setattr(install, "driver_cuda_version", lambda: "")
    monkeypatch.setattr(sys, "argv", ["install", str(tmp_path)])
    assert install.main() == 0
    out, err = capfd.readouterr()
    assert out.startswith("installing .")
    assert [line.split()[0] for line in out.splitlines()] == ["installing", "compiling"]
    assert err == ""


def test_the_installer_needs_nothing_that_it_installs() -> None:
    tree = ast.parse((ROOT / "batchjob" / "install.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_a_second_make_env_does_nothing(tmp_path: Path) -> None:
    """Checks that make has nothing to run if the stamp of this checkout is newer than pyproject.toml."""
    env = tmp_path / "env"
    env.mkdir()
    (env / f".batchjob{str(ROOT).replace('/', '_')}").touch()
    clean = {name: value for name, value in os.environ.items() if name != "CONDA_PREFIX"}
    line = ["make", "env", "-n"]
    done = subprocess.run(
        line, cwd=ROOT, env=clean | {"VIRTUAL_ENV": str(env)}, capture_output=True, text=True, check=True
    )
    assert "install" not in done.stdout


@pytest.mark.slow
def test_a_wheel_holds_all_that_a_run_needs(tmp_path: Path) -> None:
    """Builds a wheel from the files that git knows, installs it into an empty environment, and runs it elsewhere."""
    tree = tmp_path / "tree"
    tree.mkdir()
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, tree], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    (site,) = (env / "lib").glob("python3*/site-packages")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    # the other packages of this environment; .pth files in that path are not read, so this checkout is not found
    (site / "others.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    python, clean = env / "bin" / "python", {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def batchjob(*arguments: object) -> None:
        command = [python, "-m", "batchjob", *map(str, arguments)]
        subprocess.run(command, cwd=tmp_path, env=clean, check=True, capture_output=True)

    where = [python, "-c", "import batchjob; print(batchjob.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(site / "batchjob" / "__init__.py")
    sample, run = site / "batchjob" / "sample", tmp_path / "run"
    tiny = ["--model", "vit_tiny_patch16_224", "--weights", "random", "--k", "3", "--workers", "0"]
    batchjob("run", sample, run, *tiny)
    for verb in ("stats", "figures", "report"):
        batchjob(verb, run)
    assert (run / "report.html").stat().st_size > 100_000

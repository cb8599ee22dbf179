"""The limits that keep the house in order, as tests: they fail before anyone has to argue."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "batchjob"
FILES = sorted(PACKAGE.rglob("*.py"))
RAPIDS = {"cuml", "cupy", "cudf", "rmm", "pylibraft", "raft_dask"}
# Rooms hand each other arrays, not each other's classes: who must not know whom, also not inside a function.
STRANGERS = {
    "clustering": {"attention", "model", "loader", "store", "job", "stats"},
    "attention": {"loader", "sources", "store", "clustering", "job", "stats"},
    "loader": {"model", "attention", "store", "clustering", "job"},
    "store": {"model", "attention", "loader", "clustering", "job", "stats"},
    "stats": {"model", "attention", "loader", "clustering", "job", "figures", "report"},
    "figures": {"model", "attention", "clustering", "job", "report"},
}
NO_TORCH = [
    "__init__",
    "config",
    "coco",
    "errors",
    "geometry",
    "images",
    "layout",
    "plan",
    "store",
    "figures",
    "report",
    "stats",
]


def imports_of(path: Path) -> set[str]:
    """Full dotted names of everything a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_importing_the_package_brings_no_torch() -> None:
    code = "import sys, batchjob, batchjob.__main__ as m; m.make_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("name", NO_TORCH)
def test_rooms_that_read_results_bring_no_torch(name: str) -> None:
    module = "batchjob" if name == "__init__" else f"batchjob.{name}"
    code = f"import sys, {module}; sys.exit(next((m for m in ('torch', 'cuml', 'cupy') if m in sys.modules), 0))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_rapids_is_imported_in_one_file() -> None:
    users = {p.relative_to(PACKAGE).as_posix() for p in FILES if {i.split(".")[0] for i in imports_of(p)} & RAPIDS}
    assert users <= {"clustering/rapids.py"}


def test_no_file_is_longer_than_a_few_pages() -> None:
    lengths = {p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for p in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > 330} == {}


def test_the_loop_is_a_page() -> None:
    tree = ast.parse((PACKAGE / "job.py").read_text())
    lengths = {n.name: (n.end_lineno or 0) - n.lineno for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    assert max(lengths.values()) <= 75, lengths


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_point_one_way() -> None:
    rooms = {room_of(path) for path in FILES}
    uses: dict[str, set[str]] = {room: set() for room in rooms}
    for path in FILES:
        uses[room_of(path)] |= {n.split(".")[1] for n in imports_of(path) if n.startswith("batchjob.")} & rooms
    for room in uses:
        uses[room] -= {room}
    left = dict(uses)
    while ready := [room for room, used in left.items() if not used & set(left)]:
        for room in ready:
            del left[room]
    assert left == {}, "these rooms import each other in a circle, or one that does"


@pytest.mark.parametrize("room", STRANGERS)
def test_rooms_that_must_not_know_each_other_do_not(room: str) -> None:
    used = {n.split(".")[1] for p in FILES if room_of(p) == room for n in imports_of(p) if n.startswith("batchjob.")}
    assert used & STRANGERS[room] == set()


def test_public_functions_say_what_comes_back() -> None:
    bare = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{path.name}: {node.name}")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{path.name}: {node.name}")
    assert bare == []


def requirements(lines: list[str]) -> dict[str, str]:
    """name -> version bounds."""
    found = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9_.-]+?)\s*((?:[<>=!~].*)?)$", line)
        assert match, line
        found[match[1]] = match[2]
    return found


def test_the_conda_environment_and_the_package_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "environment.yml").read_text()
    conda = requirements(re.findall(r"^  - ([a-z].*[0-9a-z])$", text.split("dependencies:")[1], re.M))
    conda |= requirements(re.findall(r"^      - (.*)$", text.split("- pip:")[1], re.M))
    names = {"torch": "pytorch-gpu", "matplotlib": "matplotlib-base", "cuml-cu13": "cuml", "cupy-cuda13x": "cupy"}
    names["raft-dask-cu13"] = "raft-dask"  # its NCCL communicator, for k-means over several GPUs
    wanted = requirements([*project["dependencies"], *project["optional-dependencies"]["gpu"]])
    extra = {"python", "pip", "cuda-version"}
    assert {names.get(n, n): v for n, v in wanted.items()} == {n: v for n, v in conda.items() if n not in extra}
    assert conda["python"] == project["requires-python"]


def test_both_gpu_extras_want_the_same_versions() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    plain = [{re.sub(r"cu(da)?1\d(x)?", "", line) for line in extras[name]} for name in ("gpu", "gpu-cu12")]
    assert plain[0] == plain[1]


def test_the_top_level_holds_nothing_else() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    top = {line.split("/")[0] for line in done.stdout.splitlines()}
    wanted = {"batchjob", "slurm", "tests", "docs", ".ci", "environment.yml", "Makefile", "README.md", "pyproject.toml"}
    assert top - wanted - {"LICENSE", ".gitignore"} == set()

"""Tests of the package's structure: imports, sizes of files and functions, docstrings, dependencies."""

import ast
import importlib
import os
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
MOST_FLOORS = 8
# What a package must not import, also not inside a function: packages hand each other arrays, not classes.
STRANGERS = {
    "metrics": {"data", "loader", "model", "clustering", "codebook", "store", "stats", "job"},
    "data": {"metrics", "loader", "model", "clustering", "codebook", "store", "stats", "job"},
    "loader": {"metrics", "model", "clustering", "codebook", "store", "stats", "job"},
    "clustering": {"data", "loader", "model", "codebook", "store", "stats", "job"},
    "codebook": {"data", "loader", "store", "stats", "job"},
    "model": {"data", "loader", "clustering", "codebook", "store", "stats", "job"},
    "store": {"data", "loader", "model", "clustering", "codebook", "stats", "job"},
    "launch": {"data", "loader", "model", "clustering", "codebook", "stats", "job"},
    "stats": {"loader", "model", "clustering", "job", "figures", "report"},
    "figures": {"loader", "model", "clustering", "job", "report"},
    "report": {"loader", "model", "clustering", "job"},
}
PLAIN_SEARCH = "batchjob.clustering.search"  # it takes and returns arrays without torch, and null models use it too
NO_TORCH = [
    "batchjob",
    *(f"batchjob.{name}" for name in ("config", "data", "plan", "store", "stats", "figures", "report")),
]


def imports_of(path: Path) -> set[str]:
    """Returns the full dotted names of all that a file imports, anywhere in it, also by `import_module("name")`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def package_of(path: Path) -> str:
    """Returns the package, or the file at the top of `batchjob/`, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    """Returns the dotted name of a file below `batchjob`; empty for the package's own `__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def uses_of_packages(without: str = "-") -> dict[str, set[str]]:
    """Returns package -> packages and top-level files that it imports; `batchjob` itself counts as `__init__`.

    Imports of the file `without`, or of names in it, do not count.
    """
    names = {package_of(path) for path in FILES}
    uses: dict[str, set[str]] = {name: set() for name in names}
    for path in FILES:
        used = {n.split(".")[1] for n in imports_of(path) if n.startswith("batchjob.") and without not in n}
        uses[package_of(path)] |= {u if u in names else "__init__" for u in used}
    return {name: used - {name} for name, used in uses.items()}


def uses_of_files() -> dict[str, set[str]]:
    """Returns file -> files that it imports, by their dotted names."""
    names = {module_of(path) for path in FILES}
    uses: dict[str, set[str]] = {name: set() for name in names}
    for path in FILES:
        for name in imports_of(path):
            if name == "batchjob" or name.startswith("batchjob."):
                wanted = name.removeprefix("batchjob").lstrip(".")
                uses[module_of(path)].add(wanted if wanted in names else wanted.rpartition(".")[0])
    return {name: used - {name} for name, used in uses.items()}


def floors(uses: dict[str, set[str]]) -> list[set[str]]:
    """Returns the modules that import nothing, those that import only these, and so on; fails on a circle."""
    left, found = dict(uses), []
    while left:
        ready = {name for name, used in left.items() if not used & set(left)}
        assert ready, f"these import each other in a circle, or one that does: {sorted(left)}"
        found.append(ready)
        left = {name: used for name, used in left.items() if name not in ready}
    return found


def test_importing_the_package_brings_no_torch() -> None:
    code = "import sys, batchjob, batchjob.__main__ as m; m.make_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("module", NO_TORCH)
def test_packages_that_read_results_bring_no_torch(module: str) -> None:
    code = (
        f"import pkgutil, importlib, sys, {module} as m\n"
        "names = [i.name for i in pkgutil.iter_modules(getattr(m, '__path__', []), m.__name__ + '.')]\n"
        "[importlib.import_module(n) for n in names if m.__name__ != 'batchjob']\n"
        "sys.exit(next((m for m in ('torch', 'cuml', 'cupy') if m in sys.modules), 0))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "NOWHERE"], "is not a file or a folder"),
        (["run", ".", "--model", "vit_basee_patch16_224"], "did you mean vit_base_patch16_224,"),
        (["run", ".", "--k", "seven"], "is not a number, a rule"),
        (["run", ".", "--weights", "nofile.pth"], "is not a file"),
        (["run", ".", "--layers", "lal"], "is not a list of numbers"),
        (["run", ".", "--kk", "7"], "unrecognized arguments: --kk 7; did you mean '--k'?"),
        (["run", ".", "--mod", "resnet18"], "unrecognized arguments: --mod resnet18; did you mean '--model'?"),
        (["stat", "."], "did you mean 'stats'?"),
        (["show", "NOWHERE"], "no plan.json"),
    ],
)
def test_wrong_input_is_reported_before_anything_slow_is_imported(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    code = (
        "import sys\nfrom batchjob.__main__ import main\n"
        f"try: code = main({arguments!r})\nexcept SystemExit as end: code = end.code\n"
        "print(code, sorted({'torch', 'timm', 'torchvision', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "2 []"
    assert said in done.stderr


def lines_outside_docstrings(path: Path) -> int:
    text = path.read_text()
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = [n for n in ast.walk(ast.parse(text)) if isinstance(n, holders) and ast.get_docstring(n)]
    return len(text.splitlines()) - sum((n.body[0].end_lineno or 0) - n.body[0].lineno + 1 for n in documented)


def test_rapids_is_imported_in_one_file() -> None:
    users = {p.relative_to(PACKAGE).as_posix() for p in FILES if {i.split(".")[0] for i in imports_of(p)} & RAPIDS}
    assert users == {"clustering/rapids.py"}


def test_no_file_is_longer_than_a_few_pages() -> None:
    """Docstrings do not count: what a function takes and gives is said in full, however long its file is."""
    lengths = {p.relative_to(ROOT).as_posix(): lines_outside_docstrings(p) for p in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > 310} == {}
    assert sum(lengths.values()) > 10_000, "saw the package"


def test_the_loop_is_a_page() -> None:
    tree = ast.parse((PACKAGE / "job" / "label.py").read_text())
    # from behind the docstring on: what it takes and gives is said beside the loop, and is not the loop
    lengths = {
        n.name: (n.end_lineno or 0) - (n.body[0].end_lineno or 0)
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef) and ast.get_docstring(n)
    }
    assert {"label", "_compute"} <= set(lengths)
    assert max(lengths.values()) <= 60, lengths


def test_imports_point_one_way_between_packages_and_between_files() -> None:
    packages, files = uses_of_packages(), uses_of_files()
    assert {"plan", "store"} <= packages["job"]
    assert "store.partitions" in files["store.writer"]
    packages.pop("__init__")  # it passes on what `api` offers
    assert len(floors(packages)) <= MOST_FLOORS, floors(packages)
    assert all("__init__" not in used for used in packages.values()), "nothing inside imports the door"
    assert floors(files)


@pytest.mark.parametrize("package", STRANGERS)
def test_packages_do_not_import_what_they_must_not_know(package: str) -> None:
    uses = uses_of_packages(without=PLAIN_SEARCH)
    assert set(uses) >= {package, *STRANGERS[package]}, "a rule about a package that is not there guards nothing"
    assert uses[package], "no import was seen"
    assert uses[package] & STRANGERS[package] == set()


def test_a_package_shows_at_most_six_names() -> None:
    shown = {}
    for path in PACKAGE.glob("*/__init__.py"):
        names = re.search(r"^__all__ = (\[[^]]*\])", path.read_text(), re.M)
        shown[path.parent.name] = ast.literal_eval(names[1]) if names else []
    assert {"stats", "figures", "clustering", "report"} <= {name for name, names in shown.items() if names}
    assert {name: names for name, names in shown.items() if len(names) > 6} == {}
    for package, names in shown.items():
        module = importlib.import_module(f"batchjob.{package}")
        assert all(hasattr(module, name) for name in names), package


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
    """Returns name -> version bounds."""
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


def test_the_top_level_holds_only_the_listed_files() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    top = {line.split("/")[0] for line in done.stdout.splitlines()}
    wanted = {"batchjob", "slurm", "tests", "docs", ".ci", "environment.yml", "Makefile", "README.md", "pyproject.toml"}
    assert top - wanted - {"CHANGELOG.md", "LICENSE", "mkdocs.yml", ".gitignore"} == set()


def test_public_functions_say_what_they_take() -> None:
    """Those with more than one argument have NumPy's sections; a line says enough of one argument."""
    lacking, seen = [], 0
    for path in FILES:
        tree = ast.parse(path.read_text())
        public = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
        for node in (n for holder in (tree, *public) for n in holder.body if isinstance(n, ast.FunctionDef)):
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if node.name.startswith("_") or len([a for a in arguments if a not in ("self", "cls")]) < 2:
                continue
            seen += 1
            if "Parameters\n-----" not in (ast.get_docstring(node) or ""):
                lacking.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert lacking == []
    assert seen > 300, "saw the functions"


def test_the_tests_of_a_file_run_in_one_process(request: pytest.FixtureRequest) -> None:
    is_one_of_several = "PYTEST_XDIST_WORKER" in os.environ
    assert not is_one_of_several or request.node.nodeid.endswith("@test_structure"), (
        "this pytest-xdist does not group tests with this pytest, so fixtures are made in every process"
    )

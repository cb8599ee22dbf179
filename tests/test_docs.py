"""The site is built and lists every option; the code of the tutorial and the recipes runs from top to bottom."""

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import batchjob
from batchjob.config import Options, Runtime
from batchjob.metrics import catalogue
from tests.conftest import ROOT, SAMPLE

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder with the photos that the pages use."""
    folder = tmp_path_factory.mktemp("here")
    shutil.copytree(SAMPLE, folder / "photos", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return folder


def run_page(name: str, where: Path) -> dict[str, Any]:
    """Runs the Python of a page in `where`, block after block, and returns its names."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.S)
    assert blocks, f"{name} has no Python"
    if importlib.util.find_spec("tensorstore") is None:
        blocks = [block for block in blocks if "tensorstore" not in block]
    before, found = Path.cwd(), {"__name__": "page"}
    os.chdir(where)
    try:
        exec(compile("\n".join(blocks), name, "exec"), found)
    finally:
        os.chdir(before)
    return found


def test_the_notebook_is_the_tutorial_and_runs(here: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "tutorial.md").read_text(), re.S)
    assert code == [block.strip() for block in blocks]
    assert printed(notebook) in (DOCS / "tutorial.md").read_text(), "both show the same table"
    assert (DOCS / "tutorial.ipynb").stat().st_size < 100_000, "outputs are kept small"
    assert len(pictures_of(notebook)) == 2, "it shows its pictures to who only reads it"
    where = {"metadata": {"path": str(here)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    assert len(pictures_of(notebook)) == 2, "a plot shows by itself in a notebook"
    assert re.sub(r"[ \d.-]+", " ", printed(notebook)).startswith(" layer head null mean gain enough\n swap False\n")


def printed(notebook: Any) -> str:
    """Returns what the last cell of a notebook with code printed to stdout."""
    outputs = [cell for cell in notebook.cells if cell.cell_type == "code"][-1].outputs
    return "".join(out.text for out in outputs if out.get("name") == "stdout")


def pictures_of(notebook: Any) -> list[Any]:
    """Returns the outputs of a notebook that are pictures."""
    return [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]


def test_the_tutorial_runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    found = run_page("tutorial.md", here)
    assert found["maps"].attrs["grid"] == [14, 14]
    assert found["one"].shape == (14, 14)
    assert len(found["summary"])


def test_the_recipes_run_and_agree_with_the_labels(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    batchjob.run(here / "photos", here / "runs" / "photos", model="vit_tiny_patch16_224", weights="random", k=3)
    found = run_page("recipes.md", here)
    labels = found["labels"]
    assert found["table"].iloc[:, :3].sum(axis=1).eq(196).all()
    from PIL import Image
    from pycocotools import mask as coco

    decoded = sum(coco.decode(line["segmentation"]).astype(int) * line["category_id"] for line in found["results"])
    assert np.array_equal(decoded - 1, found["pixels"])
    written = np.asarray(Image.open(here / "cluster-0.png")) == 255
    assert written.mean() == pytest.approx((found["patches"] == 0).mean(), abs=0.01)
    assert written.shape == found["pixels"].shape
    assert np.array_equal(found["where"].sel(head=2), (labels == 0).mean("image"))
    assert found["joined"]["pixels"].sum() > 0
    assert list(found["ids"]) == list(labels.image.values)
    if "first" in found:
        assert found["names"] == list(found["ids"])
        assert np.array_equal(found["first"][:, 0, 2], labels)


def test_the_site_is_built_and_lists_every_option(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "options.html").read_text()
    for kind in (Options, Runtime):
        for field in dataclasses.fields(kind):
            assert f"--{field.name.replace('_', '-')}" in page
    python = (tmp_path / "site" / "api.html").read_text()
    for name in batchjob.__all__:
        assert f"batchjob.api.{name}" in python or f"frames.{name}" in python


def test_every_fault_of_a_cluster_names_a_test_that_is_there() -> None:
    table = (DOCS / "cluster.md").read_text().split("| fault | final state |")[1].split("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) > 20
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[-2])
        assert named, row
        assert all(f"def {name}(" in tests for name in named), row


def test_the_page_of_metrics_explains_every_score_and_null_with_small_pictures() -> None:
    page = (DOCS / "metrics.md").read_text()
    names = {row.name for row in catalogue.SCORES} | {n for row in catalogue.SCORES for n in row.nulls} | {"random"}
    assert [n for n in sorted(names) if f"`{n}`" not in page and not n.startswith("jaccard")] == []
    pictures = re.findall(r"!\[.+\]\((.+?)\)", page)
    assert len(pictures) >= 7
    assert [p for p in pictures if (DOCS / p).stat().st_size > 150_000] == []

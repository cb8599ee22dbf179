"""The tables of a dataset-wide clustering: the positions, categories and images in which each cluster occurs."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import adjusted_mutual_info_score

import batchjob as package
from batchjob.stats import codebook
from tests.conftest import Command
from tests.striped import IMAGES, LINES, SCOPE, annotate_by_orientation, labels_of


def test_the_codebook_has_positions_categories_and_images_of_each_cluster(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    run, annotations = tmp_path / "run", annotate_by_orientation(striped, tmp_path / "striped.json")
    ended = batchjob("run", striped, run, *colour_model, *SCOPE, "--heads", "1", "--annotations", annotations)
    assert ended.code == 0, ended.err
    ended = batchjob("stats", run)
    assert ended.code == 0, ended.err
    assert "codebook: 12 clusters, 0 of them in no image" in ended.out
    tables = {path.stem: pd.read_parquet(path) for path in (run / "stats").glob("codebook*.parquet")}
    clusters = tables["codebook"]
    np.testing.assert_allclose(clusters["share"], 1 / 12)
    assert (clusters["images"] == IMAGES // 2).all()
    assert (clusters["category_share"] == 1).all()
    np.testing.assert_allclose(clusters["lift"], 2)  # half of the images have each orientation
    positions = tables["codebook_positions"]
    assert (positions.groupby("cluster").size() == LINES).all()
    np.testing.assert_allclose(positions["share"], 0.5)
    agreement = tables["codebook_agreement"].set_index("against")["ami"]
    assert agreement["categories"] == pytest.approx(2 * np.log(2) / (np.log(2) + np.log(12)), abs=0.01)
    typical = tables["codebook_images"]
    labels = labels_of(run)[:, 0]
    assert (typical.groupby("cluster").size() == 8).all()
    assert all(
        (labels[row] == cluster).sum() == LINES for row, cluster in zip(typical["row"], typical["cluster"], strict=True)
    )
    np.testing.assert_allclose(typical["share"], 1 / LINES)
    ended = batchjob("figures", run)
    assert ended.code == 0, ended.err
    with Image.open(run / "figures" / "codebook-1-layer-11.png") as picture:
        assert min(picture.size) > 500


def test_the_codebook_of_cls_rows_names_images(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    run, annotations = tmp_path / "run", annotate_by_orientation(striped, tmp_path / "striped.json")
    options = ["--queries", "cls", "--annotations", annotations, "--heads", "2"]
    assert batchjob("run", striped, run, *colour_model, *SCOPE, *options).code == 0
    for verb in ("stats", "report"):
        ended = batchjob(verb, run)
        assert ended.code == 0, ended.err
    images = pd.read_parquet(run / "stats" / "codebook_images.parquet")
    labels = package.open(run)["image_labels"].values[:, 0, 0]
    assert len(images) == IMAGES  # every one of the 12 clusters is in at most 8 images
    assert all(labels[line.row, 0] == line.cluster for line in images.itertuples())
    text = (run / "report.html").read_text()
    assert '<section id="codebook">' in text
    assert "<h3>Head 2</h3>" in text
    categories = pd.read_parquet(run / "stats" / "codebook_categories.parquet")
    assert set(categories["category"]) == {"level", "upright"}
    assert (categories["share_of_cluster"] == 1).all()


@pytest.mark.parametrize("queries", ["rows", "cls"])
def test_agreement_with_the_classes_of_folders_needs_no_annotations(
    queries: str, striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    """Checks that rows of vertical and of horizontal stripes never share a cluster; a CLS row says where red is."""
    run, folder = tmp_path / "run", tmp_path / "photos"
    for i, path in enumerate(sorted(striped.glob("*.png"))):
        (folder / ("upright" if i % 2 else "level")).mkdir(parents=True, exist_ok=True)
        (folder / ("upright" if i % 2 else "level") / path.name).write_bytes(path.read_bytes())
    ended = batchjob("run", folder, run, *colour_model, *SCOPE, "--heads", "1,2", "--queries", queries)
    assert ended.code == 0, ended.err
    ended = batchjob("stats", run)
    assert ended.code == 0, ended.err
    agreement = pd.read_parquet(run / "stats" / "codebook_agreement.parquet")
    own = agreement[(agreement["against"] == "classes") & (agreement["head"] == 2)].iloc[0]
    labels = package.open(run)["labels" if queries == "rows" else "image_labels"].sel(head=2).values.reshape(IMAGES, -1)
    classes = np.broadcast_to((package.open(run)["class"].values == "level")[:, None], labels.shape)
    assert own["rows"] == labels.size
    assert own["ami"] == pytest.approx(adjusted_mutual_info_score(classes.ravel(), labels.ravel()), abs=1e-6)
    assert f"agreement with classes (AMI over {labels.size:,} rows): median" in ended.out
    assert batchjob("report", run).code == 0
    assert "agreement with classes (AMI)" in (run / "report.html").read_text()


@pytest.mark.parametrize("exact", [True, False])
def test_agreement_over_a_dataset_is_scikit_learns(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 7, 20_000)
    labels = np.where(rng.random(20_000) < 0.4, groups, rng.integers(0, 12, 20_000))
    table = np.zeros((12, 9), np.int64)  # two groups are without rows
    np.add.at(table, (labels, groups), 1)
    if not exact:
        monkeypatch.setattr(codebook, "EXACT_ROWS", 0)
    expected = adjusted_mutual_info_score(groups, labels)
    assert codebook.dataset_ami(table) == pytest.approx(expected, abs=1e-9 if exact else 1e-5)
    assert np.isnan(codebook.dataset_ami(np.zeros((3, 2), np.int64)))
    assert codebook.dataset_ami(np.array([[5, 7]])) == 0.0

"""The table of the embedded sample, as `batchjob stats` prints and writes it: golden figures with DINOv2's weights."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import Command

# score, null, column -> by head. Drawn once; another preprocessing, token order, layout or definition moves them.
GOLDEN: dict[tuple[str, str, str], list[float]] = {
    ("instance_ari", "position", "mean"): [0.106, 0.423, -0.012, 0.295, 0.245, 0.311],
    ("instance_ari", "position", "gain"): [-0.192, 0.125, -0.31, -0.003, -0.053, 0.013],
    ("instance_ari", "position", "gain_low"): [-0.313, -0.013, -0.352, -0.115, -0.186, -0.126],
    ("instance_ami", "position", "mean"): [0.159, 0.497, -0.003, 0.376, 0.287, 0.402],
    ("image_ari", "position", "mean"): [0.021, 0.038, -0.049, 0.105, 0.067, 0.052],
    ("pair_ari", "position", "mean"): [0.138, 0.521, -0.008, 0.399, 0.237, 0.443],
    ("jaccard_60", "swap", "mean"): [0.044, 0.052, 0.055, 0.036, 0.057, 0.054],
    ("corloc", "swap", "mean"): [0.143, 0.143, 0.286, 0.143, 0.0, 0.286],
    ("coherence", "", "mean"): [0.725, 0.839, 0.833, 0.762, 0.53, 0.622],
    ("prefix_mass", "", "mean"): [0.023, 0.02, 0.012, 0.01, 0.075, 0.023],
}


def test_the_samples_table_is_as_it_was(sample_run: Path, tmp_path: Path, batchjob: Command) -> None:
    run = tmp_path / "sample"
    shutil.copytree(sample_run, run)
    ended = batchjob("stats", run)
    assert ended.code == 0
    assert "instance_ari by head, best first, with 95 % intervals over images against swap and position" in ended.out
    assert "An example, " in ended.out
    assert "evidence" not in ended.out
    assert "needs untrained runs" in ended.out
    verified = batchjob("show", run, "--verify")
    assert verified.code == 0, verified.out  # new arrays in scores.zarr are no damage
    summary = pd.read_parquet(run / "stats" / "summary.parquet")
    for (score, null, column), expected in GOLDEN.items():
        found = summary[(summary.score == score) & (summary.null == null)].sort_values("head")[column]
        assert found.tolist() == pytest.approx(expected, abs=0.011), (score, null, column, found.round(3).tolist())

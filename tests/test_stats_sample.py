"""The table of the embedded sample, as `batchjob stats` prints and writes it: golden figures with DINOv2's weights."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import CommandLine

# score, null, column -> by head. Drawn once; another preprocessing, token order, layout or definition moves them.
GOLDEN: dict[tuple[str, str, str], list[float]] = {}


def test_the_samples_table_is_as_it_was(sample_run: Path, tmp_path: Path, command_line: CommandLine) -> None:
    run = tmp_path / "sample"
    shutil.copytree(sample_run, run)
    ended = command_line("stats", str(run))
    assert ended.code == 0
    assert "instance_ari by head, best first (position null beside it" in ended.out
    assert "instance_ari: head 1, chosen on the first half" in ended.out
    assert "needs an untrained run" in ended.out
    summary = pd.read_parquet(run / "stats" / "summary.parquet")
    for (score, null, column), expected in GOLDEN.items():
        found = summary[(summary.score == score) & (summary.null == null)].sort_values("head")[column]
        assert found.tolist() == pytest.approx(expected, abs=0.011), (score, null, column, found.round(3).tolist())

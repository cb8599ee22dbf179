"""The log of a long run."""

import json
from pathlib import Path

import pytest

from batchjob.job import progress


def test_durations_are_written_in_everyday_units() -> None:
    said = [progress.minutes(s) for s in (0, 42, 99.6, 180, 7800, 5 * 86400 + 3 * 3600)]
    assert said == ["0 s", "42 s", "100 s", "3 min", "2 h 10 min", "5 d 3 h"]


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress(100, 40, every_s=0.0) as bar:
        bar.advance(10)
        bar.advance(50)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert lines[0].startswith("labels: 50 of 100 images (50%)")
    assert lines[-1].startswith("labels: 100 of 100 images (100%)")
    assert "images/s" in lines[0]


def test_stages_add_up_and_are_kept(tmp_path: Path) -> None:
    stages = progress.Stages()
    assert list(stages.timed("images", [1, 2, 3])) == [1, 2, 3]
    with stages("model"):
        pass
    stages.seconds["model"] += 2.0
    stages.images = 3
    stages.save(tmp_path / "logs" / "t.json", device="cpu")
    kept = json.loads((tmp_path / "logs" / "t.json").read_text())
    assert kept["images"] == 3
    assert kept["stages"]["model"] >= 2.0
    assert kept["device"] == "cpu"
    assert "3 images" in stages.summary()

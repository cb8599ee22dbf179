"""DATA that is gone for a moment: it is not published but reported, and can be labelled later."""

import os
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batchjob import plan as plans
from batchjob.data.index import ImageIndex
from batchjob.data.reading import ReadFailure
from batchjob.job import label
from batchjob.job.presence import is_a_loss_of_data
from batchjob.job.read_rows import ReadRows
from batchjob.job.sampled_rows import SampledRows
from batchjob.loader.loader import Batch
from batchjob.model.attention import LayerMaps
from batchjob.store import centroids
from batchjob.store import lifecycle as store
from tests.conftest import TINY, Command
from tests.runs import contents
from tests.test_job import make_photos

RUNTIME = ["--workers", "0", "--device", "cpu", "--batch-size", "8"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", 12)


def test_a_root_or_photos_that_are_gone_end_the_label_before_it_begins(
    tmp_path: Path, photos: Path, batchjob: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has one machine needs no name of it."""
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    run = tmp_path / "run"
    assert batchjob("plan", photos, run, *TINY, "--rows-per-partition", "4").code == 0
    photos.rename(tmp_path / "away")
    ended = batchjob("label", run, *RUNTIME)
    assert ended.code == 75
    assert f"DATA {photos} was planned and can't be seen; bring it back" in ended.err
    photos.mkdir()  # like the folder of a disk that is not mounted
    ended = batchjob("label", run, *RUNTIME)
    assert ended.code == 75
    assert f"none of the 12 photos of DATA {photos} can be seen; bring it back" in ended.err
    assert list((run / "done").glob("[0-9]*.json")) == []


def test_photos_whose_names_are_not_utf_8_are_seen(tmp_path: Path, photos: Path, batchjob: Command) -> None:
    for number, name in enumerate(sorted(os.listdir(photos))):
        os.rename(photos / name, os.fsencode(photos) + b"/\xe9%d.jpg" % number)
    assert batchjob("run", photos, tmp_path / "run", *TINY, *RUNTIME).code == 0


def test_a_list_of_paths_none_of_which_is_there_is_refused_before_it_is_planned(
    tmp_path: Path, photos: Path, batchjob: Command
) -> None:
    (tmp_path / "gone.txt").write_text("".join(f"no{number}.jpg\n" for number in range(6)))
    ended = batchjob("run", tmp_path / "gone.txt", tmp_path / "run", *TINY, *RUNTIME)
    assert ended.code == 2
    assert f"none of the 6 paths of {tmp_path}/gone.txt is there, such as {tmp_path}/no0.jpg" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_list_whose_photos_are_gone_after_the_plan_is_named_with_one_of_them(
    tmp_path: Path, photos: Path, batchjob: Command
) -> None:
    names = [f"photos/{name}" for name in sorted(os.listdir(photos))]
    (tmp_path / "list.txt").write_text("\n".join(names))
    assert batchjob("plan", tmp_path / "list.txt", tmp_path / "run", *TINY).code == 0
    photos.rename(tmp_path / "away")
    ended = batchjob("label", tmp_path / "run", *RUNTIME)
    assert ended.code == 75
    said = f"none of the 12 paths of {tmp_path}/list.txt can be seen, such as {tmp_path}/{names[0]}; bring the photos"
    assert said in ended.err


def test_a_partition_that_lost_its_photos_is_not_published_and_comes_with_the_next_run(
    tmp_path: Path, photos: Path, batchjob: Command
) -> None:
    calm, run = tmp_path / "calm", tmp_path / "run"
    assert batchjob("run", photos, calm, *TINY, "--rows-per-partition", "6", *RUNTIME).code == 0
    assert batchjob("plan", photos, run, *TINY, "--rows-per-partition", "6").code == 0
    away = tmp_path / "away"
    away.mkdir()
    for name in sorted(os.listdir(photos))[6:10]:
        (photos / name).rename(away / name)
    ended = batchjob("label", run, *RUNTIME)
    assert ended.code == 75
    assert "not published: 4 of 6 images of partition 1 can't be read now (1 partition)" in ended.err
    assert [path.name for path in (run / "done").glob("[0-9]*.json")] == ["000000.json"]
    for name in os.listdir(away):
        shutil.move(away / name, photos / name)
    assert batchjob("run", photos, run, *TINY, "--rows-per-partition", "6", *RUNTIME).code == 0
    assert contents(run) == contents(calm)


def test_a_partition_of_two_images_is_not_published_either_where_data_is_gone(
    tmp_path: Path, photos: Path, batchjob: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, away = tmp_path / "run", tmp_path / "away"
    options = [*TINY, "--rows-per-partition", "2"]
    assert batchjob("plan", photos, run, *options).code == 0
    real, seen = label._compute, []

    def compute(job: Any, partition: int, *others: Any) -> Any:
        seen.append(partition)
        if len(seen) == 3:
            photos.rename(away)
        return real(job, partition, *others)

    monkeypatch.setattr(label, "_compute", compute)
    ended = batchjob("label", run, *RUNTIME)
    assert ended.code == 75
    assert f"DATA {photos} was planned and can't be seen" in ended.err
    assert len(seen) < 6, "stopped at the first partition that lost an image"
    away.rename(photos)
    assert batchjob("run", photos, run, *options, *RUNTIME).code == 0
    assert batchjob("run", photos, tmp_path / "calm", *options, *RUNTIME).code == 0
    assert contents(run) == contents(tmp_path / "calm")


def test_photos_that_come_back_are_labelled_on_request_and_on_request_only(
    tmp_path: Path, photos: Path, batchjob: Command
) -> None:
    calm, run = tmp_path / "calm", tmp_path / "run"
    options = [*TINY, "--rows-per-partition", "4", *RUNTIME]
    assert batchjob("run", photos, calm, *options).code == 0
    assert batchjob("plan", photos, run, *TINY, "--rows-per-partition", "4").code == 0
    one = sorted(photos.iterdir())[5]
    one.rename(tmp_path / "away")
    ended = batchjob("run", photos, run, *options)
    assert ended.code == 1  # 1 of 12 is more than --max-failures
    hint = f"batchjob run {photos} {run} {' '.join([*TINY, '--rows-per-partition', '4'])} --retry-failed"
    assert (
        f"1 of 12 images failed: 1 missing; those that are missing or unreadable (1) are tried again by: {hint}"
        in ended.err
    )
    (tmp_path / "away").rename(one)
    assert f"tried again by: {hint} (with make: RETRY_FAILED=1)" in batchjob("show", run).err
    assert f"tried again by: {hint} (with make: RETRY_FAILED=1)" in batchjob("finish", run).err
    assert "nothing is missing" in batchjob("run", photos, run, *options).err
    before = {path.name: path.stat().st_mtime_ns for path in (run / "done").glob("[0-9]*.json")}
    ended = batchjob("run", photos, run, *options, "--retry-failed")
    assert ended.code == 0
    assert "--retry-failed: 1 image that was missing or unreadable is tried again" in ended.err
    after = {path.name: path.stat().st_mtime_ns for path in (run / "done").glob("[0-9]*.json")}
    assert [name for name in sorted(after) if after[name] != before[name]] == ["000001.json"]
    assert contents(run) == contents(calm)
    assert store.verify(run) == []


def test_a_disk_that_fails_for_a_moment_costs_no_image(
    tmp_path: Path, photos: Path, batchjob: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, failed = ImageIndex.read, set[int]()

    def read_at_the_second_try(index: ImageIndex, row: int) -> bytes:
        if row not in failed:
            failed.add(row)
            raise ReadFailure("unreadable" if row % 2 else "missing", "Input/output error")
        return read(index, row)

    monkeypatch.setattr(ImageIndex, "read", read_at_the_second_try)
    assert batchjob("run", photos, tmp_path / "run", *TINY, *RUNTIME).code == 0
    assert failed == set(range(12))
    assert np.all(store.open_labels(tmp_path / "run")["status"].values == 0)


@pytest.mark.parametrize(
    ("missing", "count", "max_failures", "is_lost"),
    [(3, 4, 0.01, False), (4, 4, 0.01, True), (12, 256, 0.01, False), (13, 256, 0.01, True), (13, 256, 0.1, False)],
)
def test_a_few_missing_photos_are_failures_and_many_are_a_loss_of_data(
    missing: int, count: int, max_failures: float, is_lost: bool
) -> None:
    failures = [("a.jpg", "missing", "No such file")] * missing + [("b.jpg", "truncated", "cut off")] * 100
    assert is_a_loss_of_data(failures, count, max_failures) == is_lost


FIT = ["--scope", "dataset", "--rows-per-partition", "4"]


def test_a_fit_that_is_stopped_while_it_reads_goes_on_after_the_last_whole_partition(
    tmp_path: Path, photos: Path, batchjob: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, run = tmp_path / "calm", tmp_path / "run"
    for folder in (calm, run):
        assert batchjob("plan", photos, folder, *TINY, *FIT).code == 0
    runtime = ["--workers", "0", "--device", "cpu", "--batch-size", "2"]
    assert batchjob("fit", calm, *runtime).code == 0
    add, seen = SampledRows.add, list[int]()

    def add_and_signal(rows: SampledRows, batch: Batch, layers: Iterable[LayerMaps]) -> None:
        add(rows, batch, layers)
        seen.extend(batch.rows.tolist())
        if seen[-1] == 9:  # in the middle of the third partition
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SampledRows, "add", add_and_signal)
    ended = batchjob("fit", run, *runtime)
    assert ended.code == 75, ended.err
    assert (run / "fit" / "rows-0-of-1.bin").exists()
    seen.clear()
    monkeypatch.setattr(SampledRows, "add", lambda *given: (seen.extend(given[1].rows.tolist()), add(*given)))
    ended = batchjob("fit", run, *runtime)
    assert ended.code == 0, ended.err
    assert "going on after 2 of 3 partitions" in ended.err
    assert seen == [8, 9, 10, 11]
    assert not (run / "fit" / "rows-0-of-1.bin").exists()
    one, two = (centroids.load(folder, plans.load(folder).digest) for folder in (calm, run))
    np.testing.assert_array_equal(one.centroids, two.centroids)


def test_kept_rows_that_are_damaged_or_of_another_plan_are_read_again(tmp_path: Path) -> None:
    x, numbers = torch.arange(24.0).reshape(1, 2, 4, 3), torch.arange(4)
    ReadRows(tmp_path, "plan", 1, 2).save(x, numbers, 7)
    into = torch.zeros(1, 2, 6, 3), torch.zeros(6, dtype=torch.int64)
    kept = ReadRows(tmp_path, "plan", 1, 2)
    assert kept.load_into(*into) == (7, 4)
    assert torch.equal(into[0][:, :, :4], x)
    assert torch.equal(into[1][:4], numbers)
    assert ReadRows(tmp_path, "other", 1, 2).load_into(*into) == (0, 0)
    whole = kept.path.read_bytes()
    for broken in (whole[:-200], whole[:-300] + b"\xff" + whole[-299:], b""):
        kept.path.write_bytes(broken)
        assert kept.load_into(*into) == (0, 0)

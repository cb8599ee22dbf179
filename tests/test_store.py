"""The store: what is in it, and that a partition is published whole or not at all."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

import batchjob
from batchjob import config, files
from batchjob.errors import UserError, WorkLeft
from batchjob.store import arrays as layout
from batchjob.store import lifecycle as store
from batchjob.store.writer import Writer
from tests.runs import SCORED_PLAN, Ids, arrays_of, contents, label, made_up_model, made_up_plan


def test_what_is_written_is_read_back_by_plain_xarray(finished_run: Path) -> None:
    with xarray.open_zarr(finished_run / "labels.zarr", chunks=None) as labels:
        for name, spec in layout.layout(SCORED_PLAN).items():
            if spec.store == "labels":
                whole = np.concatenate([arrays_of(SCORED_PLAN, i)[name] for i in range(3)])
                assert labels[name].dims == spec.dims
                assert labels[name].dtype == spec.dtype
                np.testing.assert_array_equal(labels[name].values, whole)
        assert labels["image_id"].values.tolist() == [Ids(20).id(i) for i in range(20)]
        assert labels["layer"].values.tolist() == [3, 7]
        assert labels["layer"].dtype == "int16"
        assert labels["algorithm"].values.tolist() == ["kmeans"]
        assert labels["kept_image"].values.tolist() == [2, 9, 15]
        assert labels["status"].attrs["codes"]["ok"] == 0
    with xarray.open_zarr(finished_run / "scores.zarr", chunks=None) as scores:
        assert scores["sink"].dims == ("image", "layer", "head")


def test_batchjob_open_gives_the_same_dataset(finished_run: Path) -> None:
    with xarray.open_zarr(finished_run / "labels.zarr", chunks=None) as plain, batchjob.open(str(finished_run)) as ours:
        xarray.testing.assert_identical(plain, ours.drop_vars("image"))


def test_an_unfinished_run_can_be_opened_and_says_what_is_pending(empty_run: Path) -> None:
    label(empty_run, SCORED_PLAN, [1])
    with store.open_labels(empty_run) as labels:
        assert (labels["status"].values[:8] == 255).all()
        assert (labels["labels"].values[:8] == 255).all()
        assert np.isnan(labels["cls_attention"].values[16:]).all()
        np.testing.assert_array_equal(labels["labels"].values[8:16], arrays_of(SCORED_PLAN, 1)["labels"])


def test_each_partition_is_one_file_of_every_array(finished_run: Path) -> None:
    spec = layout.layout(SCORED_PLAN)["labels"]
    shards = sorted(p.name for p in (finished_run / "labels.zarr" / "labels").glob("c.*"))
    assert shards == [layout.shard_key(i, spec) for i in range(3)]
    array = zarr.open_array(finished_run / "labels.zarr" / "labels", mode="r")
    assert array.shards == (8, 1, 2, 3, 2, 3)
    assert array.chunks == (8, 1, 1, 1, 2, 3)


def test_a_partition_of_fill_values_is_published_like_any_other(empty_run: Path) -> None:
    arrays = {n: np.full_like(a, layout.layout(SCORED_PLAN)[n].fill) for n, a in arrays_of(SCORED_PLAN, 0).items()}
    with Writer(empty_run, SCORED_PLAN) as writer:
        writer.write(0, arrays)
    assert store.missing(empty_run, SCORED_PLAN) == [1, 2]
    assert store.verify(empty_run) == []


@pytest.mark.parametrize(
    ("options", "kind", "present", "absent"),
    [
        (config.Options(), "vit", {"labels", "cls_attention"}, {"saliency", "image_labels", "attention_rows"}),
        (config.Options(), "cnn", {"labels", "saliency"}, {"cls_attention"}),
        (config.Options(scope="dataset", queries="cls"), "vit", {"image_labels"}, {"labels"}),
    ],
)
def test_the_arrays_follow_the_options(options: config.Options, kind: str, present: set[str], absent: set[str]) -> None:
    names = set(layout.layout(made_up_plan(options=options, model=made_up_model(kind=kind))))
    assert present <= names
    assert not absent & names


def test_finish_lists_the_holes_and_ends_with_work_left(empty_run: Path) -> None:
    label(empty_run, SCORED_PLAN, [1])
    with pytest.raises(WorkLeft, match=r"2 of 3 partitions are not labelled: 0, 2; go on with: batchjob label"):
        store.finish(empty_run)


def test_finish_collects_the_failures_in_row_order_and_counts_them(finished_run: Path) -> None:
    assert store.finish(finished_run) == store.Finished(20, {"truncated": 3})
    import csv

    with open(finished_run / "failures.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image_id"] for row in rows] == [Ids(20).id(0), Ids(20).id(8), Ids(20).id(16)]
    assert rows[0]["message"] == "cut, off\n"


def test_two_runs_in_another_order_are_equal_byte_for_byte(tmp_path: Path) -> None:
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        store.create(tmp_path / name, SCORED_PLAN, Ids(20))
        for i in order:
            label(tmp_path / name, SCORED_PLAN, [i])
        store.finish(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) > 40


def test_creating_again_keeps_what_is_there_and_refuses_another_plan(empty_run: Path) -> None:
    label(empty_run, SCORED_PLAN, [1])
    store.create(empty_run, SCORED_PLAN, Ids(20))
    assert store.missing(empty_run, SCORED_PLAN) == [0, 2]
    with pytest.raises(UserError, match="labels of another plan: DATA or the options are not those"):
        store.create(empty_run, made_up_plan(inputs={"index/k.npy": "d2"}), Ids(20))


def test_a_store_whose_plan_was_never_saved_is_replaced(empty_run: Path) -> None:
    other = made_up_plan(inputs={"index/k.npy": "d2"}, row_count=5)
    store.create(empty_run, other, Ids(5))
    with store.open_labels(empty_run) as labels:
        assert labels.sizes["image"] == 5


def test_a_store_of_another_schema_is_recognised(empty_run: Path) -> None:
    root = empty_run / "labels.zarr" / "zarr.json"
    metadata = json.loads(root.read_text())
    metadata["attributes"] |= {"schema_version": 0, "batchjob": "0.0.9"}
    root.write_text(json.dumps(metadata))
    for use in (store.open_labels, store.finish, store.verify, lambda run: Writer(run, SCORED_PLAN)):
        with pytest.raises(UserError, match=r"has schema 0, this .* reads schema 3; use batchjob 0\.0\.9"):
            use(empty_run)


def test_opening_a_folder_that_is_not_a_run_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run: it has no labels.zarr; make one with: batchjob run DATA"):
        batchjob.open(tmp_path)


def test_arrays_of_another_shape_are_refused_before_they_are_written(empty_run: Path) -> None:
    arrays = arrays_of(SCORED_PLAN, 0)
    with Writer(empty_run, SCORED_PLAN) as writer:
        with pytest.raises(ValueError, match=r"partition 2 has \(4, 1, 2, 3, 2, 3\)"):
            writer.write(2, arrays)
        del arrays["k"]
        with pytest.raises(ValueError, match="the store has"):
            writer.write(0, arrays)
    assert store.missing(empty_run, SCORED_PLAN) == [0, 1, 2]


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.ENOSPC, WorkLeft, "No space left on device .* free some space"),
        (errno.EDQUOT, WorkLeft, "quota exceeded .* MB free there"),
        (errno.EROFS, UserError, "Read-only file system; .* must be writable"),
    ],
)
def test_a_full_or_read_only_disk_is_one_clear_line_and_nothing_is_torn(
    empty_run: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], text: str
) -> None:
    real, calls = os.fsync, []

    def fails_on_the_fifth(handle: int) -> None:
        calls.append(handle)
        if len(calls) >= 5:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fails_on_the_fifth)
    with pytest.raises(kind, match=text), Writer(empty_run, SCORED_PLAN) as writer:
        writer.write(0, arrays_of(SCORED_PLAN, 0))
    assert store.missing(empty_run, SCORED_PLAN) == [0, 1, 2]
    monkeypatch.undo()
    label(empty_run, SCORED_PLAN, [0, 1, 2])
    store.finish(empty_run)
    assert store.verify(empty_run) == []


def test_arrays_given_to_the_writer_are_published_even_if_the_loop_is_stopped(empty_run: Path) -> None:
    def stopped() -> None:
        with Writer(empty_run, SCORED_PLAN) as writer:
            writer.write(1, arrays_of(SCORED_PLAN, 1))
            raise WorkLeft("a signal came")

    with pytest.raises(WorkLeft, match="a signal came"):
        stopped()
    assert store.missing(empty_run, SCORED_PLAN) == [0, 2]


def test_a_partition_that_another_process_labels_can_not_be_claimed_until_it_dies(empty_run: Path) -> None:
    code = (
        "import sys, time; from batchjob.store.claims import Claims; from pathlib import Path\n"
        "claims = Claims(Path(sys.argv[1]) / 'work'); print(claims.take(1), flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(empty_run)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "True\n"
        with Writer(empty_run, SCORED_PLAN) as writer:
            assert not writer.claim(1)
            assert writer.claim(0)
            other.send_signal(signal.SIGKILL)
            other.wait()
            assert writer.claim(1)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_a_published_partition_can_not_be_claimed(empty_run: Path) -> None:
    label(empty_run, SCORED_PLAN, [0])
    with Writer(empty_run, SCORED_PLAN) as writer:
        assert not writer.claim(0)


def test_writing_returns_before_the_disk_is_done(empty_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, is_free = os.fsync, threading.Event()

    def fsync(handle: int) -> None:
        assert is_free.wait(60), "the writing waits for the disk"
        real(handle)

    with Writer(empty_run, SCORED_PLAN) as writer:
        monkeypatch.setattr(os, "fsync", fsync)
        writer.write(0, arrays_of(SCORED_PLAN, 0))
        assert not store.is_done(empty_run, 0)
        is_free.set()
    assert store.is_done(empty_run, 0)


def test_finishing_removes_all_scratch_but_that_of_running_writers(empty_run: Path) -> None:
    scratch = files.work_folder(empty_run, "scratch")
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout
    for process in (gone.strip(), str(os.getppid())):
        (scratch / f"{socket.gethostname()}-{process}-0a").mkdir()
    label(empty_run, SCORED_PLAN, [0, 1, 2])
    store.finish(empty_run)
    assert [folder.name.split("-")[-2] for folder in scratch.iterdir()] == [str(os.getppid())]
    next(scratch.iterdir()).rmdir()
    store.finish(empty_run)
    assert not scratch.exists()

"""The store: what is in it, that it is published whole or not at all, and that damage is found and mended."""

import contextlib
import errno
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

import batchjob
from batchjob import config, files
from batchjob import plan as plans
from batchjob.errors import UserError, WorkLeft
from batchjob.plan import Plan
from batchjob.store import arrays as layout
from batchjob.store import centroids
from batchjob.store import lifecycle as store
from batchjob.store import partitions as publish
from batchjob.store.writer import Writer
from tests.runs import Ids, arrays_of, contents, label, made_up_model, made_up_plan

PLAN = made_up_plan(kept_rows=(2, 9, 15), options=config.Options(scores="attention"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store.create(tmp_path / "run", PLAN, Ids(20))
    return tmp_path / "run"


@pytest.fixture
def finished(run: Path) -> Path:
    label(run, PLAN, [0, 1, 2])
    store.finish(run)
    return run


def test_what_is_written_is_read_back_by_plain_xarray(finished: Path) -> None:
    with xarray.open_zarr(finished / "labels.zarr", chunks=None) as labels:
        for name, spec in layout.layout(PLAN).items():
            if spec.store == "labels":
                whole = np.concatenate([arrays_of(PLAN, i)[name] for i in range(3)])
                assert labels[name].dims == spec.dims
                assert labels[name].dtype == spec.dtype
                np.testing.assert_array_equal(labels[name].values, whole)
        assert labels["image_id"].values.tolist() == [Ids(20).id(i) for i in range(20)]
        assert labels["layer"].values.tolist() == [3, 7]
        assert labels["layer"].dtype == "int16"
        assert labels["algorithm"].values.tolist() == ["kmeans"]
        assert labels["kept_image"].values.tolist() == [2, 9, 15]
        assert labels["status"].attrs["codes"]["ok"] == 0
    with xarray.open_zarr(finished / "scores.zarr", chunks=None) as scores:
        assert scores["sink"].dims == ("image", "layer", "head")


def test_batchjob_open_gives_the_same_dataset(finished: Path) -> None:
    with xarray.open_zarr(finished / "labels.zarr", chunks=None) as plain, batchjob.open(str(finished)) as ours:
        xarray.testing.assert_identical(plain, ours.drop_vars("image"))


def test_an_unfinished_run_can_be_opened_and_says_what_is_pending(run: Path) -> None:
    label(run, PLAN, [1])
    with store.open_labels(run) as labels:
        assert (labels["status"].values[:8] == 255).all()
        assert (labels["labels"].values[:8] == 255).all()
        assert np.isnan(labels["cls_attention"].values[16:]).all()
        np.testing.assert_array_equal(labels["labels"].values[8:16], arrays_of(PLAN, 1)["labels"])


def test_each_partition_is_one_file_of_every_array(finished: Path) -> None:
    spec = layout.layout(PLAN)["labels"]
    shards = sorted(p.name for p in (finished / "labels.zarr" / "labels").glob("c.*"))
    assert shards == [layout.shard_key(i, spec) for i in range(3)]
    array = zarr.open_array(finished / "labels.zarr" / "labels", mode="r")
    assert array.shards == (8, 1, 2, 3, 2, 3)
    assert array.chunks == (8, 1, 1, 1, 2, 3)


def test_a_partition_of_fill_values_is_published_like_any_other(run: Path) -> None:
    arrays = {n: np.full_like(a, layout.layout(PLAN)[n].fill) for n, a in arrays_of(PLAN, 0).items()}
    with Writer(run, PLAN) as writer:
        writer.write(0, arrays)
    assert store.missing(run, PLAN) == [1, 2]
    assert store.verify(run) == []


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


def test_finish_lists_the_holes_and_ends_with_work_left(run: Path) -> None:
    label(run, PLAN, [1])
    with pytest.raises(WorkLeft, match=r"2 of 3 partitions are not labelled: 0, 2; go on with: batchjob label"):
        store.finish(run)


def test_finish_collects_the_failures_in_row_order_and_counts_them(finished: Path) -> None:
    assert store.finish(finished) == store.Finished(20, {"truncated": 3})
    import csv

    with open(finished / "failures.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image_id"] for row in rows] == [Ids(20).id(0), Ids(20).id(8), Ids(20).id(16)]
    assert rows[0]["message"] == "cut, off\n"


def test_two_runs_in_another_order_are_equal_byte_for_byte(tmp_path: Path) -> None:
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        store.create(tmp_path / name, PLAN, Ids(20))
        for i in order:
            label(tmp_path / name, PLAN, [i])
        store.finish(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) > 40


def test_creating_again_keeps_what_is_there_and_refuses_another_plan(run: Path) -> None:
    label(run, PLAN, [1])
    store.create(run, PLAN, Ids(20))
    assert store.missing(run, PLAN) == [0, 2]
    with pytest.raises(UserError, match="labels of another plan: DATA or the options are not those"):
        store.create(run, made_up_plan(inputs={"index/k.npy": "d2"}), Ids(20))


def test_a_store_whose_plan_was_never_saved_gives_way(run: Path) -> None:
    other = made_up_plan(inputs={"index/k.npy": "d2"}, row_count=5)
    store.create(run, other, Ids(5))
    with store.open_labels(run) as labels:
        assert labels.sizes["image"] == 5


def test_a_store_of_another_schema_is_recognised(run: Path) -> None:
    root = run / "labels.zarr" / "zarr.json"
    metadata = json.loads(root.read_text())
    metadata["attributes"] |= {"schema_version": 0, "batchjob": "0.0.9"}
    root.write_text(json.dumps(metadata))
    for use in (store.open_labels, store.finish, store.verify, lambda run: Writer(run, PLAN)):
        with pytest.raises(UserError, match=r"has schema 0, this .* reads schema 2; use batchjob 0\.0\.9"):
            use(run)


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run: it has no labels.zarr; make one with: batchjob run DATA"):
        batchjob.open(tmp_path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (_cut, "were published"),
        (_flip, "checksum differs"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.unlink(), "missing"),
    ],
    ids=["truncated", "bit-flipped", "zero-byte", "deleted"],
)
def test_every_damaged_file_of_a_done_partition_is_found_and_mended(finished: Path, damage, found: str) -> None:  # type: ignore[no-untyped-def]
    whole = contents(finished)
    paths = layout.shard_paths(layout.layout(PLAN), PLAN, 1)
    for path in paths:
        damage(finished / path)
    damages = store.verify(finished)
    assert sorted(d.path for d in damages) == sorted(paths)
    assert {d.partition for d in damages} == {1}
    assert all(found in d.reason for d in damages)
    store.forget(finished, damages)
    assert store.missing(finished, PLAN) == [1]
    label(finished, PLAN, [1])
    store.finish(finished)
    assert store.verify(finished) == []
    assert contents(finished) == whole


@pytest.mark.parametrize(
    "damage", [_cut, _flip, lambda path: path.unlink()], ids=["truncated", "bit-flipped", "deleted"]
)
def test_damaged_metadata_coordinates_and_image_ids_are_found_and_mended(finished: Path, damage) -> None:  # type: ignore[no-untyped-def]
    whole = contents(finished)
    paths = ["labels.zarr/zarr.json", "labels.zarr/k/zarr.json", "labels.zarr/image_id/c.0", "scores.zarr/head/c.0"]
    for path in paths:
        damage(finished / path)
    damages = store.verify(finished)
    assert sorted(d.path for d in damages) == sorted(paths)
    store.forget(finished, damages)
    assert len(store.mend(finished, PLAN, Ids(20))) == len(paths)
    store.finish(finished)
    assert store.verify(finished) == []
    assert contents(finished) == whole


def test_a_damaged_done_marker_counts_as_missing(finished: Path) -> None:
    _flip(publish.marker_path(finished, 2))
    assert [d.partition for d in store.verify(finished)] == [2]
    assert store.missing(finished, PLAN) == [2]


def test_files_of_another_size_are_missing_work_without_reading_them(finished: Path) -> None:
    _cut(finished / layout.shard_paths(layout.layout(PLAN), PLAN, 0)[0])
    assert store.missing(finished, PLAN) == [0]
    with pytest.raises(WorkLeft, match="1 of 3 partitions are not labelled: 0;"):
        store.finish(finished)


def test_the_markers_checksums_are_those_of_the_files(finished: Path) -> None:
    marker = publish.read_marker(finished, 0)
    assert marker is not None
    for path, (size, checksum) in marker["files"].items():
        data = (finished / path).read_bytes()
        assert (len(data), zlib.crc32(data)) == (size, checksum)


def test_arrays_of_another_shape_are_refused_before_they_are_written(run: Path) -> None:
    arrays = arrays_of(PLAN, 0)
    with Writer(run, PLAN) as writer:
        with pytest.raises(ValueError, match=r"partition 2 has \(4, 1, 2, 3, 2, 3\)"):
            writer.write(2, arrays)
        del arrays["k"]
        with pytest.raises(ValueError, match="the store has"):
            writer.write(0, arrays)
    assert store.missing(run, PLAN) == [0, 1, 2]


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.ENOSPC, WorkLeft, "No space left on device .* free some space"),
        (errno.EDQUOT, WorkLeft, "quota exceeded .* MB free there"),
        (errno.EROFS, UserError, "Read-only file system; .* must be writable"),
    ],
)
def test_a_full_or_read_only_disk_is_one_clear_line_and_nothing_is_torn(
    run: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], text: str
) -> None:
    real, calls = os.fsync, []

    def fails_on_the_fifth(handle: int) -> None:
        calls.append(handle)
        if len(calls) >= 5:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fails_on_the_fifth)
    with pytest.raises(kind, match=text), Writer(run, PLAN) as writer:
        writer.write(0, arrays_of(PLAN, 0))
    assert store.missing(run, PLAN) == [0, 1, 2]
    monkeypatch.undo()
    label(run, PLAN, [0, 1, 2])
    store.finish(run)
    assert store.verify(run) == []


def test_what_was_handed_over_is_published_even_if_the_loop_is_stopped(run: Path) -> None:
    def stopped() -> None:
        with Writer(run, PLAN) as writer:
            writer.write(1, arrays_of(PLAN, 1))
            raise WorkLeft("a signal came")

    with pytest.raises(WorkLeft, match="a signal came"):
        stopped()
    assert store.missing(run, PLAN) == [0, 2]


def test_a_partition_that_another_process_labels_can_not_be_claimed_until_it_dies(run: Path) -> None:
    code = (
        "import sys, time; from batchjob.store.claims import Claims; from pathlib import Path\n"
        "claims = Claims(Path(sys.argv[1]) / 'work'); print(claims.take(1), flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "True\n"
        with Writer(run, PLAN) as writer:
            assert not writer.claim(1)
            assert writer.claim(0)
            other.send_signal(signal.SIGKILL)
            other.wait()
            assert writer.claim(1)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_a_published_partition_can_not_be_claimed(run: Path) -> None:
    label(run, PLAN, [0])
    with Writer(run, PLAN) as writer:
        assert not writer.claim(0)


def test_writing_returns_before_the_disk_is_done(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (time.sleep(0.05), real(handle)))
    with Writer(run, PLAN) as writer:
        start = time.monotonic()
        writer.write(0, arrays_of(PLAN, 0))
        assert time.monotonic() - start < 0.2
    assert store.is_done(run, 0)


def test_finishing_leaves_no_scratch_behind_but_that_of_who_still_writes(run: Path) -> None:
    scratch = files.work_folder(run, "scratch")
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout
    for process in (gone.strip(), str(os.getppid())):
        (scratch / f"{socket.gethostname()}-{process}-0a").mkdir()
    label(run, PLAN, [0, 1, 2])
    store.finish(run)
    assert [folder.name.split("-")[-2] for folder in scratch.iterdir()] == [str(os.getppid())]
    next(scratch.iterdir()).rmdir()
    store.finish(run)
    assert not scratch.exists()


def test_finishing_does_not_take_damaged_metadata_for_what_was_written(run: Path) -> None:
    label(run, PLAN, [0, 1, 2])
    _flip(run / "labels.zarr" / "image_id" / "c.0")
    store.finish(run)
    assert [damage.path for damage in store.verify(run)] == ["labels.zarr/image_id/c.0"]


def _fit(run: Path, plan: Plan) -> None:
    """RUN/fit/centroids.npz of 4 clusters, made up."""
    rng, heads = np.random.default_rng(0), (len(plan.layers), len(plan.heads))
    values = rng.random((*heads, 4, 6), np.float32), rng.integers(1, 9, (*heads, 4)), rng.random(heads)
    found = centroids.Centroids(*values, np.ones(heads, np.int64), 20, 20, "batched", plan.digest)
    centroids.save(run, found)


class Killed(BaseException):
    """Ends a function between two of its steps, as SIGKILL would."""


@pytest.mark.parametrize("scope", ["image", "dataset"])
def test_a_kill_at_any_step_of_finishing_is_no_damage_and_finishing_again_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    plan = made_up_plan(options=config.Options(scope=scope, scores="attention"))
    store.create(tmp_path / "labelled", plan, Ids(20))
    label(tmp_path / "labelled", plan, [0, 1, 2])
    if scope == "dataset":
        _fit(tmp_path / "labelled", plan)
    shutil.copytree(tmp_path / "labelled", tmp_path / "calm")
    store.finish(tmp_path / "calm")
    whole, steps = contents(tmp_path / "calm"), 0
    assert any(path.startswith("labels.zarr/centroid_rows/c/") for path in whole) == (scope == "dataset")
    done = False
    while not done:
        run, left = tmp_path / f"killed-{steps}", [steps]

        def step(real: Callable[..., None], left: list[int], *names: str) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            real(*names)

        shutil.copytree(tmp_path / "labelled", run)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for name in ("replace", "rename"):
                patch.setattr(os, name, functools.partial(step, getattr(os, name), left))
            store.finish(run)
            done = True
        assert store.verify(run) == []
        with store.open_labels(run) as labels:
            np.testing.assert_array_equal(labels["k"].values[8:16], arrays_of(plan, 1)["k"])
        assert store.mend(run, plan, Ids(20)) == []
        _flip(run / "labels.zarr" / "image_id" / "c.0")  # what is damaged is still seen
        assert [damage.path for damage in store.verify(run)] == ["labels.zarr/image_id/c.0"]
        _flip(run / "labels.zarr" / "image_id" / "c.0")
        store.finish(run)
        assert store.verify(run) == []
        assert contents(run) == whole
        steps += 1
    assert steps > 4  # failures.csv, both roots, and their seal before and after


@pytest.mark.parametrize(
    "damage", [_cut, _flip, lambda path: path.unlink()], ids=["truncated", "bit-flipped", "deleted"]
)
def test_damaged_centroids_in_the_store_are_found_and_written_again_from_the_fit(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    run, plan = tmp_path / "run", made_up_plan(options=config.Options(scope="dataset"))
    store.create(run, plan, Ids(20))
    label(run, plan, [0, 1, 2])
    _fit(run, plan)
    store.finish(run)
    whole = contents(run)
    paths = sorted(path for path in whole if path.startswith("labels.zarr/centroid"))
    assert len(paths) == 3 + 3 * 6  # metadata, and a chunk for each of two layers and three heads
    for path in paths:
        damage(run / path)
    damages = store.verify(run)
    assert sorted(d.path for d in damages) == paths
    store.forget(run, damages)
    assert len(store.mend(run, plan, Ids(20))) == len(paths)
    store.finish(run)
    assert store.verify(run) == []
    assert contents(run) == whole
    for path in paths:
        damage(run / path)
    store.finish(run)  # mends them by itself, too
    assert contents(run) == whole


@pytest.mark.parametrize(
    ("images", "on_gpu", "rows"),
    [(8, False, 8), (98, False, 8), (5000, False, 64), (5000, True, 64), (118_287, True, 256), (118_287, False, 256)],
)
def test_rows_per_partition_by_itself(images: int, on_gpu: bool, rows: int) -> None:
    assert plans.rows_per_partition(images, on_gpu=on_gpu) == rows


def test_coco_val_keeps_eight_gpus_busy_and_a_kill_on_a_cpu_costs_minutes() -> None:
    partitions = -(-5000 // plans.rows_per_partition(5000, on_gpu=True))
    assert partitions / 8 / -(-partitions // 8) > 0.95  # share of the last round that is work
    assert (
        max(plans.rows_per_partition(n, on_gpu=False) for n in (10, 10**4, 10**6, 10**9)) / 2 < 180
    )  # s at 2 images/s


@pytest.mark.parametrize(("rows", "chunk"), [(8, 8), (64, 64), (512, 512), (1856, 928), (4096, 1024), (97, 97)])
def test_chunks_divide_their_shard(rows: int, chunk: int) -> None:
    assert plans.rows_per_chunk(rows) == chunk


def test_a_partition_that_can_not_be_cut_into_chunks_names_a_better_one() -> None:
    with pytest.raises(UserError, match=r"--rows-per-partition 4093 has no divisor from 64 to 1024 .*; try 4094"):
        plans.rows_per_chunk(4093)
    with pytest.raises(UserError, match="more than 4096"):
        plans.rows_per_chunk(5000)

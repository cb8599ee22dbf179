"""Damage in the store is found and mended; a kill during `finish` does not cause damage."""

import contextlib
import functools
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray

import batchjob
from batchjob import config
from batchjob import plan as plans
from batchjob.errors import UserError, WorkLeft
from batchjob.plan import Plan
from batchjob.store import arrays as layout
from batchjob.store import centroids, outputs
from batchjob.store import lifecycle as store
from batchjob.store import partitions as publish
from tests.runs import SCORED_PLAN, Ids, arrays_of, contents, label, made_up_plan


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
def test_every_damaged_file_of_a_done_partition_is_found_and_mended(finished_run: Path, damage, found: str) -> None:  # type: ignore[no-untyped-def]
    whole = contents(finished_run)
    paths = layout.shard_paths(layout.layout(SCORED_PLAN), SCORED_PLAN, 1)
    for path in paths:
        damage(finished_run / path)
    damages = store.verify(finished_run)
    assert sorted(d.path for d in damages) == sorted(paths)
    assert {d.partition for d in damages} == {1}
    assert all(found in d.reason for d in damages)
    store.forget(finished_run, damages)
    assert store.missing(finished_run, SCORED_PLAN) == [1]
    label(finished_run, SCORED_PLAN, [1])
    store.finish(finished_run)
    assert store.verify(finished_run) == []
    assert contents(finished_run) == whole


@pytest.mark.parametrize(
    "damage", [_cut, _flip, lambda path: path.unlink()], ids=["truncated", "bit-flipped", "deleted"]
)
def test_damaged_metadata_coordinates_and_image_ids_are_found_and_mended(finished_run: Path, damage) -> None:  # type: ignore[no-untyped-def]
    whole = contents(finished_run)
    paths = ["labels.zarr/zarr.json", "labels.zarr/k/zarr.json", "labels.zarr/image_id/c.0", "scores.zarr/head/c.0"]
    for path in paths:
        damage(finished_run / path)
    damages = store.verify(finished_run)
    assert sorted(d.path for d in damages) == sorted(paths)
    store.forget(finished_run, damages)
    assert len(store.mend(finished_run, SCORED_PLAN, Ids(20))) == len(paths)
    store.finish(finished_run)
    assert store.verify(finished_run) == []
    assert contents(finished_run) == whole


def test_a_damaged_done_marker_counts_as_missing(finished_run: Path) -> None:
    _flip(publish.marker_path(finished_run, 2))
    assert [d.partition for d in store.verify(finished_run)] == [2]
    assert store.missing(finished_run, SCORED_PLAN) == [2]


def test_partitions_with_files_of_another_size_are_missing_without_being_read(finished_run: Path) -> None:
    _cut(finished_run / layout.shard_paths(layout.layout(SCORED_PLAN), SCORED_PLAN, 0)[0])
    assert store.missing(finished_run, SCORED_PLAN) == [0]
    with pytest.raises(WorkLeft, match="1 of 3 partitions is not labelled: 0;"):
        store.finish(finished_run)


def test_the_markers_checksums_are_those_of_the_files(finished_run: Path) -> None:
    marker = publish.read_marker(finished_run, 0)
    assert marker is not None
    for path, (size, checksum) in marker["files"].items():
        data = (finished_run / path).read_bytes()
        assert (len(data), zlib.crc32(data)) == (size, checksum)


def test_finishing_does_not_take_damaged_metadata_for_what_was_written(empty_run: Path) -> None:
    label(empty_run, SCORED_PLAN, [0, 1, 2])
    _flip(empty_run / "labels.zarr" / "image_id" / "c.0")
    with pytest.raises(WorkLeft, match=r"metadata of .* is damaged"):
        store.finish(empty_run)
    assert [damage.path for damage in store.verify(empty_run)] == ["labels.zarr/image_id/c.0"]
    assert [damage.path for damage in store.mend(empty_run, SCORED_PLAN, Ids(20))] == ["labels.zarr/image_id/c.0"]
    store.finish(empty_run)
    assert store.verify(empty_run) == []


def test_opening_refuses_what_is_cut_or_lost_and_flipped_metadata_and_if_asked_flipped_shards(
    finished_run: Path,
) -> None:
    plans.save(SCORED_PLAN, finished_run)
    whole = batchjob.open(finished_run, verify=True).load()
    shard = finished_run / "labels.zarr" / "cls_attention" / "c.1.0.0.0.0"
    data = shard.read_bytes()
    _flip(shard)
    batchjob.open(finished_run)
    with pytest.raises(UserError, match="checksum differs"):
        batchjob.open(finished_run, verify=True)
    for left in (b"", data[:-1], None):
        shard.unlink()
        if left is not None:
            shard.write_bytes(left)
        with pytest.raises(UserError, match="is damaged"):
            batchjob.open(finished_run)
    shard.write_bytes(data)
    xarray.testing.assert_identical(batchjob.open(finished_run).load(), whole)
    _flip(finished_run / "labels.zarr" / "image_id" / "c.0")
    with pytest.raises(UserError, match="checksum differs"):
        batchjob.open(finished_run)


def _fit(empty_run: Path, plan: Plan) -> None:
    """Writes a made-up RUN/fit/centroids.npz of 4 clusters."""
    rng, heads = np.random.default_rng(0), (len(plan.layers), len(plan.heads))
    values = rng.random((*heads, 4, 6), np.float32), rng.integers(1, 9, (*heads, 4)), rng.random(heads)
    found = centroids.Centroids(*values, np.ones(heads, np.int64), 20, 20, "batched", plan.digest)
    centroids.save(empty_run, found)


class Killed(BaseException):
    """Ends a function between two of its steps, as SIGKILL would."""


@pytest.mark.parametrize("scope", ["image", "dataset"])
def test_a_kill_at_any_step_of_finishing_is_not_damage_and_finishing_again_ends_the_same(
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
        for _ in range(2):  # the second attempt is stopped where the first was
            left[0] = steps
            with monkeypatch.context() as patch, contextlib.suppress(Killed):
                for name in ("replace", "rename"):
                    patch.setattr(os, name, functools.partial(step, getattr(os, name), left))
                store.finish(run)
                done = True
            assert store.verify(run) == []
        with store.open_labels(run) as labels:
            np.testing.assert_array_equal(labels["k"].values[8:16], arrays_of(plan, 1)["k"])
        assert store.mend(run, plan, Ids(20)) == []
        _flip(run / "labels.zarr" / "image_id" / "c.0")  # the damage is still found
        assert [damage.path for damage in store.verify(run)] == ["labels.zarr/image_id/c.0"]
        _flip(run / "labels.zarr" / "image_id" / "c.0")
        store.finish(run)
        assert store.verify(run) == []
        assert contents(run) == whole
        steps += 1
    assert steps > 4  # failures.csv, both root groups, and their checksums before and after


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
    store.finish(run)  # `finish` mends them by itself too
    assert contents(run) == whole


@pytest.mark.parametrize("is_replaced", [True, False])
def test_files_that_are_replaced_while_they_are_checked_are_checked_again(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    seal, looks = finished_run / "done" / "store.json", []

    def find_static() -> list[publish.Damage]:
        looks.append(seal.stat().st_ino)
        if len(looks) > 1:
            return []
        if is_replaced:  # as `finish` does
            shutil.copy(seal, seal.with_suffix(".new"))
            seal.with_suffix(".new").replace(seal)
        return [publish.Damage(-1, "labels.zarr/zarr.json", "has other contents than were published")]

    with contextlib.nullcontext() if is_replaced else pytest.raises(UserError, match="is damaged"):
        outputs.raise_for_damage(finished_run, find_static, stats=True)
    assert len(looks) == 1 + is_replaced

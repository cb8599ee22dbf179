"""Options, the plan, its partitions and its file."""

import csv
import dataclasses
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchjob import config
from batchjob import plan as plans
from batchjob.config import Options, Runtime
from batchjob.errors import UserError
from tests.conftest import ROOT, TINY, Command
from tests.runs import made_up_plan
from tests.test_job import make_photos


@given(st.integers(0, 10_000), st.integers(1, 4096))
def test_partitions_cover_every_row_once_in_order(rows: int, size: int) -> None:
    bounds = plans.Partitions(rows, size)
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(rows))
    assert all(stop - start == size for start, stop in bounds[:-1])
    assert len(bounds) == -(-rows // size)


def test_the_partitions_of_a_billion_rows_are_never_listed() -> None:
    plan = made_up_plan(row_count=10**9, rows_per_partition=4096)
    tracemalloc.start()
    try:
        for _ in range(100):
            assert plan.partition_count == len(plan.partitions) == 244_141
            assert plan.rows_of(244_140) == plan.partitions[-1] == (244_140 * 4096, 10**9)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0 < peak_bytes < 20_000  # a list of them takes 30 MB


def test_a_plan_is_read_back_equal(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 5)
    ended = batchjob("plan", photos, tmp_path / "run", *TINY, "--keep-maps", 2, "--layers", "0,-1")
    assert ended.code == 0, ended.err
    plan = plans.load(tmp_path / "run")
    plans.save(plan, tmp_path / "run")
    assert plans.load(tmp_path / "run") == plan
    assert plan.layers == (0, 11)
    assert plan.kept_rows == (0, 4)
    assert plan.row_count == 5
    assert set(plan.versions) >= {"batchjob", "python", "torch", "timm", "numpy", "zarr"}


def test_another_option_gives_another_run_folder_by_default(tmp_path: Path) -> None:
    base = plans.default_run("data/coco", Options())
    assert base == plans.default_run("data/coco/", Options())
    assert re.fullmatch(r"coco-vit_small_patch14_dinov2\.lvd142m-[0-9a-f]{8}", base.name)
    assert base != plans.default_run("data/coco", Options(k="6"))
    assert base != plans.default_run("other/coco", Options())


def test_options_go_through_json_unchanged() -> None:
    options = Options(k="instances", layers="all", seed=3)
    assert config.options_from_json(config.to_json(options)) == options
    with pytest.raises(UserError, match="colour"):
        config.options_from_json(config.to_json(options) | {"colour": "red"})


def test_the_difference_of_two_plans_names_both_values() -> None:
    assert config.difference(Options(k="7"), Options()) == "k: planned '5', asked '7'"
    assert config.difference(Options(), Options()) == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resize": "stretch"}, "squash"),
        ({"algorithm": "kmeans,spektral"}, "spectral"),
        ({"algorithm": "kmeans,kmeans"}, "twice"),
        ({"algorithm": ""}, "empty"),
        ({"scores": "pears"}, "pairs"),
        ({"k": "255"}, "254"),
        ({"n_init": "0"}, "n-init"),
        ({"n_init": "many"}, "n-init"),
        ({"repeats": 0}, "repeats"),
        ({"repeats": 2, "scope": "dataset"}, "repeats"),
        ({"limit": -1}, "limit"),
        ({"queries": "cls"}, "--scope dataset"),
    ],
)
def test_wrong_options_are_refused_with_what_is_known(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Options(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [{"batch_size": "0"}, {"workers": "two"}, {"max_failures": 1.5}, {"engine": "gpu"}])
def test_wrong_runtime_options_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UserError):
        Runtime(**values)  # type: ignore[arg-type]


def test_every_option_says_what_it_is_and_has_a_make_variable() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for field in (*dataclasses.fields(Options), *dataclasses.fields(Runtime)):
        assert field.metadata["help"], field.name
        assert re.search(rf"\b{field.name.upper()}\b", makefile), field.name


def test_k_of_each_image_comes_from_a_csv(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 3)
    table = tmp_path / "k.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("image_id", "k"), ("photo-002.jpg", 4), ("photo-000.jpg", 2), ("photo-001.jpg", 3)]
        )
    assert batchjob("plan", photos, tmp_path / "run", *TINY[:-2], "--k", table).code == 0
    assert np.load(tmp_path / "run" / "index" / "k.npy").tolist() == [2, 3, 4]
    table.write_text("photo-000.jpg,2\n")
    ended = batchjob("plan", photos, tmp_path / "other", *TINY[:-2], "--k", table)
    assert ended.code == 2
    assert "2 of 3 images" in ended.err
    table.write_text("photo-000.jpg,99\n")
    assert "line 1" in batchjob("plan", photos, tmp_path / "other", *TINY[:-2], "--k", table).err


def test_maps_are_kept_of_the_named_images(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 4)
    (tmp_path / "names.txt").write_text("photo-003.jpg\nphoto-001.jpg\n")
    assert batchjob("plan", photos, tmp_path / "run", *TINY, "--keep-maps", tmp_path / "names.txt").code == 0
    assert plans.load(tmp_path / "run").kept_rows == (1, 3)
    (tmp_path / "names.txt").write_text("photo-009.jpg\n")
    ended = batchjob("plan", photos, tmp_path / "other", *TINY, "--keep-maps", tmp_path / "names.txt")
    assert ended.code == 2
    assert "photo-009.jpg" in ended.err


def test_a_plan_made_for_gpus_on_a_login_node_chooses_half_precision(
    tmp_path: Path, batchjob: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos(tmp_path / "photos", 2)
    monkeypatch.setenv("BATCHJOB_PLAN_FOR_GPU", "1")
    ended = batchjob("plan", photos, tmp_path / "run", *TINY)
    assert plans.load(tmp_path / "run").precision == "fp16"
    assert "planned for GPUs" in ended.err


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

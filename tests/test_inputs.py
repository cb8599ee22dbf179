"""Inputs that change after `plan`: every command that uses one finds the change and refuses it with the difference."""

import json
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import batchjob as package
from batchjob import inputs
from batchjob import plan as plans
from batchjob.__main__ import main
from batchjob.codes import STATUS
from batchjob.store import lifecycle as store
from tests.conftest import SAMPLE, TINY, Command
from tests.runs import contents
from tests.test_job import make_photos

RUNTIME = ["--workers", "0", "--device", "cpu"]
SHARDS = ["--rows-per-partition", "2"]


def weights_file(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_weights_that_are_overwritten_during_a_run_are_refused(tmp_path: Path, batchjob: Command) -> None:
    photos, run = make_photos(tmp_path / "photos", 4), tmp_path / "run"
    file = weights_file(tmp_path / "last.safetensors", 1)
    options = ["--model", "vit_tiny_patch16_224", "--image-size", 64, "--k", 3, "--weights", file, *SHARDS]
    assert batchjob("plan", photos, run, *options).code == 0
    assert batchjob("label", run, *RUNTIME, "--partition", 0).code == 0
    weights_file(file, 2)
    for command in (("run", photos, run, *options, *RUNTIME), ("label", run, *RUNTIME)):
        ended = batchjob(*command)
        assert ended.code == 2
        assert f"the weights {file} have changed" in ended.err
    assert store.missing(run, plans.load(run)) == [1]
    shown = batchjob("show", run, "--verify")
    assert shown.code == 2
    assert f"changed   the weights {file} have changed" in shown.out
    weights_file(file, 1)
    assert batchjob("run", photos, run, *options, *RUNTIME).code == 0


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a finished run of four images of the sample, with k and scores from its own copy of annotations."""
    folder = tmp_path_factory.mktemp("annotated")
    (folder / "instances.json").write_bytes(next((SAMPLE / "annotations").glob("instances_*.json")).read_bytes())
    options = [*TINY[:-1], "instances", "--annotations", str(folder / "instances.json"), "--scores", "pairs"]
    assert main(["run", str(SAMPLE), str(folder / "run"), *options, *SHARDS, "--limit", "4", *RUNTIME]) == 0
    return folder / "run"


@pytest.mark.parametrize("name", ["k.npy", "names.bin", "where.npy", "index.json", "instances_owner.npy"])
def test_a_bit_flipped_in_the_index_is_refused_by_every_command_and_mended_by_run(
    annotated: Path, batchjob: Command, name: str
) -> None:
    before = contents(annotated)
    flip(annotated / "index" / name)
    said = f"{annotated / 'index' / name} has changed since it was planned"
    for verb in ("label", "stats", "figures", "report"):
        ended = batchjob(verb, annotated)
        assert (ended.code, ended.out) == (2, "")
        assert said in ended.err
        assert ended.err.count("\n") == 1
    shown = batchjob("show", annotated, "--verify")
    assert shown.code == 2
    assert f"changed   {said}" in shown.out
    options = plans.load(annotated, checks_index=False).options
    mended = batchjob(
        *("run", SAMPLE, annotated, *TINY[:-1], "instances", "--annotations", options.annotations),
        *("--scores", "pairs", *SHARDS, "--limit", "4", *RUNTIME),
    )
    assert mended.code == 0, mended.err
    assert "the index is made again" in mended.err
    assert contents(annotated) == before


def test_annotations_that_changed_are_not_scored_against(annotated: Path, batchjob: Command) -> None:
    file = annotated.parent / "instances.json"
    before = file.read_bytes()
    values = json.loads(before)
    values["annotations"][0]["iscrowd"] = 1
    file.write_text(json.dumps(values))
    try:
        ended = batchjob("stats", annotated)
        assert ended.code == 2
        assert f"{file} has changed since it was planned" in ended.err
    finally:
        file.write_bytes(before)


def test_changed_mask_files_count_as_changed_annotations(tmp_path: Path) -> None:
    masks = tmp_path / "voc" / "SegmentationObject"
    masks.mkdir(parents=True)
    (masks / "a.png").write_bytes(b"mask")
    (tmp_path / "run" / "index").mkdir(parents=True)
    planned = inputs.hashes(tmp_path / "run", str(tmp_path / "voc"))
    assert inputs.differences(tmp_path / "run", planned, annotations=True) == []
    (masks / "a.png").write_bytes(b"Mask")
    assert len(inputs.differences(tmp_path / "run", planned, annotations=True)) == 1


def test_a_photo_that_changed_after_plan_has_its_own_status(tmp_path: Path, batchjob: Command) -> None:
    photos, run = make_photos(tmp_path / "photos", 6), tmp_path / "run"
    assert batchjob("plan", photos, run, *TINY, *SHARDS).code == 0
    replaced, touched = photos / "photo-001.jpg", photos / "photo-002.jpg"
    replaced.write_bytes((photos / "photo-000.jpg").read_bytes() + b"\0")
    os.utime(touched, ns=(0, touched.stat().st_mtime_ns + 1))
    ended = batchjob("run", photos, run, *TINY, *SHARDS, *RUNTIME, "--max-failures", 1)
    assert ended.code == 0, ended.err
    status = package.open(run).status.values
    assert status.tolist() == [0, STATUS["changed"], STATUS["changed"], 0, 0, 0]
    assert 'photo-001.jpg,changed,"the file had' in (run / "failures.csv").read_text()


def test_a_photo_of_a_list_that_appears_after_plan_counts_as_changed(tmp_path: Path, batchjob: Command) -> None:
    photos, run = make_photos(tmp_path / "photos", 2), tmp_path / "run"
    names = photos / "all.txt"
    names.write_text("photo-000.jpg\nlater.jpg\nphoto-001.jpg\n")
    assert batchjob("plan", names, run, *TINY).code == 0
    (photos / "later.jpg").write_bytes((photos / "photo-000.jpg").read_bytes())
    assert batchjob("run", names, run, *TINY, *RUNTIME, "--max-failures", 1).code == 0
    assert package.open(run).status.values.tolist() == [0, STATUS["changed"], 0]


def test_a_tar_that_changed_after_plan_is_refused(tmp_path: Path, batchjob: Command) -> None:
    photos, tar, run = make_photos(tmp_path / "photos", 3), tmp_path / "photos.tar", tmp_path / "run"
    for _ in range(2):
        with tarfile.open(tar, "w") as file:
            file.add(photos, ".")
        if not run.exists():
            assert batchjob("plan", tar, run, *TINY).code == 0
    ended = batchjob("label", run, *RUNTIME)
    assert ended.code == 2
    assert f"{tar} has changed since it was planned" in ended.err


def test_a_tar_that_is_replaced_during_a_run_gives_no_pixels(tmp_path: Path) -> None:
    from batchjob.data.reading import ReadFailure
    from batchjob.data.sources import index_images

    tar = tmp_path / "photos.tar"
    with tarfile.open(tar, "w") as file:
        file.add(make_photos(tmp_path / "photos", 2), ".")
    index = index_images(str(tar))
    assert index.read(0)[:2] == b"\xff\xd8"
    with tar.open("r+b") as raw:
        raw.seek(600)
        raw.write(b"x")
    os.utime(tar, ns=(0, time.time_ns() + 10**9))
    with pytest.raises(ReadFailure) as failure:
        index.read(1)
    assert failure.value.cause == "changed"


@pytest.mark.parametrize("left", ["work", "done", "index", "labels.zarr"])
def test_a_plan_that_was_stopped_at_any_step_goes_on(tmp_path: Path, batchjob: Command, left: str) -> None:
    photos, run = make_photos(tmp_path / "photos", 2), tmp_path / "run"
    assert batchjob("plan", photos, run, *TINY).code == 0
    planned = plans.load(run)
    (run / "plan.json").rename(run / "plan.json.part12")
    for name in [p.name for p in run.iterdir() if p.is_dir() and p.name not in ("done", left)]:
        (run / name).rename(tmp_path / name)
    (run / "index").mkdir(exist_ok=True)
    (run / "index" / "ids.bin").write_bytes(b"half")
    ended = batchjob("plan", photos, run, *TINY)
    assert ended.code == 0, ended.err
    assert plans.load(run) == planned


def test_a_folder_that_is_not_a_run_is_refused_whatever_its_subfolders_are_called(
    tmp_path: Path, batchjob: Command
) -> None:
    photos, run = make_photos(tmp_path / "photos", 2), tmp_path / "run"
    (run / "work").mkdir(parents=True)
    ended = batchjob("plan", photos, run, *TINY)
    assert ended.code == 2
    assert "holds something else (work)" in ended.err


@pytest.mark.parametrize("how", ["delete", "cut", "flip"])
def test_a_plan_that_was_lost_or_damaged_is_made_again_where_it_is_the_plan_of_the_labels(
    tmp_path: Path, batchjob: Command, how: str
) -> None:
    photos, run = make_photos(tmp_path / "photos", 4), tmp_path / "run"
    assert batchjob("run", photos, run, *TINY, *SHARDS, *RUNTIME).code == 0
    path, before = run / "plan.json", contents(run)
    written, index = path.read_bytes(), {p: p.read_bytes() for p in (run / "index").iterdir()}
    if how == "delete":
        path.unlink()
    elif how == "cut":
        path.write_bytes(written[:200])
    else:
        flip(path, written.index(b'"seed"') + 9)
    shown = batchjob("show", run)
    assert shown.code == 2
    assert shown.err.count("\n") == 1
    os.utime(photos / "photo-001.jpg", ns=(0, 0))
    for data, options in ((photos, TINY), (make_photos(tmp_path / "others", 5), TINY), (photos, [*TINY[:-1], "4"])):
        refused = batchjob("run", data, run, *options, *SHARDS, *RUNTIME)
        assert refused.code == 2
        assert "holds the labels of another plan: DATA or the options are not those" in refused.err
        assert {p: p.read_bytes() for p in (run / "index").iterdir()} == index
    stamp = np.load(run / "index" / "where.npy")
    os.utime(photos / "photo-001.jpg", ns=(0, int(stamp[1, 1])))
    mended = batchjob("run", photos, run, *TINY, *SHARDS, *RUNTIME)
    assert mended.code == 0, mended.err
    assert f"{path} was damaged or lost and is made again" in mended.err
    assert path.read_bytes() == written
    assert contents(run) == before

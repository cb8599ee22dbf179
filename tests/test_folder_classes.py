"""Folders whose names are classes: when they count as such, and the coordinate that they become."""

import os
from pathlib import Path

import pytest

import batchjob as package
from batchjob.data.sources import index_images
from tests.conftest import TINY, Command
from tests.pictures import png

PNG = png(40, 30)


def make(root: Path, names: str) -> Path:
    for name in names.split():
        path = root / os.fsdecode(name.encode("latin-1"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    return root


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ("cat/1.png cat/2.png dog/1.png", ["cat", "cat", "dog"]),
        ("train/cat/1.png train/dog/1.png val/cat/9.png", ["cat", "dog", "cat"]),
        ("test-2/a/1.png Train2017/a/1.png Train2017/b/1.png", ["a", "b", "a"]),
        ("n\xff/1.png o/1.png o/2.png", ["n\\xff", "o", "o"]),
    ],
    ids=["one deep", "below splits", "splits with numbers", "not UTF-8"],
)
def test_folders_one_deep_or_below_a_split_are_classes(names: str, classes: list[str], tmp_path: Path) -> None:
    index = index_images(str(make(tmp_path, names)))
    assert index.columns == ("class",)
    assert sorted(index.column("class")) == sorted(classes)
    assert all(name.split("/")[-2] == own for name, own in zip(index.ids(), index.column("class"), strict=True))


@pytest.mark.parametrize(
    "names",
    [
        "1.png 2.png",
        "1.png cat/1.png dog/1.png",
        "cat/1.png dog/deep/1.png cat/2.png",
        "x/cat/1.png x/dog/1.png x/dog/2.png",
        "train/1.png val/1.png val/2.png",
        "photos/1.png photos/2.png",
        "a/1.png b/1.png c/1.png",
        "train/cat/1.png val/2.png val/3.png",
    ],
    ids=["flat", "one beside", "other depths", "no split", "splits alone", "one", "one image each", "mixed"],
)
def test_other_folders_are_not_classes(names: str, tmp_path: Path) -> None:
    assert index_images(str(make(tmp_path, names))).columns == ()


def test_a_coco_root_and_a_list_have_no_classes(tmp_path: Path) -> None:
    make(tmp_path, "train2017/a/1.png train2017/b/1.png train2017/b/2.png annotations/x.png")
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{}")
    assert index_images(str(tmp_path)).columns == ()
    (tmp_path / "list.txt").write_text("train2017/a/1.png\ntrain2017/b/1.png\ntrain2017/b/2.png\n")
    assert index_images(str(tmp_path / "list.txt")).columns == ()


def test_a_run_has_the_class_of_each_image_as_a_coordinate(tmp_path: Path, batchjob: Command) -> None:
    photos, run = make(tmp_path / "photos", "cat/1.png cat/2.png dog/1.png"), tmp_path / "run"
    ended = batchjob("run", photos, run, *TINY, "--workers", 0)
    assert ended.code == 0, ended.err
    labels = package.open(run)
    assert labels.coords["class"].values.tolist() == ["cat", "cat", "dog"]
    assert labels.labels.groupby("class").count().sizes["class"] == 2
    (run / "labels.zarr" / "class" / "c.0").write_bytes(b"damage")
    ended = batchjob("show", run, "--verify")
    assert ended.code == 1
    assert "labels.zarr/class/c.0" in ended.out + ended.err

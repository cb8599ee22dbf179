"""The whole job through its command line: known answers, real weights, kills, order of images, wrong input."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import xarray
from PIL import Image
from safetensors.torch import save_file

import batchjob as package
from batchjob.errors import UserError
from tests.conftest import ROOT, SAMPLE, TINY, Command

PX, PATCH = 96, 16
# Regions of the drawn image on its 6×6 grid, numbered by first appearance in row-major order.
REGIONS = np.array(
    [
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [0, 2, 2, 2, 1, 1],
        [3, 2, 2, 2, 2, 1],
        [3, 3, 2, 2, 3, 3],
        [3, 3, 3, 3, 3, 3],
    ]
)
COLOURS = np.array([[230, 30, 30], [30, 220, 40], [40, 40, 240], [250, 240, 60]], np.uint8)


@pytest.fixture(scope="module")
def colour_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns options for a ViT whose patches attend to patches of their own colour, in every head of every layer.

    A token is the mean colour of its patch, nothing later adds to it, and queries equal keys: the softmax over
    similarities is the same for all patches of one colour and peaks on that colour.
    """
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    state = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    for name in state:
        if name.endswith(("norm1.weight", "norm2.weight")) or name == "norm.weight":
            state[name] += 1
    width, heads = 192, 3
    for channel in range(3):
        state["patch_embed.proj.weight"][channel, channel] = 1 / PATCH**2
    for layer in range(12):
        mixing = state[f"blocks.{layer}.attn.qkv.weight"]
        for head in range(heads):
            for channel in range(3):
                at = head * width // heads + channel
                mixing[at, channel] = mixing[width + at, channel] = 1.0  # the query and the key
    path = tmp_path_factory.mktemp("weights") / "colours.safetensors"
    save_file(state, path)
    return path


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Makes a folder with the drawn image, in the model's own size so that resampling does not mix colours."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    pixels = COLOURS[REGIONS].repeat(PATCH, axis=0).repeat(PATCH, axis=1)
    Image.fromarray(pixels).save(folder / "regions.png")
    return folder


def make_photos(folder: Path, count: int, px: int = 80) -> Path:
    """Makes `count` small JPEGs of smooth noise, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    for i in range(count):
        small = rng.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(small).resize((px, px), Image.Resampling.BICUBIC).save(folder / f"photo-{i:03d}.jpg")
    return folder


def labels_of(run: Path) -> np.ndarray:
    return package.open(run)["labels"].values


def test_the_drawn_regions_come_back_as_labels(
    drawn: Path, colour_weights: Path, tmp_path: Path, batchjob: Command
) -> None:
    run = tmp_path / "run"
    options = ["--model", "vit_tiny_patch16_224", "--weights", colour_weights, "--image-size", PX, "--k", 4]
    ended = batchjob("run", drawn, run, *options, "--layers", "0,11", "--algorithm", "kmeans")
    assert ended.code == 0, ended.err
    labels = labels_of(run)
    assert labels.shape == (1, 1, 2, 3, 6, 6)
    assert (labels == REGIONS).all()


def test_plain_xarray_opens_the_store_and_gives_the_same(sample_run: Path) -> None:
    ours, plain = package.open(sample_run), xarray.open_zarr(sample_run / "labels.zarr")
    xarray.testing.assert_identical(ours.drop_vars("image").load(), plain.load())
    assert ours["labels"].dims == ("image", "algorithm", "layer", "head", "y", "x")
    assert ours["labels"].shape == (8, 1, 1, 6, 32, 32)
    assert ours["labels"].dtype == np.uint8
    assert list(ours["image_id"].values) == sorted(f"val2017/{p.name}" for p in (SAMPLE / "val2017").iterdir())
    assert (ours["status"] == 0).all()


def test_the_sample_is_clustered_by_the_study_s_rule(sample_run: Path) -> None:
    found = package.open(sample_run)
    counts = [len(np.unique(found["labels"].values[i, 0, 0, 0])) for i in range(8)]
    assert counts == list(found["k"].values[:, 0, 0, 0])
    assert list(found["k"].values[:, 0, 0, 0]) == list(np.load(sample_run / "index" / "k.npy"))
    assert 2 <= min(counts) < max(counts) <= 16


def test_cls_rows_and_the_mass_on_prefix_tokens_add_up(sample_run: Path) -> None:
    found = package.open(sample_run)
    total = found["cls_attention"].values.astype(np.float64).sum((-2, -1))
    assert ((total > 0.05) & (total < 1.0)).all()
    rows = found["attention_rows"].values.astype(np.float64)
    kept = found["kept_image"].values
    mass = found["prefix_mass"].values[kept].astype(np.float64)
    np.testing.assert_allclose(1 - rows.sum(-1).mean(-1), mass, atol=2e-3)


def test_a_killed_run_goes_on_and_gives_the_same_labels(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 24)
    options = [*TINY, "--rows-per-partition", "2", "--keep-maps", "3"]
    assert batchjob("run", photos, tmp_path / "calm", *options).code == 0
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "batchjob", "run", str(photos), str(killed), *options, "--workers", "0"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 300
    while len(list((killed / "done").glob("*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list((killed / "done").glob("*")))
    assert 3 <= done < 12, "the kill came too late to prove anything"
    assert batchjob("run", photos, killed, *options).code == 0
    for name, array in package.open(tmp_path / "calm").variables.items():
        np.testing.assert_array_equal(array.values, package.open(killed)[name].values, err_msg=str(name))


def test_an_unreadable_photo_keeps_its_row_and_nothing_shifts(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 7)
    options = [*TINY, "--batch-size", "3"]
    assert batchjob("run", photos, tmp_path / "whole", *options).code == 0
    (photos / "photo-003.jpg").write_bytes((photos / "photo-003.jpg").read_bytes()[:200])
    ended = batchjob("run", photos, tmp_path / "torn", *options, "--max-failures", "0.5")
    assert ended.code == 0, ended.err
    whole, torn = package.open(tmp_path / "whole"), package.open(tmp_path / "torn")
    others = [0, 1, 2, 4, 5, 6]
    np.testing.assert_array_equal(whole["labels"].values[others], torn["labels"].values[others])
    assert list(torn["image_id"].values) == list(whole["image_id"].values)
    assert (torn["labels"].values[3] == 255).all()
    assert np.isnan(torn["cls_attention"].values[3]).all()
    assert torn["status"].values[3] != 0
    assert "photo-003.jpg" in (tmp_path / "torn" / "failures.csv").read_text()


def test_too_many_failures_end_with_1_after_everything_is_stored(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 4)
    (photos / "photo-001.jpg").write_bytes(b"")
    ended = batchjob("run", photos, tmp_path / "run", *TINY)
    assert ended.code == 1
    assert "1 of 4 images failed" in ended.err
    assert (package.open(tmp_path / "run")["status"] == 0).sum() == 3


def test_padding_is_never_clustered(tmp_path: Path, batchjob: Command) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (40, 80, 3), np.uint8)).save(photos / "wide.png")
    assert batchjob("run", photos, tmp_path / "run", *TINY, "--resize", "pad").code == 0
    labels = labels_of(tmp_path / "run")[0, 0, 0]
    assert (labels[:, :2] < 3).all()
    assert (labels[:, 2:] == 255).all()


def test_the_same_run_with_other_options_is_refused_with_the_difference(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 2)
    assert batchjob("run", photos, tmp_path / "run", *TINY).code == 0
    before = sorted(tmp_path.rglob("*"))
    ended = batchjob("run", photos, tmp_path / "run", *TINY[:-1], "2")
    assert ended.code == 2
    assert "k: planned '3', asked '2'" in ended.err
    assert sorted(tmp_path.rglob("*")) == before
    ended = batchjob("run", photos, tmp_path / "run", *TINY)
    assert ended.code == 0
    assert "nothing is missing" in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "RUN"], "nowhere"),
        (["empty", "RUN"], "empty"),
        (["texts", "RUN"], "no image"),
        (["photos", "RUN", "--model", "vit_tinny_patch16_224"], "vit_tiny_patch16_224"),
        (["photos", "RUN", "--weights", "texts/note.txt"], "note.txt"),
        (["photos", "RUN", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["photos", "RUN", "--k", "17"], "16 patches"),
        (["photos", "RUN", "--k", "many"], "many"),
        (["photos", "RUN", "--k", "0"], "out of range"),
        (["photos", "RUN", "--k", "instances"], "--annotations"),
        (["photos", "RUN", "--layers", "12"], "12"),
        (["photos", "RUN", "--heads", "3"], "3"),
        (["photos", "RUN", "--image-size", "65"], "64x64"),
        (["photos", "RUN", "--algorithm", "kmeens"], "kmeans"),
        (["photos", "RUN", "--keep-maps", "nowhere.txt"], "nowhere.txt"),
        (["photos", "RUN", "--keep-maps", "photos/photo-000.jpg"], "not readable text"),
        (["photos", "RUN", "--k", "photos/photo-000.jpg"], "not a CSV file"),
        (["photos", "RUN", "--seed", "-1"], "give 0 to"),
        (["photos", "RUN", "--rows-per-partition", "0"], "rows-per-partition"),
        (["photos", "RUN", "--batch-size", "-1"], "batch-size"),
        (["photos", "else"], "something else"),
        (["photos", "photos/photo-000.jpg"], "file"),
        (["photos", "RUN\udcff"], "not UTF-8"),
        (["photos", "RUN\n2"], "no print"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path, batchjob: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "note.txt").write_text("no image")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    ended = batchjob("run", *arguments[:2], *TINY, *arguments[2:])
    assert ended.code == 2
    errors = [line for line in ended.err.splitlines() if line.startswith("batchjob: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in ended.err
    assert ended.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_of_another_architecture_are_refused_with_the_keys(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 1)
    save_file({"conv.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    ended = batchjob("run", photos, tmp_path / "run", *TINY, "--weights", tmp_path / "other.safetensors")
    assert ended.code == 2
    assert "vit_tiny_patch16_224" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_read_only_run_is_refused_before_any_work(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 1)
    ended = batchjob("run", photos, "/proc/run", *TINY)
    assert ended.code == 2
    assert "read-only" in ended.err or "can't be written" in ended.err


def test_a_plan_changed_by_hand_is_refused(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 1)
    assert batchjob("plan", photos, tmp_path / "run", *TINY).code == 0
    path = tmp_path / "run" / "plan.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"layers": [3]}))
    ended = batchjob("label", tmp_path / "run")
    assert ended.code == 2
    assert "changed by hand" in ended.err


def test_show_prints_what_is_done_and_what_failed(tmp_path: Path, batchjob: Command) -> None:
    photos = make_photos(tmp_path / "photos", 6)
    (photos / "photo-005.jpg").write_text("<html>")
    run = tmp_path / "run"
    options = [*TINY, "--rows-per-partition", "2"]
    assert batchjob("plan", photos, run, *options).out.strip() == str(run)
    assert "0 of 3 partitions" in batchjob("show", run).out
    assert batchjob("label", run, "--partition", 2).code == 0
    ended = batchjob("show", run, "--verify")
    assert ended.code == 0
    assert "1 of 3 partitions" in ended.out
    assert "1 image: not_an_image" in ended.out
    ended = batchjob("finish", run)
    assert ended.code == 75
    assert "0, 1" in ended.err
    assert batchjob("label", run, "--partition", 7).code == 2


def test_the_printed_command_makes_what_is_damaged_again(tmp_path: Path, batchjob: Command) -> None:
    """The run has options, without which the command would be refused, and names that a shell would split."""
    photos, run = make_photos(tmp_path / "my photos", 3), tmp_path / "a run"
    assert batchjob("run", photos, run, *TINY, "--seed", 7, "--keep-maps", 1).code == 0
    shard = next((run / "labels.zarr" / "labels").glob("c.*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    ended = batchjob("stats", run)
    assert ended.code == 2
    assert f"batchjob show {run} --verify lists all and says how to mend it" in ended.err
    ended = batchjob("show", run, "--verify")
    assert ended.code == 1
    printed = dict(line.split(maxsplit=1) for line in ended.out.splitlines())
    assert printed["repair"] == printed["command"]
    assert batchjob(*shlex.split(printed["repair"])[1:]).code == 0
    assert shard.read_bytes() == whole


def test_opening_a_folder_that_is_not_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run: it has no labels\.zarr; make one with: batchjob run DATA"):
        package.open(tmp_path)


def test_a_folder_whose_name_is_not_utf_8_is_data_like_any(tmp_path: Path, batchjob: Command, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos\udcff", 2)
    ended = batchjob("run", "photos\udcff", *TINY)
    assert (ended.code, ended.err.count("Traceback")) == (0, 0)
    (run,) = (tmp_path / "runs").iterdir()
    for verb in ("show", "stats", "figures", "report"):
        assert batchjob(verb, run).code == 0

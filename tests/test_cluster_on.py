"""Queries, keys, values and tokens through the command line: clusters planted in one of them are found there."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import adjusted_rand_score

import batchjob as package
from tests.conftest import Command

PX, PATCH, SIDE, IMAGES = 96, 16, 6, 4
COLOURS = np.array([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]])
QUICK = ["--workers", 0, "--layers", "0", "--k", len(COLOURS)]


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """Makes images of four quarters in different colours with varying borders; returns (folder, colours [n, y, x])."""
    folder, random = tmp_path_factory.mktemp("blobs"), np.random.default_rng(0)
    planted = np.zeros((IMAGES, SIDE, SIDE), int)
    for i in range(IMAGES):
        y, x = np.mgrid[:SIDE, :SIDE]
        planted[i] = random.permutation(4)[2 * (y > 1 + i % 3) + (x > 2 + i % 2)]
        grey = 127.5 + COLOURS[planted[i]] * 100 + random.uniform(-4, 4, (SIDE, SIDE, 3))
        Image.fromarray(grey.astype(np.uint8).repeat(PATCH, 0).repeat(PATCH, 1)).save(folder / f"{i}.png")
    return folder, planted


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Returns options for a ViT whose tokens are the patches' mean colours.

    In head 0 the keys are the colours, in head 1 only their red. In head 2 queries, keys and values are the colours.
    All others are 0, so the attention of heads 0 and 1 is uniform, and so is the CLS token's in all heads.
    """
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    state = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    for name in state:
        if name.endswith("norm1.weight"):
            state[name] += 1
    for channel in range(3):
        state["patch_embed.proj.weight"][channel, channel] = 1 / PATCH**2
        mixing = state["blocks.0.attn.qkv.weight"]
        mixing[192 + channel, channel] = 1.0
        for part in range(3):
            mixing[part * 192 + 2 * 64 + channel, channel] = 1.0
    mixing[192 + 64, 0] = 1.0
    path = tmp_path_factory.mktemp("weights") / "planted.safetensors"
    save_file(state, path)
    return ["--model", "vit_tiny_patch16_224", "--weights", path, "--image-size", PX]


def agreement(run: Path, planted: np.ndarray, head: int, *, algorithm: int = 0) -> float:
    """Returns the mean over images of the ARI between a head's labels and the colours."""
    labels = package.open(run)["labels"].values[:, algorithm, 0, head]  # [n, y, x]
    return float(np.mean([adjusted_rand_score(a.ravel(), b.ravel()) for a, b in zip(planted, labels, strict=True)]))


@pytest.mark.parametrize(("what", "heads"), [("key", [1, 0, 1]), ("value", [0, 0, 1]), ("query", [0, 0, 1])])
def test_blobs_are_found_in_the_head_that_has_them(
    blobs: tuple[Path, np.ndarray], model: list[object], what: str, heads: list[int], tmp_path: Path, batchjob: Command
) -> None:
    folder, planted = blobs
    run = tmp_path / "run"
    algorithms = "kmeans,spectral,agglomerative" if what == "key" else "kmeans"
    ended = batchjob("run", folder, run, *model, *QUICK, "--cluster-on", what, "--algorithm", algorithms)
    assert ended.code == 0, ended.err
    for algorithm in range(len(algorithms.split(","))):
        for head, wanted in enumerate(heads):
            assert (agreement(run, planted, head, algorithm=algorithm) > 0.999) == bool(wanted)
    found = package.open(run)
    assert np.allclose(found["cls_attention"], 1 / 37, atol=1e-4)  # attention is still stored


def test_blobs_are_found_in_the_tokens_which_have_one_head_and_no_attention(
    blobs: tuple[Path, np.ndarray], model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    folder, planted = blobs
    run = tmp_path / "run"
    options = ["--cluster-on", "token", "--distance", "cosine", "--resize", "pad"]
    ended = batchjob("run", folder, run, *model, *QUICK, *options)
    assert ended.code == 0, ended.err
    found = package.open(run)
    assert found.sizes["head"] == 1
    assert "cls_attention" not in found
    assert agreement(run, planted, 0) > 0.999
    for verb in ("show", "stats", "figures", "report"):
        ended = batchjob(verb, run)
        assert ended.code == 0, ended.err


def test_one_codebook_of_keys_serves_all_images(
    blobs: tuple[Path, np.ndarray], model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    folder, planted = blobs
    run = tmp_path / "run"
    ended = batchjob("run", folder, run, *model, *QUICK, "--cluster-on", "key", "--scope", "dataset", "--heads", "0")
    assert ended.code == 0, ended.err
    found = package.open(run)
    assert adjusted_rand_score(planted.ravel(), found["labels"].values[:, 0, 0, 0].ravel()) == 1
    assert found["centroids"].shape == (1, 1, 1, len(COLOURS), 64)
    for verb in ("stats", "figures", "report"):
        ended = batchjob(verb, run)
        assert ended.code == 0, ended.err


def test_two_runs_are_compared_head_by_head(
    blobs: tuple[Path, np.ndarray], model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    folder, planted = blobs
    annotations = tmp_path / "instances.json"
    annotations.write_text(json.dumps(as_coco(planted)))
    runs = [tmp_path / what for what in ("attention", "key")]
    for run in runs:
        options = ["--cluster-on", run.name, "--annotations", annotations, "--scores", "pairs"]
        ended = batchjob("run", folder, run, *model, *QUICK, *options)
        assert ended.code == 0, ended.err
    ended = batchjob("stats", *runs)
    assert ended.code == 0, ended.err
    assert "instance_ari, head by head: too few images to say where attention is above key" in ended.out  # four
    table = pd.read_parquet(runs[0] / "stats" / "comparison.parquet")
    heads = table[(table.score == "instance_ari") & (table.of == "head")].set_index("head_a")
    assert heads.loc[0, "mean_b"] > 0.999  # the head whose keys are the colours
    assert heads.loc[0, "difference"] < -0.5
    assert heads.loc[2, ["mean_a", "mean_b", "difference"]].tolist() == pytest.approx([1, 1, 0], abs=1e-3)
    # uniform attention joins all objects, even if k-means starts from them; keys have no scores of pairs
    for run, wanted in zip(runs, (0, 1), strict=True):
        summary = pd.read_parquet(run / "stats" / "summary.parquet").query("null == 'swap' and head == 0")
        mean = summary.set_index("score")["mean"]
        assert mean["instance_ari_truth"] == wanted
        assert ("pair_auc" in mean) == (run.name == "attention")


def as_coco(planted: np.ndarray) -> dict[str, object]:
    """Writes each colour of each image as an instance of one category, its cells as one run-length mask."""
    images = [{"id": i, "file_name": f"{i}.png", "height": PX, "width": PX} for i in range(len(planted))]
    instances: list[dict[str, object]] = []
    for i, colours in enumerate(planted):
        for colour in range(len(COLOURS)):
            mask = (colours == colour).repeat(PATCH, 0).repeat(PATCH, 1)
            y, x = np.nonzero(mask)
            corners = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            left, top, right, bottom = map(int, corners)
            outline = [left, top, right, top, right, bottom, left, bottom]
            box = [left, top, right - left, bottom - top]
            instance = {"id": len(instances) + 1, "image_id": i, "category_id": 1, "iscrowd": 0, "bbox": box}
            instances.append(instance | {"segmentation": [outline], "area": int(mask.sum())})
    return {"images": images, "annotations": instances, "categories": [{"id": 1, "name": "square"}]}


def test_a_cnn_has_tokens_but_no_queries_keys_or_values(
    blobs: tuple[Path, np.ndarray], tmp_path: Path, batchjob: Command
) -> None:
    folder, _ = blobs
    model = ["--model", "resnet18", "--weights", "random", "--image-size", PX, "--workers", 0, "--k", 3]
    ended = batchjob("run", folder, tmp_path / "key", *model, "--cluster-on", "key")
    assert (ended.code, "computes no attention; give token" in ended.err) == (2, True)
    ended = batchjob("run", folder, tmp_path / "token", *model, "--cluster-on", "token")
    assert ended.code == 0, ended.err
    assert (package.open(tmp_path / "token")["k"] == 3).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cluster-on", "key", "--distance", "hellinger"], "between distributions"),
        (["--cluster-on", "key", "--scores", "attention"], "give --scores pairs"),
        (["--cluster-on", "token", "--heads", "0"], "belong to no head"),
        (["--cluster-on", "token", "--keep-maps", "1"], "does not make"),
        (["--cluster-on", "keys"], "did you mean 'key'?"),
        (["--cluster-on", "key", "--scope", "dataset", "--queries", "cls"], "leave them out"),
    ],
)
def test_options_that_do_not_apply_are_refused_before_any_work(
    blobs: tuple[Path, np.ndarray], tmp_path: Path, batchjob: Command, options: list[str], said: str
) -> None:
    ended = batchjob("run", blobs[0], tmp_path / "run", *options)
    assert ended.code == 2
    assert said in ended.err
    assert not (tmp_path / "run").exists()

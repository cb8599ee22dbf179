"""The Python interface: functions do what the command line does, documented examples run, wrong input is one line."""

import doctest
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import xarray
from PIL import Image
from torch import Tensor, nn

import batchjob
from batchjob.errors import UserError
from tests.conftest import ROOT, SAMPLE

TINY = "vit_tiny_patch16_224"
PHOTO = SAMPLE / "val2017" / "000000184324.jpg"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder in which the paths of the documented examples exist."""
    folder = tmp_path_factory.mktemp("here")
    shutil.copytree(SAMPLE, folder / "photos", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copy(PHOTO, folder / "cat.jpg")
    return folder


@pytest.fixture(scope="module")
def photos(here: Path) -> xarray.Dataset:
    """Makes the run of `run`'s example."""
    before = Path.cwd()
    os.chdir(here)
    try:
        return batchjob.run("photos/", "runs/photos", model=TINY, weights="random", k=3, workers=1)
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def maps() -> xarray.Dataset:
    return batchjob.attention(PHOTO, model=TINY, weights="random", layers=[0, -1], image_size=64)


@pytest.mark.parametrize("name", ["run", "open", "attention", "cluster", "plot", "stats"])
def test_the_documented_example_runs(
    name: str, here: Path, photos: xarray.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setenv("MPLBACKEND", "agg")
    function: Any = batchjob.stats.stats if name == "stats" else getattr(batchjob, name)  # type: ignore[attr-defined]
    test = doctest.DocTestParser().get_doctest(function.__doc__, {"batchjob": batchjob, "np": np}, name, None, None)
    assert test.examples, f"{name} documents no example"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert said == []


def test_the_names_are_offered_without_torch_or_pandas() -> None:
    heavy = "{'torch', 'timm', 'pandas', 'scipy', 'xarray'}"
    code = f"import sys, batchjob; print(sorted({heavy} & set(sys.modules)), dir(batchjob))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ['__version__', 'attention', 'cluster', 'open', 'plot', 'run', 'stats']")


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(AttributeError, match="'atention'; it offers attention, cluster, open, plot, run, stats"):
        batchjob.atention  # type: ignore[attr-defined]  # noqa: B018


def test_stats_can_be_called_after_its_package_was_imported() -> None:
    code = "import batchjob.stats.run, batchjob; print(callable(batchjob.stats), batchjob.stats.run_stats.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "run_stats"]


# ---- run and open ----


def test_an_image_is_selected_by_its_id(photos: xarray.Dataset) -> None:
    name = f"val2017/{PHOTO.name}"
    row = [str(i) for i in photos.image_id.values].index(name)
    one = photos.labels.sel(image=name, algorithm="kmeans", layer=11, head=2)
    assert np.array_equal(one, photos.labels.values[row, 0, 0, 2])
    assert int(photos.status.sel(image=name)) == 0


def test_the_same_call_again_does_no_work_and_gives_the_same(
    photos: xarray.Dataset, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    again = batchjob.run("photos/", "runs/photos", model=TINY, weights="random", k=3, workers=1)
    said = capfd.readouterr()
    assert "nothing is missing" in said.err
    assert said.out == ""
    assert again.identical(photos)


def test_chunks_on_request_are_dask_arrays_of_the_same_numbers(photos: xarray.Dataset, here: Path) -> None:
    lazy = batchjob.open(here / "runs" / "photos", chunks={})
    assert lazy.labels.chunks is not None
    assert photos.labels.chunks is None
    assert np.array_equal(lazy.labels.mean("image").compute(), photos.labels.mean("image"))
    assert np.array_equal(
        lazy.labels.sel(image=f"val2017/{PHOTO.name}"), photos.labels.sel(image=f"val2017/{PHOTO.name}")
    )


def test_chunks_without_dask_say_what_to_install(here: Path, photos: xarray.Dataset, monkeypatch: Any) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install dask"):
        batchjob.open(here / "runs" / "photos", chunks={})


def test_a_network_of_timm_is_run_with_its_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHJOB_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(5)
    net = timm.create_model(TINY)
    (tmp_path / "photos").mkdir()
    shutil.copy(PHOTO, tmp_path / "photos")
    data = batchjob.run(tmp_path / "photos", tmp_path / "run", model=net, k=4, layers=[3, -1], image_size=64, workers=0)
    assert data.attrs["weights"]["path"].startswith(str(tmp_path / "cache" / "modules" / TINY))
    mine = batchjob.attention(tmp_path / "photos" / PHOTO.name, model=net, layers=[3, -1], image_size=64)
    np.testing.assert_allclose(mine.cls_attention[0], data.cls_attention[0].astype("float32"), atol=1e-3)
    assert np.array_equal(batchjob.cluster(mine.attention_rows, 4)[0], data.labels[0, 0].values.reshape(2, 3, 16))


def test_a_network_that_timm_does_not_know_is_refused_by_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found a Linear; give a network of timm\.create_model"):
        batchjob.run(SAMPLE, tmp_path / "run", model=nn.Linear(2, 2))
    assert not (tmp_path / "run").exists()


def test_an_unknown_option_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="option 'layer' is unknown; did you mean 'layers'"):
        batchjob.run(SAMPLE, tmp_path / "run", layer=3)


# ---- attention ----


def test_a_row_of_attention_and_its_prefix_mass_sum_to_one(maps: xarray.Dataset) -> None:
    assert maps.attention_rows.shape == (1, 2, 3, 16, 16)
    assert maps.attrs["grid"] == [4, 4]
    np.testing.assert_allclose(maps.attention_rows.sum("key").mean("query") + maps.prefix_mass, 1, atol=1e-5)


def test_attention_is_what_timm_computes_without_fusing(maps: xarray.Dataset) -> None:
    torch.manual_seed(3)
    net = timm.create_model(TINY, img_size=64).eval()
    seen: list[Tensor] = []
    for block in net.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _m, _i, output: seen.append(output))
    mine = batchjob.attention(PHOTO, model=net, layers="all")
    pixels = torch.from_numpy(mine.pixels.values).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        net((pixels - 0.5) / 0.5)
    theirs = torch.stack(seen, 1)  # [1, L, H, T, T]
    np.testing.assert_allclose(mine.attention_rows, theirs[..., 1:, 1:], atol=1e-6)
    np.testing.assert_allclose(mine.cls_attention.values.reshape(1, 12, 3, 16), theirs[..., 0, 1:], atol=1e-6)
    assert not net.blocks[0].attn.fused_attn, "the network at hand is left as it is"


def test_a_path_a_picture_and_an_array_of_one_photo_are_equal() -> None:
    picture = Image.open(PHOTO)
    found = batchjob.attention(
        [PHOTO, picture, np.asarray(picture.convert("RGB"))], model=TINY, weights="random", image_size=32
    )
    assert [str(v) for v in found.image.values] == [str(PHOTO), "1", "2"]
    for other in (1, 2):
        assert np.array_equal(found.attention_rows[0], found.attention_rows[other])


class OwnViT(nn.Module):
    """A ViT written without timm: 2 blocks, a CLS token, patches of 8."""

    patch_size = 8
    image_size = 32

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cls = nn.Conv2d(3, 24, 8, 8), nn.Parameter(torch.randn(1, 1, 24))
        self.mixers = nn.ModuleList(nn.Linear(24, 72) for _ in range(2))
        self.weights: list[Tensor] = []

    def forward(self, pixels: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(pixels), -1, -1), self.embed(pixels).flatten(2).transpose(1, 2)], 1)
        for mixer in self.mixers:
            q, k, v = mixer(x).reshape(*x.shape[:2], 3, 4, 6).permute(2, 0, 3, 1, 4)
            if not x.is_meta:
                self.weights.append((q @ k.transpose(-1, -2) * 6**-0.5).softmax(-1))
            x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


def test_the_attention_of_a_network_that_is_not_timms_is_read() -> None:
    torch.manual_seed(0)
    net = OwnViT().eval()
    mine = batchjob.attention(PHOTO, model=net, layers="all")
    assert mine.attrs["grid"] == [4, 4]
    pixels = torch.from_numpy(mine.pixels.values).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        net((pixels - mean) / std)
    theirs = torch.stack(net.weights, 1)
    np.testing.assert_allclose(mine.attention_rows, theirs[..., 1:, 1:], atol=1e-5)


@pytest.mark.parametrize(
    ("net", "found"),
    [(nn.Conv2d(3, 8, 3), "does not say how large its patches are"), (timm.create_model("resnet18"), "patch")],
    ids=["a layer", "a CNN"],
)
def test_a_network_without_attention_is_refused(net: nn.Module, found: str) -> None:
    with pytest.raises(UserError, match=found):
        batchjob.attention(PHOTO, model=net)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        ("nowhere.jpg", "image nowhere.jpg can't be read"),
        ([], "an empty list"),
        (np.zeros((4, 4, 3)), r"found ndarray of float64 \[4, 4, 3\]"),
        (7, "found int of int64"),
    ],
)
def test_an_input_that_is_not_an_image_is_refused(images: Any, found: str) -> None:
    with pytest.raises(UserError, match=found):
        batchjob.attention(images, model=TINY, weights="random", image_size=32)


# ---- cluster ----


def test_padding_is_not_clustered() -> None:
    wide = np.full((32, 64, 3), 90, np.uint8)
    maps = batchjob.attention(wide, model=TINY, weights="random", image_size=64, resize="pad")
    labels = batchjob.cluster(maps.attention_rows, 2)
    assert labels.dims == ("image", "layer", "head", "query")
    assert (labels.values.reshape(3, 4, 4)[:, 2:] == 255).all()
    assert (labels.values.reshape(3, 4, 4)[:, :2] < 2).all()


@pytest.mark.parametrize("algorithm", ["kmeans", "spectral", "agglomerative"])
def test_two_blocks_of_attention_are_two_clusters(algorithm: str) -> None:
    rows = np.kron(np.eye(2), np.full((4, 4), 0.25)) + 0.001
    assert batchjob.cluster(rows[None, None], 2, algorithm=algorithm).tolist() == [[[0] * 4 + [1] * 4]]


def test_features_of_any_sign_are_clustered_as_they_are() -> None:
    features = np.array([[-5.0, 1, 0], [-5.1, 1, 0], [5, -1, 0], [5.1, -1, 0]])
    assert batchjob.cluster(features, 2, normalise=False).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("rows", "options", "found"),
    [
        (np.array([[-1.0, 1], [1, 0]]), {}, "give normalise=False"),
        (np.array([[np.nan, 1], [1, 0]]), {}, "NaN or infinity"),
        (np.ones((3, 2)), {"algorithm": "spectral", "k": 2}, r"needs rows \[..., P, P\]"),
        (np.ones((3, 3)), {"k": 4}, "more than the 3 rows"),
        (np.ones(3), {}, r"takes numbers \[..., P, D\]"),
        (np.ones((3, 3)), {"k": "instances"}, "as a number"),
        (np.ones((3, 3)), {"algorithm": "kmean"}, "did you mean 'kmeans'"),
    ],
)
def test_rows_that_cannot_be_clustered_are_refused(rows: Any, options: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError, match=found):
        batchjob.cluster(rows, **{"k": 2, **options})


# ---- plot and stats ----


def test_a_query_is_drawn_as_its_own_row_of_attention(maps: xarray.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    axes = batchjob.plot(maps, query=(2, 1))
    assert axes.shape == (2, 4)
    drawn = axes[1, 3].images[0].get_array()
    assert np.array_equal(drawn, maps.attention_rows.values[0, 1, 2, 2 * 4 + 1].reshape(4, 4))
    assert axes[0, 1].get_title() == "layer 0, head 0"
    with pytest.raises(UserError, match=r"not in the grid of 4 × 4"):
        batchjob.plot(maps, query=(4, 0))


def test_clusters_are_drawn_with_and_without_their_photo(maps: xarray.Dataset, photos: xarray.Dataset) -> None:
    labels = batchjob.cluster(maps.attention_rows, 3)
    assert batchjob.plot(labels, photo=maps).shape == (2, 4)
    assert batchjob.plot(labels.values[0, 0, 0]).shape == (1, 2)
    name = str(photos.image.values[3])
    assert batchjob.plot(photos.labels, image=name).shape == (1, 4)
    with pytest.raises(UserError, match="image 'nobody' is not in the data"):
        batchjob.plot(photos.labels, image="nobody")


def test_stats_gives_the_tables_that_the_verb_writes(photos: xarray.Dataset, here: Path) -> None:
    tables = batchjob.stats(here / "runs" / "photos", jobs=1)
    assert {"summary", "scores"} <= set(tables)
    written = pd.read_parquet(here / "runs" / "photos" / "stats" / "summary.parquet")
    pd.testing.assert_frame_equal(tables["summary"], written)

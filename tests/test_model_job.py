"""The arrays of a run for a CNN, for half precision and for padding, through the command line."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import xarray
from safetensors.torch import save_file

from batchjob.model import self_similarity as cnn
from tests.conftest import SAMPLE, Command

FEW = ["--k", "3", "--limit", "3", "--workers", "0", "--device", "cpu"]


def open_arrays(run: Path) -> xarray.Dataset:
    return xarray.open_zarr(run / "labels.zarr").load()


def test_a_run_of_a_cnn_works_and_none_of_its_arrays_is_called_attention(batchjob: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--model", "resnet18", "--weights", "random", "--image-size", "96", "--keep-maps", "1", *FEW]
    assert batchjob("run", SAMPLE, run, *options).code == 0
    arrays = open_arrays(run)
    assert (arrays.status == 0).all()
    assert arrays.labels.shape == (3, 1, 1, 1, 6, 6)
    assert (arrays.k == 3).all()
    assert "cls_attention" not in arrays
    np.testing.assert_allclose(arrays.saliency.astype(float).sum(("y", "x")), 1, atol=0.01)
    np.testing.assert_allclose(np.abs(arrays.saliency_component).max(("y", "x")), 1, atol=1e-3)
    for name in ("saliency", "saliency_component", "attention_rows"):
        assert "no attention" in str(arrays[name].attrs)
    assert f"the temperature {cnn.TEMPERATURE}" in str(arrays.attention_rows.attrs)
    assert (arrays.prefix_mass == 0).all()
    rows = arrays.attention_rows.astype(float).sum("key")
    np.testing.assert_allclose(rows, 1, atol=0.01)


def test_padding_is_never_clustered_and_all_other_patches_are(batchjob: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--model", "vit_tiny_patch16_224", "--weights", "random", "--image-size", "96", "--resize", "pad", *FEW]
    assert batchjob("run", SAMPLE, run, *options).code == 0
    arrays = open_arrays(run)
    for labels, height, width in zip(arrays.labels, arrays.height, arrays.width, strict=True):
        is_padding = labels.values[0, 0] == 255  # [H, y, x]
        assert (is_padding == is_padding[:1]).all()
        content = min(6, round(6 * int(height) / int(width))) if width > height else 6
        assert is_padding[0].any() == (int(height) != int(width))
        if width > height:
            assert is_padding[0, content + 1 :].all()
            assert not is_padding[0, : content - 1].any()


def test_photos_whose_activations_overflow_half_precision_get_a_status_and_no_labels(
    batchjob: Command, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    state = dict(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict())
    state["blocks.2.mlp.fc2.bias"] = torch.full((192,), 1e6)
    save_file(state, tmp_path / "huge.safetensors")
    run = tmp_path / "run"
    options = ["--model", "vit_tiny_patch16_224", "--weights", tmp_path / "huge.safetensors", "--image-size", "64"]
    ended = batchjob("run", SAMPLE, run, *options, "--precision", "fp16", "--max-failures", "1", *FEW)
    arrays = open_arrays(run)
    assert (arrays.status == 9).all(), ended.err
    assert (arrays.labels == 255).all()
    assert arrays.cls_attention.isnull().all()
    assert "not_finite" in (run / "failures.csv").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "swin_tiny_patch4_window7_224"], "has no patch-to-patch map"),
        (["--model", "vit_tiny_patch16_224", "--layers", "12"], "--layers 12 out of range"),
        (["--model", "vit_tiny_patch16_224", "--heads", "3"], "--heads 3 out of range"),
        (["--model", "vit_tiny_patch16_224", "--image-size", "100"], "not a multiple"),
        (["--model", "resnet18", "--heads", "1"], "--heads 1 out of range: resnet18 has 1 head; give 0"),
        (["--fit-rows", "100"], "--fit-rows 100 is of dataset-wide clusters; give --scope dataset too"),
        (["--features", "relative"], "--features relative is of dataset-wide clusters; give --scope dataset too"),
    ],
)
def test_what_the_model_cannot_do_ends_2_with_one_line_and_leaves_nothing(
    batchjob: Command, tmp_path: Path, options: list[str], message: str
) -> None:
    ended = batchjob("plan", SAMPLE, tmp_path / "run", "--weights", "random", *options)
    assert ended.code == 2
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()

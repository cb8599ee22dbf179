"""Extraction on a GPU: half precision against float32 on the CPU, equal bits, and the memory it takes."""

import pytest
import torch

from batchjob.config import Options
from batchjob.job.memory import forecast
from batchjob.model.attention import Extractor, LayerMaps
from batchjob.model.describe import Model, describe, load_model
from tests.networks import make_model, make_pixels

pytestmark = pytest.mark.gpu

FAMILIES = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "beit_base_patch16_224",
]


def on_gpu(model: Model, precision: str) -> Model:
    """Moves the same random weights to the GPU."""
    moved = load_model(model.spec, None, precision=precision, device="cuda", seed=0)
    moved.net.load_state_dict(model.net.state_dict())
    return moved


def last_layer(model: Model) -> LayerMaps:
    spec = model.spec
    (maps,) = Extractor(model, (spec.num_layers - 1,), tuple(range(spec.num_heads)))(make_pixels(model, count=4))
    return maps


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("fp16", 0.02), ("bf16", 0.1)])
@pytest.mark.parametrize("name", FAMILIES)
def test_maps_of_the_gpu_are_close_to_those_of_the_cpu_in_float32(name: str, precision: str, bound: float) -> None:
    model = make_model(name, "112")
    exact, found = last_layer(model), last_layer(on_gpu(model, precision))
    assert found.finite.all()
    error = (found.rows.float().cpu() - exact.rows).abs().max() / exact.rows.max()
    assert error < bound


def test_a_cnn_s_maps_of_the_gpu_are_close_to_those_of_the_cpu() -> None:
    model = make_model("resnet18", "96")
    exact, found = last_layer(model), last_layer(on_gpu(model, "fp16"))
    assert (found.rows.float().cpu() - exact.rows).abs().max() / exact.rows.max() < 0.05


def test_the_same_batch_gives_the_same_bits_twice() -> None:
    model = load_model(describe(Options()), None, precision="fp16", device="cuda")
    assert torch.equal(last_layer(model).rows, last_layer(model).rows)


@pytest.mark.parametrize("images", [16, 128])
def test_the_forecast_covers_what_the_gpu_allocates(images: int) -> None:
    model = load_model(describe(Options()), None, precision="fp16", device="cuda")
    spec = model.spec
    extract = Extractor(model, (spec.num_layers - 1,), tuple(range(spec.num_heads)))
    pixels = make_pixels(model, count=images).cuda()
    list(extract(pixels))  # cuBLAS allocates its workspace once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    list(extract(pixels))
    peak = torch.cuda.max_memory_allocated() - before
    known = forecast(spec, precision="fp16", layers=1, heads=spec.num_heads, images=images)
    assert peak <= max(known.activations, known.maps) * 1.1

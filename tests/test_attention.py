"""The attention maps against timm's own unfused path."""

import pytest
import torch
from torch import Tensor, nn

from batchjob.attention import Extractor, renormalise
from batchjob.config import Options
from batchjob.model import Model, describe, load_model, resolve_heads, resolve_layers


def make_model(name: str, *, image_size: str = "", precision: str = "fp32", seed: int = 0) -> Model:
    """A small model with random weights on the CPU."""
    spec = describe(Options(model=name, image_size=image_size))
    return load_model(spec, None, precision=precision, device="cpu", seed=seed)


def make_pixels(model: Model, count: int = 2) -> Tensor:
    """Random uint8 photos of the model's input size."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (count, 3, *model.spec.input_px), dtype=torch.uint8, generator=generator)


def timm_maps(model: Model, pixels: Tensor) -> list[Tensor]:
    """[B, H, T, T] of every layer: what timm's explicit path multiplies its values with (its `attn_drop` sees it)."""
    found: list[Tensor] = []
    hooks = []
    for module in model.net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            dropout = module.attn_drop
            assert isinstance(dropout, nn.Dropout)
            hooks.append(dropout.register_forward_hook(lambda _m, _i, output: found.append(output)))
    with torch.no_grad():
        model(pixels)
    for hook in hooks:
        hook.remove()
    for module in model.net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    return found


FAMILIES = ["vit_tiny_patch16_224", "vit_small_patch14_dinov2.lvd142m"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_and_head_equals_timms_unfused_path(name: str) -> None:
    model = make_model(name)
    pixels = make_pixels(model)
    spec = model.spec
    expected = timm_maps(model, pixels)
    layers, heads = resolve_layers("all", spec), resolve_heads("all", spec)
    maps = list(Extractor(model, layers, heads)(pixels))
    assert [m.layer for m in maps] == list(range(spec.num_layers))
    assert len(expected) == spec.num_layers
    prefix = spec.num_prefix_tokens
    for layer, full in zip(maps, expected, strict=True):
        torch.testing.assert_close(layer.rows, full[:, :, prefix:, prefix:], atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.cls, full[:, :, 0, prefix:], atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.prefix_mass, full[:, :, prefix:, :prefix].sum(-1).mean(-1), atol=1e-5, rtol=0)
        assert layer.finite.all()


def test_renormalised_rows_sum_to_one() -> None:
    rows = renormalise(torch.rand(2, 3, 5, 5).half() * 1e-3)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 3, 5))

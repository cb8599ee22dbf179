"""Attention maps against Hugging Face transformers: other code, the same random weights."""

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import transformers
from torch import nn

from batchjob.config import Options
from batchjob.model.attention import Extractor
from batchjob.model.checkpoints import read_checkpoint
from batchjob.model.describe import Model, describe, load_model, resolve_heads, resolve_layers
from tests.networks import make_pixels

DEPTH, WIDTH, HEADS = 3, 192, 3
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 768}
# family, timm name, configuration, network, image size, patch size
ORACLES: dict[str, tuple[str, str, str, tuple[int, int], int]] = {
    "vit": ("vit_tiny_patch16_224", "ViTConfig", "ViTModel", (64, 64), 16),
    "vit_mae": ("vit_base_patch16_224.mae", "ViTMAEConfig", "ViTMAEModel", (64, 64), 16),
    "dinov2": ("vit_small_patch14_dinov2", "Dinov2Config", "Dinov2Model", (56, 56), 14),
    "dinov2_registers": (
        "vit_small_patch14_reg4_dinov2",
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        (56, 56),
        14,
    ),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", "DINOv3ViTConfig", "DINOv3ViTModel", (64, 96), 16),
    "clip": ("vit_base_patch16_clip_224", "CLIPVisionConfig", "CLIPVisionModel", (64, 64), 16),
}


def their_model(family: str) -> nn.Module:
    """The Hugging Face model with eager attention and random weights, of which none is at a value it starts from."""
    name, config, network, size, patch = ORACLES[family]
    extra: dict[str, Any] = {"mask_ratio": 0.0} if family == "vit_mae" else {}
    extra |= {"num_register_tokens": 4} if family in ("dinov3", "dinov2_registers") else {}
    extra |= {"hidden_act": "gelu"} if family == "clip" else {}
    extra |= {"layer_norm_eps": 1e-6} if family in ("vit", "vit_mae") else {}  # timm's; theirs is 1e-12
    if "dinov3" in name:
        size = (64, 64)  # positions are computed from the input
    configuration = getattr(transformers, config)(**SMALL, image_size=size[0], patch_size=patch, **extra)
    configuration._attn_implementation = "eager"
    theirs: nn.Module = getattr(transformers, network)(configuration).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return theirs


def our_model(family: str, theirs: Any, folder: Path) -> Model:
    """Ours with the weights as they published them: saved by their code, read by ours."""
    theirs.save_pretrained(folder)
    state, _ = read_checkpoint(folder / "model.safetensors")
    name, _, _, size, _ = ORACLES[family]
    create = functools.partial(timm.create_model, depth=DEPTH, embed_dim=WIDTH, num_heads=HEADS)
    with mock.patch.object(timm, "create_model", create):
        spec = describe(Options(model=name, image_size="{}x{}".format(*size)))
        return load_model(spec, state, precision="fp32", device="cpu")


@pytest.mark.parametrize("family", ORACLES)
def test_maps_equal_those_of_transformers_with_the_same_weights(family: str, tmp_path: Path) -> None:
    theirs = their_model(family)
    ours = our_model(family, theirs, tmp_path)
    pixels = make_pixels(ours)
    spec = ours.spec
    inputs: dict[str, Any] = {"pixel_values": ours.normalise(pixels)}
    if family == "vit_mae":  # it shuffles patches by this noise, even if none is masked
        inputs["noise"] = torch.arange(spec.num_patches).float().expand(len(pixels), -1)
    with torch.no_grad():
        expected = theirs(**inputs, output_attentions=True).attentions
    layers, heads = resolve_layers("all", spec), resolve_heads("all", spec)
    maps = list(Extractor(ours, layers, heads)(pixels))
    assert len(maps) == len(expected) == DEPTH
    prefix = spec.num_prefix_tokens
    for layer, full in zip(maps, expected, strict=True):
        assert full.shape[-1] == spec.num_tokens
        torch.testing.assert_close(layer.rows, full[:, :, prefix:, prefix:], atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.cls, full[:, :, 0, prefix:], atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.prefix_mass, full[:, :, prefix:, :prefix].sum(-1).mean(-1), atol=1e-5, rtol=0)
    assert max(float(m.rows.max() / m.rows.mean()) for m in maps) > 1.5  # far from uniform

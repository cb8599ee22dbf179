"""Attention maps against Hugging Face transformers, which is independent code, with the same random weights."""

import functools
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from batchjob.config import Options
from batchjob.model.attention import Extractor
from batchjob.model.checkpoints import read_checkpoint
from batchjob.model.choices import resolve_heads, resolve_layers
from batchjob.model.describe import Model, describe, load_model
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
    "siglip": ("vit_base_patch16_siglip_gap_224", "SiglipVisionConfig", "SiglipVisionModel", (64, 64), 16),
    "clip": ("vit_base_patch16_clip_224", "CLIPVisionConfig", "CLIPVisionModel", (64, 64), 16),
}


def their_model(family: str) -> nn.Module:
    """Makes the Hugging Face model with eager attention and random weights, all different from their initial values."""
    name, config, network, size, patch = ORACLES[family]
    extra: dict[str, Any] = {"mask_ratio": 0.0} if family == "vit_mae" else {}
    extra |= {"num_register_tokens": 4} if family in ("dinov3", "dinov2_registers") else {}
    extra |= {"hidden_act": "gelu"} if family == "clip" else {}
    extra |= {"hidden_act": "gelu", "vision_use_head": False} if family == "siglip" else {}
    extra |= {"layer_norm_eps": 1e-6} if family in ("vit", "vit_mae") else {}  # timm's; transformers: 1e-12
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
    """Makes our model with weights that their code saved and ours read."""
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
    if family == "vit_mae":  # the model shuffles patches by this noise, even if no patch is masked
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
        cls = full[:, :, 0, prefix:] if spec.has_cls else full.mean(2)
        torch.testing.assert_close(layer.cls, cls, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.prefix_mass, full[:, :, prefix:, :prefix].sum(-1).mean(-1), atol=1e-5, rtol=0)
    assert max(float(m.rows.max() / m.rows.mean()) for m in maps) > 1.5  # far from uniform


def rotated_by_theirs(theirs: nn.Module) -> Any:
    """Returns the module of transformers whose `apply_rotary_pos_emb` rotates queries and keys, or None."""
    module = sys.modules[type(theirs).__module__]
    return module if hasattr(module, "apply_rotary_pos_emb") else None


def their_vectors(theirs: nn.Module, inputs: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Returns queries, keys and values [B, T, H · E] and tokens [B, T, D] of every layer, by hooks on their modules."""
    found: dict[str, list[Tensor]] = {"query": [], "key": [], "value": [], "token": []}
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    hooks = []
    for path, module in theirs.named_modules():
        what = names.get(path.rpartition(".")[2], "token" if re.search(r"layers?\.\d+$", path) else "")
        if what:
            hooks.append(
                module.register_forward_hook(
                    lambda _m, _i, out, to=found[what]: to.append(out[0] if isinstance(out, tuple) else out)
                )
            )
    rope, turned = rotated_by_theirs(theirs), list[tuple[Tensor, Tensor]]()
    if rope is not None:
        plain = rope.apply_rotary_pos_emb

        def watch(*args: Any, **kwargs: Any) -> Any:
            turned.append(plain(*args, **kwargs))
            return turned[-1]

        with mock.patch.object(rope, "apply_rotary_pos_emb", watch), torch.no_grad():
            theirs(**inputs)
        found["query"], found["key"] = ([pair[i].transpose(1, 2).flatten(2) for pair in turned] for i in (0, 1))
    else:
        with torch.no_grad():
            theirs(**inputs)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", ["vit", "dinov2_registers", "dinov3", "clip", "siglip"])
def test_queries_keys_values_and_tokens_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    theirs = their_model(family)
    ours = our_model(family, theirs, tmp_path)
    pixels, spec = make_pixels(ours), ours.spec
    expected = their_vectors(theirs, {"pixel_values": ours.normalise(pixels)})
    layers, heads = resolve_layers("all", spec), resolve_heads("all", spec)
    for what, by_layer in expected.items():
        assert len(by_layer) == DEPTH
        for some in (layers, layers[:1]):  # all layers in one pass, and the first one alone, by the short cut
            for maps in Extractor(ours, some, heads, cluster_on=what)(pixels):
                wanted = by_layer[maps.layer][:, spec.num_prefix_tokens :]
                count = 1 if what == "token" else spec.num_heads
                wanted = wanted.unflatten(2, (count, -1)).transpose(1, 2)  # [B, H, P, D]
                assert maps.vectors is not None
                torch.testing.assert_close(maps.vectors, wanted, atol=1e-5, rtol=1e-5)
                assert maps.to_cluster(None) is maps.vectors

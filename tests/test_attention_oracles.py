"""Attention maps against Hugging Face transformers: other code, the same random weights."""

import functools
import re
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from batchjob.config import Options
from batchjob.model.attention import Extractor
from batchjob.model.describe import Model, describe, load_model, resolve_heads, resolve_layers
from tests.networks import make_pixels

DEPTH, WIDTH, HEADS = 3, 192, 3
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 768}
BLOCK = re.compile(r"^(?:model\.|encoder\.)?layers?\.(\d+)\.(.*)$")
INSIDE = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "attention.o_proj": "attn.proj",
    "self_attn.out_proj": "attn.proj",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}


def in_timms_names(theirs: nn.Module) -> dict[str, Tensor]:
    """The weights of a Hugging Face vision transformer as timm names them: q, k, v stacked, embeddings renamed."""
    state = dict(theirs.state_dict())
    ours: dict[str, Tensor] = {}
    stacked: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in state.items():
        match = BLOCK.match(name)
        if not match:
            continue
        prefix, inside = f"blocks.{match[1]}", match[2]
        if part := re.search(r"([qkv])_proj\.(weight|bias)$", inside):
            stacked.setdefault((prefix, part[2]), {})[part[1]] = value
            continue
        for theirs_inside, ours_inside in INSIDE.items():
            inside = inside.replace(theirs_inside, ours_inside)
        ours[f"{prefix}.{inside}"] = value
    for (prefix, kind), parts in stacked.items():
        if len(parts) == 3:
            ours[f"{prefix}.attn.qkv.{kind}"] = torch.cat([parts["q"], parts["k"], parts["v"]])
        else:  # DINOv3 has no bias on its keys
            ours |= {f"{prefix}.attn.{letter}_bias": value for letter, value in parts.items()}
    return ours


def vit_names(theirs: nn.Module) -> dict[str, Tensor]:
    state, ours = theirs.state_dict(), in_timms_names(theirs)
    ours["cls_token"] = state["embeddings.cls_token"]
    ours["pos_embed"] = state["embeddings.position_embeddings"]
    for kind in ("weight", "bias"):
        ours[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
        ours[f"norm.{kind}"] = state[f"layernorm.{kind}"]
    return ours


def dinov2_names(theirs: nn.Module) -> dict[str, Tensor]:
    ours = vit_names(theirs)
    return {re.sub(r"layer_scale(\d)\.lambda1", r"ls\1.gamma", name): value for name, value in ours.items()}


def register_names(theirs: nn.Module) -> dict[str, Tensor]:
    ours = dinov2_names(theirs)  # timm keeps the CLS token's position in the token, registers have none
    ours["cls_token"] = ours["cls_token"] + ours["pos_embed"][:, :1]
    ours["pos_embed"] = ours["pos_embed"][:, 1:]
    ours["reg_token"] = theirs.state_dict()["embeddings.register_tokens"]
    return ours


def dinov3_names(theirs: nn.Module) -> dict[str, Tensor]:
    state, ours = theirs.state_dict(), in_timms_names(theirs)
    ours = {re.sub(r"layer_scale(\d)\.lambda1", r"gamma_\1", name): value for name, value in ours.items()}
    ours["cls_token"], ours["reg_token"] = state["embeddings.cls_token"], state["embeddings.register_tokens"]
    for kind in ("weight", "bias"):
        ours[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.{kind}"]
        ours[f"norm.{kind}"] = state[f"norm.{kind}"]
    return ours


def clip_names(theirs: nn.Module) -> dict[str, Tensor]:
    state, ours = theirs.state_dict(), in_timms_names(theirs)
    ours["cls_token"] = state["embeddings.class_embedding"].view(1, 1, -1)
    ours["pos_embed"] = state["embeddings.position_embedding.weight"][None]
    ours["patch_embed.proj.weight"] = state["embeddings.patch_embedding.weight"]
    for kind in ("weight", "bias"):
        ours[f"norm_pre.{kind}"] = state[f"pre_layrnorm.{kind}"]
        ours[f"norm.{kind}"] = state[f"post_layernorm.{kind}"]
    return ours


def siglip_names(theirs: nn.Module) -> dict[str, Tensor]:
    state, ours = theirs.state_dict(), in_timms_names(theirs)
    ours["pos_embed"] = state["embeddings.position_embedding.weight"][None]
    for kind in ("weight", "bias"):
        ours[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embedding.{kind}"]
        ours[f"norm.{kind}"] = state[f"post_layernorm.{kind}"]
    return ours


Names = Callable[[nn.Module], dict[str, Tensor]]
# family, timm name, configuration, rename, image size, patch size
ORACLES: dict[str, tuple[str, str, str, Names, tuple[int, int], int]] = {
    "vit": ("vit_tiny_patch16_224", "ViTConfig", "ViTModel", vit_names, (64, 64), 16),
    "vit_mae": ("vit_base_patch16_224.mae", "ViTMAEConfig", "ViTMAEModel", vit_names, (64, 64), 16),
    "dinov2": ("vit_small_patch14_dinov2", "Dinov2Config", "Dinov2Model", dinov2_names, (56, 56), 14),
    "dinov2_registers": (
        "vit_small_patch14_reg4_dinov2",
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        register_names,
        (56, 56),
        14,
    ),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", "DINOv3ViTConfig", "DINOv3ViTModel", dinov3_names, (64, 96), 16),
    "siglip": (
        "vit_base_patch16_siglip_gap_224",
        "SiglipVisionConfig",
        "SiglipVisionModel",
        siglip_names,
        (64, 64),
        16,
    ),
    "clip": ("vit_base_patch16_clip_224", "CLIPVisionConfig", "CLIPVisionModel", clip_names, (64, 64), 16),
}


def their_model(family: str) -> nn.Module:
    """The Hugging Face model with eager attention and random weights, of which none is at a value it starts from."""
    name, config, network, _, size, patch = ORACLES[family]
    extra: dict[str, Any] = {"mask_ratio": 0.0} if family == "vit_mae" else {}
    extra |= {"num_register_tokens": 4} if family in ("dinov3", "dinov2_registers") else {}
    extra |= {"hidden_act": "gelu"} if family == "clip" else {}
    extra |= {"hidden_act": "gelu", "vision_use_head": False} if family == "siglip" else {}
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


def our_model(family: str, theirs: nn.Module) -> Model:
    name, _, _, rename, size, _ = ORACLES[family]
    create = functools.partial(timm.create_model, depth=DEPTH, embed_dim=WIDTH, num_heads=HEADS)
    with mock.patch.object(timm, "create_model", create):
        spec = describe(Options(model=name, image_size="{}x{}".format(*size)))
        return load_model(spec, rename(theirs), precision="fp32", device="cpu")


@pytest.mark.parametrize("family", ORACLES)
def test_maps_equal_those_of_transformers_with_the_same_weights(family: str) -> None:
    theirs = their_model(family)
    ours = our_model(family, theirs)
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
        cls = full[:, :, 0, prefix:] if spec.has_cls else full.mean(2)
        torch.testing.assert_close(layer.cls, cls, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.prefix_mass, full[:, :, prefix:, :prefix].sum(-1).mean(-1), atol=1e-5, rtol=0)
    assert max(float(m.rows.max() / m.rows.mean()) for m in maps) > 1.5  # far from uniform


def rotated_by_theirs(theirs: nn.Module) -> Any:
    """The module of transformers whose `apply_rotary_pos_emb` turns queries and keys; None where there is none."""
    module = sys.modules[type(theirs).__module__]
    return module if hasattr(module, "apply_rotary_pos_emb") else None


def their_vectors(theirs: nn.Module, inputs: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Queries, keys and values [B, T, H · E] and tokens [B, T, D] of every layer, seen by hooks on their modules."""
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
def test_queries_keys_values_and_tokens_equal_those_of_transformers(family: str) -> None:
    theirs = their_model(family)
    ours = our_model(family, theirs)
    pixels, spec = make_pixels(ours), ours.spec
    expected = their_vectors(theirs, {"pixel_values": ours.normalise(pixels)})
    layers, heads = resolve_layers("all", spec), resolve_heads("all", spec)
    for what, by_layer in expected.items():
        assert len(by_layer) == DEPTH
        for some in (layers, layers[:1]):  # all in one pass, and the first alone, by the short cut
            for maps in Extractor(ours, some, heads, cluster_on=what)(pixels):
                wanted = by_layer[maps.layer][:, spec.num_prefix_tokens :]
                count = 1 if what == "token" else spec.num_heads
                wanted = wanted.unflatten(2, (count, -1)).transpose(1, 2)  # [B, H, P, D]
                assert maps.vectors is not None
                torch.testing.assert_close(maps.vectors, wanted, atol=1e-5, rtol=1e-5)
                assert maps.to_cluster(None) is maps.vectors

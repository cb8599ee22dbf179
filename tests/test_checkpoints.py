"""Checkpoints in the layouts that training codes publish: each loads and says what was left out, or is refused."""

import argparse
import functools
import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from batchjob.errors import UserError
from batchjob.model.checkpoints import read_checkpoint, sha256_of_weights
from batchjob.model.network import trained_network

TINY = "vit_tiny_patch16_224"
State = dict[str, Tensor]
ARGS = argparse.Namespace(arch="vit_tiny", lr=5e-4, out=[1, 2])


@functools.cache
def weights_of(name: str, **changes: Any) -> State:
    """Makes random weights of a shallow network, with timm's names, without a classifier."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0, depth=2, **changes)
    return {key: torch.randn_like(value) * 0.02 for key, value in net.state_dict().items()}


def load(name: str, content: Any, folder: Path) -> tuple[Any, str]:
    """Saves the content and returns the network that is loaded from it, and the remark."""
    path = folder / "w.pth"
    torch.save(content, path)
    state, remark = read_checkpoint(path)
    with mock.patch.object(timm, "create_model", functools.partial(timm.create_model, depth=2)):
        return trained_network(name, (224, 224), state, stage=None), remark


def assert_same(net: Any, state: State) -> None:
    held = net.state_dict()
    for key, value in state.items():
        torch.testing.assert_close(held[key], value, msg=key)


def put(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


HEAD = {"head.mlp.0.weight": torch.zeros(8, 192), "head.last_layer.weight_g": torch.zeros(8, 1)}
DECODER = {
    "mask_token": torch.zeros(1, 1, 512),
    "decoder_pos_embed": torch.zeros(1, 197, 512),
    "decoder_embed.weight": torch.zeros(512, 192),
    "decoder_blocks.0.norm1.weight": torch.zeros(512),
}


def other(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


# layout -> what the file holds, given the network's own weights
LAYOUTS: dict[str, Any] = {
    "DINO, full training": lambda s: {
        "student": put("module.backbone.", other(s)) | put("module.", HEAD),
        "teacher": put("backbone.", s) | HEAD,
        "optimizer": {"state": {}},
        "epoch": 100,
        "args": ARGS,
        "dino_loss": {"center": torch.zeros(1, 8)},
    },
    "MAE, pre-training": lambda s: {"model": s | DECODER, "args": ARGS, "epoch": 3},
    "DeiT": lambda s: {"model": s | {"head.weight": torch.zeros(9, 192), "head.bias": torch.zeros(9)}, "args": ARGS},
    "timm, training": lambda s: {"state_dict": s, "args": ARGS, "metric": np.float64(71.2), "epoch": 9},
    "timm, training with an average": lambda s: {"state_dict": other(s), "state_dict_ema": s, "args": ARGS},
    "DeiT, training with an average": lambda s: {
        "model": other(s),
        "model_ema": s,
        "optimizer": {"param_groups": [{"lr": np.float32(1e-3)}]},
        "max_accuracy": np.int64(7),
        "args": ARGS,
    },
    "Lightning": lambda s: {"state_dict": put("model.", s), "pytorch-lightning_version": "2", "global_step": 5},
    "Lightning, with a head beside": lambda s: {"state_dict": put("model.", s) | {"criterion.weight": torch.ones(3)}},
    "torch.compile": lambda s: put("_orig_mod.", s),
    "torch.compile in DDP": lambda s: {"model": put("module._orig_mod.", s)},
    "MoCo v3": lambda s: {
        "state_dict": put("module.base_encoder.", s)
        | put("module.momentum_encoder.", other(s))
        | {"module.predictor.0.weight": torch.ones(2), "module.base_encoder.head.0.weight": torch.ones(2)},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout_loads_into_the_plain_vit(layout: str, tmp_path: Path) -> None:
    state = weights_of(TINY)
    net, _ = load(TINY, LAYOUTS[layout](state), tmp_path)
    assert_same(net, state)


def test_one_line_says_what_was_left_out(tmp_path: Path) -> None:
    state = weights_of(TINY)
    _, remark = load(TINY, LAYOUTS["DINO, full training"](state), tmp_path)
    assert remark.endswith("w.pth: took 'teacher.backbone', left out 2 other tensors (head)")
    _, remark = load(TINY, LAYOUTS["MAE, pre-training"](state), tmp_path)
    assert "left out 4 other tensors (decoder_blocks, decoder_embed, decoder_pos_embed, …)" in remark
    assert load(TINY, state, tmp_path)[1] == ""


@pytest.mark.parametrize("branch", ["teacher", "FSDP"])
def test_dinov2_teachers_load_with_their_heads_and_block_chunks_left_out(branch: str, tmp_path: Path) -> None:
    name = "vit_small_patch14_dinov2"
    state = weights_of(name, img_size=518)
    theirs = state | {"mask_token": torch.zeros(1, 384)}
    chunks = {key.replace("blocks.", "blocks.0.") if key.startswith("blocks.") else key: v for key, v in theirs.items()}
    heads = {"dino_head.mlp.0.weight": torch.ones(2), "ibot_head.last_layer.weight_v": torch.ones(2)}
    if branch == "teacher":
        content: Any = {"teacher": put("backbone.", chunks) | heads}
    else:
        both = put("student.backbone.", other(chunks)) | put("teacher.backbone._fsdp_wrapped_module.", chunks)
        content = {"model": both | put("teacher.", heads), "iteration": 7}
    net, remark = load(name, content, tmp_path)
    assert_same(net, {key: value for key, value in state.items() if key != "pos_embed"})
    assert "'model.teacher.backbone'" in remark or "'teacher.backbone'" in remark


@pytest.mark.parametrize("branch", ["teacher", "FSDP"])
def test_a_dinov3_teacher_loads(branch: str, tmp_path: Path) -> None:
    name = "vit_small_patch16_dinov3"
    state = weights_of(name)
    theirs = {k.replace("gamma_", "ls").replace("reg_token", "storage_tokens"): v for k, v in state.items()}
    theirs = {(k + ".gamma" if k.endswith(("ls1", "ls2")) else k): v for k, v in theirs.items()}
    theirs |= {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}
    head = {"dino_head.mlp.0.weight": torch.ones(2)}
    if branch == "teacher":
        content = {"teacher": put("backbone.", theirs) | head}
    else:
        both = put("student.backbone.", other(theirs)) | put("teacher.", head) | put("gram_teacher.", other(head))
        content = {"model": both | put("teacher.backbone._fsdp_wrapped_module.", theirs), "iteration": 7}
    net, _ = load(name, content, tmp_path)
    assert_same(net, state)


@pytest.mark.parametrize("kind", ["fine-tuned", "pre-training"])
def test_beit_loads(kind: str, tmp_path: Path) -> None:
    name = "beit_base_patch16_224"
    state = weights_of(name, embed_dim=48, num_heads=12)
    content = dict(state)
    if kind == "pre-training":
        content = {key.replace("fc_norm", "norm"): value for key, value in state.items()}
        content |= {"mask_token": torch.zeros(1, 1, 48), "lm_head.weight": torch.ones(9, 48)}
    small = functools.partial(timm.create_model, embed_dim=48, num_heads=12)
    with mock.patch.object(timm, "create_model", small):
        net, _ = load(name, {"model": content}, tmp_path)
    assert_same(net, state)


HUGGING_FACE = {
    "google/vit": ("ViTConfig", "ViTForImageClassification", TINY, {}),
    "facebook/dinov2": ("Dinov2Config", "Dinov2Model", "vit_small_patch14_dinov2", {"patch_size": 14}),
    "facebook/dinov3": (
        "DINOv3ViTConfig",
        "DINOv3ViTModel",
        "vit_small_patch16_dinov3_qkvb",
        {"num_register_tokens": 4},
    ),
    "facebook/vit-mae": (
        "ViTMAEConfig",
        "ViTMAEForPreTraining",
        "vit_base_patch16_224.mae",
        {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 3},
    ),
    "facebook/dinov2-with-registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        "vit_small_patch14_reg4_dinov2",
        {"patch_size": 14},
    ),
    "openai/clip, vision": ("CLIPVisionConfig", "CLIPVisionModel", "vit_base_patch16_clip_224", {"patch_size": 16}),
    "google/siglip, vision": ("SiglipVisionConfig", "SiglipVisionModel", "vit_base_patch16_siglip_224", {}),
}


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_hugging_face_layouts_load_with_every_tensor_in_its_place(family: str, tmp_path: Path) -> None:
    """Saves by transformers' own code; tests/test_attention_oracles.py checks that the maps are equal."""
    config, network, name, extra = HUGGING_FACE[family]
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
    theirs = getattr(transformers, network)(getattr(transformers, config)(**sizes, image_size=224, **extra))
    theirs.save_pretrained(tmp_path)
    state, _ = read_checkpoint(tmp_path / "model.safetensors")
    small = functools.partial(timm.create_model, depth=2, embed_dim=48, num_heads=3)
    with mock.patch.object(timm, "create_model", small):
        net: Any = trained_network(name, (224, 224), state, stage=None)
    ours, own = net.state_dict(), theirs.state_dict()
    patches = next(value for key, value in own.items() if "patch_embedding" in key and value.ndim == 4)
    torch.testing.assert_close(ours["patch_embed.proj.weight"], patches)
    queries = next(value for key, value in own.items() if re.search(r"1\..*q_proj\.weight$", key))
    torch.testing.assert_close(ours["blocks.1.attn.qkv.weight"][:48], queries)


# Names of modules in transformers before version 5, and so in the files on the hub.
ON_THE_HUB = (
    (r"^(vit\.)?(encoder\.)?layers?\.", r"\1encoder.layer."),
    (r"attention\.(q|k|v)_proj", lambda m: "attention.attention." + {"q": "query", "k": "key", "v": "value"}[m[1]]),
    (r"attention\.o_proj", "attention.output.dense"),
)


@pytest.mark.parametrize("family", ["google/vit", "facebook/dinov2"])
def test_the_names_in_the_hub_s_files_lead_to_the_same_tensors(family: str, tmp_path: Path) -> None:
    config, network, _, extra = HUGGING_FACE[family]
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
    theirs = getattr(transformers, network)(getattr(transformers, config)(**sizes, image_size=224, **extra))
    mlp = ((r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense")) * (family == "google/vit")
    renamed: State = {}
    for name, value in theirs.state_dict().items():
        for pattern, as_on_the_hub in ON_THE_HUB + mlp:
            name = re.sub(pattern, as_on_the_hub, name)
        renamed[name] = value
    assert any("encoder.layer.1.attention.attention.query.weight" in name for name in renamed)
    torch.save(theirs.state_dict(), tmp_path / "now.pth")
    torch.save(renamed, tmp_path / "hub.pth")
    (now, _), (hub, _) = read_checkpoint(tmp_path / "now.pth"), read_checkpoint(tmp_path / "hub.pth")
    assert "blocks.1.mlp.fc2.weight" in hub
    assert now.keys() == hub.keys()
    assert all(torch.equal(value, hub[name]) for name, value in now.items())


def test_the_vision_tower_of_a_whole_clip_is_taken() -> None:
    from batchjob.model.checkpoints import choose_network

    state = {"text_model.embeddings.token_embedding.weight": torch.ones(2), "logit_scale": torch.ones(1)}
    state |= {"vision_model.embeddings.patch_embedding.weight": torch.ones(4, 3, 16, 16)}
    found, remark = choose_network(state, "clip.pth")
    assert list(found) == ["patch_embed.proj.weight"]
    assert remark == "clip.pth: took 'vision_model', left out 2 other tensors (text_model, logit_scale)"


def test_weights_in_several_files_are_read_by_their_index_and_all_of_them_are_hashed(tmp_path: Path) -> None:
    state = weights_of(TINY)
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for shard, keys in shards.items():
        save_file({key: state[key] for key in keys}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}))
    found, _ = read_checkpoint(index)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in state.items()}
    before = sha256_of_weights(index)
    save_file({key: state[key] + 1 for key in names[20:]}, tmp_path / "model-00002-of-00002.safetensors")
    assert sha256_of_weights(index) != before
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="names 1 file that is not beside it, such as model-00001"):
        read_checkpoint(index)


def test_weights_of_other_patches_are_refused_rather_than_resampled(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="their patches are 8x8 pixels, the model's 16x16"):
        load(TINY, weights_of(TINY, patch_size=8), tmp_path)


def test_weights_that_do_not_fit_are_refused_with_the_keys_that_say_most(tmp_path: Path) -> None:
    state = dict(weights_of(TINY))
    state["blocks.0.attn.strange"] = state.pop("blocks.0.attn.qkv.weight")
    with pytest.raises(UserError, match=r"not those of vit_tiny_patch16_224: missing blocks\.0\.attn\.qkv\.weight"):
        load(TINY, state, tmp_path)


def test_a_tensor_that_claims_to_be_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    """Tests a view that repeats one number 10¹² times: it takes memory only when it is copied."""
    state = dict(weights_of(TINY))
    state["blocks.0.attn.qkv.weight"] = torch.zeros(1).expand(1_000_000, 1_000_000)
    torch.save(state, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").stat().st_size < 10**7
    with pytest.raises(UserError, match=r"says that blocks\.0\.attn\.qkv\.weight is 1000000x1000000"):
        read_checkpoint(tmp_path / "w.pth")


class Strange:
    """A class that is not on the list of allowed ones."""


def test_what_could_run_code_is_refused_in_one_line_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"model": weights_of(TINY), "config": Strange()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"it holds \S*Strange beside its tensors.*torch\.save\(torch\.load") as error:
        read_checkpoint(tmp_path / "w.pth")
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)

"""Reads checkpoint files as training codes publish them: picks one network's tensors, and names them as timm does."""

import argparse
import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchjob.errors import UserError, counted
from batchjob.inputs import sha256_of

if TYPE_CHECKING:
    from torch import Tensor

INDEX = ".index.json"  # a file of this ending lists the files of weights that are stored in parts
_WRAPPERS = ("teacher", "state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "student", "module")
# The first is what wrappers of modules insert between names, the second what training codes put before all names.
_BETWEEN = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_IN_FRONT = re.compile(r"^(module|model|backbone)\.")
# The first layer of a vision transformer. What stands before its name stands before all names of the network.
_FIRST_LAYER = re.compile(
    r"^(.*?)(patch_embed\.proj|embeddings\.patch_embeddings(\.projection)?|embeddings\.patch_embedding)\.weight$"
)
_PREFERRED = ("teacher", "base_encoder", "ema", "student", "momentum_encoder")
_PRETRAINING = re.compile(r"^(decoder_|(dino|ibot)_head\.|lm_head\.|predictor\.|projector\.|pooler\.|classifier\.)")
# Hugging Face's names of modules → timm's: first the names inside a block, then those outside of the blocks.
_IN_A_BLOCK = {
    "layernorm_before": "norm1",  # ViT
    "layernorm_after": "norm2",
    "layer_norm1": "norm1",  # CLIP, SigLIP
    "layer_norm2": "norm2",
    "attention.attention.query": "attn.q",  # ViT, DINOv2
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "attention.q_proj": "attn.q",  # DINOv3, ViT of transformers 5
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "self_attn.q_proj": "attn.q",  # CLIP, SigLIP
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.out_proj": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",  # DINOv2, DINOv3
    "layer_scale2.lambda1": "ls2.gamma",
    "intermediate.dense": "mlp.fc1",  # ViT
    "output.dense": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",  # DINOv2 giant
    "mlp.weights_out": "mlp.w3",
}
_IN_THE_NETWORK = {
    "embeddings.cls_token": "cls_token",  # ViT, DINOv2, DINOv3
    "embeddings.class_embedding": "cls_token",  # CLIP
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",  # ViT, DINOv2
    "embeddings.position_embedding.weight": "pos_embed",  # CLIP, SigLIP
    "embeddings.patch_embeddings.projection": "patch_embed.proj",  # ViT, DINOv2
    "embeddings.patch_embeddings": "patch_embed.proj",  # DINOv3
    "embeddings.patch_embedding": "patch_embed.proj",  # CLIP, SigLIP
    "pre_layrnorm": "norm_pre",  # CLIP, which spells it so
    "layernorm": "norm",  # ViT, DINOv2
    "post_layernorm": "norm",  # CLIP, SigLIP
    "head.probe": "attn_pool.latent",  # SigLIP
    "head.attention.out_proj": "attn_pool.proj",
    "head.layernorm": "attn_pool.norm",
    "head.mlp": "attn_pool.mlp",
}
_BLOCK = re.compile(r"^(?:encoder\.|model\.)?layers?\.(\d+)\.(.+)$")


def sha256_of_weights(path: Path) -> str:
    """Returns the sha256 (hex) of a file of weights; for an index, that of its own hash and the hashes of its files."""
    if not path.name.endswith(INDEX):
        return sha256_of(path)
    hashes = [sha256_of(path), *(sha256_of(shard) for shard in _shards(path))]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_checkpoint(path: Path) -> "tuple[dict[str, Tensor], str]":
    """Reads the tensors of one network from safetensors, pth, or an index of several files.

    Of a pickle, only tensors, plain values, `argparse.Namespace` and NumPy's numbers are loaded, so that no code of the
    file runs.

    Returns
    -------
    The tensors on the CPU by the names that timm reads, and a sentence on what was taken and left out, "" for nothing.

    Raises
    ------
    UserError
        The file can't be read, holds other objects than these, or holds no tensors by name.
    """
    found: Any = {}
    for part in _shards(path) if path.name.endswith(INDEX) else [path]:
        loaded = _load(part)
        found = found | loaded if path.name.endswith(INDEX) and isinstance(loaded, dict) else loaded
    return choose_network(found, str(path))


def choose_network(found: Any, path: str) -> "tuple[dict[str, Tensor], str]":
    """Picks one network out of what a checkpoint file held.

    Left out are wrappers, other networks beside it (a student beside its teacher) and parts that only training uses.

    Parameters
    ----------
    found
        What the file held: tensors by name, or dictionaries around them.
    path
        Of the file, for messages.

    Returns
    -------
    As `read_checkpoint`.

    Raises
    ------
    UserError
        There are no tensors by name, or a tensor claims to be larger than its memory.
    """
    import torch

    taken = []
    while isinstance(found, dict) and (inner := next((n for n in _WRAPPERS if isinstance(found.get(n), dict)), "")):
        taken.append(inner)
        found = found[inner]
    state = {}
    if isinstance(found, dict):
        state = {_BETWEEN.sub("", str(n)): value for n, value in found.items() if isinstance(value, torch.Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors by name; give a state dict as safetensors or pth")
    for name, value in state.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes() + 2**20:
            shape = "x".join(map(str, value.shape))
            raise UserError(f"{path} says that {name} is {shape}, and holds less; give the file as it was saved")
    while all(_IN_FRONT.match(name) for name in state) and len({name.split(".")[0] for name in state}) == 1:
        state = {_IN_FRONT.sub("", name): value for name, value in state.items()}
    prefix = _prefix(state)
    beside = [name for name in state if not name.startswith(prefix)]
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    state = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", n): v for n, v in state.items()}  # DINOv2's block chunks
    is_pretraining = any(name.startswith(("decoder_", "lm_head.")) for name in state)
    dropped = {n for n in state if _PRETRAINING.match(n) or (n == "mask_token" and is_pretraining)}
    beside += sorted(dropped)
    state = {name: value for name, value in state.items() if name not in dropped}
    if "lm_head.weight" in dropped:  # BEiT's pre-training names its last norm otherwise
        state = {re.sub(r"^norm\.", "fc_norm.", name): value for name, value in state.items()}
    if any(name.startswith("embeddings.") for name in state):
        state = _from_hugging_face(state)
    return state, _sentence(path, ".".join([*taken, *filter(None, prefix.split("."))]), beside)


def _sentence(path: str, source: str, beside: list[str]) -> str:
    if not beside:
        return f"{path}: took {source!r}" if source else ""
    kinds = list(dict.fromkeys(name.split(".")[0] for name in beside))
    some = ", ".join(kinds[:3]) + (", …" if len(kinds) > 3 else "")
    return f"{path}: {f'took {source!r}, ' if source else ''}left out {len(beside)} other tensors ({some})"


def _prefix(state: "dict[str, Tensor]") -> str:
    """Returns what stands before the names of the wanted network: that of a teacher, or the next of `_PREFERRED`."""
    found = sorted({match[1] for name in state if (match := _FIRST_LAYER.match(name))})
    ranked = sorted(found, key=lambda p: next((i for i, n in enumerate(_PREFERRED) if n in p), len(_PREFERRED)))
    return ranked[0] if ranked else ""


def _from_hugging_face(state: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Renames Hugging Face's ViT, DINOv2, DINOv3, CLIP and SigLIP to their first authors' names, which timm reads."""
    import torch

    renamed = {_as_timm_names_it(name): value for name, value in state.items()}
    is_dinov3 = "embeddings.register_tokens" in renamed and "pos_embed" not in renamed
    registers = "storage_tokens" if is_dinov3 else "register_tokens"
    out: dict[str, Tensor] = {}
    for name, value in renamed.items():
        if match := re.match(r"^(blocks\.\d+\.attn)\.(q|k|v)\.(weight|bias)$", name):
            block, _, kind = match.groups()
            parts = [renamed.get(f"{block}.{letter}.{kind}") for letter in "qkv"]  # DINOv3's keys have no bias
            out[f"{block}.qkv.{kind}"] = torch.cat([torch.zeros_like(value) if p is None else p for p in parts])
        elif match := re.match(r"^head\.attention\.in_proj_(weight|bias)$", name):
            width = len(value) // 3
            out |= {f"attn_pool.q.{match[1]}": value[:width], f"attn_pool.kv.{match[1]}": value[width:]}
        else:
            out[name.replace("embeddings.register_tokens", registers)] = value
    if "cls_token" in out:
        out["cls_token"] = out["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in out and out["pos_embed"].ndim == 2:
        out["pos_embed"] = out["pos_embed"][None]
    gates = any(".mlp.gate_proj." in name for name in out)
    up = "w2" if gates else "fc1"
    names = {"gate_proj": "w1", "up_proj": up, "down_proj": "w3" if gates else "fc2"}
    return {re.sub(r"\.mlp\.(\w+_proj)\.", lambda m: f".mlp.{names[m[1]]}.", n): v for n, v in out.items()}


def _as_timm_names_it(name: str) -> str:
    block = _BLOCK.match(name)
    rest, table = (block[2], _IN_A_BLOCK) if block else (name, _IN_THE_NETWORK)
    for theirs, ours in table.items():
        if rest == theirs or rest.startswith(f"{theirs}."):
            rest = ours + rest.removeprefix(theirs)
            break
    return f"blocks.{block[1]}.{rest}" if block else rest


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of weights ({error}); give the one beside its files") from error
    if absent := [path.name for path in paths if not path.is_file()]:
        are = "is" if len(absent) == 1 else "are"
        raise UserError(
            f"{index} names {counted(len(absent), 'file')} that {are} not beside it, such as {absent[0]}; bring all"
        )
    return paths


def _load(path: Path) -> Any:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_plain_classes()):
            return torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        text = str(error)
        if named := re.search(r"GLOBAL ([\w.]+)", text):
            reason = f"it holds {named[1]} beside its tensors, which could run code"
        else:
            lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() or ["it is empty"]
            reason = lines[0][:160].strip() or "it is empty"
        raise UserError(
            f"{path} holds no weights that can be read safely: {reason}; give safetensors or pth, or, if you trust it, "
            "save the state dict alone: torch.save(torch.load(FILE, weights_only=False)['model'], 'weights.pth')"
        ) from error


def _plain_classes() -> list[Any]:
    """Returns the classes that training codes save beside tensors and that hold nothing but values."""
    import numpy as np
    from numpy._core import multiarray

    dtypes = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]
    scalar = multiarray.scalar
    return [argparse.Namespace, np.dtype, *dtypes, scalar, (scalar, "numpy.core.multiarray.scalar")]

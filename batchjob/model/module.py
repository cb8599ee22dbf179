"""Takes a network at hand instead of a name: stores its weights for a run, or wraps it for a few images."""

import copy
import os
from dataclasses import replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from batchjob.errors import UserError
from batchjob.inputs import sha256_of
from batchjob.model import network, probe, weights
from batchjob.model import sdpa_tap as taps
from batchjob.model.choices import DEFAULT_PX, choose_input_px
from batchjob.model.describe import Model, vit_spec

_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}


def name_and_weights(net: nn.Module) -> tuple[str, str]:
    """Returns timm's name of a network that timm made, and the path of its present weights, which are stored now.

    The file lies in the cache under their checksum. Raises UserError where timm did not make the network, since a run
    names the model that it can build again.
    """
    known = getattr(net, "pretrained_cfg", None) or {}
    name = known.get("architecture", "")
    if not timm.is_model(name):
        raise UserError(
            f"a run needs a model that timm can build again, found a {type(net).__name__}; give a network of "
            "timm.create_model, or a name with weights=FILE; batchjob.attention takes any network"
        )
    from safetensors.torch import save_file

    folder = weights.cache_folder() / "modules"
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.part{os.getpid()}"
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in net.state_dict().items()}, part)
    path = folder / f"{name}-{sha256_of(part)[:16]}.safetensors"
    part.replace(path)
    tag = known.get("tag") or ""
    return (f"{name}.{tag}" if tag else name), str(path)


def wrap(net: nn.Module, image_size: str, *, device: torch.device) -> Model:
    """Makes a `Model` in float32 of a copy of a network. It gets the preprocessing that timm knows, else ImageNet's.

    Parameters
    ----------
    net
        A vision transformer of timm, or any that takes pixels [B, 3, H, W] and has an attribute `patch_size`, itself or
        in its `patch_embed` or `config`.
    image_size
        As `--image-size`; empty for the network's own size.
    device
        Where the forward pass runs.

    Raises
    ------
    UserError
        The blocks do not attend from all tokens to all tokens by `scaled_dot_product_attention`, the network does not
        say how large its patches are, or the size is not a multiple of them.
    """
    net = copy.deepcopy(net).eval().float()
    known = hasattr(net, "pretrained_cfg")
    data: dict[str, Any] = timm.data.resolve_model_data_config(net) if known else dict(_IMAGENET)  # type: ignore[attr-defined, no-untyped-call]
    name = str((getattr(net, "pretrained_cfg", None) or {}).get("architecture") or type(net).__name__)
    taps.fuse_attention(net)
    if not hasattr(net, "forward_features"):
        net = _Foreign(net, name)
    own_px = _own_px(net, data)
    patch_px = _patch_px(net, name)
    input_px = choose_input_px(image_size, own_px, patch_px=patch_px) if image_size else own_px
    if input_px != own_px:
        network.resize(net, input_px)
    meta = copy.deepcopy(net).to("meta")
    if isinstance(meta, _Foreign):
        meta.count_blocks(input_px)
        net.blocks = meta.blocks  # type: ignore[assignment]
    shape = probe.probe_vit(name, meta, input_px)
    if shape is None:
        raise UserError(f"model {name} {probe.NO_MAP}; a CNN is given by its timm name")
    embed_dim = shape.num_heads * shape.head_dim
    spec = vit_spec(name, shape, data, input_px=input_px, patch_px=patch_px, embed_dim=embed_dim)
    if isinstance(meta, _Foreign):
        spec = replace(spec, num_prefix_tokens=meta.num_prefix_tokens, has_cls=meta.num_prefix_tokens > 0)
    return Model(spec, net, "fp32", device)


class _Foreign(nn.Module):
    """Wraps a network that timm did not make: `forward_features` is its forward pass, and each attention is a block."""

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        self.net, self.name = net, name
        self.patch_embed = _Patches(_patch_px(net, name))
        self.blocks: tuple[int, ...] = ()
        self.num_prefix_tokens = 0

    def forward_features(self, pixels: Tensor) -> Any:
        return self.net(pixels)

    def count_blocks(self, input_px: tuple[int, int]) -> None:
        """Counts the calls of attention as blocks, and the tokens beyond the grid's patches as prefix tokens."""
        calls: list[taps.AttentionCall] = []
        with torch.no_grad(), taps.AttentionTap(lambda _, call: calls.append(call)):
            self.net(torch.empty(1, 3, *input_px, device="meta"))
        self.blocks = tuple(range(len(calls)))
        height, width = self.patch_embed.patch_size
        patches = (input_px[0] // height) * (input_px[1] // width)
        self.num_prefix_tokens = calls[0].query.shape[2] - patches if calls else 0
        if not calls or self.num_prefix_tokens < 0:
            raise UserError(f"model {self.name} {probe.NO_MAP}")


class _Patches:
    """Holds the size of a patch where `probe` looks for it."""

    def __init__(self, patch_size: tuple[int, int]) -> None:
        self.patch_size = patch_size


def _patch_px(net: nn.Module, name: str) -> tuple[int, int]:
    for part in (getattr(net, "patch_embed", None), net, getattr(net, "config", None), getattr(net, "embeds", None)):
        size = getattr(part, "patch_size", None)
        if size is not None:
            return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
    raise UserError(f"model {name} does not say how large its patches are; set its attribute patch_size, in pixels")


def _own_px(net: nn.Module, data: dict[str, Any]) -> tuple[int, int]:
    """Returns the input size that the network was built for, as its patch embedding, itself or its config says it."""
    inner = net.net if isinstance(net, _Foreign) else net
    embed = getattr(inner, "patch_embed", None)
    for part, key in ((embed, "img_size"), (inner, "image_size"), (getattr(inner, "config", None), "image_size")):
        size = getattr(part, key, None)
        if size is not None:
            return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
    own = data.get("input_size", (3, DEFAULT_PX, DEFAULT_PX))
    return int(own[1]), int(own[2])

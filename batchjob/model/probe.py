"""Finds out what kind of network a timm name is, by a pass of shapes alone (torch's meta device), without weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchjob.errors import UserError
from batchjob.model import network
from batchjob.model import sdpa_tap as taps

NO_MAP = (
    "has no patch-to-patch map: it attends inside windows, over stages of other grids, or in another way than one "
    "softmax(QK) over all patches in every block; give a plain vision transformer, e.g. "
    "vit_small_patch14_dinov2.lvd142m, or a CNN such as resnet50"
)

NO_TOKENS = (
    "has no tokens for --cluster-on token, which takes those of transformers that keep one grid of patches and compute "
    "one softmax(QK) over all of it in every block, and the features of CNNs; give e.g. "
    "vit_small_patch14_dinov2.lvd142m or resnet50"
)


@dataclass(frozen=True, slots=True)
class VitShape:
    """The tokens of a vision transformer at one input size."""

    grid: tuple[int, int]  # patches as (rows, columns)
    num_prefix_tokens: int
    num_layers: int
    num_heads: int
    head_dim: int
    has_cls: bool
    parameters: int
    activation_numbers: int  # of one image, alive at once


@dataclass(frozen=True, slots=True)
class Stage:
    """One feature map of a CNN at one input size."""

    index: int  # counted from 0
    stride_px: int
    grid: tuple[int, int]  # (rows, columns)
    channels: int
    parameters: int
    activation_numbers: int  # of one image, alive at once


def probe_vit(name: str, net: Any, input_px: tuple[int, int], *, refusal: str = NO_MAP) -> VitShape | None:
    """Finds the tokens, heads and layers of a network.

    Parameters
    ----------
    name
        For messages.
    net
        On the meta device, as `network.build` makes it.
    input_px
        (height, width) of the input in pixels, for which the network is built.
    refusal
        What the error says of the model.

    Returns
    -------
    Its shape; None where the network computes no attention on the way to its features.

    Raises
    ------
    UserError
        Some block is not one softmax(QKᵀ) from all tokens to all tokens.
    """
    calls: list[taps.AttentionCall] = []
    ran: list[nn.Module] = []
    with _activation_numbers(net, ran) as numbers, taps.AttentionTap(lambda _, call: calls.append(call)):
        net.forward_features(torch.empty(1, 3, *input_px, device="meta"))
    if not calls and not ran:
        return None
    grid, prefix = _grid(net, input_px), int(getattr(net, "num_prefix_tokens", 0))
    blocks = len(getattr(net, "blocks", ()))
    if grid is None or not calls or len(calls) != blocks:
        raise UserError(f"model {name} {refusal}")
    tokens = prefix + grid[0] * grid[1]
    heads, head_dim = calls[0].query.shape[1], calls[0].query.shape[-1]
    expected = torch.Size((1, heads, tokens))
    if any(c.query.shape[:3] != expected or c.key.shape[:3] != expected or c.is_causal for c in calls):
        raise UserError(f"model {name} {refusal}")
    parts = (net, getattr(net, "embeds", None))
    return VitShape(
        grid=grid,
        num_prefix_tokens=prefix,
        num_layers=blocks,
        num_heads=heads,
        head_dim=head_dim,
        has_cls=any(getattr(part, "cls_token", None) is not None for part in parts),
        parameters=sum(p.numel() for p in net.parameters()),
        activation_numbers=max(numbers) + 2 * tokens * heads * head_dim,  # the residual stream and its normed copy
    )


@contextmanager
def _activation_numbers(net: nn.Module, attending: list[nn.Module] | None = None) -> Iterator[list[int]]:
    """Collects how many numbers go into and out of each innermost module that runs inside the `with` block.

    The modules with heads that run are added to `attending`.
    """
    numbers: list[int] = []

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        if attending is not None and isinstance(getattr(module, "num_heads", None), int):
            attending.append(module)
        if not any(True for _ in module.children()):
            numbers.append(sum(t.numel() for t in (*inputs, output) if isinstance(t, Tensor)))

    hooks = [module.register_forward_hook(watch) for module in net.modules()]
    try:
        with torch.no_grad():
            yield numbers
    finally:
        for hook in hooks:
            hook.remove()


def _grid(net: Any, input_px: tuple[int, int]) -> tuple[int, int] | None:
    embed = getattr(net, "patch_embed", None)
    if embed is not None and hasattr(net, "set_input_size"):
        grid = getattr(embed, "grid_size", None)
        return (int(grid[0]), int(grid[1])) if grid else None
    for part in (embed, getattr(net, "embeds", None)):  # models that take an input of any size
        patch_px = getattr(part, "patch_size", None)
        if patch_px is not None:
            height, width = (patch_px, patch_px) if isinstance(patch_px, int) else patch_px
            return input_px[0] // int(height), input_px[1] // int(width)
    return None


def probe_stages(name: str, input_px: tuple[int, int]) -> tuple[Stage, ...]:
    """Lists the feature maps of a CNN, from the first to the last.

    Parameters
    ----------
    name
        timm's.
    input_px
        (height, width) of the input in pixels.

    Raises
    ------
    UserError
        timm can't give feature maps of the model.
    """
    try:
        net = network.build(name, features_only=True)
    except (RuntimeError, AttributeError, AssertionError, TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"model {name} has neither attention nor spatial features; give a vision transformer or a CNN, "
            "e.g. vit_small_patch14_dinov2.lvd142m or resnet50"
        ) from error
    with _activation_numbers(net) as numbers:
        maps = net(torch.empty(1, 3, *input_px, device="meta"))
    activations = 2 * max(numbers)  # those of the largest layer, and its input that the skip connection keeps
    parameters = sum(p.numel() for p in net.parameters())
    strides = [int(stride) for stride in net.feature_info.reduction()]
    return tuple(
        Stage(i, stride, (int(x.shape[-2]), int(x.shape[-1])), int(x.shape[1]), parameters, activations)
        for i, (stride, x) in enumerate(zip(strides, maps, strict=True))
    )

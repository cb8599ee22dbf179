"""Reads what a model hands to its attention: queries, keys and bias of each block, as the model computed them.

Every timm block that may use fused attention ends in one call of `scaled_dot_product_attention(q, k, v, attn_mask)`.
The arguments of that call are exact for every family of models: norms of queries and keys, rotary positions, relative
position biases and grouped heads are already applied in them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The arguments of one fused attention. T tokens, E numbers a head."""

    query: Tensor  # [B, H, T, E]
    key: Tensor  # [B, H, T, E]
    value: Tensor | None  # [B, H, T, E]; None where it was not asked for
    bias: Tensor | None  # additive (or bool: False = not seen), broadcasts to [B, H, T, T]
    scale: float
    is_causal: bool


class StopForward(Exception):
    """Ends a forward pass whose rest is not needed. It is always caught inside this package."""


class AttentionTap(TorchFunctionMode):
    """Calls `on_call(i, call)` before the i-th fused attention inside the `with` block, counted from 0."""

    def __init__(self, on_call: Callable[[int, AttentionCall], None]) -> None:
        super().__init__()
        self.on_call = on_call
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            index, self.count = self.count, self.count + 1
            self.on_call(index, _read_call(*args, **kwargs))
        return func(*args, **kwargs)


def _read_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    if enable_gqa and key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return AttentionCall(query, key, value, attn_mask, scale or query.shape[-1] ** -0.5, is_causal)


def fuse_attention(net: nn.Module) -> None:
    """Switches every attention module of `net` to the fused path, which is the one that an `AttentionTap` sees.

    timm reads its global switch only in the constructors of modules (timm/layers/config.py); afterwards the attribute
    of each module decides.
    """
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", True)  # noqa: B010 (mypy takes a module's attributes for tensors)

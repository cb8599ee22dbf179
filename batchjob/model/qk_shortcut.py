"""Computes queries and keys for the wanted heads alone, from a block's input and their rows of W_q and W_k.

This is the short cut for the last wanted layer, where nothing else of the block is needed: no other heads, and values
only where these are clustered. It knows the attention classes of timm; other classes go the general way, by
`AttentionTap`. Tests hold the two ways equal.
"""

from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from batchjob.model.sdpa_tap import AttentionCall

KNOWN = (Attention, AttentionRope, BeitAttention, EvaAttention, RelPosAttention)


class HeadProjection:
    """Returns the `AttentionCall` of the wanted heads when called with the arguments of a timm attention module."""

    def __init__(self, attention: Any, heads: tuple[int, ...], parts: int = 2) -> None:
        """Takes the wanted rows out of the module's weights.

        Parameters
        ----------
        attention
            A module of one of the classes `KNOWN`.
        heads
            The wanted ones, counted from 0.
        parts
            2 for queries and keys, 3 for values too.
        """
        self.attention, self.parts = attention, parts
        weight, bias = _rows(attention, list(heads), parts)
        self.weight, self.bias = weight.contiguous(), None if bias is None else bias.contiguous()
        self.heads = torch.tensor(heads, device=weight.device)  # a list would be copied there for every batch

    @classmethod
    def of(cls, attention: nn.Module, heads: tuple[int, ...], parts: int = 2) -> "HeadProjection | None":
        """Makes the projection, or returns None for a module of another class or with grouped keys.

        Parameters
        ----------
        attention
            Any attention module.
        heads, parts
            As `__init__`.
        """
        grouped = getattr(attention, "num_kv_groups", 1) > 1
        return cls(attention, heads, parts) if type(attention) in KNOWN and not grouped else None

    def __call__(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
        shared_rel_pos: Tensor | None = None,
        is_causal: bool = False,
    ) -> AttentionCall:
        module, (batch, tokens, _) = self.attention, x.shape
        all_parts = nn.functional.linear(x, self.weight, self.bias)
        all_parts = all_parts.reshape(batch, tokens, self.parts, len(self.heads), -1).permute(2, 0, 3, 1, 4)
        query, key, *values = all_parts.unbind(0)  # [B, H, T, E]
        head_dim = query.shape[-1]
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        if rope is not None:
            query, key = self._rotate(query, rope), self._rotate(key, rope)
        bias = self._bias(attn_mask, shared_rel_pos_bias, shared_rel_pos)
        return AttentionCall(query, key, values[0] if values else None, bias, head_dim**-0.5, is_causal)

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Turns the patch tokens by their positions and leaves the prefix tokens; `rope` may differ between heads."""
        prefix = self.attention.num_prefix_tokens
        if rope.dim() >= 3 and rope.shape[-3] == self.attention.num_heads:
            rope = rope.index_select(-3, self.heads)
        half = getattr(self.attention, "rotate_half", False)
        turned = apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)
        return torch.cat([x[:, :, :prefix], turned], dim=2).to(x.dtype)

    def _bias(self, mask: Tensor | None, shared_beit: Tensor | None, shared_relpos: Tensor | None) -> Tensor | None:
        bias = mask
        if getattr(self.attention, "relative_position_bias_table", None) is not None:
            bias = self.attention._get_rel_pos_bias()
        elif getattr(self.attention, "rel_pos", None) is not None:
            bias = self.attention.rel_pos.get_bias()
        elif shared_relpos is not None:
            bias = shared_relpos
        if shared_beit is not None:
            bias = shared_beit if bias is None else bias + shared_beit
        return select_heads(bias, self.heads)


def select_heads(bias: Tensor | None, heads: Tensor) -> Tensor | None:
    """Takes the wanted heads of a bias.

    Parameters
    ----------
    bias
        Broadcasts to [B, H, T, T]; None for no bias.
    heads
        int64 [h], on the device of the bias: the wanted ones, counted from 0.

    Returns
    -------
    Broadcasts to [B, h, T, T]; None for no bias.
    """
    if bias is None or bias.dim() < 3 or bias.shape[-3] == 1:
        return bias
    return bias.index_select(-3, heads)


def _rows(attention: Any, heads: list[int], parts: int) -> tuple[Tensor, Tensor | None]:
    """Returns the rows of the first `parts` of W_q, W_k, W_v for h heads, [parts·h·E, C], and their biases or None."""
    if attention.qkv is not None:
        weights = attention.qkv.weight.chunk(3)[:parts]
        fused = attention.qkv.bias
        if fused is None and getattr(attention, "q_bias", None) is not None:
            biases = [attention.q_bias, attention.k_bias, attention.v_bias][:parts]
        else:
            biases = [None] * parts if fused is None else list(fused.chunk(3)[:parts])
    else:
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)[:parts]
        weights, biases = tuple(p.weight for p in projections), [p.bias for p in projections]

    def select(rows: Tensor) -> Tensor:
        per_head = rows.reshape(attention.num_heads, -1, *rows.shape[1:])
        return per_head[heads].flatten(0, 1)

    weight = torch.cat([select(w) for w in weights])
    if all(b is None for b in biases):
        return weight, None
    zeros = torch.zeros(weights[0].shape[0], dtype=weight.dtype, device=weight.device)
    return weight, torch.cat([select(zeros if b is None else b) for b in biases])

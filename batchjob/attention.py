"""A batch of photos as attention: rows [B, H, P, P] from patch to patch and the CLS row [B, H, P], layer by layer.

Letters: B images, H heads, T tokens (prefix tokens, then P patches in row-major order of the grid), E numbers a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from batchjob import taps
from batchjob.model import Model

CHUNK_BYTES = 256 * 2**20  # of float32 scores at once: the softmax's working memory


@dataclass(frozen=True, slots=True)
class LayerMaps:
    """The attention of one layer, after the softmax over all T tokens; prefix columns dropped, not renormalised."""

    layer: int
    rows: (
        Tensor  # [B, H, P, P], from query patch to key patch; float16 where the model is in half precision, or float32
    )
    cls: Tensor  # [B, H, P], the CLS token's row, or the mean over patch queries in a model without one
    prefix_mass: Tensor  # [B, H] float32: mean over patch queries of the mass on prefix tokens
    finite: Tensor  # [B] bool: False where the network overflowed; that image's maps are uniform and mean nothing


class Extractor:
    """Calls on uint8 pixels [B, 3, H, W] give the `LayerMaps` of the wanted layers, for the wanted heads, in order.

    The forward pass ends in the last wanted block, before its softmax; all blocks run fused attention. Queries and
    keys are kept until their layer is asked for, so one layer's maps exist at a time.
    """

    def __init__(self, model: Model, layers: tuple[int, ...], heads: tuple[int, ...]) -> None:
        self.model = model
        self.layers = tuple(sorted(layers))
        self.heads = tuple(heads)
        self._all_heads = self.heads == tuple(range(model.spec.num_heads))

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Iterator[LayerMaps]:
        """The maps of each wanted layer, ascending, on the model's device."""
        for layer, call in self._calls(pixels):
            yield self._maps(layer, call)

    def _calls(self, pixels: Tensor) -> list[tuple[int, taps.AttentionCall]]:
        found: list[tuple[int, taps.AttentionCall]] = []

        def keep(layer: int, call: taps.AttentionCall) -> None:
            if layer in self.layers:
                found.append((layer, self._select(call)))
            if layer == self.layers[-1]:
                raise taps.StopForward

        with taps.AttentionTap(keep):
            try:
                self.model(pixels)
            except taps.StopForward:
                return found
        raise RuntimeError(
            f"{self.model.spec.name}: layers {self.layers} wanted, {len(found)} seen in the forward pass"
        )

    def _select(self, call: taps.AttentionCall) -> taps.AttentionCall:
        if self._all_heads:
            return call
        heads = list(self.heads)
        bias = call.bias
        if bias is not None and bias.dim() >= 3 and bias.shape[-3] != 1:
            bias = bias[..., heads, :, :]
        return taps.AttentionCall(call.query[:, heads], call.key[:, heads], bias, call.scale, call.is_causal)

    def _maps(self, layer: int, call: taps.AttentionCall) -> LayerMaps:
        spec = self.model.spec
        prefix, (batch, heads, tokens, _) = spec.num_prefix_tokens, call.query.shape
        dtype = torch.float32 if self.model.dtype == torch.float32 else torch.float16
        device, patches = call.query.device, tokens - prefix
        query, key, finite = _clean(call)
        rows = torch.empty(batch, heads, patches, patches, dtype=dtype, device=device)
        cls = torch.empty(batch, heads, patches, dtype=dtype, device=device)
        mass = torch.zeros(batch, heads, dtype=torch.float32, device=device)
        step = max(1, CHUNK_BYTES // (4 * heads * tokens * tokens))
        for start in range(0, batch, step):
            part = slice(start, start + step)
            attention = softmax_rows(query[part], key[part], call)  # [b, H, T, T]
            seen = attention[:, :, prefix:, :]
            rows[part] = seen[..., prefix:]
            cls[part] = attention[:, :, 0, prefix:] if spec.has_cls else seen[..., prefix:].mean(dim=2)
            if prefix:
                mass[part] = seen[..., :prefix].sum(dim=-1).mean(dim=-1)
        return LayerMaps(layer, rows, cls, mass, finite)


def softmax_rows(query: Tensor, key: Tensor, call: taps.AttentionCall) -> Tensor:
    """float32 [B, H, T, T]: softmax(scale · QKᵀ + bias), products and softmax in float32 whatever the inputs are."""
    scores = (query.float() * call.scale) @ key.float().transpose(-2, -1)
    if call.bias is not None:
        if call.bias.dtype == torch.bool:
            scores = scores.masked_fill(~call.bias, float("-inf"))
        else:
            scores = scores + call.bias.float()
    return scores.softmax(dim=-1)


def _clean(call: taps.AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with NaN and Inf set to 0, and [B] whether there were none.

    Finite ones below 1e15 give finite scores, hence a finite softmax. To check them costs T·E a head, the map T².
    """
    limit = 1e15
    finite = ((call.query.abs() < limit).flatten(1).all(1)) & ((call.key.abs() < limit).flatten(1).all(1))
    keep = finite[:, None, None, None]
    return call.query.where(keep, 0), call.key.where(keep, 0), finite


def renormalise(rows: Tensor) -> Tensor:
    """float32, same shape: each row divided by its sum, so that a patch's attention to patches sums to 1."""
    rows = rows.float()
    return rows / rows.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

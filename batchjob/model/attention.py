"""Turns photos into attention: rows [B, H, P, P] from patch to patch and the CLS row [B, H, P], layer by layer.

Letters: B images, H heads, T tokens (prefix tokens, then P patches in row-major order of the grid), E numbers a head.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from batchjob.model import sdpa_tap as taps
from batchjob.model import self_similarity as cnn
from batchjob.model.describe import Model
from batchjob.model.qk_shortcut import HeadProjection, select_heads

CHUNK_BYTES = 256 * 2**20  # the most that the float32 scores of a softmax take at once
FINITE_LIMIT = 1e15  # products of two numbers below it, and sums of thousands of products, are finite in float32


@dataclass(frozen=True, slots=True)
class LayerMaps:
    """The attention of one layer after the softmax over all T tokens; prefix columns are dropped, nothing renormalised.

    Where tokens are clustered, `rows` is None, there is one head, and `cls` is the saliency of the tokens, computed as
    that of a CNN's features.
    """

    layer: int
    # [B, H, P, P] from query patch to key patch; float16 where the model is in half precision, else float32
    rows: Tensor | None
    cls: Tensor  # [B, H, P] the CLS token's row, or the mean over patch queries without one; of a CNN, saliency
    prefix_mass: Tensor  # float32 [B, H] mean over patch queries of the mass on prefix tokens
    finite: Tensor  # bool [B], False where the network overflowed; that image's maps are uniform and mean nothing
    component: Tensor | None = None  # [B, H, P] of a CNN: the features' first principal component, in [-1, 1]
    vectors: Tensor | None = None  # float32 [B, H, P, D]: queries, keys, values or tokens, where these are clustered

    def to_cluster(self, mask: Tensor | None) -> Tensor:
        """Returns what is clustered, float32 [B, H, P, D]: the vectors, or else the rows after `renormalise`.

        `mask` bool [B, P] is False for patches of padding; None where all patches are image.
        """
        if self.vectors is not None:
            return self.vectors
        assert self.rows is not None
        return renormalise(self.rows, mask)


class Extractor:
    """Extracts attention: called with uint8 pixels [B, 3, H, W], it yields the `LayerMaps` of each wanted layer.

    The forward pass ends in the last wanted block, after its queries and keys; every block before it runs fused.
    Queries and keys are kept until their layer is asked for, so that the maps of only one layer exist at a time. The
    only layer of a CNN is the pseudo-attention of `self_similarity.py`.
    """

    def __init__(
        self,
        model: Model,
        layers: tuple[int, ...],
        heads: tuple[int, ...],
        *,
        cluster_on: str = "attention",
        short_cut: bool = True,
    ) -> None:
        """Prepares the short cut for the last layer, and checks it.

        Parameters
        ----------
        model
            On its device.
        layers, heads
            The wanted ones, counted from 0.
        cluster_on
            What `LayerMaps.vectors` holds: `query`, `key`, `value`, `token`, or nothing with `attention`. Queries and
            keys are those that are multiplied, after their norms and rotary positions; the keys and values of a group
            are repeated for its heads. Tokens are the residual stream behind the layer, before any last norm, or a
            CNN's features.
        short_cut
            Whether queries and keys of the last layer may be computed for the wanted heads alone.
        """
        self.model, self.cluster_on = model, cluster_on
        self.layers = tuple(sorted(layers))
        self._all_heads = tuple(heads) == tuple(range(model.spec.num_heads))
        self._heads = torch.tensor(heads, device=model.device)  # a list would be copied there for every layer
        self._projection: HeadProjection | None = None
        if short_cut and model.spec.kind == "vit" and cluster_on != "token":
            attention = getattr(model.blocks[self.layers[-1]], "attn", None)
            parts = 3 if cluster_on == "value" else 2
            self._projection = None if attention is None else HeadProjection.of(attention, tuple(heads), parts)
            self._check_short_cut()

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Iterator[LayerMaps]:
        """Yields the maps of each wanted layer, ascending, on the model's device."""
        if self.model.spec.kind == "cnn":
            yield _pseudo_maps(self.model(pixels)[0], self.model.is_half, wants_vectors=self.cluster_on == "token")
            return
        if self.cluster_on == "token":
            for layer, tokens in self._tokens(pixels):
                yield self._token_maps(layer, tokens)
            return
        for layer, call in self.calls(pixels):
            yield self._maps(layer, call)

    def calls(self, pixels: Tensor) -> list[tuple[int, taps.AttentionCall]]:
        """Returns (layer, queries and keys) of each wanted layer, for the wanted heads.

        Raises RuntimeError where the attention of a layer was not seen.
        """
        found: list[tuple[int, taps.AttentionCall]] = []

        def keep(layer: int, call: taps.AttentionCall) -> None:
            if layer in self.layers:
                found.append((layer, self._select(call)))
            if layer == self.layers[-1]:
                raise taps.StopForward

        def project(_module: nn.Module, args: Any, kwargs: Any) -> None:
            assert self._projection is not None
            found.append((self.layers[-1], self._projection(*args, **kwargs)))
            raise taps.StopForward

        hook = None
        if self._projection is not None:
            hook = self._projection.attention.register_forward_pre_hook(project, with_kwargs=True)
        try:
            with taps.AttentionTap(keep):
                self.model(pixels)
        except taps.StopForward:
            pass
        finally:
            if hook is not None:
                hook.remove()
        if tuple(layer for layer, _ in found) != self.layers:
            seen = [layer for layer, _ in found]
            raise RuntimeError(f"{self.model.spec.name}: attention of layers {self.layers} wanted, of {seen} seen")
        return found

    def _tokens(self, pixels: Tensor) -> list[tuple[int, Tensor]]:
        """Returns (layer, tokens [B, T, D] behind it) of each wanted layer; the forward pass ends behind the last."""
        found: list[tuple[int, Tensor]] = []

        def keep(layer: int, output: Tensor) -> None:
            found.append((layer, output))
            if layer == self.layers[-1]:
                raise taps.StopForward

        hooks = [
            self.model.blocks[layer].register_forward_hook(lambda _module, _args, output, at=layer: keep(at, output))
            for layer in self.layers
        ]
        try:
            self.model(pixels)
        except taps.StopForward:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @torch.no_grad()
    def _check_short_cut(self) -> None:
        """Drops the short cut, with a warning, if it does not give the queries and keys that the model computes.

        The short cut repeats timm's code; one picture of noise shows whether the installed timm does the same.
        """
        if self._projection is None:
            return
        picture = torch.randint(0, 256, (1, 3, *self.model.spec.input_px), generator=torch.Generator().manual_seed(0))
        pixels = picture.to(torch.uint8)
        projection, (_, quick) = self._projection, self.calls(pixels)[-1]
        self._projection = None
        _, exact = self.calls(pixels)[-1]
        names = ("query", "key", "value", "bias")
        pairs = [(getattr(quick, name), getattr(exact, name)) for name in names]
        if all(_is_same(a, b) for a, b in pairs) and quick.scale == exact.scale:
            self._projection = projection
        else:
            kind, version = type(projection.attention).__name__, timm.__version__
            warnings.warn(f"the short cut does not fit {kind} of timm {version}; going the general way", stacklevel=3)

    def _select(self, call: taps.AttentionCall) -> taps.AttentionCall:
        value = call.value if self.cluster_on == "value" else None
        if self._all_heads:
            return replace(call, value=value)
        query, key = call.query.index_select(1, self._heads), call.key.index_select(1, self._heads)
        value = None if value is None else value.index_select(1, self._heads)
        return replace(call, query=query, key=key, value=value, bias=select_heads(call.bias, self._heads))

    def _token_maps(self, layer: int, tokens: Tensor) -> LayerMaps:
        height, width = self.model.spec.grid
        features = (
            tokens[:, self.model.spec.num_prefix_tokens :].transpose(1, 2).reshape(len(tokens), -1, height, width)
        )
        return replace(_pseudo_maps(features, self.model.is_half, wants_vectors=True), layer=layer)

    def _maps(self, layer: int, call: taps.AttentionCall) -> LayerMaps:
        spec = self.model.spec
        prefix, (batch, heads, tokens, _) = spec.num_prefix_tokens, call.query.shape
        dtype = torch.float16 if self.model.is_half else torch.float32
        device, patches = call.query.device, tokens - prefix
        query, key, value, finite = _clean(call)
        rows = torch.empty(batch, heads, patches, patches, dtype=dtype, device=device)
        cls = torch.empty(batch, heads, patches, dtype=dtype, device=device)
        mass = torch.zeros(batch, heads, dtype=torch.float32, device=device)
        step = max(1, CHUNK_BYTES // (4 * heads * tokens * tokens))
        for start in range(0, batch, step):
            part = slice(start, start + step)
            bias = call.bias if call.bias is None or call.bias.dim() < 4 or len(call.bias) == 1 else call.bias[part]
            attention = softmax_rows(query[part], key[part], replace(call, bias=bias))  # [b, H, T, T]
            seen = attention[:, :, prefix:, :]
            rows[part] = seen[..., prefix:]
            cls[part] = attention[:, :, 0, prefix:] if spec.has_cls else seen[..., prefix:].mean(dim=2)
            if prefix:
                mass[part] = seen[..., :prefix].sum(dim=-1).mean(dim=-1)
        vectors = {"query": query, "key": key, "value": value}.get(self.cluster_on)
        vectors = None if vectors is None else vectors[:, :, prefix:].float()
        return LayerMaps(layer, rows, cls, mass, finite, vectors=vectors)


def _pseudo_maps(features: Tensor, is_half: bool, *, wants_vectors: bool) -> LayerMaps:
    """Returns features [B, C, h, w] as a layer of one head: with the features themselves, or rows of similarity."""
    finite = (features.abs() < FINITE_LIMIT).flatten(1).all(1)
    features = features.where(finite[:, None, None, None], 0)
    dtype = torch.float16 if is_half else torch.float32
    return LayerMaps(
        layer=0,
        rows=None if wants_vectors else cnn.self_similarity(features).to(dtype),
        cls=cnn.feature_norm(features).to(dtype),
        prefix_mass=torch.zeros(len(features), 1, device=features.device),
        finite=finite,
        component=cnn.first_component(features).to(dtype),
        vectors=features.float().flatten(2).transpose(1, 2)[:, None].contiguous() if wants_vectors else None,
    )


def softmax_rows(query: Tensor, key: Tensor, call: taps.AttentionCall) -> Tensor:
    """Computes softmax(scale · QKᵀ + bias) in float32, whatever the dtype of the inputs is.

    Parameters
    ----------
    query, key
        [B, H, T, E].
    call
        Gives the scale and the bias.

    Returns
    -------
    float32 [B, H, T, T], each row of sum 1.
    """
    scores = (query.float() * call.scale) @ key.float().transpose(-2, -1)
    if call.bias is not None:
        if call.bias.dtype == torch.bool:
            scores = scores.masked_fill(~call.bias, float("-inf"))
        else:
            scores = scores + call.bias.float()
    return scores.softmax(dim=-1)


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Says whether two tensors are equal up to the rounding of half precision; what overflows in both is equal."""
    if a is None or b is None:
        return a is b
    largest = float(b.float().abs().nan_to_num(0, 0, 0).max())
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=0, atol=0.02 * largest, equal_nan=True)


def _clean(call: taps.AttentionCall) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Returns queries, keys and values with zeros for the images that overflowed, and bool [B], False for these.

    An image overflowed where any number is NaN or not below `FINITE_LIMIT`. Numbers below it give finite scores, and so
    a finite softmax. This check reads T·E numbers a head, where a check of the map would read T².
    """
    finite = torch.ones(len(call.query), dtype=torch.bool, device=call.query.device)
    for x in (call.query, call.key, call.value):  # both comparisons are False for NaN
        if x is not None:
            finite &= (x.amax((1, 2, 3)) < FINITE_LIMIT) & (x.amin((1, 2, 3)) > -FINITE_LIMIT)
    if not finite.is_cuda and bool(finite.all()):  # on a GPU, the question itself would wait for the computation
        return call.query, call.key, call.value, finite
    keep = finite[:, None, None, None]
    value = None if call.value is None else call.value.where(keep, 0)
    return call.query.where(keep, 0), call.key.where(keep, 0), value, finite


def renormalise(rows: Tensor, mask: Tensor | None = None) -> Tensor:
    """Divides each row by its sum, so that a patch's attention to the patches of the image sums to 1.

    Parameters
    ----------
    rows
        [..., P]; with a mask [B, H, P, P].
    mask
        bool [B, P], True for patches of the image: attention to other patches is set to 0 before. None for no padding.

    Returns
    -------
    float32 of the same shape; a row of zeros stays zeros.
    """
    rows = rows.float()
    if mask is not None:
        rows = rows * mask[:, None, None, :]
    return rows / rows.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

"""Makes small models with random weights, and their attention by timm's own explicit path."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn

from batchjob.config import Options
from batchjob.model.describe import Model, describe, load_model


def make_model(name: str, image_size: str = "", *, precision: str = "fp32", seed: int = 0, **smaller: Any) -> Model:
    """Makes a model with random weights on the CPU; `smaller` are timm's arguments to shrink it, e.g. `depth=2`."""
    create = functools.partial(timm.create_model, **smaller)
    with mock.patch.object(timm, "create_model", create):
        spec = describe(Options(model=name, image_size=image_size))
        return load_model(spec, None, precision=precision, device="cpu", seed=seed)


def make_pixels(model: Model, count: int = 2) -> Tensor:
    """Draws uint8 photos of the model's input size in coarse blocks, so that patches differ from each other."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return nn.functional.interpolate(coarse, size=model.spec.input_px, mode="nearest")


@contextmanager
def unfused(net: nn.Module) -> Iterator[list[Tensor]]:
    """Makes attention explicit inside the block; the list gets the [B, H, T, T] that every `attn_drop` sees."""
    found: list[Tensor] = []
    modules = [module for module in net.modules() if hasattr(module, "fused_attn") and hasattr(module, "attn_drop")]
    hooks = []
    for module in modules:
        module.fused_attn = False  # type: ignore[assignment]
        hooks.append(module.attn_drop.register_forward_hook(lambda _m, _i, output: found.append(output)))  # type: ignore[operator, union-attr]
    try:
        with torch.no_grad():
            yield found
    finally:
        for hook in hooks:
            hook.remove()
        for module in modules:
            module.fused_attn = True  # type: ignore[assignment]

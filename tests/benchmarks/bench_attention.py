"""Measures extraction of attention against the plain forward pass of the same model, which returns no attention."""

from collections.abc import Iterator

import torch

from batchjob.config import Options
from batchjob.model.attention import Extractor
from batchjob.model.describe import Model, describe, load_model
from tests.benchmarks.harness import Contest

MODELS = ("vit_small_patch14_dinov2.lvd142m", "vit_base_patch16_224.mae")


def contests(*, smoke: bool) -> Iterator[Contest]:
    """Yields all heads and one head of the last layer, and all layers, each against timm's fused forward pass."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision, images = ("fp16", 64) if device == "cuda" else ("fp32", 1 if smoke else 4)
    for name in MODELS[:1] if smoke else MODELS:
        spec = describe(Options(model=name))
        model = load_model(spec, None, precision=precision, device=device)
        pixels = torch.randint(0, 256, (images, 3, *spec.input_px), dtype=torch.uint8, device=device)
        last, every = (spec.num_layers - 1,), tuple(range(spec.num_layers))
        heads = tuple(range(spec.num_heads))
        short = name.split(".")[0]
        yield _contest(f"attention, last layer, {short}", model, pixels, last, heads, aim=1.0)
        yield _contest(f"attention, last layer, one head, {short}", model, pixels, last, heads[:1], aim=1.0)
        yield _contest(f"attention, all layers, {short}", model, pixels, every, heads, aim=None)


def _contest(
    name: str, model: Model, pixels: torch.Tensor, layers: tuple[int, ...], heads: tuple[int, ...], *, aim: float | None
) -> Contest:
    extract = Extractor(model, layers, heads)

    def ours() -> None:
        for maps in extract(pixels):
            del maps
        _wait(model)

    def theirs() -> None:
        with torch.no_grad():
            model(pixels)
        _wait(model)

    return Contest(
        name=name,
        peer="timm's plain fused forward pass",
        unit="images",
        items=len(pixels),
        ours=ours,
        theirs=theirs,
        aim=aim,
        note=f"{model.device.type}, {model.precision}, random weights",
    )


def _wait(model: Model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()

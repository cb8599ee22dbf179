"""Finds the half precision that holds a model's activations, by running it once in full precision."""

import torch
from torch import Tensor, nn

from batchjob.model.describe import Model

FP16_LIMIT = 65504.0
MARGIN = 8  # photos may have larger activations than the probe pictures: by a factor below this one
PROBE_PARAMETERS = 700_000_000  # a larger model would take minutes on a login node


def choose_half(model: Model) -> tuple[str, str]:
    """Chooses `fp16` or `bf16` for a model that was loaded in fp32, and says why: returns (precision, sentence).

    fp16 is preferred, since it keeps 11 bits where bf16 keeps 8. bf16, which has the range of fp32, is taken for a
    model whose activations come near the largest number of fp16, and for one that is too large to be run here.
    """
    if model.spec.parameters > PROBE_PARAMETERS:
        return "bf16", f"its {model.spec.parameters / 1e9:.1f} billion parameters are too many to try fp16 beforehand"
    largest = largest_activation(model, probe_pixels(model))
    why = f"its largest activation on probe pictures is {largest:,.0f}, fp16 holds {FP16_LIMIT:,.0f}"
    return ("fp16" if largest * MARGIN < FP16_LIMIT else "bf16"), why


def largest_activation(model: Model, pixels: Tensor) -> float:
    """Runs the model once, and returns the largest absolute output of any of its modules.

    Parameters
    ----------
    model
        In fp32.
    pixels
        uint8 [B, 3, H, W].

    Returns
    -------
    A number from 0; inf where an output is NaN or infinite.
    """
    peaks: list[Tensor] = []

    def watch(_module: nn.Module, _inputs: object, output: object) -> None:
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                peaks.append(tensor.abs().amax().float().nan_to_num(nan=torch.inf))

    hooks = [module.register_forward_hook(watch) for module in model.net.modules()]
    try:
        with torch.no_grad():
            model(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return float(torch.stack(peaks).max())


def probe_pixels(model: Model) -> Tensor:
    """Draws three pictures, uint8 [3, 3, H, W]: a ramp from black to white, noise, coloured blocks; always the same."""
    height, width = model.spec.input_px
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 255, width).round().to(torch.uint8).expand(3, height, width)
    noise = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    blocks = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return torch.stack([ramp, noise, nn.functional.interpolate(blocks, size=(height, width))[0]])

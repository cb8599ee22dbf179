"""Builds a timm network at any input size: as shapes alone, with random weights, or with trained ones."""

import re
import warnings
from typing import Any

import timm
import torch
from torch import Tensor, nn

from batchjob.errors import UserError
from batchjob.model import sdpa_tap as taps

QUOTES = ' "'


def build(name: str, **arguments: Any) -> Any:
    """Builds the network on the meta device (shapes without memory), in evaluation mode, with all attention fused.

    `arguments` go to `timm.create_model`.
    """
    with torch.device("meta"):
        net = timm.create_model(name, **arguments).eval()
    taps.fuse_attention(net)
    return net


def resize(net: Any, input_px: tuple[int, int]) -> None:
    """Interpolates a network's positions in place to another input size; does nothing where it has none.

    Weights are loaded at their own size before this is called. Before timm 1.0.31, loading them into a network of the
    new size did not interpolate the positions where the number of patches was the same (7×28 and 14×14).

    Parameters
    ----------
    net
        A timm network with its weights.
    input_px
        (height, width) of the input in pixels.
    """
    if hasattr(net, "set_input_size") and getattr(net, "patch_embed", None) is not None:
        with warnings.catch_warnings():
            # BEiT's interpolator indexes by lists and non-contiguous tensors: the results are right, and torch warns
            warnings.filterwarnings("ignore", category=UserWarning, module=r"timm\.layers\.interpolate")
            net.set_input_size(img_size=input_px)


def random_network(name: str, input_px: tuple[int, int], *, stage: int | None, seed: int) -> nn.Module:
    """Builds the network with timm's own initial weights, in evaluation mode on the CPU.

    LayerScale is set to 1: timm's initial 1e-5 would make every block nearly the identity, and so every layer equal to
    the first. The caller's random state does not change.

    Parameters
    ----------
    name
        timm's.
    input_px
        (height, width) of the input in pixels; a CNN takes any.
    stage
        Number of the feature map that a CNN shall give; None for a vision transformer.
    seed
        Of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: nn.Module = timm.create_model(name, **_arguments(stage))
    for key, parameter in net.named_parameters():
        if re.search(r"(^|\.)(ls\d?\.gamma|gamma_\d)$", key):
            nn.init.ones_(parameter)
    return _finish(net, input_px, stage)


def trained_network(name: str, input_px: tuple[int, int], state: dict[str, Tensor], *, stage: int | None) -> nn.Module:
    """Builds the network with trained weights, in evaluation mode on the CPU; every key must match.

    timm renames the checkpoints of other codes, and resizes their positions. If it were told to leave out the
    classifier, it would also accept missing keys and keep random weights for them (`strict = False` in
    timm/models/_builder.py). So it is told that the checkpoint was made without a classifier.

    Parameters
    ----------
    name, input_px, stage
        As `random_network`.
    state
        Tensors by any names that timm reads, trained at any size.

    Raises
    ------
    UserError
        There are no tensors; one holds NaN or Inf; the patches are of another size; or keys or shapes differ, which the
        message names.
    """
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if not state or broken:
        found = f"NaN or Inf in {_some(broken)}" if broken else "no tensors"
        raise UserError(f"the weights for {name} hold {found}; give another file with --weights")
    _check_patches(name, state)
    overlay = {"state_dict": _without_classifier(name, state), "num_classes": 0, "label_offset": 0}
    arguments = _arguments(stage)
    if stage is None and _has_other_positions(name, state):
        arguments["img_size"] = input_px
    try:
        net: nn.Module = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    except (RuntimeError, KeyError, AttributeError, IndexError, ValueError) as error:
        found = _differences(str(error))
        raise UserError(
            f"the weights are not those of {name}: {found}; give others with --weights, or their --model"
        ) from error
    return _finish(net, input_px, stage)


def _arguments(stage: int | None) -> dict[str, Any]:
    return {"num_classes": 0} if stage is None else {"num_classes": 0, "features_only": True, "out_indices": (stage,)}


def _finish(net: nn.Module, input_px: tuple[int, int], stage: int | None) -> nn.Module:
    if stage is None:
        resize(net, input_px)
    taps.fuse_attention(net)
    return net.eval()


def _check_patches(name: str, state: dict[str, Tensor]) -> None:
    """Raises UserError where the weights are for patches of another size: timm would silently resample them."""
    own = build(name, num_classes=0).state_dict().get("patch_embed.proj.weight")
    theirs = state.get("patch_embed.proj.weight")
    if own is None or theirs is None or own.ndim != 4 or theirs.ndim != 4 or own.shape[2:] == theirs.shape[2:]:
        return
    found, wanted = ("{}x{}".format(*shape) for shape in (theirs.shape[2:], own.shape[2:]))
    raise UserError(
        f"the weights are not those of {name}: their patches are {found} pixels, the model's {wanted}; "
        "give others with --weights, or their --model"
    )


def _has_other_positions(name: str, state: dict[str, Tensor]) -> bool:
    """Says whether positions in `state` have other shapes than timm's own; timm then interpolates them as it loads."""
    own = build(name, num_classes=0)
    if not hasattr(own, "set_input_size"):
        return False
    shapes = {key: value.shape for key, value in own.state_dict().items()}
    positions = [key for key in state if key.endswith(("pos_embed", "relative_position_bias_table")) and key in shapes]
    return any(state[key].shape != shapes[key] for key in positions)


def _without_classifier(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights without the classifier: it is not used here, and a fine-tuned one may have other classes."""
    names = getattr(timm.get_pretrained_cfg(name), "classifier", None) or ()
    heads = tuple(f"{n}." for n in ((names,) if isinstance(names, str) else names))
    return {key: value for key, value in state.items() if not (heads and key.startswith(heads))}


def _differences(message: str) -> str:
    """Shortens torch's message about keys that differ to one line."""
    parts = []
    for kind in ("Missing", "Unexpected"):
        if found := re.search(rf"{kind} key\(s\) in state_dict: (.*?)\. ?(?:\n|$)", message):
            parts.append(f"{kind.lower()} {_some([key.strip(QUOTES) for key in found[1].split(',')])}")
    sizes = re.findall(r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)", message)
    if sizes:
        parts.append(f"other sizes {_some([f'{key} {theirs} for {ours}' for key, theirs, ours in sizes])}")
    return "; ".join(parts) or " ".join(message.split())[:200]


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more

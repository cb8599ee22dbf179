"""Describes a timm model: `describe` finds its input, tokens and heads; `load_model` makes a `Model` with weights."""

from collections.abc import Mapping
from typing import Any

import timm
import timm.data
import torch
from torch import Tensor, nn

from batchjob.config import Options
from batchjob.errors import UserError, nearest
from batchjob.model import names, network, probe
from batchjob.model.choices import DEFAULT_PX, choose_input_px
from batchjob.plan import ModelSpec

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CNN_STRIDE_PX = 16
_DOES_NOT_RUN = (RuntimeError, ValueError, AssertionError, AttributeError)  # timm raises these for an unsuited size


class Model(nn.Module):
    """A network on its device, with the preprocessing that it was trained with."""

    def __init__(self, spec: ModelSpec, net: nn.Module, precision: str, device: torch.device) -> None:
        """Moves the network to its device and precision.

        Parameters
        ----------
        spec
            Describes the network.
        net
            The network, which is changed in place.
        precision
            `fp16`, `bf16` or `fp32`.
        device
            Where the forward pass runs.
        """
        super().__init__()
        self.spec = spec
        self.precision = precision
        self.net = net.to(device=device, dtype=DTYPES[precision]).eval().requires_grad_(False)
        mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (spec.mean, spec.std))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and activations."""
        return DTYPES[self.precision]

    @property
    def is_half(self) -> bool:
        """Whether maps are kept as float16, also for a model in bfloat16: in [0, 1] float16 is the finer of the two."""
        return self.precision != "fp32"

    @property
    def blocks(self) -> Any:
        """The blocks of a vision transformer, in order."""
        return self.net.blocks

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.scale.device

    scale: Tensor
    shift: Tensor

    def normalise(self, pixels: Tensor) -> Tensor:
        """Turns uint8 pixels [B, 3, H, W] into the network's input: normalised, on its device, in its dtype."""
        pixels = pixels.to(self.device, non_blocking=True)
        return (pixels.float() * self.scale + self.shift).to(self.dtype)

    def forward(self, pixels: Tensor) -> Any:
        """Runs the plain forward pass on uint8 pixels [B, 3, H, W], and returns the network's features."""
        inputs = self.normalise(pixels)
        return self.net(inputs) if self.spec.kind == "cnn" else self.net.forward_features(inputs)  # type: ignore[operator]


def describe(options: Options) -> ModelSpec:
    """Describes the model that the options name, at their image size, without loading any weights.

    A pass of shapes alone shows whether every block attends from all tokens to all tokens. A network that computes no
    attention is taken for a CNN. Raises UserError for an unknown model, a size that is not a multiple of its patches, a
    stage out of range, or attention that is not one map over all patches in every block.
    """
    name = options.model
    raise_for_unknown(name)
    net = network.build(name, num_classes=0)
    data: dict[str, Any] = timm.data.resolve_model_data_config(net)  # type: ignore[attr-defined, no-untyped-call]
    own_px = (int(data["input_size"][1]), int(data["input_size"][2]))
    preprocessing = {"mean": tuple(data["mean"]), "std": tuple(data["std"]), "interpolation": data["interpolation"]}
    refusal = probe.NO_TOKENS if options.cluster_on == "token" else probe.NO_MAP
    shape = probe.probe_vit(name, net, own_px, refusal=refusal)
    if shape is None:
        return _describe_cnn(options, own_px, preprocessing)
    if options.stage:
        raise UserError(f"--stage {options.stage} is for a CNN's features, {name} has attention; give --layers")
    patch_px = (own_px[0] // shape.grid[0], own_px[1] // shape.grid[1])
    input_px = choose_input_px(options.image_size, own_px, patch_px=patch_px)
    if input_px != own_px:
        try:
            network.resize(net, input_px)
            resized = probe.probe_vit(name, net, input_px, refusal=refusal)
            assert resized is not None
            shape = resized
        except _DOES_NOT_RUN as error:
            input_px = _own_px_instead(options, own_px, error)
    embed_dim = int(net.num_features)
    return vit_spec(name, shape, preprocessing, input_px=input_px, patch_px=patch_px, embed_dim=embed_dim)


def vit_spec(
    name: str,
    shape: probe.VitShape,
    preprocessing: Mapping[str, Any],
    *,
    input_px: tuple[int, int],
    patch_px: tuple[int, int],
    embed_dim: int,
) -> ModelSpec:
    """Puts together what plan.json holds of a vision transformer.

    Parameters
    ----------
    name
        timm's name, or the class of a network that timm did not make.
    shape
        The tokens at this input size.
    preprocessing
        Has `mean` and `std`, each of three numbers for pixels from 0 to 1, and `interpolation`.
    input_px, patch_px
        (height, width) of the input and of a patch, in pixels of the input.
    embed_dim
        Numbers of a token.
    """
    return ModelSpec(
        name=name,
        kind="vit",
        input_px=input_px,
        patch_px=patch_px,
        grid=shape.grid,
        num_prefix_tokens=shape.num_prefix_tokens,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        has_cls=shape.has_cls,
        mean=tuple(preprocessing["mean"]),
        std=tuple(preprocessing["std"]),
        interpolation=preprocessing["interpolation"],
        head_dim=shape.head_dim,
        embed_dim=embed_dim,
        parameters=shape.parameters,
        activation_numbers=shape.activation_numbers,
    )


def _describe_cnn(options: Options, own_px: tuple[int, int], preprocessing: dict[str, Any]) -> ModelSpec:
    if own_px[0] % 32 or own_px[1] % 32:  # EfficientNets of 240 or 380 px and the like: any size will do
        own_px = (DEFAULT_PX, DEFAULT_PX)
    stage = _choose_stage(options, probe.probe_stages(options.model, own_px))
    input_px = choose_input_px(options.image_size, own_px, patch_px=(stage.stride_px, stage.stride_px))
    try:
        stage = probe.probe_stages(options.model, input_px)[stage.index]
    except _DOES_NOT_RUN as error:
        input_px = _own_px_instead(options, own_px, error)
    if stage.grid != tuple(px // stage.stride_px for px in input_px):
        raise UserError(
            f"stage {stage.index} of {options.model} gives {stage.grid[0]}x{stage.grid[1]} features for an input of "
            f"{input_px[0]}x{input_px[1]}, which is not its stride of {stage.stride_px}; give another --stage"
        )
    return ModelSpec(
        name=options.model,
        kind="cnn",
        input_px=input_px,
        patch_px=(stage.stride_px, stage.stride_px),
        grid=stage.grid,
        num_prefix_tokens=0,
        num_layers=1,
        num_heads=1,
        has_cls=False,
        stage=stage.index,
        head_dim=stage.channels,
        embed_dim=stage.channels,
        parameters=stage.parameters,
        activation_numbers=stage.activation_numbers,
        **preprocessing,
    )


def _own_px_instead(options: Options, own_px: tuple[int, int], error: Exception) -> tuple[int, int]:
    """Returns the model's own size where the user named no size. Raises UserError where the user did."""
    if not options.image_size:
        return own_px
    reason = " ".join(str(error).split())[:160] or "its layers are made for one size"
    raise UserError(
        f"--image-size {options.image_size} does not suit {options.model}: {reason}; "
        f"its own size is {own_px[0]}x{own_px[1]}"
    ) from error


def _choose_stage(options: Options, stages: tuple[probe.Stage, ...]) -> probe.Stage:
    strides = "strides " + ", ".join(f"{s.index}: {s.stride_px}" for s in stages)
    if not options.stage:
        at_stride = [stage for stage in stages if stage.stride_px == CNN_STRIDE_PX]
        if not at_stride:
            raise UserError(f"model {options.model} has no stage at stride {CNN_STRIDE_PX}; give --stage ({strides})")
        return at_stride[-1]
    if not -len(stages) <= int(options.stage) < len(stages):
        raise UserError(
            f"--stage {options.stage} is not a stage of {options.model}; give one of 0 to {len(stages) - 1} ({strides})"
        )
    return stages[int(options.stage)]


def raise_for_unknown(name: str) -> None:
    """Raises UserError, with the most similar names, where timm has no such model or no such weights of it."""
    names.raise_for_unknown(name)
    base, _, tag = name.partition(".")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise UserError(f"model {name!r}: timm knows no weights {tag!r} of {base}; {nearest(tag, tags)}")


def load_model(
    spec: ModelSpec, state: dict[str, Tensor] | None, *, precision: str, device: torch.device | str, seed: int = 0
) -> Model:
    """Makes a model with trained or random weights; positions are interpolated to `spec.input_px` as timm does it.

    Parameters
    ----------
    spec
        Describes the model.
    state
        Tensors by any names that timm reads, trained at any size; None for random weights.
    precision
        `fp16`, `bf16` or `fp32`.
    device
        Where the forward pass runs.
    seed
        Of the random weights; trained ones need none.

    Raises
    ------
    UserError
        The weights are of another architecture; the message names keys that differ.
    """
    stage = spec.stage if spec.kind == "cnn" else None
    if state is None:
        net = network.random_network(spec.name, spec.input_px, stage=stage, seed=seed)
    else:
        net = network.trained_network(spec.name, spec.input_px, state, stage=stage)
    return Model(spec, net, precision, torch.device(device))

"""A timm model ready to be looked into: its name, input and tokens (`ModelSpec`), its weights and preprocessing."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

import timm
import timm.data
import torch
from torch import Tensor, nn

from batchjob import taps
from batchjob.config import Options, split_list
from batchjob.errors import UserError, nearest

DEFAULT_PX = 224
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CNN_STRIDE_PX = 16


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the other rooms need to know of a model; saved in `plan.json`. Pairs are (rows, columns)."""

    name: str
    kind: Literal["vit", "cnn"]
    input_px: tuple[int, int]
    patch_px: tuple[int, int]  # input pixels of a patch; of a CNN, its stage's stride
    grid: tuple[int, int]
    num_prefix_tokens: int  # CLS, distillation and register tokens: the first of the sequence
    num_layers: int
    num_heads: int
    has_cls: bool  # if so, the CLS token is the first
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    stage: int = -1  # of a CNN's feature stages, counted from 0; -1 for a ViT

    @property
    def num_patches(self) -> int:
        """P: patches of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """T: patches and prefix tokens."""
        return self.num_prefix_tokens + self.num_patches

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ModelSpec":
        """The inverse of `to_json`."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)


class Model(nn.Module):
    """A timm network on its device with the preprocessing it was trained with."""

    def __init__(self, spec: ModelSpec, net: nn.Module, precision: str, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.precision = precision
        self.net = net.to(device=device, dtype=DTYPES[precision]).eval().requires_grad_(False)
        mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (spec.mean, spec.std))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and activations."""
        return DTYPES[self.precision]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.scale.device

    scale: Tensor
    shift: Tensor

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] as the network's input, on its device and in its precision."""
        pixels = pixels.to(self.device, non_blocking=True)
        return (pixels.float() * self.scale + self.shift).to(self.dtype)

    def forward(self, pixels: Tensor) -> Any:
        """The network's features of uint8 pixels [B, 3, H, W]: the plain forward pass."""
        inputs = self.normalise(pixels)
        return self.net(inputs) if self.spec.kind == "cnn" else self.net.forward_features(inputs)  # type: ignore[operator]


def describe(options: Options) -> ModelSpec:
    """The model that the options name, at their image size: built without weights or memory, in a fraction of a second.

    A pass of shapes alone (torch's meta device) shows whether every block attends from all tokens to all tokens.
    Raises UserError for an unknown model, a size that its patches don't divide, a stage out of range, a model without
    a global patch-to-patch map.
    """
    base = options.model.split(".")[0]
    if not timm.is_model(options.model):
        raise UserError(f"model {options.model!r} is not in timm {timm.__version__}; {_nearest_models(base)}")
    raise_for_tag(options.model)
    with torch.device("meta"):
        own = timm.create_model(options.model, num_classes=0).eval()
    data: dict[str, Any] = timm.data.resolve_model_data_config(own)  # type: ignore[attr-defined, no-untyped-call]
    own_px = (int(data["input_size"][1]), int(data["input_size"][2]))
    probe = _probe_vit(options.model, own, own_px)
    if probe is None:
        raise UserError(f"model {options.model} has no self-attention; give a vision transformer")
    input_px = choose_input_px(options.image_size, own_px, patch_px=probe.patch_px)
    if input_px != own_px:
        with torch.device("meta"):
            net = timm.create_model(options.model, num_classes=0, img_size=input_px).eval()
        resized = _probe_vit(options.model, net, input_px)
        assert resized is not None
        probe = resized
    return ModelSpec(
        name=options.model,
        kind="vit",
        input_px=input_px,
        patch_px=probe.patch_px,
        grid=probe.grid,
        num_prefix_tokens=probe.num_prefix_tokens,
        num_layers=probe.num_layers,
        num_heads=probe.num_heads,
        has_cls=probe.has_cls,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
    )


def raise_for_tag(name: str) -> None:
    """Raises UserError if the part of a timm name behind the dot names no known weights of that architecture."""
    base, _, tag = name.partition(".")
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in known:
        raise UserError(f"model {name!r}: timm knows no weights {tag!r} of {base}; {nearest(tag, known)}")


def choose_input_px(text: str, own_px: tuple[int, int], *, patch_px: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the model's input: as asked; else 224, or the model's own where patches don't divide 224."""
    if not text:
        divides = all(DEFAULT_PX % patch == 0 for patch in patch_px)
        return (DEFAULT_PX, DEFAULT_PX) if divides else own_px
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text.strip().lower())
    if not match:
        raise UserError(f"--image-size {text!r} is no size in pixels; give S or HxW, e.g. 224 or 336x448")
    asked = (int(match[1]), int(match[2] or match[1]))
    fitting = tuple(max(1, round(px / patch)) * patch for px, patch in zip(asked, patch_px, strict=True))
    if fitting != asked:
        size = "{}x{}".format(*patch_px)
        raise UserError(
            f"--image-size {text} is not a multiple of the model's {size} patches; try {fitting[0]}x{fitting[1]}"
        )
    return asked


@dataclass(frozen=True, slots=True)
class _Probe:
    patch_px: tuple[int, int]
    grid: tuple[int, int]
    num_prefix_tokens: int
    num_layers: int
    num_heads: int
    has_cls: bool


def _probe_vit(name: str, net: Any, input_px: tuple[int, int]) -> _Probe | None:
    calls: list[taps.AttentionCall] = []
    taps.fuse_attention(net)
    with torch.no_grad(), taps.AttentionTap(lambda _, call: calls.append(call)):
        net.forward_features(torch.empty(1, 3, *input_px, device="meta"))
    if not calls and not any(isinstance(getattr(m, "num_heads", None), int) for m in net.modules()):
        return None
    blocks = list(getattr(net, "blocks", ()))
    grid = _grid(net, input_px)
    prefix = int(getattr(net, "num_prefix_tokens", 0))
    if grid is None or not calls or len(calls) != len(blocks):
        raise UserError(f"model {name} {_NO_MAP}")
    tokens = prefix + grid[0] * grid[1]
    heads = calls[0].query.shape[1]
    expected = torch.Size((1, heads, tokens))
    if any(c.query.shape[:3] != expected or c.key.shape[:3] != expected or c.is_causal for c in calls):
        raise UserError(f"model {name} {_NO_MAP}")
    return _Probe(
        patch_px=(input_px[0] // grid[0], input_px[1] // grid[1]),
        grid=grid,
        num_prefix_tokens=prefix,
        num_layers=len(blocks),
        num_heads=heads,
        has_cls=getattr(net, "cls_token", None) is not None,
    )


_NO_MAP = (
    "attends inside windows, over stages or in another way than softmax(QK) over all its patches, so it has no "
    "patch-to-patch map; give a plain vision transformer, e.g. vit_small_patch14_dinov2.lvd142m"
)


def _grid(net: Any, input_px: tuple[int, int]) -> tuple[int, int] | None:
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    return (int(grid[0]), int(grid[1])) if grid else None


def resolve_layers(text: str, spec: ModelSpec) -> tuple[int, ...]:
    """The layers that `--layers` names (`-1`, `0,5,11`, `all`), counted from 0, ascending; raises UserError."""
    return _resolve("layers", text, spec.num_layers, spec.name)


def resolve_heads(text: str, spec: ModelSpec) -> tuple[int, ...]:
    """The heads that `--heads` names, counted from 0, ascending; raises UserError."""
    return _resolve("heads", text, spec.num_heads, spec.name)


def _resolve(option: str, text: str, count: int, model: str) -> tuple[int, ...]:
    items = split_list(text)
    if items == ["all"]:
        return tuple(range(count))
    if not items or not all(re.fullmatch(r"-?\d{1,4}", item) for item in items):
        raise UserError(f"--{option} {text!r} is no list of numbers; give e.g. -1, or 0,{count - 1}, or all")
    outside = [item for item in items if not -count <= int(item) < count]
    if outside:
        raise UserError(
            f"--{option} {', '.join(outside)} out of range: {model} has {count} {option}; give 0 to {count - 1}, or -1"
        )
    return tuple(sorted({int(item) % count for item in items}))


def load_model(
    spec: ModelSpec, state: dict[str, Tensor] | None, *, precision: str, device: torch.device | str, seed: int = 0
) -> Model:
    """The model with the weights in `state` (timm's names, at the architecture's own size), or random ones if None.

    Positions are interpolated to `spec.input_px` as timm does. Random weights are timm's own for `seed`, LayerScale
    set to 1 (timm starts it at 1e-5, and the blocks would be the identity). `precision` is fp16, bf16 or fp32.
    Raises UserError where the weights are of another architecture, naming the keys that differ.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _create(spec, state)
    if state is None:
        _set_layer_scale(net, 1.0)
    taps.fuse_attention(net)
    return Model(spec, net, precision, torch.device(device))


def _create(spec: ModelSpec, state: dict[str, Tensor] | None) -> nn.Module:
    arguments: dict[str, Any] = {"num_classes": 0, "img_size": spec.input_px}
    if state is not None:
        if not state:
            raise UserError(f"the weights for {spec.name} are empty; give another file with --weights")
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": dict(state)}}
    try:
        net: nn.Module = timm.create_model(spec.name, **arguments)
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"the weights are not those of {spec.name}: {_shorten(str(error))}; give others with --weights"
        ) from error
    return net


def _shorten(message: str, limit: int = 300) -> str:
    text = " ".join(message.split())
    return text if len(text) <= limit else text[:limit] + "…"


def _set_layer_scale(net: nn.Module, value: float) -> None:
    for name, parameter in net.named_parameters():
        if re.search(r"(^|\.)(ls\d?\.gamma|gamma_\d)$", name):
            nn.init.constant_(parameter, value)


def _nearest_models(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists the names"

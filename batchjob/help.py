"""What `--help` says besides the options' own words: groups of verbs, three examples a verb, the common options."""

import dataclasses
from collections.abc import Sequence

from batchjob.config import Options

GROUPS = {
    "the whole job": ("run",),
    "the same in steps, for many processes and nodes": ("plan", "fit", "label", "finish"),
    "what came of it": ("show", "stats", "figures", "report"),
    "ahead of time": ("fetch",),
}

# the options that most people need; `--help-all` shows the others too
COMMON = (
    "model",
    "image_size",
    "layers",
    "heads",
    "algorithm",
    "k",
    "scores",
    "keep_maps",
    "annotations",
    "device",
)

EXAMPLES = {
    "run": (
        "batchjob run photos/",
        "batchjob run /coco runs/mae --model vit_base_patch16_224.mae --layers all --k instances",
        "batchjob run photos/ runs/two --algorithm kmeans,spectral --k 6 --keep-maps 8",
    ),
    "plan": (
        "batchjob plan /coco runs/coco --split val2017 --k instances",
        "batchjob plan '/data/shard-{000000..000041}.tar' runs/web --layers 0,5,11",
        "batchjob plan photos/ runs/null --weights random --seed 1",
    ),
    "fit": (
        "batchjob fit runs/codebook",
        "batchjob fit runs/codebook --engine cuml",
        "batchjob fit runs/codebook --device cpu --workers 4",
    ),
    "label": (
        "batchjob label runs/coco",
        "batchjob label runs/coco --partition 3 --partition 7",
        "batchjob label runs/coco --gpus 0,1 --batch-size 64",
    ),
    "finish": (
        "batchjob finish runs/coco",
        "batchjob finish runs/coco --max-failures 0.05",
        "batchjob finish runs/coco && batchjob stats runs/coco",
    ),
    "show": ("batchjob show runs/coco", "batchjob show runs/coco --verify", "watch batchjob show runs/coco"),
    "stats": (
        "batchjob stats runs/coco",
        "batchjob stats runs/dino runs/mae",
        "batchjob stats runs/coco --annotations instances_val2017.json --csv",
    ),
    "figures": (
        "batchjob figures runs/coco",
        "batchjob figures runs/coco --images best --layer 11 --head 6",
        "batchjob figures runs/coco --format svg,pdf --heads-across 6",
    ),
    "report": (
        "batchjob report runs/coco",
        "batchjob report runs/dino runs/mae",
        "batchjob report runs/coco --seed 3",
    ),
    "fetch": (
        "batchjob fetch vit_small_patch14_dinov2.lvd142m",
        "batchjob fetch vit_base_patch16_224.mae",
        "batchjob fetch vit_small_patch16_224 --registry",
    ),
}


def of_all_verbs(words: dict[str, str]) -> str:
    """Returns the page of `batchjob --help`: every verb with its words, in groups. `words` says what each verb does."""
    lines = ["usage: batchjob VERB …", "", "Cluster the attention of vision transformers, head by head.", ""]
    for title, verbs in GROUPS.items():
        lines += [f"{title}:", *(f"  {verb:<9}{words[verb]}" for verb in verbs), ""]
    lines += [
        "examples:",
        *(f"  {EXAMPLES[verb][0]}" for verb in ("run", "stats", "report")),
        "",
        "batchjob VERB --help says more of each; batchjob --version says which this is.",
    ]
    return "\n".join(lines) + "\n"


def of_other_verbs(option: str, verbs: Sequence[str]) -> str:
    """Says which verbs take an option that the present one does not.

    Parameters
    ----------
    option
        Such as `--device`.
    verbs
        One verb or more that take it.

    Returns
    -------
    A sentence without its full stop.
    """
    taken_by = " and ".join([part for part in (", ".join(verbs[:-1]), *verbs[-1:]) if part])
    name = option.removeprefix("--").replace("-", "_")
    is_frozen = set(verbs) <= {"run", "plan"} and name in {field.name for field in dataclasses.fields(Options)}
    more = ", frozen in RUN since; other values need another RUN" if is_frozen else ""
    return f"{option} is an option of {taken_by}{more}"


def examples(verb: str) -> str:
    """Returns the last lines of `batchjob VERB --help`: three commands."""
    return "\n".join(["examples:", *(f"  {line}" for line in EXAMPLES[verb])])

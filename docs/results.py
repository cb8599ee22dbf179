"""Makes docs/results.md and its pictures from a COCO root: python docs/results.py COCO FOLDER

It makes every run in FOLDER with the `batchjob` command line. Finished runs are kept: started again, the script goes on
where it was stopped. It makes the page and the pictures from the tables of `batchjob stats`. With `--tables` it makes
no runs and takes the tables that are in FOLDER/tables.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from docs import results_page

ROOT = Path(__file__).parents[1]
SIZES = (224, 448)
SEEDS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the page."""

    short: str  # what the names of its runs begin with
    name: str  # in timm
    is_cnn: bool = False  # a CNN has no queries, keys and values
    has_own_wheel: bool = False  # whether its weights come from a package of a registry, not from timm's own source
    is_deep: bool = False  # whether all layers of the largest input are clustered, too, of attention alone


MODELS = (
    Model("vits14", "vit_small_patch14_dinov2.lvd142m", is_deep=True),
    Model("vitb16", "vit_base_patch16_224", has_own_wheel=True),
    Model("resnet18", "resnet18", is_cnn=True, has_own_wheel=True),
)
_CLUSTERED = ("attention", "query", "key", "value", "token")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python docs/results.py", description=__doc__)
    parser.add_argument("coco", help="a COCO root: val2017/ and annotations/")
    parser.add_argument("folder", type=Path, help="where the runs go; an hour or two of computing on two cores")
    parser.add_argument("--tables", action="store_true", help="make the page alone, from FOLDER/tables")
    arguments = parser.parse_args()
    coco, folder = str(Path(arguments.coco).resolve()), arguments.folder.resolve()
    if not arguments.tables:
        weights = {m.short: _own_weights(m) for m in MODELS}
        for size in SIZES:
            for model in MODELS:
                for name, options in runs(model, size, weights[model.short]):
                    _batchjob("run", coco, str(folder / name), *options)
                _tabulate(folder, f"{model.short}-{size}", [n for n, _ in runs(model, size, "")])
            _tabulate(folder, f"models-{size}", _across(size))
        for model in MODELS:
            for name, options in runs_of_all_layers(model, weights[model.short]):
                _batchjob("run", coco, str(folder / name), *options)
            if names := [n for n, _ in runs_of_all_layers(model, "")]:
                _tabulate(folder, f"{model.short}-{SIZES[-1]}all", names)
    wanted = [name for size in SIZES for model in MODELS for name, _ in runs(model, size, "")]
    wanted += [name for model in MODELS for name, _ in runs_of_all_layers(model, "")]
    results_page.write(folder / "tables", ROOT / "docs", wanted)
    return 0


def runs(model: Model, size: int, weights: str) -> Iterator[tuple[str, list[str]]]:
    """Lists the runs of a model at one size: each kind of vector that is clustered, other seeds, untrained weights.

    Parameters
    ----------
    model
        The model.
    size
        Of the input, in pixels.
    weights
        A file of weights; empty for timm's own.

    Yields
    ------
    The name and the options of each run.
    """
    common = ["--k", "instances", "--image-size", str(size)]
    if not model.is_cnn:
        common += ["--layers", "all" if size == SIZES[0] else "-1"]
    trained = ["--model", model.name, *(["--weights", weights] if weights else [])]
    for what in _CLUSTERED[: 1 if model.is_cnn else None]:
        yield f"{model.short}-{size}-{what}", [*trained, *common, "--cluster-on", what]
    for seed in SEEDS[1:]:
        yield f"{model.short}-{size}-seed{seed}", [*trained, *common, "--seed", str(seed)]
    for seed in SEEDS:
        untrained = ["--model", model.name, "--weights", "random", "--seed", str(seed)]
        yield f"{model.short}-{size}-random{seed}", [*untrained, *common]


def runs_of_all_layers(model: Model, weights: str) -> Iterator[tuple[str, list[str]]]:
    """Lists the runs of all layers of the largest input.

    Parameters
    ----------
    model, weights
        As `runs`.

    Yields
    ------
    As `runs`; nothing where the model is not `is_deep`.
    """
    if model.is_deep:
        for name, options in runs(model, SIZES[-1], weights):
            short, size, what = name.split("-")
            if what == "attention":
                layers = options.index("--layers") + 1
                yield f"{short}-{size}all-{what}", [*options[:layers], "all", *options[layers + 1 :]]


def _across(size: int) -> list[str]:
    """Returns the names of the runs of all models that are compared with each other, and of their untrained runs."""
    return [f"{m.short}-{size}-{kind}" for m in MODELS[::-1] for kind in ("attention", *(f"random{s}" for s in SEEDS))]


def _tabulate(folder: Path, name: str, members: list[str]) -> None:
    """Scores the runs together; keeps their tables and the output of `stats` under FOLDER/tables/NAME."""
    kept = folder / "tables" / name
    if kept.is_dir():
        return
    said = _batchjob("stats", *(str(folder / m) for m in members))
    aside = kept.with_name(kept.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    for member in members:
        shutil.copytree(folder / member / "stats", aside / member)
    (aside / "said.txt").write_text(said)
    aside.rename(kept)


def _own_weights(model: Model) -> str:
    return _batchjob("fetch", model.name, "--registry").splitlines()[-1] if model.has_own_wheel else ""


def _batchjob(*arguments: str) -> str:
    print("batchjob", *arguments, flush=True)
    command = [sys.executable, "-m", "batchjob", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())

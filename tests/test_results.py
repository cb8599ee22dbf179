"""The page of results: the runs that it is made from, and that it agrees with their tables."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from batchjob.stats.numbers import number
from batchjob.stats.run import run_stats
from docs import results, results_page, results_pictures
from tests.made_up_runs import KINDS, spoil_labels, write_annotations, write_run

IMAGES = 24


@pytest.mark.parametrize("size", results.SIZES)
@pytest.mark.parametrize("model", results.MODELS, ids=lambda m: m.short)
def test_untrained_runs_differ_from_the_trained_one_in_weights_and_seed_alone(model: results.Model, size: int) -> None:
    found = {
        name: dict(zip(options[::2], options[1::2], strict=True))
        for name, options in results.runs(model, size, "w.safetensors")
    }
    trained = found[f"{model.short}-{size}-attention"]
    assert trained["--weights"] == "w.safetensors"
    assert trained.pop("--cluster-on") == "attention"
    for seed in results.SEEDS:
        untrained = found[f"{model.short}-{size}-random{seed}"]
        assert untrained == trained | {"--weights": "random", "--seed": str(seed)}
    keys = [name for name, options in found.items() if options.get("--cluster-on") == "key"]
    assert len(keys) == (0 if model.is_cnn else 1)


def test_all_layers_of_the_largest_input_are_clustered_with_the_same_options() -> None:
    last = dict(results.runs(results.MODELS[0], 448, ""))["vits14-448-attention"]
    deep = dict(results.runs_of_all_layers(results.MODELS[0], ""))
    assert deep == {"vits14-448all-attention": [*("all" if o == "-1" else o for o in last)]}
    assert not dict(results.runs_of_all_layers(results.MODELS[1], ""))


@pytest.mark.slow
def test_the_page_says_what_the_tables_say(tmp_path: Path) -> None:
    names = {"attention": {}, "key": {"seed": 1}, "random0": {"kinds": ["random"] * 4, "weights": "random", "seed": 2}}
    runs = [write_run(tmp_path / f"vits14-224-{name}", IMAGES, **how) for name, how in names.items()]  # type: ignore[arg-type]
    for run in runs[:2]:
        spoil_labels(run, KINDS.index("instance"))
    run_stats(runs, annotations=str(write_annotations(tmp_path / "a.json", IMAGES)))
    for run in runs:
        shutil.copytree(run / "stats", tmp_path / "tables" / "vits14-224" / run.name)
    (tmp_path / "docs").mkdir()
    results_page.write(tmp_path / "tables", tmp_path / "docs", [*(run.name for run in runs), "vits14-224-seed1"])

    summary = pd.read_parquet(runs[0] / "stats" / "summary.parquet").query("score == 'instance_ari'")
    over = {null: summary[summary.null == null] for null in ("swap", "position")}
    better = {null: int((rows.sure & (rows.gain > 0)).sum()) for null, rows in over.items()}
    assert better["swap"] >= 1  # the head that attends within objects
    page = (tmp_path / "docs" / "results.md").read_text()
    verb = "separates" if better["swap"] == 1 else "separate"
    assert f"**DINOv2 ViT-S/14, 224 px**: {better['swap']} of 4 heads {verb} objects" in page
    assert f"and {better['position']} better than position alone" in page
    does = "does" if better["swap"] == 1 else "do"
    assert f"Of the 4 attention heads of DINOv2 ViT-S/14 at all sizes, {better['swap']} {does} so better than" in page
    assert "not among them" not in page  # no model without attention was run
    mean = pd.read_parquet(runs[0] / "stats" / "comparison.parquet").query("of == 'mean of heads'").iloc[0]
    lower, higher = (int(mean.p < 0.05 and sign * mean.difference > 0) for sign in (-1, 1))
    assert f"keys: attention lower in {lower}, higher in {higher} of 1." in page
    for _, row in over["swap"].iterrows():
        assert f"| {row['head']} | {number(row['mean'])} [" in page
    assert "not made: `vits14-224-seed1`." in page
    assert "{" not in page.split("## The commands")[0]
    assert (tmp_path / "docs" / "results_paired.png").stat().st_size > 5_000


class MadeUp:
    """Tables of a model of three layers and four heads, each of whose heads scores more in later layers."""

    title = "a model, 224 px"

    def has(self, run: str) -> bool:
        return run in ("attention", "key")

    def heads(self, run: str, null: str) -> pd.DataFrame:
        rows = [{"layer": x, "head": h, "gain": 0.1 * x, "mean": 0.1 * x} for x in range(3) for h in range(4)]
        return pd.DataFrame(rows).assign(sure=False, enough=True, null_mean=0.3)

    def compared(self, run: str, kind: str) -> pd.DataFrame:
        rows = [{"layer_a": x, "mean_a": 0.1 * x, "mean_b": 0.2, "sure": x == 1} for x in range(3)]
        return pd.DataFrame(rows)


def test_the_first_layer_is_on_top_in_the_pictures_of_the_results_too() -> None:
    image = results_pictures._map([MadeUp()]).axes[0].images[0]  # type: ignore[list-item]
    assert np.asarray(image.get_array())[:, 0].tolist() == pytest.approx([0.0, 0.1, 0.2])
    low, high = image.axes.get_ylim()
    assert low > high, "the first row is on top"


def test_heads_whose_difference_is_not_sure_are_open_in_the_pictures_of_the_results() -> None:
    points = results_pictures._paired([MadeUp()]).axes[0].collections[0]  # type: ignore[list-item]
    white = (np.asarray(points.get_facecolor())[:, :3] == 1).all(axis=1)
    assert white.tolist() == [True, False, True]


@pytest.mark.parametrize("count", [1, 3])
def test_the_pictures_of_the_results_fit_a_page(count: int) -> None:
    for draw in (results_pictures._map, results_pictures._layers, results_pictures._paired):
        assert draw([MadeUp()] * count).get_size_inches()[0] <= 7.5  # type: ignore[list-item]


def test_the_maps_of_a_cnn_are_not_counted_as_heads_and_the_page_says_so(tmp_path: Path) -> None:
    vit, cnn = (results_page.Tables(short, 448, tmp_path) for short in ("vits14", "resnet18"))
    assert results_page._not_counted([vit, cnn], [vit]) == (
        " (The maps of ResNet-18 are not among them: without attention there are no heads.)"
    )
    assert results_page._not_counted([vit], [vit]) == ""


def test_the_share_of_settled_clusterings_is_that_of_all_seeds(tmp_path: Path) -> None:
    tables = results_page.Tables("vits14", 224, tmp_path / "vits14-224")
    for run, counts in {"attention": (100, 81), "seed1": (300, 219), "seed2": None}.items():
        tables.run(run).mkdir(parents=True)
        named = dict(zip(("clusterings by kmeans", "settled by kmeans"), counts, strict=True)) if counts else {}
        (tables.run(run) / "counts.json").write_text(json.dumps({"images": 9, **named}))
    assert results_page._settled(tables, ["attention", "seed1"]) == "75 %"
    assert results_page._settled(tables, ["seed2"]) == "–"  # an older `stats` did not count them

"""What several runs have to share before `stats` compares them, and what becomes of an older comparison."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zarr

from batchjob.codes import NOISE
from batchjob.errors import UserError
from batchjob.metrics.objects import Objects
from batchjob.report.answer import _difference, differences
from batchjob.stats import run_stats
from batchjob.stats.compare import Common, comparable, compare
from batchjob.stats.differences import _k_words, describe, why_none
from batchjob.stats.differences import differences as tabulate
from batchjob.stats.image import Scene, score_labels
from batchjob.stats.pool import Pool
from batchjob.stats.run import _other_annotations
from batchjob.store.run import Run, tell_apart
from tests.made_up_runs import table, write_annotations, write_run

IMAGES = 6
KINDS = ("instance", "local")


def stats(runs: list[Path], annotations: Path) -> list[str]:
    return run_stats(runs, annotations=str(annotations), jobs=1)


def array(run: Path, name: str) -> zarr.Array[Any]:
    found = zarr.open_group(str(run / "labels.zarr"), mode="r+")[name]
    assert isinstance(found, zarr.Array)
    return found


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_annotations(tmp_path_factory.mktemp("known") / "a.json", IMAGES)


def common_of(runs: list[Path]) -> tuple[Common, list[str]]:
    """Returns what the runs have in common, and what is said of it."""
    opened = [Run(run) for run in runs]
    common = compare(opened, None, Pool(1))
    return common, describe(opened, common, tabulate(opened, common))


def test_the_number_of_clusters_that_were_found_leaves_no_image_out(tmp_path: Path) -> None:
    """It is a result. In dataset scope it is how many of the k clusters an image shows."""
    runs = [write_run(tmp_path / name, IMAGES, k="6", scope="dataset") for name in "ab"]
    found = array(runs[1], "k")
    found[:3] = np.asarray(found[:3]) + 1
    common, _ = common_of(runs)
    assert len(common.ids) == IMAGES
    assert common.other_k == 0


def test_images_of_another_k_are_left_out(tmp_path: Path, annotations: Path) -> None:
    runs = [write_run(tmp_path / name, IMAGES, kinds=KINDS) for name in "ab"]
    for run, first in zip(runs, (3, 4), strict=True):
        np.save(run / "index" / "k.npy", np.array([first, *[3] * (IMAGES - 1)], np.uint8))
    common, said = common_of(runs)
    assert (len(common.ids), common.other_k) == (IMAGES - 1, 1)
    assert said[0].startswith(f"2 runs on the same {IMAGES - 1} images")
    assert said[1].startswith("1 image left out because k differs between the runs")
    np.save(runs[0] / "index" / "k.npy", np.full(IMAGES, 5, np.uint8))
    np.save(runs[1] / "index" / "k.npy", np.full(IMAGES, 6, np.uint8))
    told = f"the runs are not compared: none of the {IMAGES} images that all of them labelled was asked for the same k"
    assert stats(runs, annotations)[-1].startswith(told)


def test_a_rule_for_k_is_compared_with_the_same_rule_alone(tmp_path: Path) -> None:
    rules = (("a", "silhouette"), ("b", "silhouette"), ("c", "5"))
    runs = [write_run(tmp_path / name, IMAGES, kinds=KINDS, k=k) for name, k in rules]
    found = array(runs[1], "k")
    found[:] = np.asarray(found[:]) + 1
    _, said = common_of(runs[:2])
    assert said[0].endswith("k by silhouette in each")
    refused = comparable([Run(run) for run in runs[1:]])
    assert refused == "k was chosen otherwise: silhouette in b, 5 in c"


def test_runs_of_other_heads_of_one_model_are_compared_by_those_that_both_have(
    tmp_path: Path, annotations: Path
) -> None:
    runs = [write_run(tmp_path / "all", IMAGES), write_run(tmp_path / "two", IMAGES, kinds=KINDS)]
    lines = stats(runs, annotations)
    found = table(runs[0], "comparison").query("score == 'instance_ari'")
    mean, heads = found.query("of == 'mean of heads'").iloc[0], found.query("of == 'head'")
    assert (mean["heads_a"], mean["heads_b"]) == (2, 2)
    assert heads["head_a"].tolist() == heads["head_b"].tolist() == [0, 1]
    assert mean["mean_a"] == pytest.approx(heads["mean_a"].mean())
    assert mean["mean_b"] == pytest.approx(heads["mean_b"].mean())
    assert any(line.startswith("instance_ari, mean of 2 heads: all ") for line in lines)


def test_labels_of_other_heads_are_not_said_to_agree(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, IMAGES, kinds=KINDS) for name in "ab"]
    assert list(common_of(runs)[0].agreement) == [(0, 1)]
    array(runs[1], "head")[:] = [2, 3]
    assert common_of(runs)[0].agreement == {}


def test_equal_numbers_of_heads_in_other_networks_are_other_heads(tmp_path: Path, annotations: Path) -> None:
    runs = [write_run(tmp_path / "four", IMAGES), write_run(tmp_path / "two", IMAGES, kinds=KINDS)]
    group = zarr.open_group(str(runs[1] / "labels.zarr"), mode="r+")
    group.attrs["model"] = {**group.attrs["model"], "num_heads": 12}
    lines = stats(runs, annotations)
    found = table(runs[0], "comparison")
    assert not (found["of"] == "head").any()
    assert (found[found["of"] == "mean of heads"][["heads_a", "heads_b"]] == [4, 2]).all(axis=None)
    assert any("instance_ari, mean of 4 heads and of 2: four " in line for line in lines)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("silhouette hdbscan", "k by silhouette, hdbscan finds its own k"),
        ("hdbscan silhouette", "k by silhouette, hdbscan finds its own k"),
        ("silhouette silhouette", "k by silhouette in each"),
        ("instances hdbscan", "k = instances, hdbscan finds its own k"),
        ("5 instances", "equal k"),
        ("hdbscan hdbscan", "hdbscan finds its own k"),
    ],
)
def test_what_is_said_of_k_is_true_of_every_run(asked: str, said: str) -> None:
    runs: list[Any] = [
        SimpleNamespace(
            options={"k": "7" if k == "hdbscan" else k}, algorithms=("hdbscan",) if k == "hdbscan" else ("kmeans",)
        )
        for k in asked.split()
    ]
    assert _k_words(runs) == said


@pytest.mark.parametrize("by", ["size in bytes", "size in pixels"])
def test_other_photos_of_the_same_id_are_left_out(tmp_path: Path, by: str) -> None:
    runs = [write_run(tmp_path / name, IMAGES, kinds=KINDS) for name in "ab"]

    def make_differ(count: int) -> None:
        if by == "size in pixels":
            array(runs[1], "height")[:count] = 50
            return
        for number, run in enumerate(runs):
            sizes = 1000 + np.arange(IMAGES) + number * (np.arange(IMAGES) < count)
            np.save(run / "index" / "where.npy", np.stack([sizes, sizes + number], axis=1))

    make_differ(2)
    common, said = common_of(runs)
    assert (len(common.ids), common.other_file) == (IMAGES - 2, 2)
    assert "2 images left out because the runs saw other files or sizes of the same id" in said
    make_differ(IMAGES)
    none = compare([Run(run) for run in runs], None, Pool(1))
    assert why_none(none) == f"the {IMAGES} images with ids in common are other files or sizes in each"


def test_runs_that_were_planned_with_other_annotations_are_not_compared() -> None:
    def planned(name: str, path: str, digest: str) -> Any:
        inputs = {"index/k.npy": name, path: digest} if path else {}
        return SimpleNamespace(name=name, annotations=path, plan={"inputs": inputs})

    one, copy = planned("a", "/x/a.json", "1"), planned("b", "/y/copy.json", "1")
    other, none = planned("c", "/x/c.json", "2"), planned("d", "", "")
    assert _other_annotations([one, copy, none]) == ""
    assert _other_annotations([one, none, other]) == "their annotations differ: /x/a.json of a, /x/c.json of c"


def test_runs_of_one_folder_name_are_told_apart(tmp_path: Path, annotations: Path) -> None:
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "z" / "run"]
    runs = [write_run(folder, IMAGES, kinds=KINDS) for folder in folders]
    lines = stats(runs, annotations)
    found = table(runs[0], "comparison").query("of == 'head' and score == 'instance_ari'")
    pairs = found.groupby(["run_a", "run_b"], sort=False).size()
    assert list(pairs.index) == [("x/run", "y/run"), ("x/run", "z/run"), ("y/run", "z/run")]
    assert set(pairs) == {2}
    assert sum("head by head" in line for line in lines) == 3
    opened = [Run(folder) for folder in folders]
    tell_apart(opened)
    assert differences(opened).rows[0][0] == "x/run − y/run"


def test_the_page_names_the_algorithm_of_a_difference_where_there_are_several() -> None:
    row = {
        "score": "instance_ari",
        "of": "mean of heads",
        "algorithm": "spectral",
        "heads_a": 6,
        "heads_b": 2,
        "n": 30,
        "mean_a": 0.3,
        "mean_b": 0.2,
    }
    row |= {"difference": 0.1, "low": 0.0, "high": 0.2, "p": 0.04, "enough": True, "run_a": "a", "run_b": "b"}
    assert _difference(row, several=False, is_named=True)[1] == "mean of 6 heads and of 2, spectral"
    assert _difference(row, several=True, is_named=False)[:3:2] == ["a − b", "mean of 6 heads and of 2"]


def test_why_none_tells_both_reasons() -> None:
    common = Common(ids=[], grid=(1, 1), values=[], agreement={}, other_k=5, other_file=3)
    assert "3 are other files or sizes in each, and for 5 other k were asked for" in why_none(common)


def test_a_comparison_of_older_statistics_is_not_shown(tmp_path: Path, annotations: Path) -> None:
    runs = [write_run(tmp_path / name, IMAGES, kinds=KINDS, seed=i) for i, name in enumerate("ab")]
    stats(runs, annotations)
    opened = [Run(run) for run in runs]
    assert differences(opened).rows
    stats([runs[1]], annotations)
    assert differences(opened).rows, "the same figures again"
    fewer = write_annotations(tmp_path / "fewer.json", IMAGES - 2)
    stats([runs[1]], fewer)
    assert not differences(opened).rows
    assert differences(opened).note.startswith("The runs were compared before their statistics were made again. ")
    stats([runs[0]], fewer)
    assert not (runs[0] / "stats" / "comparison.parquet").exists()


def test_a_comparison_by_an_earlier_version_is_not_shown(tmp_path: Path, annotations: Path) -> None:
    """Its means were over all heads of each run, also where the runs have few heads in common."""
    runs = [write_run(tmp_path / name, IMAGES, kinds=KINDS, seed=i) for i, name in enumerate("ab")]
    stats(runs, annotations)
    earlier = table(runs[0], "comparison").drop(columns=["heads_a", "heads_b"])
    earlier.to_parquet(runs[0] / "stats" / "comparison.parquet", index=False)
    found = differences([Run(run) for run in runs])
    assert not found.rows
    assert found.note.startswith("The runs were compared by an earlier version of batchjob. ")


def test_no_table_of_earlier_statistics_stays_beside_the_new_ones(tmp_path: Path, annotations: Path) -> None:
    run = write_run(tmp_path / "run", IMAGES, kinds=KINDS)
    run_stats([run], annotations=str(annotations), jobs=1, csv=True)
    assert (run / "stats" / "summary.csv").exists()
    (run / "stats" / "mine.csv").write_text("of the user")
    stats([run], annotations)
    assert sorted(path.name for path in (run / "stats").glob("*.csv")) == ["mine.csv"]


def test_an_untrained_run_that_is_not_finished_is_no_null(tmp_path: Path, annotations: Path) -> None:
    run = write_run(tmp_path / "trained", IMAGES)
    untrained = write_run(tmp_path / "untrained", IMAGES, weights="random", pending=(1, 2))
    with pytest.raises(UserError, match="2 images labelled there and not yet here"):
        stats([run, untrained], annotations)


def test_position_gets_as_many_clusters_as_there_are_groups_with_noise_as_one() -> None:
    """A clustering that calls all patches noise has one group and scores 0, as position does with one cluster."""
    owner = np.full(36, -1, np.int16)
    owner[[7, 8, 13]], owner[[22, 27, 28]] = 0, 1
    objects = Objects(owner, np.zeros(2, np.int64), np.zeros((2, 4)), np.zeros((2, 36)))
    scene = Scene((6, 6), seed=0, objects=objects)
    noise = np.full((1, len(owner)), NOISE, np.uint8)
    found = score_labels(noise, np.zeros(1, np.uint8), scene)
    assert found["instance_ari"] == found["instance_ari.position"] == 0
    labels = np.where(owner >= 0, owner, 2).astype(np.uint8)
    with_noise = np.where(labels == 2, NOISE, labels).astype(np.uint8)
    as_clusters = score_labels(labels[None], np.full(1, 3, np.uint8), scene)
    as_noise = score_labels(with_noise[None], np.full(1, 2, np.uint8), scene)
    for name, value in as_clusters.items():
        np.testing.assert_array_equal(as_noise[name], value, err_msg=name)

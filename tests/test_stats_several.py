"""`stats` of several runs: untrained runs as the random null, and paired differences between runs."""

from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

from batchjob.errors import UserError
from batchjob.metrics.uncertainty import first_half
from batchjob.stats import run_stats
from batchjob.stats.compare import upsample
from batchjob.stats.numbers import gain, number
from batchjob.stats.randoms import match_randoms
from batchjob.store.run import Run
from tests import scenes
from tests.made_up_runs import image_ids, table, write_annotations, write_run

IMAGES = 44  # so that at least 20 of them are held out


def test_an_untrained_run_is_the_random_null_of_the_others_image_by_image(tmp_path: Path) -> None:
    run = write_run(tmp_path / "trained", 6)
    untrained = write_run(tmp_path / "untrained", 6, kinds=["random"] * 4, weights="random", seed=9)
    annotations = str(write_annotations(tmp_path / "a.json", 6))
    text = "\n".join(run_stats([run, untrained], annotations=annotations))
    summary = table(run, "summary").query("score == 'instance_ari' and null == 'random'")
    assert len(summary) == 4
    with xarray.open_zarr(untrained / "scores.zarr", chunks=None) as arrays:
        by_image = arrays["instance_ari"].values[:, 0, 0].mean(axis=1)
    np.testing.assert_allclose(summary["null_mean"], by_image.mean(), rtol=1e-5)
    assert "needs untrained runs" not in text
    assert set(table(untrained, "summary").query("score == 'instance_ari'")["null"]) == {"swap", "position"}


@pytest.mark.parametrize(("count", "said"), [(1, "one seed where three are asked for"), (3, "three seeds")])
def test_the_chosen_head_is_compared_with_untrained_weights_on_the_images_that_did_not_choose_it(
    tmp_path: Path, count: int, said: str
) -> None:
    run = write_run(tmp_path / "trained", IMAGES)
    untrained = [
        write_run(tmp_path / f"random{seed}", IMAGES, kinds=["random"] * 4, weights="random", seed=seed)
        for seed in range(count)
    ]
    lines = run_stats([run, *untrained], annotations=str(write_annotations(tmp_path / "a.json", IMAGES)))
    rows = table(run, "selection").query("score == 'instance_ari'").set_index("null")
    assert list(rows.index) == ["swap", "position", "random"]
    assert rows["seeds"].tolist() == [0, 0, count]
    assert rows[["layer", "head"]].drop_duplicates().to_numpy().tolist() == [[11, 1]]
    held_out = ~first_half(image_ids(IMAGES))
    with xarray.open_zarr(run / "scores.zarr", chunks=None) as arrays:
        own = arrays["instance_ari"].values[:, 0, 0, 1]
    null = np.zeros(IMAGES)
    for folder in untrained:
        with xarray.open_zarr(folder / "scores.zarr", chunks=None) as arrays:
            null += arrays["instance_ari"].values[:, 0, 0].mean(axis=1) / count
    row = rows.loc["random"]
    assert row["n"] == held_out.sum()
    assert row["mean"] == pytest.approx(own[held_out].mean(), rel=1e-5)
    assert row["null_mean"] == pytest.approx(null[held_out].mean(), rel=1e-5)
    assert row["gain"] == pytest.approx((own - null)[held_out].mean(), rel=1e-5)
    assert row["gain_low"] < row["gain"] < row["gain_high"]
    summary = table(run, "summary").query("score == 'instance_ari' and null == 'random'")
    assert set(summary["seeds"]) == {count}
    assert row["better"] == (summary["sure"] & (summary["gain"] > 0)).sum() >= 1
    answer = next(line for line in lines if "ARI " in line)
    assert f" and {number(row['null_mean'], 2)} for untrained weights (" in answer
    assert answer.endswith(f"{said}).")
    heading = next(i for i, line in enumerate(lines) if line.startswith("instance_ari by head"))
    assert lines[heading].endswith(f" against swap, position and random; p by Holm; random is of {said}")
    assert lines[heading + 1].split()[5::4] == ["swap", "position", "random", "n"]
    head = summary[summary["head"] == 1].iloc[0]
    assert lines[heading + 2].split()[:3] == ["kmeans", "11", "1"]
    assert f"{number(head['null_mean'])} {gain(head['gain'])} [" in " ".join(lines[heading + 2].split())


def test_two_untrained_runs_of_one_seed_count_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "trained", 6)
    same = [write_run(tmp_path / name, 6, weights="random", seed=9) for name in ("a", "b")]
    run_stats([run, *same], annotations=str(write_annotations(tmp_path / "a.json", 6)))
    assert set(table(run, "summary").query("null == 'random'")["seeds"]) == {1}


def test_scores_without_objects_are_compared_with_untrained_weights_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "trained", 6, with_scores=False)
    untrained = write_run(tmp_path / "untrained", 6, weights="random", seed=9, with_scores=False)
    lines = run_stats([run, untrained])
    assert any(
        line == "coherence by head, best first, with 95 % intervals over images against random; p by Holm; random is "
        "of one seed where three are asked for"
        for line in lines
    )


def test_an_untrained_run_of_other_options_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = write_run(tmp_path / "trained", 3)
    other = write_run(tmp_path / "untrained", 3, weights="random", seed=9, k="5")
    with pytest.raises(UserError, match=r"untrained can't be the random null of .*: --k is 'instances' there, '5'"):
        run_stats([run, other])
    more = write_run(tmp_path / "more", 4, weights="random")
    with pytest.raises(UserError, match="the images are others: 3 there, 4 here"):
        run_stats([run, more])
    heads = write_run(tmp_path / "heads", 3, weights="random", kinds=("random",))
    with pytest.raises(UserError, match=r"heads: \(0, 1, 2, 3\) there, \(0,\) here"):
        run_stats([run, heads])
    assert not (run / "stats").exists()


def test_an_untrained_run_is_refused_where_equal_options_came_to_something_else(tmp_path: Path) -> None:
    """`auto` on another machine, a --k FILE or annotations that were changed, another photo of the same name."""
    run, other = write_run(tmp_path / "trained", 3), write_run(tmp_path / "untrained", 3, weights="random")
    for folder in (run, other):
        np.save(folder / "index" / "k.npy", np.array([3, 3, 3], np.uint8))
        np.save(folder / "index" / "where.npy", np.array([[10, 1], [20, 1], [30, 1]]))
    assert randoms_of(run, other) == [other]

    def refuses(why: str) -> None:
        with pytest.raises(UserError, match=why):
            randoms_of(run, other)

    def change(name: str, value: int, why: str) -> None:
        values = np.load(other / "index" / name)
        np.save(other / "index" / name, np.where(np.arange(values.size).reshape(values.shape) == 0, value, values))
        refuses(why)
        np.save(other / "index" / name, values)

    change("k.npy", 7, "null of .*: k differs for 1 of 3 images; make it")
    change("where.npy", 11, "null of .*: the size of the file differs for 1 of 3 images")
    change("instances_category.npy", 9, r"null of .*: the category differs for 1 of \d+ objects")
    change("instances_owner.npy", 5, "null of .*: the object of a patch differs for 1 of 3 images")
    np.save(other / "index" / "where.npy", np.array([[10, 5], [20, 5], [30, 5]]))  # copied, so with another date
    assert randoms_of(run, other) == [other]
    zarr.open_group(str(other / "labels.zarr"), mode="r+").attrs["precision"] = "fp16"
    refuses("null of .*: precision:  there, fp16 here")


def randoms_of(trained: Path, untrained: Path) -> list[Path]:
    return [run.folder for run in match_randoms([Run(trained), Run(untrained)])[trained]]


def test_runs_of_other_grids_are_compared_on_the_finest_by_paired_differences(tmp_path: Path) -> None:
    fine = write_run(tmp_path / "fine", 9)
    coarse = write_run(tmp_path / "coarse", 9, grid=(7, 7))
    lines = run_stats([fine, coarse], annotations=str(write_annotations(tmp_path / "a.json", 9)))
    found = table(fine, "comparison")
    best = found.query("score == 'instance_ari' and of == 'best head'").iloc[0]
    assert best["head_a"] == 1
    assert best["mean_a"] > best["mean_b"] > 0.3  # up-sampled labels of the coarse grid miss the disks' edges
    whole = found.query("score == 'instance_ari' and of == 'mean of heads'").iloc[0]
    assert whole["difference"] == pytest.approx(whole["mean_a"] - whole["mean_b"])
    assert whole["low"] <= whole["difference"] <= whole["high"]
    heads = found.query("score == 'image_ari' and of == 'head'")
    assert heads["head_a"].tolist() == heads["head_b"].tolist() == [0, 1, 2, 3]
    assert (heads["p_holm"] >= heads["p"]).all()
    assert any("on 14×14 patches, instances that survive on every grid, equal k" in line for line in lines)
    same_head = table(fine, "agreement_runs").set_index("head")["mean"]
    assert same_head[1] > 0.4 > 0.2 > same_head[3]


def test_the_best_heads_that_are_compared_are_those_with_the_largest_gain_over_swap(tmp_path: Path) -> None:
    """Head 0 only looks nearby and has the higher score; head 1 attends by object, with a fifth of its labels wrong."""
    runs = [write_run(tmp_path / name, 12, kinds=("local", "instance"), seed=i) for i, name in enumerate("ab")]
    for seed, run in enumerate(runs):
        labels = zarr.open_group(str(run / "labels.zarr"), mode="r+")["labels"]
        assert isinstance(labels, zarr.Array)
        values = np.asarray(labels[:])
        wrong = np.random.default_rng(seed).random(values[:, :, :, 1].shape) < 0.2
        values[:, :, :, 1][wrong] = 0
        labels[:] = values
    run_stats(runs, annotations=str(write_annotations(tmp_path / "a.json", 12)), jobs=1)
    means = table(runs[0], "summary").query("score == 'instance_ari' and null == 'swap'").set_index("head")["mean"]
    assert means[0] > means[1]
    best = table(runs[0], "comparison").query("of == 'best head' and score.str.startswith('instance_ari')")
    assert set(best["score"]) == {"instance_ari", "instance_ari over position"}
    assert set(best["head_a"]) == set(best["head_b"]) == {1}


def test_a_run_against_itself_differs_by_nothing(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name, 6) for name in ("one", "two"))
    run_stats([one, two], annotations=str(write_annotations(tmp_path / "a.json", 6)))
    found = table(one, "comparison")
    assert (found["difference"] == 0).all()
    assert (found["p"] == 1).all()
    assert (table(one, "agreement_runs")["mean"] == 1).all()
    # on its own grid the comparison's figures are the summary's
    summary = table(one, "summary").query("score == 'pair_ari' and null == 'position'").sort_values("head")
    heads = found.query("score == 'pair_ari' and of == 'head'")
    np.testing.assert_allclose(heads["mean_a"], summary["mean"], rtol=1e-5)
    gains = found.query("score == 'pair_ari over position' and of == 'head'")
    np.testing.assert_allclose(gains["mean_a"], summary["gain"], rtol=1e-4, atol=1e-6)


def test_up_sampling_is_by_nearest_neighbour() -> None:
    assert (
        upsample(np.array([1, 2, 3, 4]), (2, 2), (4, 4)).reshape(4, 4).tolist()
        == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2
    )
    assert upsample(np.array([1, 2]), (1, 2), (1, 3)).tolist() == [1, 2, 2]
    values = np.arange(scenes.GRID[0] * scenes.GRID[1])
    assert (upsample(values, scenes.GRID, scenes.GRID) == values).all()

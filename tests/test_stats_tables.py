"""`stats` of one run: its tables, on runs whose answers are known, and what it refuses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray
import zarr

from batchjob.codes import STATUS
from batchjob.errors import UserError
from batchjob.metrics import catalogue
from batchjob.metrics.catalogue import Score
from batchjob.metrics.objects import Labelled
from batchjob.metrics.uncertainty import first_half
from batchjob.report import table as heads_table
from batchjob.stats import run_stats, text
from batchjob.store.run import Run
from tests import scenes
from tests.made_up_runs import KINDS, image_ids, table, write_annotations, write_run

COUNT = 18


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Makes a run of COUNT scenes and its statistics; one image failed, one is not annotated, one has a wrong size."""
    folder = tmp_path_factory.mktemp("stats")
    run = write_run(folder / "made-up", COUNT, failed=[3], without_objects=[4, 5])
    annotations = write_annotations(folder / "instances.json", COUNT, missing=[4], wrong_size=[5])
    return run, run_stats([run], annotations=str(annotations), csv=True)


def by_kind(run: Path, score: str, null: str, column: str) -> dict[str, float]:
    found = table(run, "summary").query("score == @score and null == @null").sort_values("head")
    return dict(zip(KINDS, found[column], strict=True))


def test_the_four_kinds_of_attention_score_what_they_must(scored: Any) -> None:
    run, _ = scored
    instance, image = (by_kind(run, name, "position", "mean") for name in ("instance_ari", "image_ari"))
    for kind, (of_instances, of_image) in {"class": (0, 0.66), "instance": (0.99, 1), "random": (0, 0)}.items():
        assert instance[kind] == pytest.approx(of_instances, abs=0.12)
        assert image[kind] == pytest.approx(of_image, abs=0.12)
    over = by_kind(run, "instance_ari", "position", "gain")
    assert over["instance"] > 0.1
    assert abs(over["local"]) < 0.15
    assert over["class"] < -0.4


def test_gains_over_the_null_models_are_those_of_each_kind_of_attention(scored: Any) -> None:
    run, _ = scored
    over = by_kind(run, "instance_ari", "swap", "gain")
    assert over["instance"] > 0.5
    assert abs(over["local"]) < 0.1  # a purely local head scores as high with any photo's objects
    assert abs(over["random"]) < 0.05
    assert over["class"] < 0.05  # its clusters join the objects of a class, most of all those of the image itself
    assert by_kind(run, "image_ari", "swap", "gain")["class"] > 0.3
    assert by_kind(run, "pair_auc", "distance", "mean")["instance"] > 0.99
    # even at equal distance it is above a half: local attention is stronger near the edges, for any objects
    assert by_kind(run, "pair_auc_matched", "swap", "mean")["local"] > 0.7
    for score in ("pair_auc", "pair_auc_matched"):
        assert by_kind(run, score, "swap", "gain")["instance"] > 0.2
        assert abs(by_kind(run, score, "swap", "gain")["local"]) < 0.1
    assert by_kind(run, "jaccard_60", "swap", "n")["class"] == COUNT - 3
    nulls = table(run, "summary").groupby("score")["null"].unique()
    assert set(nulls["instance_ari"]) == {"swap", "position"}
    assert set(nulls["pair_auc"]) == {"swap", "distance"}
    assert set(nulls["pair_auc_matched"]) == set(nulls["corloc"]) == set(nulls["jaccard_oracle_60"]) == {"swap"}
    assert set(nulls["coherence"]) == set(nulls["attention_distance"]) == set(nulls["prefix_mass"]) == {""}


def test_the_best_head_is_chosen_by_its_gain_over_swap_and_few_images_claim_nothing(scored: Any) -> None:
    run, lines = scored
    chosen = table(run, "selection").query("score == 'instance_ari'").set_index("null")
    assert list(chosen.index) == ["swap", "position"]
    assert set(zip(chosen["layer"], chosen["head"], chosen["heads"], strict=True)) == {
        (11, KINDS.index("instance"), len(KINDS))
    }
    assert (chosen["chosen_n"] + chosen["n"] == COUNT - 3).all()
    text = "\n".join(lines)
    n = chosen["n"].iloc[0]
    start = f"An example, {n} photos: head 1 has ARI" if n < 8 else "Too few to say whether head 1 separates objects"
    assert start in text
    assert "evidence" not in text
    assert "heads over all images" not in text  # heads are not counted with fewer than twenty images
    assert "Exploratory, pair_auc:" in text
    assert ("pair_ari over position by distance" in text) == (n >= 8)
    first_row = next(line for line in lines if line.startswith("kmeans"))
    assert first_row.split()[:3] == ["kmeans", "11", "1"]


def test_counts_of_better_and_worse_heads_are_those_of_the_sure_gains(scored: Any) -> None:
    run, _ = scored
    summary, selection = table(run, "summary"), table(run, "selection")
    for row in selection.to_dict("records"):
        mine = summary.query("score == @row['score'] and null == @row['null'] and algorithm == @row['algorithm']")
        assert row["better"] == (mine["sure"] & (mine["gain"] > 0)).sum()
        assert row["worse"] == (mine["sure"] & (mine["gain"] < 0)).sum()
        assert row["too_few"] == row["heads"] == len(mine)  # fifteen images have a score


def test_a_score_is_added_by_one_function_and_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def labelled(own: Labelled) -> Any:
        return (own.labels != 255).sum(axis=1).astype(float)

    row = Score("labelled", "labels", "labelled patches", "how many patches have a label", compute=labelled)
    row = dataclasses.replace(row, needs_objects=False, nulls=("swap",), is_column=True)
    monkeypatch.setattr(catalogue, "SCORES", [*catalogue.SCORES, row])
    run = write_run(tmp_path / "run", 6, with_scores=False)
    run_stats([run], annotations=str(write_annotations(tmp_path / "a.json", 6)), jobs=1)
    with xarray.open_zarr(run / "scores.zarr", chunks=None) as arrays:
        assert (arrays["labelled"] == 196).all()
        assert arrays["labelled"].dims == arrays["labelled.swap"].dims == ("image", "algorithm", "layer", "head")
    assert set(table(run, "summary").query("score == 'labelled'")["mean"]) == {196.0}
    assert "labelled" in set(table(run, "scores")["score"])
    page = heads_table.scored(Run(run), table(run, "summary"))
    assert ("labelled patches", "how many patches have a label") in [(c.name, c.hint) for c in page.columns]


def test_images_that_can_not_be_scored_are_counted_and_reported(scored: Any) -> None:
    run, lines = scored
    counts = json.loads((run / "stats" / "counts.json").read_text())
    assert counts["images"] == COUNT
    assert counts["failed"] == 1
    assert counts["not annotated"] == 1
    assert counts["annotated at another size"] == 1
    assert counts["annotated"] == counts["with two of a category"] == COUNT - 3
    assert "1 image annotated at another size: left out" in lines


def test_scores_are_arrays_that_plain_xarray_opens_and_one_tidy_table(scored: Any) -> None:
    run, _ = scored
    with xarray.open_zarr(run / "scores.zarr", chunks=None) as arrays:
        assert arrays["instance_ari"].dims == ("image", "algorithm", "layer", "head")
        assert arrays["instance_ari.position"].dims == ("image", "algorithm", "layer", "head")
        assert arrays["jaccard_60"].dims == ("image", "layer", "head")
        assert arrays["jaccard_oracle_60"].dims == ("image", "layer")
        values = arrays["instance_ari"].values[:, 0, 0, 1]
        assert np.isnan(values[[3, 4, 5]]).all()
        assert np.isfinite(np.delete(values, [3, 4, 5])).all()
        coherence = arrays["coherence"].values[:, 0, 0, 0]
        assert np.isnan(coherence).sum() == 1  # it needs no annotation
    tidy = table(run, "scores")
    assert list(tidy.columns) == ["image_id", "algorithm", "layer", "head", "score", "value"]
    mine = tidy[(tidy.score == "instance_ari") & (tidy["head"] == 1)]
    assert mine["image_id"].tolist() == [i for row, i in enumerate(image_ids(COUNT)) if row not in (3, 4, 5)]
    np.testing.assert_array_equal(mine["value"], np.delete(values, [3, 4, 5]))
    assert tidy["value"].notna().all()
    for name in ("scores", "summary", "selection", "pairs", "modifiers", "agreement"):
        assert len(pd.read_csv(run / "stats" / f"{name}.csv")) == len(table(run, name)) > 0


def test_the_table_of_pairs_has_a_row_a_pair_and_bins_that_count_them_all(scored: Any) -> None:
    run, _ = scored
    pairs, bins = table(run, "pairs"), table(run, "modifiers")
    expected = sum(n * (n - 1) // 2 for n in ((2, 3, 6)[i % 3] for i in range(COUNT) if i not in (3, 4, 5)))
    assert len(pairs) == expected
    assert pairs["distance"].min() > 2  # the disks do not touch
    assert (pairs["smaller"] <= pairs["larger"]).all()
    held_out = pairs["image_id"][~first_half(pairs["image_id"].tolist())]
    for _, of_it in bins.groupby(["head", "modifier"]):
        assert of_it["pairs"].sum() == len(held_out) < expected  # the other half chose the head
    instance = bins[(bins["head"] == 1) & (bins["modifier"] == "distance")]
    assert (instance["pair_ari"] > 0.9).all()
    several = bins[bins["images"] > 1]  # one image has no interval
    assert len(several) > 0
    assert (several["pair_ari_low"] <= several["pair_ari"] + 1e-9).all()
    assert (several["pair_ari"] <= several["pair_ari_high"] + 1e-9).all()


def test_the_table_of_agreement_shows_heads_that_agree(scored: Any) -> None:
    run, _ = scored
    found = table(run, "agreement").set_index(["first", "second"])["mean"]
    assert len(found) == 6
    assert found["0", "1"] > 0.4  # class and instance share the background
    assert abs(found["1", "3"]) < 0.1


@pytest.mark.slow
def test_the_number_of_processes_does_not_change_the_tables(
    scored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = scored
    monkeypatch.setattr("batchjob.stats.pool.ROWS_AT_ONCE", 5)
    other = write_run(tmp_path / "made-up", COUNT, failed=[3], without_objects=[4, 5])
    annotations = write_annotations(tmp_path / "instances.json", COUNT, missing=[4], wrong_size=[5])
    run_stats([other], annotations=str(annotations), jobs=2)
    for name in ("summary", "selection", "pairs", "modifiers", "agreement"):
        pd.testing.assert_frame_equal(table(run, name), table(other, name))
    keys = ["score", "layer", "head", "image_id"]
    one, two = (table(r, "scores").astype({"score": str, "image_id": str, "algorithm": str}) for r in (run, other))
    one, two = (t.sort_values(keys, ignore_index=True) for t in (one, two))
    pd.testing.assert_frame_equal(one, two)


def test_without_annotations_the_other_scores_are_there_and_a_line_says_how_to_get_the_rest(tmp_path: Path) -> None:
    run = write_run(tmp_path / "plain", 4, with_scores=False)
    text = "\n".join(run_stats([run]))
    scores = set(table(run, "summary")["score"])
    assert {"coherence", "clusters", "largest_cluster", "smallest_cluster", "prefix_mass"} <= scores
    assert not scores & {"instance_ari", "pair_auc", "entropy", "jaccard_60"}
    assert len(table(run, "agreement")) == 6
    assert f"batchjob stats {run} --annotations instances.json" in text
    assert "--scores attention,pairs" in text
    assert "--weights random" in text
    again = "\n".join(run_stats([run], annotations=str(write_annotations(tmp_path / "a.json", 4))))
    assert "photos: head 1 has ARI" in again or "photo: head 1 has ARI" in again
    run_stats([run])  # tables that depend on annotations are gone with them
    with xarray.open_zarr(run / "scores.zarr", chunks=None) as arrays:
        assert "instance_ari" not in arrays


def test_annotations_that_were_left_out_are_reported_by_cause(tmp_path: Path) -> None:
    run, path = write_run(tmp_path / "run", 3), write_annotations(tmp_path / "a.json", 3)
    content = json.loads(path.read_text())
    broken = content["annotations"][0] | {"id": 900, "segmentation": {"size": [4, 4], "counts": [3]}}
    content["annotations"] += [broken, broken | {"id": 901}]
    path.write_text(json.dumps(content))
    said = [line for line in run_stats([run], annotations=str(path)) if "annotations left out: " in line]
    assert len(said) == 1
    assert said[0].startswith("2 annotations left out: ")
    assert text.left_out(json.loads((run / "stats" / "counts.json").read_text())) == said


def test_wrong_input_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run: it has no labels\.zarr"):
        run_stats([tmp_path])
    run = write_run(tmp_path / "run", 2)
    with pytest.raises(UserError, match="named twice"):
        run_stats([run, run])
    with pytest.raises(UserError, match=r"--jobs -1 is not a number of processes"):
        run_stats([run], jobs=-1)
    with pytest.raises(UserError, match="No such file"):
        run_stats([run], annotations=str(tmp_path / "missing.json"))
    others = tmp_path / "others.json"
    others.write_text(json.dumps({"images": [{"id": 7, "file_name": "other.jpg"}], "annotations": []}))
    with pytest.raises(
        UserError, match=r"annotates none of the 2 images .* 'other.jpg', the data has .*'val/0000.jpg'"
    ):
        run_stats([run], annotations=str(others))


def test_a_run_without_a_labelled_image_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    failed = write_run(tmp_path / "failed", 3, failed=(0, 1, 2))
    gone = write_run(tmp_path / "gone", 3, failed=(0, 1, 2))
    zarr.open_group(str(gone / "labels.zarr"), mode="r+")["status"][:2] = STATUS["missing"]  # type: ignore[index]
    pending = write_run(tmp_path / "pending", 3, failed=(0, 2), pending=(1,))
    with pytest.raises(UserError, match=r"all images of \S+failed failed \(batchjob show .* another RUN for them"):
        run_stats([failed])
    with pytest.raises(UserError, match=r"missing or unreadable \(2\) are tried again by: .* --retry-failed"):
        run_stats([gone])
    with pytest.raises(UserError, match=r"pending has no labelled image yet; go on with: batchjob run DATA \S+pending"):
        run_stats([pending])
    assert not (failed / "stats").exists()


def test_a_block_of_failed_images_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.stats.pool.ROWS_AT_ONCE", 2)
    run = write_run(tmp_path / "run", 4, failed=(2, 3))
    assert "4 images, 2 of them failed" in "\n".join(run_stats([run]))
    assert set(table(run, "summary")["n"]) <= {0, 1, 2}


def test_images_that_are_not_labelled_yet_are_not_said_to_have_failed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 4, failed=(1,), pending=(2, 3))
    assert "4 images, 1 of them failed, 2 not labelled yet" in run_stats([run])


def test_failures_that_may_pass_are_reported_with_the_command_that_retries_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 6, failed=(1, 2, 3))
    status = zarr.open_group(str(run / "labels.zarr"))["status"]
    assert "--retry-failed" not in "\n".join([*run_stats([run]), *run_stats([run], verbose=False)])
    status[1:3] = [STATUS["missing"], STATUS["unreadable"]]  # type: ignore[index]
    for verbose in (True, False):
        lines = run_stats([run], verbose=verbose)
        at = next(i for i, line in enumerate(lines) if "3 of them failed" in line or "3 failed" in line)
        assert lines[at + 1].startswith(
            f"those that are missing or unreadable (2) are tried again by: batchjob run DATA {run}"
        )
        assert lines[at + 1].endswith(" --retry-failed (with make: RETRY_FAILED=1)")
    assert json.loads((run / "stats" / "counts.json").read_text())["missing or unreadable"] == 2


@pytest.mark.parametrize("verbose", [True, False])
def test_stats_says_how_many_clusterings_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verbose: bool
) -> None:
    monkeypatch.setattr("batchjob.stats.pool.ROWS_AT_ONCE", 2)  # the blocks add up
    run = write_run(tmp_path / "run", 6, failed=(3,), unsettled=[(0, 1), (0, 2), (4, 0), (5, 3)])
    lines = run_stats([run], verbose=verbose)
    said = "k-means settled in 80 % of 20 clusterings. In the others it found its best partition only once: a run with"
    assert [line for line in lines if "settled" in line] == [f"{said} --repeats 3 shows what moves."]
    counts = json.loads((run / "stats" / "counts.json").read_text())
    assert (counts["clusterings by kmeans"], counts["settled by kmeans"]) == (20, 16)


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [("agglomerative", []), ("hdbscan", []), ("spectral", ["the k-means of spectral settled in all 8 clusterings."])],
)
def test_only_algorithms_that_start_at_random_are_said_to_settle(
    tmp_path: Path, algorithm: str, said: list[str]
) -> None:
    run = write_run(tmp_path / "run", 2, unsettled=[])
    zarr.open_group(str(run / "labels.zarr"))["algorithm"][:] = np.array([algorithm], object)  # type: ignore[index]
    assert [line for line in run_stats([run]) if "settle" in line] == said


def test_a_view_describes_its_run(tmp_path: Path) -> None:
    view = Run(write_run(tmp_path / "run", 2, weights="random"))
    assert view.is_random
    assert (view.algorithms, view.layers, view.heads) == (("kmeans",), (11,), (0, 1, 2, 3))
    assert view.geometry.grid == scenes.GRID
    assert view.ids == image_ids(2)

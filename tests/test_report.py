"""The report's text and data: what it says about a run, and how much it can hold."""

import base64
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchjob.errors import UserError
from batchjob.figures import look
from batchjob.figures.canvas import decimals
from batchjob.figures.look import scores_of_head
from batchjob.figures.photos import open_run
from batchjob.report import answer, codebook, facts
from batchjob.report import browser as packing
from batchjob.report import page as report_page
from batchjob.report.headmap import head_map
from batchjob.store.run import Run


def test_a_codebook_has_a_section_of_its_own_with_a_line_for_every_cluster(codebook_page: Path, page: Path) -> None:
    text, run = codebook_page.read_text(), codebook_page.parent
    section = text.split('<section id="codebook">')[1].split("</section>")[0]
    assert section.count("data:image/webp") == section.count('<details class="book"') == 3  # heads
    assert section.count("<tr data-find") == 3 * 6
    for column in ("Share of rows", "Images", "Best category", "Lift", "Mean x", "Mean y"):
        assert section.count(f">{column}</button>") == 3
    assert '<section id="codebook">' not in page.read_text()
    assert 'href="#codebook"' not in page.read_text()
    view = open_run(run)
    clusters = codebook.clusters_of(view, 11, 1).set_index("cluster")
    labels = view.data["labels"].values[view.ok_rows, 0, 0, 1]
    for number in range(6):
        assert clusters.loc[number, "share"] == pytest.approx((labels == number).mean())
        y, x = np.nonzero((labels == number).any(0))
        counts = (labels == number).sum(0)[y, x]
        assert clusters.loc[number, "x"] == pytest.approx(np.average((x + 0.5) / 4, weights=counts))
        assert clusters.loc[number, "y"] == pytest.approx(np.average((y + 0.5) / 4, weights=counts))


def test_what_was_left_out_of_the_annotations_stands_on_the_page(codebook_page: Path, tmp_path: Path) -> None:
    shutil.copytree(codebook_page.parent, tmp_path / "run")
    counts = tmp_path / "run" / "stats" / "counts.json"
    counts.write_text(json.dumps({"images": 3, "left out: a size of 4x4": 2}))
    rows = facts.gather(Run.checked(tmp_path / "run", stats=False)).rows
    assert ("Left out", "2 annotations left out: a size of 4x4") in rows


def test_the_share_of_settled_clusterings_stands_below_the_counts_of_images(
    runs: list[Path], codebook_page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "pictures", lambda runs: [])
    shutil.copytree(runs[0], tmp_path / "run")
    counts = tmp_path / "run" / "stats" / "counts.json"
    assert json.loads(counts.read_text())["clusterings by kmeans"] == 9 * 2 * 3  # images, layers, heads
    counts.write_text(json.dumps({"images": 10, "clusterings by kmeans": 54, "settled by kmeans": 44}))
    text = report_page.render([Run(tmp_path / "run")])
    below = text.split("</dl>")[1].split("<section")[0]
    assert below.strip() == (
        '<p class="quiet">K-means settled in 81 % of 54 clusterings. In the others it found its best partition only '
        "once: a run with --repeats 3 shows what moves.</p>"
    )
    assert "settled" not in codebook_page.read_text()  # a run in dataset scope does not know


def test_the_page_says_what_its_p_values_test(
    page: Path, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "p is from a paired sign-flip test, which tests whether the gains lie symmetrically about zero."
    assert page.read_text().split('<section id="heads">')[1].split("<form")[0].count(said) == 1
    assert answer.differences([Run(run) for run in runs]).note.endswith(said.replace("gains", "differences"))
    monkeypatch.setattr(report_page, "pictures", lambda runs: [])
    shutil.copytree(runs[0], tmp_path / "run", ignore=shutil.ignore_patterns("stats", "stats.json"))
    assert "sign-flip" not in report_page.render([Run(tmp_path / "run")])  # without statistics there are no p-values


def test_a_codebook_without_statistics_shows_how_common_clusters_are_and_how_to_get_the_rest(
    codebook_page: Path, tmp_path: Path
) -> None:
    shutil.copytree(codebook_page.parent, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "stats")
    (tmp_path / "run" / "done" / "stats.json").unlink()
    view = open_run(tmp_path / "run")
    clusters = codebook.clusters_of(view, 11, 1)
    assert clusters["share"].sum() == pytest.approx(1)
    assert [c.name for c in codebook.table_of(clusters, "").columns] == ["Cluster", "Share of rows"]
    assert f"batchjob stats {tmp_path / 'run'}" in codebook.note(view, 11)


def test_a_failed_image_is_listed_with_its_cause(page: Path) -> None:
    text = page.read_text()
    assert "val2017/cut.jpg" in text
    assert "truncated" in text


def test_failures_that_may_pass_are_reported_with_the_command_that_retries_them(
    runs: list[Path], page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "pictures", lambda runs: [])
    assert "--retry-failed" not in page.read_text()
    shutil.copytree(runs[0], tmp_path / "run")
    with (tmp_path / "run" / "failures.csv").open("a") as file:
        file.write("val2017/gone.jpg,missing,No such file\n")
    text = report_page.render([Run(tmp_path / "run")])
    section = text.split('<section id="failures">')[1].split("</section>")[0]
    assert "Those that are missing or unreadable (1) are tried again by: batchjob run " in section
    assert f"{runs[0].parent / 'data'} {tmp_path / 'run'} --model vit_tiny_patch16_224" in section
    assert "--retry-failed (with make: RETRY_FAILED=1)" in section


def test_a_page_of_very_many_images_carries_a_sample_and_says_so(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MAX_IMAGES", 4)
    monkeypatch.setattr(report_page, "pictures", lambda runs: [])
    assert "A sample of 4 of 9 labelled images" in report_page.render([open_run(runs[0])])


def test_the_browsers_data_stop_at_their_limits_whatever_the_run_holds(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = open_run(runs[0])
    everything = packing.pack([view], view.ok_rows.tolist(), [None], [(0, 2)])
    assert len(everything.json["images"]) == 9
    assert sum(len(image["runs"][0]["rows"]) for image in everything.json["images"]) == 3 * 2 * 3
    monkeypatch.setattr(packing, "IMAGES_BYTES", everything.size // 3)
    monkeypatch.setattr(packing, "ROWS_BYTES", everything.rows_size // 3)
    less = packing.pack([view], view.ok_rows.tolist(), [None], [(0, 2)])
    assert 3 <= len(less.json["images"]) < 9
    rows = [image["runs"][0]["rows"] for image in less.json["images"] if image["runs"][0]["rows"]]
    assert 0 < sum(map(len, rows)) < 18
    assert all("0,2" in places for places in rows)  # the head that is shown first goes in first


def test_every_run_of_a_page_has_attention_rows_of_its_first_head(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = open_run(runs[0])
    whole = packing.pack([view], view.ok_rows.tolist(), [None], [(0, 2)])
    monkeypatch.setattr(packing, "ROWS_BYTES", whole.rows_size)
    both = packing.pack([view, view], view.ok_rows.tolist(), [None, None], [(0, 2), (1, 1)])
    for image in both.json["images"]:
        first, second = (one["rows"] for one in image["runs"])
        assert ("0,2" in first) == ("1,1" in second) == (image["id"] in [view.ids[row] for row in view.kept_rows])


def test_the_page_holds_the_best_and_worst_images_that_did_not_choose_the_head(runs: list[Path]) -> None:
    view = open_run(runs[0])
    assert view.best is not None
    found = scores_of_head(view, *view.best)
    scores, note = found.values, found.note
    assert scores is not None
    assert note == "Only images that did not choose the head."
    known = np.flatnonzero(np.isfinite(scores))
    order = known[np.argsort(scores[known], kind="stable")]
    assert report_page._wanted(view, 0)[: 2 * min(3, len(order)) : 2] == order[::-1][:3].tolist()
    everything = packing.pack([view], view.ok_rows.tolist(), [None], [(0, 2)]).json
    chosen = everything["runs"][0]["chosen"]
    assert (view.layers[chosen["layer"]], view.heads[chosen["head"]]) == view.best
    assert chosen["note"] == note
    chose = [image["runs"][0]["row"] for image in everything["images"] if image["runs"][0]["chose"]]
    assert chose
    assert np.isnan(scores[chose]).all()
    others = [image["runs"][0]["row"] for image in everything["images"] if not image["runs"][0]["chose"]]
    assert set(known) <= set(others)


def test_the_page_says_where_images_that_chose_the_head_are_best_or_worst_too(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look, "_FEWEST_OTHERS", 100)
    view = open_run(runs[0])
    data = packing.pack([view], view.ok_rows.tolist(), [None], [(0, 2)]).json
    assert data["runs"][0]["chosen"]["note"].startswith("Over all images, also those that chose the head")
    assert not any(image["runs"][0]["chose"] for image in data["images"])


def test_a_score_is_shortened_only_where_two_decimals_stay_the_same() -> None:
    values = np.array([[-0.0045123, -0.00496, 0.123456789], [0.00501, 0.004999, np.nan]], np.float32)
    found = packing.rounded(values)
    assert [[value if value is None else decimals(value) for value in row] for row in found] == [
        ["0.00", "0.00", "0.12"],
        ["0.01", "0.00", None],
    ]
    assert found[0][2] == 0.1235


def test_runs_without_a_common_image_get_no_page(runs: list[Path]) -> None:
    both = [Run(run) for run in runs]
    both[1].__dict__["ids"] = [f"elsewhere-{i}.jpg" for i in range(len(both[1].ids))]
    with pytest.raises(UserError) as told:
        report_page.render(both)
    assert str(told.value) == (
        f"the runs have no labelled image in common ('{both[0].ids[both[0].ok_rows[0]]}' in {runs[0]}, "
        f"'elsewhere-{both[1].ok_rows[0]}.jpg' in {runs[1]}); give runs of one DATA, or make a report of each"
    )


def test_the_page_has_one_word_for_one_thing(both_runs: Path, codebook_page: Path) -> None:
    for path in (both_runs, codebook_page):
        text = re.sub(r"<(script|style)\b.*?</\1>", "", path.read_text(), flags=re.S)
        text = re.sub(r"<pre.*?</pre>|base64,[^\"]+", "", text, flags=re.S)
        for word in ("swap null", "instance ari", "Prevalence", "Codebook", "the browser", "image browser"):
            assert word not in text, (path, word)
        assert ">Other photos' objects</button>" in text.replace("&#39;", "'")
    assert "ARI within categories over position alone" in both_runs.read_text()
    assert "one colour stands for one of the head's centroids" in codebook_page.read_text().replace("&#39;", "'")


def test_attention_of_fine_grids_is_averaged_over_cells() -> None:
    rows = np.arange(16 * 16, dtype=np.float32).reshape(16, 16)
    pooled = packing.pool(rows, (4, 4), 2)
    assert pooled.shape == (4, 4)
    corner = [0, 1, 4, 5]  # the patches of the upper left cell
    assert pooled[0, 0] == pytest.approx(rows[np.ix_(corner, corner)].mean())
    assert packing.pool(rows, (4, 4), 3).shape == (4, 4)  # two rows of two cells, the last ones smaller


def test_figures_stand_on_a_clear_ground_in_an_ink_for_light_and_dark_pages(page: Path) -> None:
    found = re.findall(r'class="paper"[^>]*base64,([^"]+)"', page.read_text())
    assert len(found) >= 5
    for data in found:
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.mode == "RGBA"
            pixels = np.asarray(image)
        assert pixels[0, 0, 3] == 0
        heading = pixels[10:60][pixels[10:60, :, 3] > 250][:, :3]
        assert 90 < np.median(heading) < 160


def test_differences_of_runs_are_found_in_either_order(runs: list[Path]) -> None:
    both = [Run(run) for run in runs]
    found = [answer.differences(named) for named in (both, both[::-1])]
    assert found[0].rows
    assert found[0] == found[1]
    assert found[0].header[3:5] == ["first", "second"]


def test_the_page_does_not_ask_for_statistics_that_the_run_cannot_have(runs: list[Path], tmp_path: Path) -> None:
    both = [Run(run) for run in runs]
    for run in both:
        run.__dict__["table"] = lambda name: None
    assert answer.differences(both).note.endswith(f"batchjob stats {runs[0]} {runs[1]}")
    both[0].__dict__["options"] = {**both[0].options, "weights": "", "resize": "crop"}
    assert "second is untrained: a null model" in answer.differences(both).note
    both[1].__dict__["options"] = {**both[1].options, "weights": ""}
    both[0].__dict__["geometry"] = dataclasses.replace(both[0].geometry, resize="crop")
    assert answer.differences(both).note == (
        "The runs are not compared patch by patch: second was resized by squash, first by crop."
    )
    both[0].__dict__["geometry"] = both[1].geometry
    both[0].__dict__["ids"] = ["elsewhere.jpg"]
    assert answer.differences(both).note == "The runs are not compared: they have no image in common."


def test_the_map_holds_every_heads_gain_and_link(runs: list[Path]) -> None:
    run = Run(runs[0])
    summary = run.table("summary")
    assert summary is not None
    summary["gain"] = 0.1 * summary["head"] - 0.05 * (summary["layer"] - 9)
    summary["sure"] = summary["gain"] > 0.1
    run.__dict__["table"] = lambda name: summary
    found = head_map(run, 1)
    assert found is not None
    mine = summary[(summary["score"] == "instance_ari") & (summary["null"] == "swap")].set_index(["layer", "head"])
    assert [layer for layer, _ in found.rows] == [10, 11]
    for layer, tiles in found.rows:
        for head, tile in enumerate(tiles):
            assert float(tile.text.replace("−", "-")) == pytest.approx(mine.loc[(layer, head), "gain"], abs=0.0051)
            assert tile.share == round(100 * abs(mine.loc[(layer, head), "gain"]) / 0.15)
            assert tile.is_sure == (mine.loc[(layer, head), "gain"] > 0.1)
            assert tile.link == f"#layer2={layer}&head2={head}&algorithm2=kmeans"

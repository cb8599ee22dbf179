"""The pictures of runs: each kind that the run has data for, outlines of objects, the best and worst images."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from batchjob.errors import UserError
from batchjob.figures import Look, canvas, objects, pictures, write, write_figures
from batchjob.figures.look import chosen_head, scores_of_head
from batchjob.figures.outlines import Outline, choose_colours, count_words, key_entries, sharing
from batchjob.figures.overview import overview
from batchjob.figures.palette import OBJECT_COLOURS, object_likeness
from batchjob.figures.photos import open_run, photo_of
from batchjob.figures.pictures import extremes, grids, head_gallery, models
from batchjob.metrics import catalogue
from batchjob.metrics.uncertainty import first_half
from batchjob.report.browser import pack
from batchjob.stats.run import run_stats
from batchjob.store.run import Run
from tests import made_up_runs
from tests.runs import plan_what_is_there


def test_every_kind_of_figure_is_written_for_runs_that_hold_it(runs: list[Path]) -> None:
    look = Look(images="best", count=2, heads_across=2, query=(1, 2), formats=("svg",))
    names = {path.name.split("-layer")[0] for path in write_figures(runs, look)}
    assert {"overview.svg", "grid", "extremes-0", "masks", "layers-cls.svg", "layers-query.svg", "models.svg"} <= names
    assert {f"stats-{kind}.svg" for kind in ("forest", "gain", "nulls", "distance", "instances")} <= names
    assert len(list((runs[0] / "figures").glob("grid-layer-*-heads-*.svg"))) == 2


def test_pictures_that_the_present_statistics_have_nothing_to_show_for_are_removed(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    folder = tmp_path / "run" / "figures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("stats-nulls.png", "stats-forest.pdf", "stats-notes.txt", "head-9-layer-9.png"):
        (folder / name).touch()
    monkeypatch.setattr(write, "charts", lambda run: iter([("stats-forest", Figure())]))
    names = {path.name for path in write_figures(tmp_path / "run", Look(count=1, formats=("png",)))}
    assert {path.name for path in folder.iterdir()} == names | {
        "stats-forest.pdf",
        "stats-notes.txt",
        "head-9-layer-9.png",
    }


@pytest.mark.parametrize(
    ("look", "told"),
    [
        (Look(head=9), "--head 9 is not in"),
        (Look(layer=3), "--layer 3 is not in"),
        (Look(images="nothing.jpg"), "image 'nothing.jpg' is not in"),
        (Look(query=(40, 0)), "outside the grid of 4×4"),
    ],
)
def test_what_a_run_does_not_have_is_refused_in_a_line(runs: list[Path], look: Look, told: str) -> None:
    with pytest.raises(UserError, match=told):
        write_figures(runs[0], look)


def test_a_photo_that_is_gone_is_grey_and_the_rest_of_the_page_stays(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    index = json.loads((tmp_path / "run" / "index" / "index.json").read_text())
    (tmp_path / "run" / "index" / "index.json").write_text(json.dumps(index | {"root": str(tmp_path / "gone")}))
    plan_what_is_there(tmp_path / "run")
    view = open_run(tmp_path / "run")
    photo = photo_of(view, int(view.ok_rows[0]))
    assert not photo.found
    assert len(np.unique(photo.pixels)) == 1


def box_of(outline: Outline) -> tuple[float, ...]:
    """Returns (left, top, right, bottom) around all lines."""
    points = np.concatenate(outline.lines)
    return (*points.min(0), *points.max(0))


def test_objects_are_outlined_by_their_masks_crowds_and_small_ones_apart(runs: list[Path]) -> None:
    run = open_run(runs[0])
    found = objects.objects_of(run, run.ids.index("val2017/photo-0.jpg"))
    assert [o.kind for o in found] == ["instance", "instance", "small", "crowd"]
    assert {o.category for o in found} == {"square"}
    assert box_of(found[0]) == pytest.approx((8 / 128, 30 / 96, 52 / 128, 70 / 96), abs=0.01)
    assert box_of(found[3]) == pytest.approx((0, 0, 120 / 128, 20 / 96), abs=0.01)


def test_without_the_annotations_the_patches_of_each_instance_are_outlined(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    root = runs[0].parent / "data" / "annotations" / "instances_val2017.json"
    root.rename(tmp_path / "gone")
    try:
        objects._annotations.cache_clear()
        run = Run(tmp_path / "run")
        row = run.ids.index("val2017/photo-0.jpg")
        found = objects.objects_of(run, row)
    finally:
        (tmp_path / "gone").rename(root)
        objects._annotations.cache_clear()
    assert [(o.category, o.kind) for o in found] == [("square", "instance")] * 2
    owner = run.data["instance"].values[row]
    y, x = np.nonzero(owner == 0)
    edges = x.min() / 4, y.min() / 4, (x.max() + 1) / 4, (y.max() + 1) / 4
    assert box_of(found[0]) == pytest.approx(edges)
    assert not objects.objects_of(Run(runs[0]), Run(runs[0]).ids.index("val2017/cut.jpg"))


def test_the_annotations_that_were_scored_last_are_drawn(runs: list[Path], tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other.json"
    shutil.copytree(runs[0], run)
    known = json.loads((runs[0].parent / "data" / "annotations" / "instances_val2017.json").read_text())
    box = {"bbox": [64, 0, 64, 96], "segmentation": [[64, 0, 128, 0, 128, 96, 64, 96]], "area": 64 * 96}
    one = {"id": 1, "image_id": 0, "category_id": 5, "iscrowd": 0} | box
    other.write_text(
        json.dumps(known | {"annotations": [one, one | {"id": 2}], "categories": [{"id": 5, "name": "half"}]})
    )
    row = Run(run).ids.index("val2017/photo-0.jpg")
    run_stats([run], annotations=str(other), say=str)
    found = objects.objects_of(Run(run), row)
    assert [(o.category, o.kind) for o in found] == [("half", "instance"), ("half", "small")], "one owns every patch"
    assert box_of(found[0]) == pytest.approx((0.5, 0, 1, 1), abs=0.01)
    other.write_text("{}")
    objects._annotations.cache_clear()
    assert not objects.objects_of(Run(run), row), "what was scored has changed"
    run_stats([run], say=str)
    assert {o.category for o in objects.objects_of(Run(run), row)} == {"square"}


def test_a_masks_outline_runs_along_its_edge_and_round_its_holes() -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[10:50, 20:70] = 1
    mask[20:30, 30:40] = 0
    outer, hole = sorted(objects.follow(mask), key=lambda line: -np.ptp(line[:, 0]))
    assert (*outer.min(0), *outer.max(0)) == pytest.approx((20, 10, 70, 50), abs=0.6)
    assert (*hole.min(0), *hole.max(0)) == pytest.approx((30, 20, 40, 30), abs=0.6)


LINE = (np.zeros((2, 2)),)


def test_the_key_counts_what_is_scored_first() -> None:
    one = [Outline("cat", "instance", LINE), Outline("cat", "instance", LINE), Outline("dog", "instance", LINE)]
    other = [Outline("dog", "small", LINE), Outline("bird", "crowd", LINE)]
    assert count_words(one + other) == ([("cat", 2), ("dog", 1)], "+ 1 small, 1 crowd")


def test_categories_have_colours_of_their_own_while_there_are_colours() -> None:
    names = [f"kind {n}" for n in range(len(OBJECT_COLOURS))]
    colours = choose_colours([names[:3], names[2:5]], names)
    assert sorted(colours.values()) == sorted(OBJECT_COLOURS)
    assert colours == choose_colours([names[2:5], names[:3]], reversed(names))
    assert choose_colours([["rare"], ["common"], ["common"]])["common"] == OBJECT_COLOURS[0]


def test_of_more_categories_than_colours_those_of_one_photo_stay_apart() -> None:
    names = [f"kind {n}" for n in range(3 * len(OBJECT_COLOURS))]
    photos = [names[start : start + 12] for start in range(0, len(names), 12)]
    colours = choose_colours(photos)
    assert all(len({colours[name] for name in photo}) == 12 for photo in photos)


def test_categories_of_one_photo_are_not_given_colours_that_are_alike() -> None:
    names = [f"kind {n}" for n in range(12)]
    colours = choose_colours([names[:11], [names[0], names[11]]])
    places = [OBJECT_COLOURS.index(colours[names[n]]) for n in (0, 11)]
    assert object_likeness()[places[0], places[1]] < 0.1


def test_the_key_says_which_categories_share_a_colour() -> None:
    outlines = [Outline(name, "instance", LINE, "#aa55ff") for name in ("cup", "cup", "fork")]
    outlines += [Outline("spoon", "small", LINE, "#aa55ff"), Outline("person", "instance", LINE, "#ffcc00")]
    assert sharing(outlines) == {"#aa55ff": ["cup", "fork", "spoon"]}
    assert [entry.text for entry in key_entries(outlines)] == ["cup 2, fork 1, spoon (one colour)", "person 1"]


def words_of_key(room: float, lines: int = 1) -> list[str]:
    figure = canvas.sheet(6, 1)
    outlines = [Outline(f"category {n}", "instance", LINE) for n in range(5) for _ in range(5 - n)]
    outlines = [replace(o, colour=OBJECT_COLOURS[int(o.category[-1])]) for o in outlines]
    canvas.key(figure, 0.1, 0.1, room, [*outlines, Outline("dot", "small", LINE, OBJECT_COLOURS[5])], lines=lines)
    return [text.get_text() for text in figure.texts if text.get_text() not in ("", "■")]


def test_a_key_without_room_ends_with_how_many_objects_it_leaves_out() -> None:
    assert words_of_key(5.8)[-1] == "+ 1 small"
    assert words_of_key(2.5) == ["category 0 5", "category 1 4", "+ 7 more"]
    assert words_of_key(2.5, lines=2)[-2:] == ["category 4 1", "+ 1 small"]
    assert words_of_key(1.9, lines=2) == ["category 0 5", "category 1 4", "category 2 3", "+ 4 more"]
    assert words_of_key(0.1) == ["16 objects"]


def test_a_category_has_one_colour_in_all_photos_of_a_run_and_in_the_report(runs: list[Path]) -> None:
    run = open_run(runs[0])
    found = {(o.category, o.colour) for row in range(len(run.ids)) for o in objects.objects_of(run, row)}
    assert found
    assert len(found) == len({category for category, _ in found})
    packed = pack([run], run.ok_rows.tolist(), [None], [(0, 0)]).json["categories"]
    assert set(packed.items()) <= found


def test_no_heading_is_cut(runs: list[Path]) -> None:
    for name, figure in write._pictures([open_run(folder) for folder in runs], Look(count=2)):
        assert "…" not in figure.texts[0].get_text(), name
        if name.startswith("stats"):
            assert "…" not in figure.texts[1].get_text(), name


def test_every_word_is_on_its_sheet_and_covers_no_other(runs: list[Path]) -> None:
    seen = 0
    for name, figure in write._pictures([open_run(folder) for folder in runs], Look(count=2)):
        figure.draw_without_rendering()
        boxes = {text: text.get_window_extent() for text in figure.texts if text.get_text().strip()}
        for text, box in boxes.items():
            seen += 1
            assert figure.bbox.padded(1).fully_containsx(box.x1), (name, text.get_text())
            assert box.y0 >= -1, (name, text.get_text())
        for one, other in itertools.combinations(boxes, 2):
            assert not boxes[one].padded(-1.5).overlaps(boxes[other].padded(-1.5)), (name, one.get_text())
    assert seen > 100


def words_of(figure: Figure | None) -> str:
    """Returns all words of a sheet, in one line."""
    assert figure is not None
    return " ".join(" ".join(text.get_text().split()) for text in figure.texts)


def test_the_null_in_a_caption_is_that_of_what_is_shown(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(runs[0])
    table = made_up_runs.table(run.folder, "summary")
    table["null_mean"] = 0.01 * table["head"] + 0.1 * (table["layer"] == 11)
    summary = pd.concat([table.assign(algorithm="ward", null_mean=0.9), table])
    read = Run.table
    monkeypatch.setattr(Run, "table", lambda run, name: summary if name == "summary" else read(run, name))
    rows = run.ok_rows.tolist()
    for head in (0, 2):
        for figure in (head_gallery(run, rows, 11, head, Look()), extremes(run, 11, head, Look())):
            assert f"(with other photos' objects 0.1{head} on average)" in words_of(figure)
    (_, figure), *_ = grids(run, rows[:1], run.layers[0], Look())
    mean = np.mean(run.heads) * 0.01 + 0.1 * (run.layers[0] == 11)
    assert f"objects {canvas.decimals(mean)} on average over the heads)" in words_of(figure)


def test_captions_of_a_run_with_two_algorithms_name_the_one_that_the_scores_are_of(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(runs[0])
    for algorithms in (("kmeans",), ("kmeans", "ward")):
        monkeypatch.setattr(Run, "patch_algorithms", algorithms)
        for head in (None, 0):
            assert (", by kmeans (" in pictures._score_words(run, 11, head)) == (len(algorithms) == 2)


def test_a_dash_over_a_photo_is_explained(runs: list[Path]) -> None:
    run = open_run(runs[0])
    assert run.best is not None
    found = scores_of_head(run, *run.best)
    scores = found.values
    assert scores is not None
    known = [row for row in run.ok_rows.tolist() if np.isfinite(scores[row])]
    unknown = [row for row in run.ok_rows.tolist() if np.isnan(scores[row])]
    why = "–: no score, or the image chose the head." if found.leaves_out else "–: no score."
    assert why in words_of(head_gallery(run, unknown[:1], *run.best, Look()))
    assert "–: no score" not in words_of(head_gallery(run, known[:1], *run.best, Look()))


def test_the_picture_of_several_runs_says_which_is_which_and_has_no_numbers(runs: list[Path]) -> None:
    opened = [open_run(folder) for folder in runs]
    figure = models(opened, opened[0].ok_rows[:3].tolist(), Look())
    words = words_of(figure)
    for run in opened:
        assert f"{run.folder.name}: attention of {run.model}" in words
    assert "Numbers" not in words
    assert not any(text.get_text().lstrip("−–")[:2] in ("0.", "1.") for text in figure.texts)


def test_what_a_run_clustered_stands_in_its_name(runs: list[Path], tmp_path: Path) -> None:
    opened = [open_run(runs[0]), Run(shutil.copytree(runs[0], tmp_path / "keys"))]
    opened[1].options = {**opened[1].options, "cluster_on": "key"}
    words = words_of(models(opened, opened[0].ok_rows[:1].tolist(), Look()))
    assert f"keys: keys of {opened[0].model} (untrained), layer " in words


def test_charts_of_a_run_with_one_layer_name_it(tmp_path: Path) -> None:
    run = Run(made_up_runs.write_run(tmp_path / "run", 12))
    run_stats([run.folder], annotations=str(made_up_runs.write_annotations(tmp_path / "a.json", 12)), jobs=1)
    assert len(run.layers) == 1
    charts = dict(write.charts(run))
    assert {"stats-forest", "stats-nulls", "stats-instances"} <= set(charts)
    for name, figure in charts.items():
        assert f"layer {run.layers[0]}" in words_of(figure), name


def test_objects_are_drawn_unless_they_are_switched_off(runs: list[Path]) -> None:
    said = []
    for look in (Look(), Look(objects=False)):
        run = open_run(runs[0])
        (_, figure), *_ = grids(run, run.ok_rows[:2].tolist(), 11, look)
        said.append(" ".join(text.get_text() for text in figure.texts))
    assert "square" in said[0]
    assert "Outlines:" in said[0]
    assert "square" not in said[1]


def test_the_best_images_come_before_the_worst_with_their_scores(runs: list[Path]) -> None:
    run = open_run(runs[0])
    assert run.image_score is not None
    figure = extremes(run, 11, 1, Look())
    assert figure is not None
    words = [text.get_text() for text in figure.texts]
    values = run.image_score[1][:, 0, run.layers.index(11), 1]
    best, worst = np.nanargmax(values), np.nanargmin(values)
    for row in (best, worst):
        score = f"{values[row]:.2f}".replace("-", "−")
        name = Path(run.ids[row])
        over = [words[at + 1] for at, title in enumerate(words) if title in (name.name, name.stem)]
        assert score in over, "below the id"
    assert words.index("Best") < words.index("Worst")


def test_the_overview_asks_the_question_shows_three_photos_and_answers(runs: list[Path]) -> None:
    figure = overview(open_run(runs[0]), Look())
    assert figure is not None
    words = " ".join(text.get_text() for text in figure.texts)
    assert "Do clusters of self-attention separate objects of the same class?" in words
    for word in (
        "best ",
        "median ",
        "worst ",
        "An example",
        "(n = ",
        "The head was chosen on ",
        " is from the ",
        " over all ",
    ):
        assert word in words
    assert len(figure.axes) == 2 * 3 + 1  # photos, their clusters, the forest
    assert len(figure.axes[-1].get_yticklabels()) == 6
    assert [text.get_text() for text in figure.axes[-1].texts] == ["mean ARI"]
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 7


def test_the_score_stands_over_the_clusters_that_it_belongs_to(runs: list[Path]) -> None:
    run = open_run(runs[0])
    (_, figure), *_ = grids(run, run.ok_rows[:1].tolist(), 11, Look())
    height, heads = figure.get_size_inches()[1], len(run.heads)
    attention, clusters = (figure.axes[1 + n].get_position() for n in (0, heads))
    numbers = [t for t in figure.texts if t.get_text() == "–" or t.get_text().lstrip("−").startswith(("0.", "1."))]
    assert len(numbers) == heads
    for text in numbers:
        assert clusters.y1 < text.get_position()[1] < attention.y0
        assert attention.y0 - text.get_position()[1] > 0.09 / height, "there is room for the digits"


def test_pictures_of_the_chosen_head_leave_out_the_images_that_chose_it(tmp_path: Path) -> None:
    run = Run(made_up_runs.write_run(tmp_path / "run", 24))
    run_stats([run.folder], annotations=str(made_up_runs.write_annotations(tmp_path / "a.json", 24)), jobs=1)
    assert run.best == (11, 1)
    chose = first_half(run.ids)
    best, other = (scores_of_head(run, 11, head) for head in (1, 2))
    assert best.values is not None
    assert other.values is not None
    np.testing.assert_array_equal(np.isnan(best.values), chose)
    assert np.isfinite(other.values).all()
    assert best.note == "Only images that did not choose the head."
    assert other.note == ""


def test_the_null_beside_images_that_did_not_choose_the_head_is_over_these(tmp_path: Path) -> None:
    run = Run(made_up_runs.write_run(tmp_path / "run", 24))
    run_stats([run.folder], annotations=str(made_up_runs.write_annotations(tmp_path / "a.json", 24)), jobs=1)
    assert run.best == (11, 1)
    assert run.image_score is not None
    score = run.image_score[0]
    of_null = run.read_score(f"{score}.swap")
    assert of_null is not None
    table = made_up_runs.table(run.folder, "selection")
    rows = (table["score"] == score) & (table["null"] == "swap")
    assert table["null_mean"][rows].tolist() == [pytest.approx(of_null[~first_half(run.ids), 1].mean(), abs=1e-6)]
    table["null_mean"] = np.where(rows, 0.77, 0.9)  # to tell it from that over all images, which is much like it
    table.to_parquet(run.folder / "stats" / "selection.parquet", index=False)
    assert "(with other photos' objects 0.77 on average)" in pictures._score_words(run, 11, 1)
    second = canvas.decimals(float(of_null[:, 2].mean()))
    assert f"(with other photos' objects {second} on average)" in pictures._score_words(run, 11, 2)


def test_pictures_say_where_the_images_that_chose_the_head_are_among_them(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchjob.figures.look._FEWEST_OTHERS", 100)
    run = open_run(runs[0])
    assert run.best is not None
    told = "Over all images, also those that chose the head: too few others have a score."
    assert told in words_of(extremes(run, *run.best, Look()))
    assert told in words_of(head_gallery(run, run.ok_rows.tolist(), *run.best, Look())), "also where one has no score"
    assert "a and b are over all" in words_of(overview(run, Look()))


def test_there_is_no_overview_where_the_question_has_no_answer(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer's lines then say why, and the images go by another score."""
    run = open_run(runs[0])
    run.image_score = ("image_ari", run.image_score[1]) if run.image_score else None
    assert overview(run, Look()) is None


def test_a_head_that_another_score_chose_is_not_shown_under_the_question(tmp_path: Path) -> None:
    """One photo has two objects of a class: it has the score of the question, and no other could measure the head."""
    count = 12
    run = Run(made_up_runs.write_run(tmp_path / "run", count))
    annotations = made_up_runs.write_annotations(tmp_path / "a.json", count)
    known = json.loads(annotations.read_text())
    for one in known["annotations"]:
        one["category_id"] = 1 if one["image_id"] == 1 else one["id"]  # the others' objects are each of a class
    known["categories"] = [{"id": i, "name": str(i)} for i in range(len(known["annotations"]))]
    annotations.write_text(json.dumps(known))
    run_stats([run.folder], annotations=str(annotations), jobs=1)
    assert run.image_score is not None
    assert run.image_score[0] == catalogue.QUESTION
    assert "image_ari" in set(made_up_runs.table(run.folder, "selection")["score"])
    assert run.answer[1], "they say that there is no answer"
    assert run.best is None
    assert overview(run, Look()) is None
    assert "stats-instances" not in dict(write.charts(run))
    assert chosen_head(run, Look()) == run.heads[0]


def test_the_picture_of_pairs_by_distance_is_of_the_algorithm_that_chose_the_head(tmp_path: Path) -> None:
    """Tables are sorted by the algorithms' names, and the run's first algorithm is not the first of these."""
    run = Run(made_up_runs.write_run(tmp_path / "run", 12))
    run_stats([run.folder], annotations=str(made_up_runs.write_annotations(tmp_path / "a.json", 12)), jobs=1)
    table = made_up_runs.table(run.folder, "modifiers")
    first = table.assign(algorithm="agglomerative", mean=-1.0)
    pd.concat([first, table]).to_parquet(run.folder / "stats" / "modifiers.parquet", index=False)
    shown = write._by_distance(run)
    assert len(shown) > 0
    assert set(shown["algorithm"]) == {"kmeans"}

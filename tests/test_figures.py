"""The pictures show known partitions in the right cells and colours."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from batchjob import figures
from batchjob.codes import NO_LABEL, NOISE
from batchjob.errors import UserError
from batchjob.figures import canvas, codebook, maps, nulls, palette, statistics, write
from batchjob.figures import photos as view
from batchjob.geometry import Geometry
from batchjob.metrics.uncertainty import FEWEST_IMAGES
from batchjob.store.run import Run
from tests import made_up_runs

QUARTERS = np.kron(np.array([[0, 1], [2, 3]], dtype=np.uint8), np.ones((4, 4), dtype=np.uint8))


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_equal_partitions_get_equal_colours_whatever_their_numbers() -> None:
    shuffled = np.array([3, 0, 1, 2], dtype=np.uint8)[QUARTERS]
    first, second = palette.match_colours(np.stack([QUARTERS, shuffled]))
    assert np.array_equal(first, second)
    assert len(np.unique(first)) == 4


def test_an_object_keeps_its_colour_where_the_rest_is_cut_otherwise() -> None:
    whole = np.where(QUARTERS == 3, 1, 0).astype(np.uint8)
    first, second = palette.match_colours(np.stack([QUARTERS, whole]))
    assert set(first[QUARTERS == 3]) == set(second[QUARTERS == 3])


def test_noise_and_missing_labels_are_not_clusters_and_stay_as_they_are() -> None:
    marked = QUARTERS.copy()
    marked[0, 0], marked[0, 1] = NOISE, NO_LABEL
    (matched,) = palette.match_colours(marked[None])
    assert (matched[0, 0], matched[0, 1]) == (NOISE, NO_LABEL)
    nothing = np.full((2, 3, 3), NO_LABEL, dtype=np.uint8)
    assert np.array_equal(palette.match_colours(nothing), nothing)


def test_each_patch_is_painted_in_its_clusters_colour() -> None:
    grey = np.full((80, 40, 3), 128, dtype=np.uint8)
    painted = canvas.blend(grey, QUARTERS)
    for label, (y, x) in enumerate([(10, 10), (10, 30), (70, 10), (70, 30)]):
        expected = (1 - canvas.PHOTO_SHARE) * palette.cluster_colours(4)[label] * 255 + canvas.PHOTO_SHARE * 128
        assert np.abs(painted[y, x] - expected).max() <= 1


def test_borders_run_between_clusters_and_nowhere_else() -> None:
    segments = canvas.borders(QUARTERS)
    assert len(segments) == 16
    assert np.all((segments[..., 0] == 4).all(1) | (segments[..., 1] == 4).all(1))
    assert len(canvas.borders(np.zeros((3, 5), dtype=np.uint8))) == 0


@pytest.mark.parametrize(("heads", "algorithms", "grid"), [(1, 1, (4, 4)), (3, 2, (8, 5)), (13, 1, (2, 3))])
def test_the_grid_takes_any_number_of_heads_methods_and_patches(
    heads: int, algorithms: int, grid: tuple[int, int], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 255, (60, 90, 3), dtype=np.uint8), rng.integers(0, 255, (90, 40, 3), dtype=np.uint8)]
    figure = figures.study_grid(
        photos,
        rng.random((2, heads, *grid)),
        rng.integers(0, 3, (2, algorithms, heads, *grid), dtype=np.uint8),
        titles=["a $x^2 photo", "long " * 60],
        algorithms=[f"algorithm {m}" for m in range(algorithms)],
    )
    assert len(figure.axes) == 2 * (1 + heads * (1 + algorithms)) + 1  # the bar of the colours
    (path,) = figures.save(figure, tmp_path / "grid")
    assert pixels(path).shape[2] == 3


def test_the_attended_mask_is_the_fewest_patches_that_hold_the_mass() -> None:
    values = np.array([[0.5, 0.1], [0.1, 0.3]])
    assert maps.attended(values, 0.6).tolist() == [[True, False], [False, True]]
    assert maps.attended(values, 0.5).tolist() == [[True, False], [False, False]]
    assert not maps.attended(np.full((2, 2), np.nan), 0.6).any()


def test_titles_are_names_without_folders_where_these_tell_the_images_apart() -> None:
    assert canvas.titles_of(["val/1.jpg", "val/2.jpg", "3.jpg"], [9, 9, 9]) == ["1.jpg", "2.jpg", "3.jpg"]
    assert canvas.titles_of(["a/1.jpg", "b/1.jpg"], [9, 9]) == ["a/1.jpg", "b/1.jpg"]
    assert canvas.titles_of(["a/1.jpg", "a/1.jpg"], [9, 9]) == ["1.jpg", "1.jpg"]


def test_titles_without_room_lose_their_extensions_together_and_then_their_beginnings() -> None:
    ids = [f"val2017/0000000{number}.jpg" for number in (51191, 30213, 2592)]
    room = canvas.width_of("000000051191")
    assert canvas.titles_of(ids, [9, 9, room]) == ["000000051191", "000000030213", "00000002592"]
    narrow = canvas.titles_of(ids, [9, 9, canvas.width_of("…02592")])
    assert narrow == ["000000051191", "000000030213", "…02592"]
    narrow = canvas.titles_of(["0001.jpg", "0001.png"], [9, canvas.width_of("…1.png")])
    assert narrow == ["0001.jpg", "…1.png"], "the extension tells them apart"
    assert canvas.titles_of(["x" * 50], [0.001]) == ["…x"]


def test_letters_that_the_font_lacks_are_escaped_so_that_names_stay_apart() -> None:
    assert canvas.titles_of(["é漢.jpg", "line\nbreak"], [9, 9]) == ["é\\u6f22.jpg", "line\\nbreak"]
    assert canvas.shorten("é漢.jpg", 20) == "é\\u6f22.jpg"


@pytest.mark.parametrize("words", [1, 12, 13, 40, 200])
def test_the_small_print_takes_the_height_that_it_says(words: int) -> None:
    text, heat = " ".join(["Outlined"] * words), "attention of the marked patch"
    with canvas.style():
        figure = canvas.sheet(4.5, 1 + canvas.note_height(4.5, text, heat=heat))
        canvas.note(figure, 1, text, heat=heat)
        figure.draw_without_rendering()
    colours, small = (t.get_window_extent() for t in figure.texts)
    assert colours.y0 >= small.y1
    assert 0 <= small.y0 < 0.5 * figure.dpi
    assert max(colours.x1, small.x1) <= figure.bbox.x1


@pytest.mark.parametrize("wrong", [{"count": 0}, {"heads_across": 0}, {"seed": -1}])
def test_a_look_without_images_or_heads_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(wrong)).replace('_', '-')} .* is too small; give"):
        figures.Look(**wrong)


def test_a_padded_photos_grid_reaches_beyond_the_photo() -> None:
    shown, span = view.display(Geometry(64, 64, 8, 8, "pad"), 100, 200, 448)
    assert (shown.height, shown.width) == (224, 448)
    assert span == (2.0, 1.0)


def test_a_cropped_photo_is_shown_as_the_crop_that_the_model_saw() -> None:
    shown, span = view.display(Geometry(64, 32, 8, 8, "crop"), 100, 200, 448)
    assert (shown.height, shown.width, shown.resize) == (448, 224, "crop")
    assert span == (1.0, 1.0)


def test_a_known_partition_lands_in_the_right_cell_in_the_right_colours(tmp_path: Path) -> None:
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    halves = np.kron(np.array([[0, 1]], dtype=np.uint8), np.ones((8, 4), dtype=np.uint8))
    attention = np.zeros((1, 2, 8, 8))
    attention[0, 1, :4] = 1.0  # head 1 attends to the upper half, head 0 evenly
    figure = figures.study_grid([grey], attention, np.stack([halves, 1 - halves])[None, None], titles=["photo"])
    (path,) = figures.save(figure, tmp_path / "grid", dpi=100)
    shown, size = pixels(path), figure.get_size_inches() * 100

    def at(axes: int, y: float, x: float) -> NDArray[np.int_]:
        box = figure.axes[axes].get_position()
        column, row = (box.x0 + x * box.width) * size[0], (1 - box.y1 + y * box.height) * size[1]
        return shown[int(row), int(column)].astype(int)

    dark, bright = (np.array(palette_map(v)) for v in (0.0, 1.0))
    assert np.abs(at(1, 0.25, 0.5) - dark).max() <= 3
    assert np.abs(at(2, 0.25, 0.5) - bright).max() <= 3
    assert np.abs(at(2, 0.75, 0.5) - dark).max() <= 3
    colours = palette.cluster_colours(2) * 255 * (1 - canvas.PHOTO_SHARE) + canvas.PHOTO_SHARE * 128
    for head in (3, 4):  # the second head numbers its halves the other way round and gets the same colours
        assert np.abs(at(head, 0.3, 0.25) - colours[0]).max() <= 3
        assert np.abs(at(head, 0.3, 0.75) - colours[1]).max() <= 3
    assert {text.get_text() for text in figure.texts} >= {"head 0", "head 1", "photo", "kmeans\nk = 2"}


def palette_map(value: float) -> tuple[int, ...]:
    return tuple(round(255 * v) for v in matplotlib.colormaps[palette.MAP_COLOURS](value)[:3])


# Machado, Oliveira and Fernandes 2009, table 1, severity 1: linear RGB to the RGB that a colour-blind eye sees.
EYES = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("eye", EYES)
def test_the_first_colours_of_objects_stay_apart_for_colour_blind_eyes(eye: str) -> None:
    rgb = np.array([[int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)] for text in palette.OBJECT_COLOURS[:8]])
    seen = lab(np.clip(rgb**2.2 @ np.array(EYES[eye]).T, 0, 1))
    gaps = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert gaps[~np.eye(8, dtype=bool)].min() > 25


def test_the_colours_of_objects_are_many_and_no_two_are_the_same() -> None:
    likeness = palette.object_likeness()
    assert len(likeness) >= 12
    assert np.allclose(np.diag(likeness), 1)
    assert likeness[~np.eye(len(likeness), dtype=bool)].max() < 0.45


@pytest.mark.parametrize("eye", EYES)
def test_the_first_clusters_colours_stay_apart_for_colour_blind_eyes(eye: str) -> None:
    linear = palette.cluster_colours(7) ** 2.2 @ np.array(EYES[eye]).T
    seen = lab(np.clip(linear, 0, 1))
    gaps = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert gaps[~np.eye(7, dtype=bool)].min() > 9  # a just noticeable difference is about 2.3


def lab(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """Converts linear sRGB to CIE L*a*b*, D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    f = np.cbrt(linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089]))
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def test_there_are_colours_for_every_label_a_byte_can_hold() -> None:
    colours = palette.cluster_colours(254)
    assert colours.shape == (254, 3)
    assert len(np.unique(colours, axis=0)) == 254
    assert palette.label_colours()[NO_LABEL, 3] == 0


def summary_of(layers: int, heads: int) -> pd.DataFrame:
    """Makes a summary in which gains rise with the head and fall with the layer."""
    rows = []
    for score in ("instance_ari", "image_ari", "attention_distance"):
        for layer in range(layers):
            for head in range(heads):
                gain = 0.1 * head - 0.2 * layer
                row = {"score": score, "algorithm": "" if "distance" in score else "kmeans", "n": 40}
                row |= {"layer": layer, "head": head, "mean": 0.3 + gain, "low": 0.2 + gain, "high": 0.4 + gain}
                row |= {"null_mean": 0.3, "gain": gain, "gain_low": gain - 0.1, "gain_high": gain + 0.1}
                row |= {"sure": abs(gain) > 0.1, "gain_n": 38}
                rows += [row | {"null": null} for null in ("swap", "position")]
    return pd.DataFrame(rows)


def test_the_gain_map_holds_each_heads_gain_in_its_place_and_is_symmetric_about_zero() -> None:
    rows = statistics.of_score(summary_of(3, 4), "instance_ari", null="position")
    image = statistics.gain_map(rows, heading="model").axes[0].images[0]
    shown = np.asarray(image.get_array())
    assert shown.shape == (3, 4)
    assert shown[0].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])  # the first layer on top, as in the maps
    assert image.get_clim() == pytest.approx((-0.4, 0.4))


def test_a_forest_begins_with_the_best_head_and_cuts_the_middle_of_very_many() -> None:
    axes = statistics.forest(summary_of(1, 4), score="instance_ari", heading="model").axes[0]
    names = [" ".join(label.get_text().split()) for label in axes.get_yticklabels()]
    assert names == ["head 3 0.60", "head 2 0.50", "head 1 0.40", "head 0 0.30"]  # with the mean score
    assert [text.get_text() for text in axes.texts] == ["mean ARI"]
    axes = statistics.forest(summary_of(12, 12), score="instance_ari", heading="model").axes[0]
    assert len(axes.get_yticklabels()) == 30


@pytest.mark.parametrize(("layers", "heads"), [(1, 4), (3, 4), (12, 12)])
def test_heads_are_placed_by_their_gains_over_two_nulls_and_their_names_never_overlap(layers: int, heads: int) -> None:
    figure = nulls.against_nulls(summary_of(layers, heads), score="instance_ari", heading="model")
    axes = figure.axes[0]
    points = np.asarray(axes.collections[-1].get_offsets())
    assert sorted(points[:, 0]) == pytest.approx(sorted(0.1 * h - 0.2 * x for x in range(layers) for h in range(heads)))
    assert points[:, 0] == pytest.approx(points[:, 1])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) >= min(layers * heads, 4)
    zeros = axes.transData.transform((0, 0))
    corners = [t.get_window_extent() for t in axes.texts if t.get_style() == "italic"]
    assert not any(box.x0 < zeros[0] < box.x1 or box.y0 < zeros[1] < box.y1 for box in corners)
    named = len(axes.texts) - len(corners)
    told = " ".join(figure.texts[-1].get_text().split())
    if layers * heads > 8:
        assert ("the 8 best" in told) if named == 8 else (f"{named} of the 8 best" in told)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert crossed(axes) == []
    spread = np.ptp(points[:, 0]) / np.ptp(axes.get_xlim())
    assert spread > 0.5  # the picture is well filled


def crossed(axes: Axes) -> list[str]:
    """Returns the words that a line from a point to another point's name runs through."""
    ties = [line for line in axes.lines + axes.artists if line.get_color() == canvas.QUIET and line.get_zorder() == 5]
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    found = []
    for tie in ties:
        path = axes.transData.transform_path(tie.get_path())
        end = path.vertices[-1]
        mine = min(boxes, key=lambda name: np.hypot(*(np.clip(end, boxes[name].min, boxes[name].max) - end)))
        found += [name for name, box in boxes.items() if name != mine and path.intersects_bbox(box, filled=False)]
    return found


def test_no_line_from_a_point_to_its_name_runs_through_another_name() -> None:
    """The gains are those of the embedded sample, where it did."""
    gains = {
        "position": [-0.198891, 0.103073, -0.253989, -0.050159, -0.078880, -0.056740],
        "swap": [-0.014991, 0.220803, -0.004056, 0.091483, 0.110452, 0.096184],
    }
    summary = summary_of(1, 6)
    for null, values in gains.items():
        summary.loc[summary["null"] == null, "gain"] = values * 3
    summary["gain_low"], summary["gain_high"] = summary["gain"] - 0.18, summary["gain"] + 0.2
    figure = nulls.against_nulls(summary, score="instance_ari", heading="model")
    figure.draw_without_rendering()
    assert sum(text.get_text().startswith("head") for text in figure.axes[0].texts) == 6
    assert crossed(figure.axes[0]) == []


def bins_of(images: list[int]) -> pd.DataFrame:
    """Makes the bins of one head and modifier."""
    count = len(images)
    low = np.arange(count, dtype=float)
    bins = pd.DataFrame({"low": low, "high": [*low[1:], np.inf], "pairs": [7] * count, "images": images})
    return bins.assign(pair_ari=0.4, pair_ari_low=0.3, pair_ari_high=0.5, position=0.2)


def test_a_bin_of_few_photos_says_so_and_has_open_marks_without_an_interval() -> None:
    figure = statistics.by_modifier(bins_of([1, FEWEST_IMAGES - 1, FEWEST_IMAGES]), heading="head")
    axes = figure.axes[0]
    ticks = [" ".join(label.get_text().split()) for label in axes.get_xticklabels()]
    assert ticks == ["0–1 7 pairs, 1 photo", "1–2 7 pairs, 19 photos", "≥ 2 7 pairs, 20 photos"]
    assert [segment[0][0] for segment in axes.collections[0].get_segments()] == [2]
    open_at = [x for line in axes.lines if line.get_markerfacecolor() == "white" for x in line.get_xdata()]
    assert open_at == [0, 1, 0, 1]
    told = " ".join(figure.texts[-1].get_text().split())
    assert told == "Lines: 95 % intervals over photos. Open: fewer than 20 photos, too few to say."


def test_a_bin_chart_of_many_photos_has_no_open_marks_to_explain() -> None:
    figure = statistics.by_modifier(bins_of([FEWEST_IMAGES] * 2), heading="head")
    assert figure.texts[-1].get_text() == "Lines: 95 % intervals over photos."


@pytest.mark.parametrize("layers", [1, 3])
def test_the_chart_of_distances_says_over_how_many_images(layers: int) -> None:
    told = statistics.distance_by_layer(summary_of(layers, 2), heading="model").texts[-1].get_text()
    assert "mean" in told
    assert "40 images" in told
    assert ("Lines: 95 % intervals" in told) == (layers == 1), "where there are lines"


def test_a_run_without_clusters_beside_one_with_them_has_its_maps_under_its_own_name() -> None:
    photo, attention, labels = np.zeros((60, 90, 3), np.uint8), np.ones((4, 4)), np.eye(4, dtype=np.uint8)
    panels = [maps.Panel(photo, attention, own, "1.jpg") for own in (None, labels, labels)]
    figure = maps.side_by_side([panels], models=["first", "second", "third"], heading="runs")
    places = {text.get_text(): text.get_position()[1] for text in figure.texts}
    assert sum(text.get_text() == "clusters" for text in figure.texts) == 2
    tops = [axes.get_position().y1 for axes in figure.axes[1:6]]  # attention; attention, clusters; attention, clusters
    assert tops[0] < places["first"] < 1
    assert tops[1] < places["second"] < tops[0]
    assert tops[3] < places["third"] < tops[2]
    assert places["third"] < figure.axes[3].get_position().y0


def test_photos_of_a_codebook_have_their_own_shape() -> None:
    wide, inside = np.zeros((60, 120, 3), np.uint8), np.eye(4, dtype=bool)
    entry = codebook.Entry(0, np.ones((4, 4)), 0.5, [codebook.Typical(wide, inside)])
    figure = codebook.codebook([entry], note="small print")
    sizes = figure.get_size_inches()
    ratios = [box.height * sizes[1] / (box.width * sizes[0]) for box in (a.get_position() for a in figure.axes)]
    assert ratios == pytest.approx([1, 0.5])


def test_a_head_has_a_filled_point_only_if_both_of_its_gains_are_sure() -> None:
    summary = summary_of(1, 4)
    summary.loc[(summary["head"] == 3) & (summary["null"] == "swap"), "sure"] = False
    points = nulls.against_nulls(summary, score="instance_ari", heading="model").axes[0].collections[-1]
    white = (np.asarray(points.get_facecolor())[:, :3] == 1).all(axis=1)
    assert white.tolist() == [True, True, False, True]  # gains 0.0, 0.1, 0.2 and 0.3


def told_by(figure: Figure) -> str:
    """Returns the small print, in one line."""
    return " ".join(figure.texts[-1].get_text().split())


def test_charts_of_gains_count_the_images_of_the_gains() -> None:
    summary = summary_of(1, 4)
    summary.loc[summary["null"] == "position", "gain_n"] = 39
    how = {"score": "instance_ari", "heading": "model"}
    assert "over 38 to 39 images" in told_by(nulls.against_nulls(summary, **how))
    assert statistics.forest(summary, **how).axes[0].get_xlabel().endswith(": gain, over 38 to 39 images")
    rows = statistics.of_score(summary, "instance_ari", null="swap")
    assert "Means over 38 images." in told_by(statistics.gain_map(rows, heading="model"))


def test_a_null_model_without_gains_and_heads_without_them_are_left_out() -> None:
    summary, how = summary_of(1, 4), {"score": "instance_ari", "heading": "model"}
    unknown = {"gain": np.nan, "gain_low": np.nan, "gain_high": np.nan, "gain_n": 0}
    summary.loc[(summary["null"] == "swap") & (summary["head"] == 2), list(unknown)] = list(unknown.values())
    figure = nulls.against_nulls(summary, **how)
    assert len(figure.axes[0].collections[-1].get_offsets()) == 3
    names = [label.get_text().split()[1] for label in statistics.forest(summary, **how).axes[0].get_yticklabels()]
    assert names == ["3", "1", "0", "2"], "a head that has the other gain alone comes last"
    assert "over 38 images" in told_by(figure)
    assert [text.get_text() for text in statistics.forest(summary, **how).legends[0].texts] == [
        "over position alone",
        "over other photos' objects",
    ]
    summary.loc[summary["null"] == "swap", list(unknown)] = list(unknown.values())
    figure = statistics.forest(summary, **how)
    assert [text.get_text() for text in figure.legends[0].texts] == ["over position alone"]
    assert len(figure.axes[0].get_yticklabels()) == 4
    assert figure.axes[0].get_xlabel().endswith(": gain, over 38 images")


@pytest.mark.parametrize("null", ["swap", "position"])
def test_there_is_no_chart_of_gains_that_no_head_has(tmp_path: Path, null: str) -> None:
    run = Run(made_up_runs.write_run(tmp_path / "run", 2))
    summary = summary_of(2, 4)
    run.__dict__ |= {"layers": (0, 1), "heads": (0, 1, 2, 3)}
    run.__dict__["table"] = lambda name: summary if name == "summary" else None
    assert {"stats-forest", "stats-gain", "stats-nulls"} <= set(dict(write.charts(run)))
    summary.loc[summary["null"] == null, "gain"] = np.nan
    assert ("stats-gain" in dict(write.charts(run))) == (null == "position")
    assert "stats-nulls" not in dict(write.charts(run))
    assert "stats-forest" in dict(write.charts(run)), "over the other null model"
    summary["gain"] = np.nan
    assert set(dict(write.charts(run))) == {"stats-distance"}


@pytest.mark.filterwarnings("error")
def test_one_image_has_marks_without_intervals() -> None:
    bounds = ["low", "high", "gain_low", "gain_high"]
    summary = summary_of(1, 4).assign(n=1, gain_n=1, sure=False)
    summary[bounds] = np.nan
    how = {"score": "instance_ari", "heading": "model"}
    charts = {
        "forest": statistics.forest(summary, **how),
        "means": statistics.forest(summary.assign(null=""), **how),
        "nulls": nulls.against_nulls(summary, **how),
        "distance": statistics.distance_by_layer(summary, heading="model"),
        "bins": statistics.by_modifier(
            bins_of([FEWEST_IMAGES]).assign(pair_ari_low=np.nan, pair_ari_high=np.nan), heading="head"
        ),
    }
    for name, figure in charts.items():
        figure.draw_without_rendering()
        words = " ".join(text.get_text() for text in figure.findobj(Text))
        assert "nan" not in words, name
        assert "interval" not in words, name
        axes = figure.axes[0]
        assert not [lines for lines in axes.collections if isinstance(lines, LineCollection)], name
    assert len(charts["nulls"].axes[0].collections[0].get_offsets()) == 4
    marks = [x for line in charts["forest"].axes[0].lines if line.get_marker() in "oD" for x in line.get_xdata()]
    assert sorted(marks) == pytest.approx(sorted([0.0, 0.1, 0.2, 0.3] * 2))


def test_names_that_find_no_place_are_counted_in_the_caption() -> None:
    summary = summary_of(2, 4).assign(gain=0.5)  # all points in one place
    summary["layer"] *= 10**15  # and names so long that few have room around it
    figure = nulls.against_nulls(summary, score="instance_ari", heading="model")
    told = " ".join(figure.texts[-1].get_text().split())
    named = sum("/" in text.get_text() for text in figure.axes[0].texts)
    assert 0 < named < 8
    assert f"{named} of the 8 best, where there is room," in told


def test_an_svg_in_a_page_has_ids_of_its_own_and_the_pages_colours() -> None:
    svg = '<?xml version="1.0"?><svg><metadata>when</metadata><g id="a"/><use href="#a" fill="#1b1f24"/></svg>'
    told = statistics.themed(svg, "one-", [("#1b1f24", "var(--ink)")])
    assert told == '<svg><g id="one-a"/><use href="#one-a" fill="var(--ink)"/></svg>'


def test_figures_are_the_same_bytes_when_they_are_made_again(tmp_path: Path) -> None:
    made = []
    for name in ("first", "second"):
        figure = statistics.forest(summary_of(1, 3), score="instance_ari", heading="model")
        made.append([p.read_bytes() for p in figures.save(figure, tmp_path / name, formats=("png", "svg", "pdf"))])
    assert made[0] == made[1]


@pytest.mark.parametrize(("text", "told"), [("4", "not a patch"), ("a,b", "not a patch"), ("1,2,3", "not a patch")])
def test_a_query_that_is_not_a_patch_is_refused(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        figures.query(text)
    assert figures.query("4, 7") == (4, 7)


def test_an_unknown_format_is_refused_with_the_nearest_known() -> None:
    with pytest.raises(UserError, match="did you mean 'png'"):
        figures.formats("pgn")
    assert figures.formats("svg, PDF") == ("svg", "pdf")

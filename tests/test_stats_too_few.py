"""Nothing is claimed on too few images: no mark, no count and no p, wherever the tables are read."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from numpy.typing import NDArray

from batchjob.figures import nulls, statistics
from batchjob.metrics.uncertainty import SURE
from batchjob.report import answer
from batchjob.report import table as heads_table
from batchjob.report.headmap import head_map
from batchjob.stats import run_stats
from batchjob.store.run import Run
from tests.conftest import ROOT
from tests.made_up_runs import KINDS, spoil_labels, table, write_annotations, write_run

FEW, MANY = 8, 60
FOLDERS = ("batchjob/figures", "batchjob/report", "batchjob/stats", "docs")
SILENT = KINDS.index("random")  # this head of the larger runs has one cluster in every image, so it always scores 0
GOOD = KINDS.index("instance")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[str]]:
    """Makes two runs of FEW scenes with other heads, and their statistics and comparison."""
    folder = tmp_path_factory.mktemp("few")
    runs = [write_run(folder / "one", FEW), write_run(folder / "other", FEW, kinds=KINDS[::-1], seed=1)]
    return runs, run_stats(runs, annotations=str(write_annotations(folder / "a.json", FEW)))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[str]]:
    """Makes two runs of MANY scenes and their statistics and comparison.

    The head SILENT scores 0 in all images. GOOD would score 1 in nearly all, which tells as little, so a tenth of its
    labels are wrong.
    """
    folder = tmp_path_factory.mktemp("many")
    runs = [write_run(folder / name, MANY, seed=seed) for seed, name in enumerate(("one", "other"))]
    for run in runs:
        spoil_labels(run, SILENT, 1.0)
        spoil_labels(run, GOOD)
    return runs, run_stats(runs, annotations=str(write_annotations(folder / "a.json", MANY)))


def filled(axes: Axes) -> int:
    """Counts the filled marks on the axes of a forest; the entries of its legend have no place there."""
    drawn = [line for line in axes.lines if line.get_marker() != "None" and line.get_markerfacecolor() != "white"]
    return sum(len(np.atleast_1d(line.get_xdata())) for line in drawn)


def test_eight_images_make_no_gain_sure_however_small_p_is(few: Any) -> None:
    summary = table(few[0][0], "summary")
    assert (summary["p_holm"] <= SURE).any(), "else the limits are not what keeps the gains from being sure"
    assert not summary["enough"].any()
    assert not summary["sure"].any()
    known = summary[summary["null"] != ""]
    assert (known["gain_n"] <= known["n"]).all()
    selection = table(few[0][0], "selection")
    assert not selection[["better", "worse"]].any(axis=None)
    assert (selection["too_few"] == selection["heads"]).all()


def test_pairs_of_one_image_have_no_interval(few: Any) -> None:
    modifiers = table(few[0][0], "modifiers")
    is_one, bounds = modifiers["images"] == 1, ["pair_ari_low", "pair_ari_high", "gain_low", "gain_high"]
    assert is_one.any()
    assert modifiers.loc[is_one, bounds].isna().all(axis=None)
    assert modifiers.loc[~is_one, bounds].notna().all(axis=None)


def test_eight_images_give_no_mark_on_the_page(few: Any) -> None:
    run = Run(few[0][0])
    found = heads_table.scored(run, table(run.folder, "summary"))
    assert len(found.rows) == len(KINDS)
    assert not any(row.clear or cell.mark for row in found.rows for cell in row.cells)
    place = [column.name for column in found.columns].index("p")
    assert {row.cells[place].text for row in found.rows} == {"too few"}
    tiles = head_map(run, 0)
    assert tiles is not None
    assert not any(tile.is_sure or "Holm" in tile.title for _, row in tiles.rows for tile in row)


def test_eight_images_give_no_filled_mark_in_any_figure(few: Any) -> None:
    summary = table(few[0][0], "summary")
    score = "instance_ari"
    axes = statistics.forest(summary, score=score, heading="few").axes[0]
    assert filled(axes) == 0
    axes = statistics.gain_map(statistics.of_score(summary, score, null="swap"), heading="few").axes[0]
    assert not axes.lines
    assert open_points(summary).all()


def open_points(summary: pd.DataFrame) -> NDArray[np.bool_]:
    """Returns for each head of the scatter of two nulls whether its point is open."""
    points = nulls.against_nulls(summary, score="instance_ari", heading="").axes[0].collections[-1]
    white: NDArray[np.bool_] = (np.asarray(points.get_facecolor())[:, :3] == 1).all(axis=1)
    return white


def test_eight_images_give_no_p_and_no_count_in_what_is_printed(few: Any) -> None:
    runs, lines = few
    told = "\n".join(lines)
    assert "p = " not in told
    assert "p < " not in told
    assert "heads over all images" not in told
    rows = [line.split() for line in lines if line.startswith("kmeans")]
    assert rows
    assert all(line.count("too") == line.count("few") >= 1 for line in rows)
    comparison = table(runs[0], "comparison")
    assert (comparison["p_holm"] <= SURE).any()
    assert not comparison["enough"].any()
    assert not comparison["sure"].any()
    assert any(line.endswith("n = 8, too few to say") for line in lines)
    assert "instance_ari, head by head: too few images to say where one is above other" in lines
    shown = answer.differences([Run(run) for run in runs])
    assert {row[-1] for row in shown.rows + shown.others} == {"too few"}


def test_p_is_compared_with_the_limit_only_where_the_tables_are_made() -> None:
    """Whoever reads a table reads its column `sure`, which knows of too few images."""
    texts = {p.relative_to(ROOT).as_posix(): p.read_text() for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")}
    assert "p_holm" in texts["batchjob/report/table.py"], "saw the readers"
    compares = {name for name, text in texts.items() if re.search(r"<=? *(\w+\.)?SURE|p_holm\W*[<>]", text)}
    assert compares == {
        "batchjob/stats/summary.py",
        "batchjob/stats/differences.py",
        "docs/results_page.py",  # its own correction, over the models and sizes
    }


def test_a_head_that_always_scores_the_same_is_one_of_which_too_little_is_known(many: Any) -> None:
    runs, lines = many
    summary = table(runs[0], "summary").query("score == 'instance_ari' and null == 'position'").set_index("head")
    silent = summary.loc[SILENT]
    assert silent["informative"] == 0
    assert silent["gain"] < 0
    assert silent["p_holm"] <= SURE
    assert not silent["enough"]
    assert not silent["sure"]
    others = summary.drop(SILENT)
    assert others["enough"].all()
    assert (others["sure"] == (others["p_holm"] <= SURE)).all()
    assert summary.loc[GOOD, "sure"]
    assert summary.loc[KINDS.index("class"), "sure"]
    row = table(runs[0], "selection").query("score == 'instance_ari' and null == 'position'").iloc[0]
    assert row["too_few"] == 1
    assert row["worse"] == (others["sure"] & (others["gain"] < 0)).sum() >= 1
    (counted, *_) = [line for line in lines if line.startswith("Of 4 heads over all images")]
    assert "does worse, and of 1 too little is known to say (p ≤ 0.05" in counted


def test_many_images_mark_the_heads_that_are_sure_and_no_others(many: Any) -> None:
    run = Run(many[0][0])
    summary = table(run.folder, "summary")
    by_null = {
        null: summary.query("score == 'instance_ari' and null == @null").set_index("head")["sure"]
        for null in ("swap", "position")
    }
    found = heads_table.scored(run, summary)
    shown = {int(row.cells[2].text): row.clear for row in found.rows}
    assert shown == by_null["swap"].to_dict()
    assert any(shown.values())
    tiles = head_map(run, 0)
    assert tiles is not None
    assert [tile.is_sure for tile in tiles.rows[0][1]] == by_null["swap"].tolist()
    axes = statistics.forest(summary, score="instance_ari", heading="many").axes[0]
    assert filled(axes) == sum(sure.sum() for sure in by_null.values())
    both = by_null["swap"] & by_null["position"]
    assert (~open_points(summary)).tolist() == both.tolist()


def test_differences_that_are_mostly_zero_are_too_few_to_say(many: Any) -> None:
    runs, lines = many
    heads = table(runs[0], "comparison").query("score == 'instance_ari' and of == 'head'").set_index("head_a")
    assert (heads["n"] == MANY).all()
    assert heads.loc[SILENT, "informative"] == 0
    assert not heads.loc[SILENT, "enough"]
    assert heads["enough"].any()
    few = int((~heads["enough"]).sum())
    (told,) = [line for line in lines if line.startswith("instance_ari, head by head")]
    assert f"of 4 heads and below in 0; of {few} too little is known to say (p ≤ 0.05 after Holm" in told

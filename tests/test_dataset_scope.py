"""Dataset scope through its command line: planted clusters, several processes, the memory budget, wrong input."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
from PIL import Image
from sklearn.metrics import adjusted_rand_score

import batchjob as package
from batchjob.codebook.processes import ALONE
from batchjob.codebook.rows import RowKind, draw_sample
from batchjob.config import Options
from batchjob.job import fit
from batchjob.job.sampled_rows import SampledRows
from batchjob.job.upload import DeviceBatch
from batchjob.model.attention import LayerMaps, renormalise
from tests.conftest import Command
from tests.runs import made_up_plan
from tests.striped import IMAGES, PLANNED, PX, SCOPE, labels_of, planted


@pytest.mark.parametrize("features", ["absolute", "relative"])
@pytest.mark.parametrize("engine", ["batched", "sklearn"])
def test_planted_rows_are_recovered(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command, features: str, engine: str
) -> None:
    run = tmp_path / "run"
    ended = batchjob("run", striped, run, *colour_model, *SCOPE, "--features", features, "--engine", engine)
    assert ended.code == 0, ended.err
    truth = dict(zip(("absolute", "relative"), planted(striped)[:2], strict=True))[features]
    found = package.open(run)
    for head in range(3):
        assert adjusted_rand_score(truth.ravel(), labels_of(run)[:, head].ravel()) == 1.0
    assert found["centroids"].dims == ("algorithm", "layer", "head", "cluster", "feature")
    assert found["centroids"].shape == (1, 1, 3, 12, 36 if features == "absolute" else 121)
    assert found["centroids"].attrs["rows"] == IMAGES * 36
    assert (found["centroid_rows"].values.sum(-1) == IMAGES * 36).all()
    assert (found["k"] == 6).all()  # of the 12 clusters, each image shows its own orientation's
    np.testing.assert_allclose(
        found["inertia"].values.sum(0, dtype=np.float64), found["centroid_inertia"].values, rtol=1e-4
    )
    xarray.testing.assert_identical(found.drop_vars("image").load(), xarray.open_zarr(run / "labels.zarr").load())


def test_planted_cls_rows_are_recovered(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    run = tmp_path / "run"
    ended = batchjob("run", striped, run, *colour_model, *SCOPE, "--queries", "cls", "--distance", "hellinger")
    assert ended.code == 0, ended.err
    found = package.open(run)
    truth = planted(striped)[2]
    assert len(set(truth)) == 12
    assert "labels" not in found
    assert found["image_labels"].dims == ("image", "algorithm", "layer", "head")
    for head in range(3):
        assert adjusted_rand_score(truth, found["image_labels"].values[:, 0, 0, head]) == 1.0
    assert (found["k"] == 1).all()


@pytest.mark.slow  # a dozen interpreters; the engine by itself is held to this in every run (test_large_kmeans.py)
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_fit_and_label_the_same(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command, world: int
) -> None:
    options = [*colour_model, *SCOPE, "--rows-per-partition", 4, "--device", "cpu"]
    assert batchjob("run", striped, tmp_path / "one", *options).code == 0
    ended = batchjob("run", striped, tmp_path / "many", *options, "--gpus", world)
    assert ended.code == 0, ended.err
    one, many = package.open(tmp_path / "one"), package.open(tmp_path / "many")
    np.testing.assert_array_equal(one["labels"].values, many["labels"].values)
    np.testing.assert_allclose(one["centroids"].values, many["centroids"].values, atol=1e-7)
    np.testing.assert_array_equal(one["centroid_rows"].values, many["centroid_rows"].values)


def test_the_sample_stays_within_the_memory_budget_and_says_so(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, budget = tmp_path / "run", 400 * 3 * 36 * 4
    monkeypatch.setattr(fit, "sample_budget", lambda device, world: budget)
    allocated: list[int] = []

    class Watched(fit.SampledRows):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            allocated.append(self._x.numel() * self._x.element_size())

    monkeypatch.setattr(fit, "SampledRows", Watched)
    ended = batchjob("run", striped, run, *colour_model, *SCOPE)
    assert ended.code == 0, ended.err
    assert "rows instead of 1,080: that is the budget" in ended.err
    found = package.open(run)["centroids"]
    assert 200 < found.attrs["rows"] < 400
    assert allocated[0] <= budget
    assert allocated[0] == found.attrs["rows"] * 3 * 36 * 4
    truth = planted(striped)[0]
    assert adjusted_rand_score(truth.ravel(), labels_of(run)[:, 0].ravel()) == 1.0
    monkeypatch.setattr(fit, "sample_budget", lambda device, world: 5000)
    ended = batchjob("run", striped, tmp_path / "poor", *colour_model, *SCOPE)
    assert ended.code == 2
    assert "--k 12 needs as many rows" in ended.err


def test_the_sample_is_the_one_asked_for(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    run = tmp_path / "run"
    assert batchjob("run", striped, run, *colour_model, *SCOPE, "--fit-rows", 300).code == 0
    found = package.open(run)
    assert (found["centroids"].attrs["rows"], found["centroids"].attrs["asked_rows"]) == (300, 300)
    assert (found["centroid_rows"].values.sum(-1) == 300).all()


@pytest.mark.parametrize("overflowed", [(0, 1), (2, 5), (0, 2, 4, 5), (0, 1, 2, 3, 4, 5)])
def test_images_that_overflow_give_no_rows_whichever_batch_they_are_in(overflowed: tuple[int, ...]) -> None:
    plan = made_up_plan(options=Options(scope="dataset", k="2"), layers=(0,), heads=(0,), row_count=6)
    kind = RowKind("rows", "absolute", (2, 2))
    rows = SampledRows(plan, kind, draw_sample(24, 24, 0), [(0, 6)], torch.device("cpu"))
    attention = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for start in (0, 2, 4):
        part = slice(start, start + 2)
        finite = torch.tensor([image not in overflowed for image in (start, start + 1)])
        one = np.zeros(2, np.uint8)
        batch = DeviceBatch(np.arange(start, start + 2), torch.empty(0), one, one, one, [])
        rows.add(batch, [LayerMaps(0, attention[part], attention[part][:, :, 0], torch.zeros(2, 1), finite)])
    rows.settle()
    kept = [image for image in range(6) if image not in overflowed]
    problem = rows.problem(0, 0, ALONE)
    assert problem.numbers.tolist() == [4 * image + place for image in kept for place in range(4)]
    torch.testing.assert_close(problem.x, renormalise(attention)[kept, 0].flatten(0, 1))


def test_failed_images_and_padding_give_no_rows_and_no_labels(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted(striped.iterdir())[:8]:
        image = Image.open(path)
        image.crop((0, 0, PX, PX // 2)).save(photos / path.name)
    (photos / "003.png").write_bytes((photos / "003.png").read_bytes()[:100])
    run = tmp_path / "run"
    options = [*colour_model, "--scope", "dataset", "--k", 4, "--workers", 0, "--resize", "pad", "--max-failures", 0.5]
    ended = batchjob("run", photos, run, *options)
    assert ended.code == 0, ended.err
    found = package.open(run)
    labels = labels_of(run)
    assert (labels[3] == 255).all()
    assert (labels[:, :, 3:] == 255).all()  # the lower half is padding
    assert (np.delete(labels, 3, 0)[:, :, :3] < 4).all()
    assert found["centroids"].attrs["rows"] == 7 * 18
    assert np.isnan(found["inertia"].values[3]).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--k", "instances"], "give a number"),
        (["--algorithm", "spectral"], "give --algorithm kmeans"),
        (["--queries", "cls", "--features", "relative"], "CLS has no place"),
        (["--queries", "cls", "--k", "31"], "found 30 in 30 images"),
        (["--fit-rows", "2"], "below --k 12"),
    ],
)
def test_options_without_meaning_in_dataset_scope_are_refused_before_any_work(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command, options: list[str], said: str
) -> None:
    ended = batchjob("plan", striped, tmp_path / "run", *colour_model, *PLANNED, *options)
    assert ended.code == 2
    assert said in ended.err
    assert not (tmp_path / "run").exists()


def test_fit_refuses_a_run_of_image_scope(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    assert batchjob("plan", striped, tmp_path / "run", *colour_model, "--k", 3).code == 0
    ended = batchjob("fit", tmp_path / "run")
    assert ended.code == 2
    assert "nothing to fit" in ended.err

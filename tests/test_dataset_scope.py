"""Dataset scope through its command line: planted clusters, processes, kills, the budget, wrong input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import xarray
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

import batchjob as package
from batchjob.job import fit
from batchjob.stats import codebook
from batchjob.store import centroids
from tests.conftest import ROOT, Command

PX, PATCH, LINES, IMAGES = 96, 16, 6, 30
COLOURS = np.array([[1, -1, -1], [-1, 1, 1], [-1, 1, -1], [1, -1, 1], [-1, -1, 1], [1, 1, -1]])  # red is the first
PLANNED = ["--scope", "dataset", "--k", 2 * LINES]
SCOPE = [*PLANNED, "--workers", 0]


@pytest.fixture(scope="module")
def colour_model(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Options of a ViT whose patches attend to patches of their own colour, and whose CLS token to the red ones.

    A token is the mean colour of its patch, nothing later adds to it, and queries equal keys.
    """
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    state = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    for name in state:
        if name.endswith("norm1.weight"):
            state[name] += 1
    state["cls_token"][0, 0, :3] = torch.from_numpy(COLOURS[0]).float()
    for channel in range(3):
        state["patch_embed.proj.weight"][channel, channel] = 1 / PATCH**2
        for layer in range(12):
            for head in range(3):
                at = head * 64 + channel
                mixing = state[f"blocks.{layer}.attn.qkv.weight"]
                mixing[at, channel] = mixing[192 + at, channel] = 1.0  # the query, and the key
    path = tmp_path_factory.mktemp("weights") / "colours.safetensors"
    save_file(state, path)
    return ["--model", "vit_tiny_patch16_224", "--weights", path, "--image-size", PX]


@pytest.fixture(scope="module")
def striped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of 6 vertical or horizontal stripes, a patch wide, of 6 colours in any order.

    A patch attends to its stripe: absolute rows are of 12 kinds (which stripe), relative ones of 12 others (how far
    along the stripe the patch is: the same in any stripe).
    """
    folder, rng = tmp_path_factory.mktemp("striped"), np.random.default_rng(3)
    for i in range(IMAGES):
        order = rng.permutation(LINES)
        order = np.roll(order, i // 2 - list(order).index(0))  # red is everywhere once
        grid = np.broadcast_to(COLOURS[order], (LINES, LINES, 3))
        grid = grid if i % 2 else grid.transpose(1, 0, 2)
        grey = 127.5 + grid * (120 + rng.uniform(-1, 1, (LINES, LINES, 1)))
        Image.fromarray(grey.astype(np.uint8).repeat(PATCH, 0).repeat(PATCH, 1)).save(folder / f"{i:03d}.png")
    return folder


def planted(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(kind of each absolute row [images, y, x], of each relative row, of each image's CLS row)."""
    y, x = np.mgrid[:LINES, :LINES]
    absolute = np.stack([x if i % 2 else LINES + y for i in range(IMAGES)])
    relative = np.stack([y if i % 2 else LINES + x for i in range(IMAGES)])
    red = []
    for i, path in enumerate(sorted(folder.iterdir())):
        pixels = np.asarray(Image.open(path)).astype(int)[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
        is_red = (pixels[..., 0] > 200) & (pixels[..., 1] < 50) & (pixels[..., 2] < 50)
        red.append(absolute[i][is_red][0])
    return absolute, relative, np.array(red)


def labels_of(run: Path) -> np.ndarray:
    return np.asarray(package.open(run)["labels"].values[:, 0, 0])  # [images, head, y, x]


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


def _until(process: subprocess.Popen[bytes], is_true: Iterator[bool]) -> None:
    deadline = time.monotonic() + 120
    while not next(is_true) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def test_a_run_killed_in_the_fit_and_again_in_the_labels_ends_the_same(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    options = [*colour_model, *SCOPE, "--layers", "all", "--n-init", 10, "--rows-per-partition", 2, "--batch-size", 2]
    assert batchjob("run", striped, tmp_path / "calm", *options).code == 0
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "batchjob", "run", str(striped), str(run), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def in_the_fit() -> Iterator[bool]:
        while True:
            path, last = run / "fit" / "checkpoint.npz", 0
            if path.exists():
                with np.load(path) as state:
                    last = int((state["counts"].sum(-1) > 0).sum())
            yield last >= 3

    def in_the_labels() -> Iterator[bool]:
        while True:
            yield len(list((run / "done").glob("*"))) >= 3

    for moment in (in_the_fit(), in_the_labels()):
        process = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, env=environment, stderr=subprocess.DEVNULL
        )
        _until(process, moment)
        assert process.poll() is None, "the kill came too late to prove anything"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert (run / "fit" / "centroids.npz").exists()
    assert len(list((run / "done").glob("*"))) < IMAGES // 2
    assert batchjob("run", striped, run, *options).code == 0
    calm, killed = package.open(tmp_path / "calm"), package.open(run)
    for name, array in calm.variables.items():
        np.testing.assert_array_equal(array.values, killed[name].values, err_msg=str(name))


def test_a_fit_that_is_told_to_stop_ends_75_and_goes_on_from_its_last_iteration(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert batchjob("plan", striped, run, *colour_model, *PLANNED, "--layers", "0,11").code == 0
    saved: list[int] = []

    def save_and_signal(where: Path, value: centroids.Centroids | centroids.Checkpoint) -> None:
        save(where, value)
        saved.append(1)
        if len(saved) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    save = centroids.save
    monkeypatch.setattr(centroids, "save", save_and_signal)
    ended = batchjob("fit", run)
    assert (ended.code, len(saved)) == (75, 4)
    assert "go on with" in ended.err
    assert batchjob("label", run).code == 2  # there are no centroids yet
    ended = batchjob("fit", run)
    assert ended.code == 0
    assert "going on with layer 11, head 0 after 1 iterations" in ended.err
    assert not (run / "fit" / "checkpoint.npz").exists()


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
def test_what_makes_no_sense_is_refused_before_any_work(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command, options: list[str], said: str
) -> None:
    ended = batchjob("plan", striped, tmp_path / "run", *colour_model, *PLANNED, *options)
    assert ended.code == 2
    assert said in ended.err
    assert not (tmp_path / "run").exists()


def test_a_run_of_image_scope_has_nothing_to_fit(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    assert batchjob("plan", striped, tmp_path / "run", *colour_model, "--k", 3).code == 0
    ended = batchjob("fit", tmp_path / "run")
    assert ended.code == 2
    assert "nothing to fit" in ended.err


def test_damaged_centroids_are_told_apart(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    run = tmp_path / "run"
    assert batchjob("run", striped, run, *colour_model, *SCOPE, "--limit", 4).code == 0
    path = run / "fit" / "centroids.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    next((run / "done").glob("0*.json")).unlink()
    ended = batchjob("label", run)
    assert ended.code == 2
    assert "is damaged" in ended.err


def test_damaged_centroids_in_the_store_are_shown_and_run_makes_them_again(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    run = tmp_path / "run"
    command = ["run", striped, run, *colour_model, *SCOPE, "--limit", 4]
    assert batchjob(*command).code == 0
    path = run / "labels.zarr" / "centroid_rows" / "c" / "0" / "0" / "1" / "0"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    ended = batchjob("show", run, "--verify")
    assert ended.code == 1
    assert "damaged   the store's own: labels.zarr/centroid_rows/c/0/0/1/0: its checksum differs" in ended.out
    assert batchjob(*command).code == 0
    assert path.read_bytes() == whole
    assert batchjob("show", run, "--verify").code == 0


def annotate_by_orientation(folder: Path, file: Path) -> Path:
    """COCO annotations of the striped images: every stripe is an instance of `upright` or of `level`."""
    images, annotations = [], []
    for i, path in enumerate(sorted(folder.iterdir())):
        images.append({"id": i, "file_name": path.name, "height": PX, "width": PX})
        for stripe in range(LINES):
            at, size = stripe * PATCH, (PATCH, PX) if i % 2 else (PX, PATCH)
            left, top = (at, 0) if i % 2 else (0, at)
            corners = [left, top, left + size[0], top, left + size[0], top + size[1], left, top + size[1]]
            one = {"id": len(annotations), "image_id": i, "category_id": 1 + i % 2, "iscrowd": 0}
            annotations.append(one | {"segmentation": [corners], "bbox": [left, top, *size], "area": PX * PATCH})
    categories = [{"id": 1, "name": "level"}, {"id": 2, "name": "upright"}]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def test_the_codebook_says_where_in_what_and_in_which_images_a_cluster_occurs(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    run, annotations = tmp_path / "run", annotate_by_orientation(striped, tmp_path / "striped.json")
    ended = batchjob("run", striped, run, *colour_model, *SCOPE, "--heads", "1", "--annotations", annotations)
    assert ended.code == 0, ended.err
    ended = batchjob("stats", run)
    assert ended.code == 0, ended.err
    assert "codebook: 12 clusters, 0 of them in no image" in ended.out
    tables = {path.stem: pd.read_parquet(path) for path in (run / "stats").glob("codebook*.parquet")}
    clusters = tables["codebook"]
    np.testing.assert_allclose(clusters["share"], 1 / 12)
    assert (clusters["images"] == IMAGES // 2).all()
    assert (clusters["category_share"] == 1).all()
    np.testing.assert_allclose(clusters["lift"], 2)  # half of all images are of each orientation
    positions = tables["codebook_positions"]
    assert (positions.groupby("cluster").size() == LINES).all()
    np.testing.assert_allclose(positions["share"], 0.5)
    agreement = tables["codebook_agreement"].set_index("against")["ami"]
    assert agreement["categories"] == pytest.approx(2 * np.log(2) / (np.log(2) + np.log(12)), abs=0.01)
    typical = tables["codebook_images"]
    labels = labels_of(run)[:, 0]
    assert (typical.groupby("cluster").size() == 8).all()
    assert all(
        (labels[row] == cluster).sum() == LINES for row, cluster in zip(typical["row"], typical["cluster"], strict=True)
    )
    np.testing.assert_allclose(typical["share"], 1 / LINES)
    ended = batchjob("figures", run)
    assert ended.code == 0, ended.err
    with Image.open(run / "figures" / "codebook-1-layer-11.png") as picture:
        assert min(picture.size) > 500


def test_the_codebook_of_cls_rows_names_images(
    striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    run, annotations = tmp_path / "run", annotate_by_orientation(striped, tmp_path / "striped.json")
    options = ["--queries", "cls", "--annotations", annotations, "--heads", "2"]
    assert batchjob("run", striped, run, *colour_model, *SCOPE, *options).code == 0
    for verb in ("stats", "report"):
        ended = batchjob(verb, run)
        assert ended.code == 0, ended.err
    images = pd.read_parquet(run / "stats" / "codebook_images.parquet")
    labels = package.open(run)["image_labels"].values[:, 0, 0]
    assert len(images) == IMAGES  # none of the 12 clusters has more than 8
    assert all(labels[line.row, 0] == line.cluster for line in images.itertuples())
    text = (run / "report.html").read_text()
    assert '<section id="codebook">' in text
    assert "<h3>Head 2</h3>" in text
    categories = pd.read_parquet(run / "stats" / "codebook_categories.parquet")
    assert set(categories["category"]) == {"level", "upright"}
    assert (categories["share_of_cluster"] == 1).all()


@pytest.mark.parametrize("queries", ["rows", "cls"])
def test_agreement_with_the_classes_of_folders_needs_no_annotations(
    queries: str, striped: Path, colour_model: list[object], tmp_path: Path, batchjob: Command
) -> None:
    """Absolute rows of vertical and of horizontal stripes share no cluster; a CLS row says where red is."""
    run, folder = tmp_path / "run", tmp_path / "photos"
    for i, path in enumerate(sorted(striped.glob("*.png"))):
        (folder / ("upright" if i % 2 else "level")).mkdir(parents=True, exist_ok=True)
        (folder / ("upright" if i % 2 else "level") / path.name).write_bytes(path.read_bytes())
    ended = batchjob("run", folder, run, *colour_model, *SCOPE, "--heads", "1,2", "--queries", queries)
    assert ended.code == 0, ended.err
    ended = batchjob("stats", run)
    assert ended.code == 0, ended.err
    agreement = pd.read_parquet(run / "stats" / "codebook_agreement.parquet")
    own = agreement[(agreement["against"] == "classes") & (agreement["head"] == 2)].iloc[0]
    labels = package.open(run)["labels" if queries == "rows" else "image_labels"].sel(head=2).values.reshape(IMAGES, -1)
    classes = np.broadcast_to((package.open(run)["class"].values == "level")[:, None], labels.shape)
    assert own["rows"] == labels.size
    assert own["ami"] == pytest.approx(adjusted_mutual_info_score(classes.ravel(), labels.ravel()), abs=1e-6)
    assert f"agreement with classes (AMI over {labels.size:,} rows): median" in ended.out
    assert batchjob("report", run).code == 0
    assert "agreement with classes (AMI)" in (run / "report.html").read_text()


@pytest.mark.parametrize("exact", [True, False])
def test_agreement_over_a_dataset_is_scikit_learns(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 7, 20_000)
    labels = np.where(rng.random(20_000) < 0.4, groups, rng.integers(0, 12, 20_000))
    table = np.zeros((12, 9), np.int64)  # two groups have no row
    np.add.at(table, (labels, groups), 1)
    if not exact:
        monkeypatch.setattr(codebook, "EXACT_ROWS", 0)
    expected = adjusted_mutual_info_score(groups, labels)
    assert codebook.dataset_ami(table) == pytest.approx(expected, abs=1e-9 if exact else 1e-5)
    assert np.isnan(codebook.dataset_ami(np.zeros((3, 2), np.int64)))
    assert codebook.dataset_ami(np.array([[5, 7]])) == 0.0

"""Counts what the loop asks of a pretended GPU (kernels, waits, bytes), and tests the pretence itself."""

import pytest
import torch

from batchjob.clustering import triton_engine
from batchjob.codebook import kmeans
from batchjob.config import Options, Runtime
from tests.counted import count_fit, count_run, problems
from tests.pretended import OnDevice, pretended
from tests.stand_ins import counted_kernels

GPU = torch.device("cuda", 0)
MODEL = {"model": "vit_base_patch16_224", "weights": "random", "precision": "fp16", "image_size": "64"}
RUNTIME = Runtime(device="cuda", workers="0", batch_size="4")  # two batches of the sample
PROBLEMS_A_LAYER = 256 * 12


def test_the_pretended_device_counts_kernels_and_bytes_but_not_views():
    with pretended() as meter:
        x = torch.rand(4, 8).to(GPU)
        meter.reset()
        y = (x[1:] * 2).sum(1)
        assert y.device == GPU
        assert (meter.total.kernels, meter.total.syncs) == (2, 0)
        assert meter.total.bytes == 4 * (3 * 8 + 3 * 8) + 4 * (3 * 8 + 3)
        assert torch.equal(y.cpu(), (x.inner[1:] * 2).sum(1))


@pytest.mark.parametrize(
    ("act", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x[x > 0.5], 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x[[0, 1]], 1),
        (lambda x: torch.zeros(3, 4).to(GPU, non_blocking=True), 1),  # the host's memory is not page-locked
        (lambda x: torch.zeros(3, 4).pin_memory().to(GPU, non_blocking=True), 0),
        (lambda x: torch.empty(3, 4, pin_memory=True).copy_(x, non_blocking=True), 0),
        (lambda x: x[:, 1:2].clone(), 0),
    ],
)
def test_the_pretended_device_counts_when_the_host_waits(act, waits):
    with pretended() as meter:
        x = torch.rand(3, 4).to(GPU)
        meter.reset()
        act(x)
        assert meter.total.syncs == waits


def test_tensors_of_host_and_device_do_not_mix():
    with pretended():
        x = torch.rand(3, device=GPU)
        with pytest.raises(RuntimeError, match="mul: Expected all tensors to be on the same device"):
            x * torch.rand(3)
        assert isinstance(x * 2, OnDevice)
        assert not isinstance(x.cpu(), OnDevice)


@pytest.mark.parametrize("k", ["5", "instances"])
@pytest.mark.parametrize("n_init", ["4", "auto"])
def test_a_layer_is_clustered_by_five_kernels_without_a_wait_and_a_batch_waits_once(k, n_init):
    counted = count_run(Options(**MODEL, layers="3,11", k=k, n_init=n_init), RUNTIME)
    assert counted.batches == 2
    clustering = counted.meter.stages["clustering"]
    assert clustering.kernels == 5 * 2 * 2  # for each layer and batch
    assert clustering.syncs == 0
    assert counted.meter.total.syncs <= 2 * counted.batches, dict(counted.meter.stages)


@pytest.mark.parametrize("p", [196, 256])
def test_clustering_a_layer_moves_less_than_six_gib_beside_reads_of_the_gram_matrix(p):
    n = 4
    with pretended() as meter, counted_kernels(meter):
        x = problems(n, p).to(GPU)
        k, seeds = torch.full((n,), 5, dtype=torch.int32).pin_memory(), torch.arange(n).pin_memory()
        engine = triton_engine.TritonEngine(GPU)
        meter.reset()
        engine.kmeans(x, k, seeds, n_init=4, checks=False)
    assert meter.total.kernels <= 20
    assert meter.total.syncs == 0
    assert meter.total.bytes * PROBLEMS_A_LAYER / n <= 6 * 2**30


def check_waits(more):
    counted = count_run(Options(**(MODEL | {"k": "3", "n_init": "2"} | more)), RUNTIME)
    assert counted.batches == 2
    assert counted.meter.stages["clustering"].kernels > 0
    waits = {name: dict(count.waits) for name, count in counted.meter.stages.items()}
    assert counted.meter.total.syncs <= 2 * counted.batches, waits


@pytest.mark.parametrize("more", [{"scores": "pairs"}, {"resize": "pad", "keep_maps": "2"}], ids=str)
def test_scores_padding_and_kept_maps_cost_no_wait(more):
    check_waits(more)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"scores": "attention,pairs", "resize": "pad"},
        {"cluster_on": "key"},
        {"cluster_on": "token"},
        {"heads": "0,3,7", "layers": "0,1,2,3"},
        {"repeats": 2},
        {"distance": "cosine"},
        {"model": "resnet18"},
        {"model": "vit_base_patch16_siglip_gap_224"},
        {"model": "eva02_tiny_patch14_224", "image_size": "56"},
    ],
    ids=str,
)
def test_no_option_of_image_scope_makes_the_host_wait_more_than_twice_a_batch(more):
    check_waits(more)


DATASET = {"scope": "dataset", "k": "5", "layers": "3", "heads": "0,3", "n_init": "2"}


def check_dataset_waits(more):
    options = Options(**(MODEL | DATASET | more))
    counted = count_fit(options, RUNTIME)
    stages = counted.meter.stages
    waits = {name: dict(count.waits) for name, count in stages.items()}
    starts = int(options.n_init)
    assert counted.batches == 2
    assert counted.descents == counted.fits * (starts + 1) >= 3
    assert counted.iterations >= counted.descents
    assert min(stages[name].kernels for name in ("read", "fit", "lloyd")) > 0
    assert stages["read"].syncs <= counted.batches, waits
    assert stages["lloyd"].syncs <= 2 * counted.iterations + 2 * counted.descents, waits
    assert stages["fit"].syncs <= counted.fits * (5 + 2 * starts), waits
    labelled = count_run(options, RUNTIME)
    waits = {name: dict(count.waits) for name, count in labelled.meter.stages.items()}
    assert labelled.batches == 2
    assert labelled.meter.stages["clustering"].kernels > 0
    assert labelled.meter.total.syncs <= labelled.batches, waits


def test_a_fit_waits_once_a_batch_and_twice_an_iteration_and_its_labels_once_a_batch():
    check_dataset_waits({})


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"resize": "pad"},
        {"queries": "cls"},
        {"features": "relative"},
        {"distance": "cosine"},
        {"cluster_on": "key"},
        {"cluster_on": "token", "heads": "all"},
        {"model": "resnet18", "layers": "-1", "heads": "all"},
        {"model": "vit_base_patch16_siglip_gap_224"},
        {"model": "eva02_tiny_patch14_224", "image_size": "56", "heads": "all"},
    ],
    ids=str,
)
def test_no_option_of_dataset_scope_makes_the_host_wait_more_often(more):
    check_dataset_waits(more)


def test_an_iteration_moves_any_number_of_empty_clusters_with_three_waits():
    with pretended() as meter:
        x = torch.rand(1000, 8)
        far = 100 + torch.arange(5.0)[:, None].expand(5, 8)
        start = torch.cat([x[:3], far])
        problem = kmeans.Problem(x.to(GPU), torch.arange(1000).to(GPU), 8, 0, 1)
        on_device = start.to(GPU)
        meter.reset()
        moved, _ = kmeans.TorchRefiner().advance(problem, on_device)
        assert 0 < meter.total.syncs <= 3, dict(meter.stages)
        on_host = kmeans.Problem(x, torch.arange(1000), 8, 0, 1)
        expected, _ = kmeans.TorchRefiner().advance(on_host, start)
        torch.testing.assert_close(moved.cpu(), expected)
    assert expected.max() < 2

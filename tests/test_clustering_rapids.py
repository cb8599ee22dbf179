"""The cuML engine: what it passes to cuML, cuML's peculiarities, and that nothing is copied on a GPU."""

import sys

import numpy as np
import pytest
import torch

from batchjob.clustering import engines, find_engine, open_engine, rapids, self_check
from batchjob.errors import UserError


def test_nothing_of_rapids_is_imported_before_the_engine_is_opened():
    assert not {"cuml", "cupy", "rmm"} & set(sys.modules)


def test_without_a_gpu_the_engine_says_so_before_any_work():
    wanted = "engine 'cuml' needs an NVIDIA GPU, this is device cpu; use --engine batched"
    with pytest.raises(UserError, match=wanted):
        engines._check_engine("cuml", torch.device("cpu"))
    with pytest.raises(UserError, match="use --engine batched"):
        rapids.CumlEngine(torch.device("cpu"))


def test_without_cuml_the_engine_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    wanted = "engine 'cuml' needs cuml, which is not installed; use --engine batched, or: make env GPU=1"
    with pytest.raises(UserError, match=wanted):
        engines._check_engine("cuml", torch.device("cuda"))


def test_image_scope_says_why_auto_leaves_cuml(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(self_check, "find_refusal", lambda *_, **__: "")
    monkeypatch.setattr(engines, "open_engine", lambda name, device: name)
    name, why = find_engine("auto", torch.device("cuda"))
    assert name == "triton"
    assert "cuml solves one problem a call" in why


def test_an_unknown_engine_is_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"--engine 'cumll' is unknown; did you mean 'cuml'.*auto, compiled, batched"):
        open_engine("cumll", torch.device("cpu"))


def test_small_problems_get_greedy_starts_and_large_ones_a_few_passes():
    small = rapids._arguments(196, 5, 2**40 + 3, 4)
    assert small["init"] == "k-means++"
    assert small["n_clusters"] == 5
    assert small["n_init"] == 4
    assert small["random_state"] == 3  # cuML takes 32 bits
    assert small["tol"] < 1e-6  # an absolute tolerance, on rows of unit spread
    assert rapids._arguments(1_000_000, 5, 0, 1)["init"] == "scalable-k-means++"


@pytest.mark.parametrize("size", [1e-30, 3e-5, 1.0, 7e18])
def test_rows_get_unit_spread_by_a_power_of_two_so_that_cuml_does_not_take_their_cost_for_zero(size):
    rows = (torch.rand(196, 196, generator=torch.Generator().manual_seed(0)).softmax(-1) + 1) * size
    scaled, factor = rapids._to_unit_spread(rows)
    spread = scaled.double().std(0, correction=0).square().mean().sqrt()
    assert 1 <= spread < 2
    assert np.log2(factor) == round(np.log2(factor))
    assert torch.equal(scaled.double() / factor, rows.double())
    cost = float((scaled - scaled.mean(0)).square().sum())
    assert cost > 3000  # k-means|| makes ln(cost) rounds, at most 8


def test_rows_that_are_all_equal_keep_their_size():
    scaled, factor = rapids._to_unit_spread(torch.zeros(4, 3))
    assert factor == 1
    assert torch.equal(scaled, torch.zeros(4, 3))


def test_tensors_become_arrays_over_the_same_memory_and_back():
    tensor = torch.rand(5, 3)
    array = rapids._as_array(tensor, np)  # numpy stands in for cupy: both speak DLPack
    assert array.ctypes.data == tensor.data_ptr()
    back = rapids._as_tensor(array)
    assert back.data_ptr() == tensor.data_ptr()
    assert torch.equal(back, tensor)


def test_a_memory_pool_is_made_once_and_never_replaces_another_librarys():
    class Plain:
        pass

    class Pool:
        def __init__(self, upstream, initial_pool_size):
            self.upstream, self.size = upstream, initial_pool_size

    class Resources:
        CudaMemoryResource, PoolMemoryResource = Plain, Pool
        current = Plain()

        def get_per_device_resource(self, device):
            return self.current

        def set_per_device_resource(self, device, resource):
            assert device == 1
            self.current = resource

    class Rmm:
        mr = Resources()

    rapids._make_pool(Rmm, 1)
    made = Rmm.mr.current
    assert made.size == rapids.FIRST_POOL_BYTES
    rapids._make_pool(Rmm, 1)
    assert Rmm.mr.current is made


@pytest.fixture
def cuml_engine():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    pytest.importorskip("cuml")
    return open_engine("cuml", torch.device("cuda"))


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_copied_on_the_way_to_cuml_and_back(cuml_engine):
    import cupy

    tensor = torch.rand(64, 8, device="cuda")
    array = rapids._as_array(tensor, cupy)
    assert array.data.ptr == tensor.data_ptr()
    assert rapids._as_tensor(array).data_ptr() == tensor.data_ptr()


@pytest.mark.gpu
def test_on_a_gpu_rows_written_on_another_stream_are_ready_when_cuml_reads_them(cuml_engine):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x = torch.eye(4, device="cuda")[torch.arange(40, device="cuda") % 4][None]
        found = cuml_engine.kmeans(x, torch.tensor([4]), torch.arange(1), n_init=1)
    assert found.labels[0].tolist() == [i % 4 for i in range(40)]


@pytest.mark.gpu
def test_on_a_gpu_tiny_numbers_give_the_inertia_of_the_batched_engine(cuml_engine):
    x = (3 * torch.randn(20, 100, 100, generator=torch.Generator().manual_seed(0))).softmax(-1).cuda() * 1e-4
    k = torch.full((20,), 5)
    ours = cuml_engine.kmeans(x, k, torch.arange(20), n_init=4)
    theirs = open_engine("batched", x.device).kmeans(x, k, torch.arange(20), n_init=4)
    assert float(ours.inertia.mean() / theirs.inertia.mean()) < 1.02

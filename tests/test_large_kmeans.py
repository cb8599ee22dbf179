"""The k-means over a whole dataset: right results, the same for any number of processes, and resuming."""

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from batchjob.clustering import rapids
from batchjob.codebook.kmeans import Fit, Problem, Refiner, SklearnRefiner, State, TorchRefiner, fit, open_refiner
from batchjob.codebook.nearest import _block_sums, assign, cluster_sums, greedy_starts
from batchjob.codebook.processes import ALONE, Group, _meeting_point, join
from batchjob.errors import UserError

REFINERS: list[Callable[[], Refiner]] = [TorchRefiner, SklearnRefiner]


def rows_like_attention(n: int, width: int, seed: int = 0) -> torch.Tensor:
    """Returns [n, width]: smooth rows that sum to 1 and overlap, like attention, without clear clusters."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(8, width, generator=generator)
    return torch.softmax(torch.randn(n, 8, generator=generator) @ factors, 1)


def mixture(n: int, k: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    centres = torch.softmax(3 * torch.randn(k, width, generator=generator), 1)
    truth = torch.randint(k, (n,), generator=generator)
    noise = 1 + 0.05 * torch.randn(n, width, generator=generator)
    return (centres[truth] * noise).abs(), truth


def solve(x: torch.Tensor, k: int, refiner: Refiner, *, n_init: int = 2, seed: int = 0, group: Group = ALONE) -> Fit:
    problem = Problem(x, torch.arange(len(x)), k, seed, n_init, group)
    return fit(problem, refiner, start=None, keep=lambda state: None)


@pytest.mark.parametrize("refiner", REFINERS)
def test_a_planted_mixture_is_recovered(refiner: Callable[[], Refiner]) -> None:
    x, truth = mixture(3000, 12, 20)
    found = solve(x, 12, refiner())
    labels, squares = assign(x, found.centroids)
    assert adjusted_rand_score(truth, labels) == 1.0
    assert found.counts.tolist() == torch.bincount(labels, minlength=12).tolist()
    assert found.inertia == pytest.approx(float(squares.double().sum()), rel=1e-6)
    assert found.rows == 3000


@pytest.mark.parametrize("refiner", REFINERS)
def test_inertia_is_within_a_percent_of_scikit_learns_own(refiner: Callable[[], Refiner]) -> None:
    x = rows_like_attention(20_000, 24)
    ours = np.mean([solve(x, 16, refiner(), seed=seed).inertia for seed in range(3)])
    theirs = np.mean([KMeans(16, n_init=2, random_state=seed).fit(x.numpy()).inertia_ for seed in range(3)])
    assert ours < 1.01 * theirs


def test_from_equal_starts_each_iteration_is_scikit_learns() -> None:
    x = rows_like_attention(4000, 16)
    start = x[:10].clone()
    problem, centroids = Problem(x, torch.arange(4000), 10, 0, 1), start
    for _ in range(5):
        centroids, _ = TorchRefiner().advance(problem, centroids)
    model = KMeans(10, init=start.double().numpy(), n_init=1, max_iter=5, tol=0).fit(x.double().numpy())
    np.testing.assert_allclose(centroids.numpy(), model.cluster_centers_, atol=1e-6)


def test_a_constant_factor_changes_nothing() -> None:
    x = rows_like_attention(3000, 16)
    a, b = solve(x, 8, TorchRefiner()), solve(x / 2**20, 8, TorchRefiner())
    assert torch.equal(a.centroids / 2**20, b.centroids)
    assert torch.equal(a.counts, b.counts)


def test_sums_over_23_million_rows_are_right_to_float32_and_a_plain_float32_sum_is_not() -> None:
    # every row of cluster 0 is (1/196, 1/3): a running float32 sum stops growing by the right amount long before
    n = 23_000_000
    values = torch.tensor([1 / 196, 1 / 3])
    x = values.expand(n, 2)
    centroids = torch.stack([values, values + 9])
    sums, counts = cluster_sums(x, centroids)
    means = (sums[0] / counts[0]).float()
    assert counts.tolist() == [n, 0]
    assert torch.equal(means, values)
    blocks = _block_sums(x[:1_000_000], torch.zeros(1_000_000, dtype=torch.int64), 2)[0] / 1_000_000  # as done on a GPU
    torch.testing.assert_close(blocks.float(), values, rtol=1e-6, atol=0)
    naive = np.cumsum(np.full(n, values[1].item(), np.float32), dtype=np.float32)[-1] / n
    assert abs(naive - values[1].item()) > 1e-3 * values[1].item()


def test_fewer_distinct_rows_than_clusters_leaves_clusters_empty_and_says_so() -> None:
    x = rows_like_attention(3, 10).repeat(50, 1)
    for refiner in (TorchRefiner(), SklearnRefiner()):
        found = solve(x, 5, refiner)
        assert (found.counts > 0).sum() >= 3
        assert found.counts.sum() == 150
        assert found.inertia < 1e-9
        assert torch.isfinite(found.centroids).all()


def test_a_cluster_that_loses_its_rows_moves_to_the_farthest_row() -> None:
    x = torch.tensor([[0.0], [0.1], [0.2], [9.0]])
    problem = Problem(x, torch.arange(4), 2, 0, 1)
    centroids, _ = TorchRefiner().advance(problem, torch.tensor([[1.0], [100.0]]))
    torch.testing.assert_close(centroids.sort(0).values, torch.tensor([[0.1], [9.0]]))


def test_fewer_rows_than_clusters_are_refused() -> None:
    with pytest.raises(UserError, match="5 clusters of 3 rows"):
        solve(rows_like_attention(3, 4), 5, TorchRefiner())


@pytest.mark.parametrize("refiner", REFINERS)
def test_an_interrupted_fit_goes_on_and_gives_the_same_centroids(refiner: Callable[[], Refiner]) -> None:
    problem = Problem(rows_like_attention(20_000, 16), torch.arange(20_000), 12, 3, 1)
    states: list[State] = []
    whole = fit(problem, refiner(), start=None, keep=states.append)
    assert len(states) > 1
    for state in states:
        rest = fit(problem, refiner(), start=state, keep=lambda _: None)
        assert torch.equal(rest.centroids, whole.centroids)
        assert (rest.inertia, rest.iterations) == (whole.inertia, whole.iterations)


def _fit_share(rank: int, ports: dict[int, int], folder: Path) -> None:
    torch.set_num_threads(1)
    for world, port in ports.items():
        if rank < world:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            with join(rank, world, torch.device("cpu")) as group:
                torch.save(_solve_share(rank, world, group), folder / f"{world}-{rank}.pt")


def _solve_share(rank: int, world: int, group: Group) -> Fit:
    x, numbers = rows_like_attention(30_000, 16), torch.arange(30_000)
    mine = (numbers // 1000) % min(world, 3) == rank  # as partitions are shared; the fourth gets no rows
    return fit(Problem(x[mine], numbers[mine], 20, 5, 2, group), TorchRefiner(), start=None, keep=lambda _: None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_one_two_and_four_processes_fit_the_same_centroids(tmp_path: Path) -> None:
    ports = {4: free_port(), 2: free_port()}
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_fit_share, args=(rank, ports, tmp_path)) for rank in range(4)]
    for process in processes:
        process.start()
    alone = _solve_share(0, 1, ALONE)
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    for world in (2, 4):
        found = [torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]
        assert all(torch.equal(one.centroids, found[0].centroids) for one in found)
        torch.testing.assert_close(found[0].centroids, alone.centroids, atol=1e-7, rtol=1e-5)
        assert torch.equal(found[0].counts, alone.counts)
        assert found[0].inertia == pytest.approx(alone.inertia, rel=1e-9)
        assert (found[0].rows, found[0].iterations) == (alone.rows, alone.iterations)


def test_the_start_has_a_centroid_in_every_planted_cluster() -> None:
    x, truth = mixture(2000, 10, 16)
    starts = greedy_starts(x, 10, torch.Generator().manual_seed(0))
    owners = {int(truth[(x == row).all(1).nonzero()[0, 0]]) for row in starts}
    assert owners == set(range(10))


def test_processes_connect_at_the_address_that_torchrun_or_slurm_gives() -> None:
    assert _meeting_point({"MASTER_ADDR": "a", "MASTER_PORT": "5"}) == ("a", 5)
    address, port = _meeting_point({"SLURM_JOB_NODELIST": "n7", "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "1"})
    assert (address, 20000 <= port < 32000) == ("n7", True)
    with pytest.raises(UserError, match="torchrun or srun"):
        _meeting_point({})
    with pytest.raises(UserError, match="job array"):
        _meeting_point({"SLURM_JOB_NODELIST": "n7", "SLURM_ARRAY_TASK_COUNT": "4"})


def test_engines_that_cannot_run_are_refused() -> None:
    cpu = torch.device("cpu")
    assert open_refiner("auto", cpu, ALONE)[0].name == "batched"
    with pytest.raises(UserError, match="one process"):
        open_refiner("sklearn", cpu, Group(0, 2))
    with pytest.raises(UserError, match="did you mean"):
        open_refiner("batchd", cpu, ALONE)
    with pytest.raises(UserError, match=r"--engine triton solves .* single images; the fit of a dataset takes auto"):
        open_refiner("triton", cpu, ALONE)


class FakeCuml:
    """Stands for cuml, cupy and RAFT on a CPU: runs scikit-learn's k-means and records its arguments."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.joined: tuple[Any, ...] = ()
        fake = self

        class Model:
            def __init__(self, **given: Any) -> None:
                fake.calls.append(given)
                self._given = given

            def fit(self, x: Any) -> None:
                model = KMeans(self._given["n_clusters"], init=self._given["init"], n_init=1, max_iter=10, tol=1e-4)
                self.cluster_centers_, self.n_iter_ = model.fit(x).cluster_centers_, model.n_iter_

        class Nccl:
            get_unique_id = staticmethod(lambda: b"id")

            def init(self, *arguments: Any) -> None:
                fake.joined = arguments

        cuda = SimpleNamespace(runtime=SimpleNamespace(deviceSynchronize=lambda: None))
        self.modules: dict[str, Any] = {
            "cuml": SimpleNamespace(cluster=SimpleNamespace(KMeans=Model)),
            "cuml.cluster.kmeans_mg": SimpleNamespace(KMeansMG=Model),
            "cupy": SimpleNamespace(from_dlpack=np.from_dlpack, asarray=np.asarray, cuda=cuda),
            "raft_dask.common.nccl": SimpleNamespace(nccl=Nccl),
            "raft_dask.common.comms_utils": SimpleNamespace(inject_comms_on_handle_coll_only=lambda *given: None),
            "pylibraft.common.handle": SimpleNamespace(Handle=lambda n_streams: "handle"),
        }


@pytest.mark.parametrize("launched", [False, True])
def test_cuml_gets_the_rows_without_a_copy_and_the_start_that_all_engines_have(
    launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuml()

    def open_fake(engine: rapids.CumlEngine, device: torch.device) -> None:
        engine._cuml, engine._cupy = fake.modules["cuml"], fake.modules["cupy"]

    monkeypatch.setattr(rapids.CumlEngine, "__init__", open_fake)
    monkeypatch.setattr(rapids.importlib, "import_module", fake.modules.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.delenv("RANK", raising=False)
    if launched:
        monkeypatch.setenv("RANK", "0")  # torchrun with one process: KMeansMG in a world of one
    refiner, _ = open_refiner("cuml", torch.device("cpu"), ALONE)
    x = rows_like_attention(5000, 16) / 1000  # tiny numbers, as in attention
    found = solve(x, 8, refiner)
    reference = solve(x, 8, TorchRefiner())
    assert found.inertia == pytest.approx(reference.inertia, rel=1e-3)
    assert all(call["n_init"] == 1 and call["max_iter"] == 10 for call in fake.calls)
    variance = float(x.double().var(0, correction=0).mean())
    assert fake.calls[0]["tol"] == pytest.approx(1e-4 * variance)  # absolute, so it scales with the rows
    assert fake.calls[0]["init"].shape == (8, 16)
    assert [call.get("handle") for call in fake.calls[:1]] == ["handle" if launched else None]
    assert fake.joined == ((1, b"id", 0) if launched else ())


def test_cuml_without_a_gpu_is_refused_before_any_work() -> None:
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        open_refiner("cuml", torch.device("cpu"), ALONE)


@pytest.mark.gpu
def test_cuml_and_torch_agree_on_a_gpu() -> None:
    pytest.importorskip("cuml")
    x = rows_like_attention(200_000, 64).cuda()
    ours = solve(x, 32, TorchRefiner())
    theirs = solve(x, 32, open_refiner("cuml", x.device, ALONE)[0])
    assert theirs.inertia == pytest.approx(ours.inertia, rel=0.01)
    on_cpu = solve(x.cpu(), 32, TorchRefiner())
    assert ours.inertia == pytest.approx(on_cpu.inertia, rel=1e-3)


MEASURE_MEMORY = """
import re, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, torch
from batchjob.codebook import kmeans as dataset
from batchjob.codebook.processes import ALONE
from batchjob.config import Options
from batchjob.job import fit
from batchjob.model.attention import LayerMaps

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
images, heads, budget = 1000, 4, int(sys.argv[1])
options = Options(scope="dataset", k="8", n_init="1")
plan = SimpleNamespace(options=options, model=SimpleNamespace(grid=(14, 14)), row_count=images, layers=(0,),
                       heads=tuple(range(heads)), vector_size=0)
batch = SimpleNamespace(rows=np.arange(8), status=np.zeros(8, np.uint8), mask=None, host_mask=None)

def maps(i):
    rows = torch.rand(8, heads, 196, 196, generator=torch.Generator().manual_seed(i))
    return [LayerMaps(0, rows, rows[:, :, 0], torch.zeros(8, heads), torch.ones(8, dtype=torch.bool))]

kind, sample, said = fit.sample_for(plan, [(0, images)], ALONE, budget)
warm = fit.SampledRows(plan, kind, fit.draw_sample(196 * 8, 1000, 0), [(0, 8)], torch.device("cpu"))
warm.add(batch, maps(0))
dataset.fit(warm.problem(0, 0, ALONE), dataset.TorchRefiner(), start=None, keep=lambda s: None)
before = peak()
held = fit.SampledRows(plan, kind, sample, [(0, images)], torch.device("cpu"))
for i in range(0, images, 8):
    held.add(SimpleNamespace(rows=np.arange(i, i + 8), status=batch.status, mask=None, host_mask=None), maps(i))
held.settle()
dataset.fit(held.problem(0, 0, ALONE), dataset.TorchRefiner(), start=None, keep=lambda s: None)
print(peak() - before, len(held), said)
"""


def test_memory_grows_by_the_budget_at_most() -> None:
    budget = 128 << 20  # all rows would take 615 MB
    command = [sys.executable, "-c", MEASURE_MEMORY, str(budget)]
    # glibc keeps freed blocks of up to 32 MB, and how many of them differs from run to run: here it gives them back
    fixed = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | fixed)
    growth, rows, said = ended.stdout.split(maxsplit=2)
    assert "instead of 196,000" in said
    assert 0.97 * budget < int(rows) * 4 * 196 * 4 <= budget
    assert 0.9 * budget < int(growth) < budget + (48 << 20)  # plus the sample of the start and one batch

"""One contract over all engines, algorithms and devices that this machine has."""

from dataclasses import dataclass

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from batchjob.clustering import Clusters, cluster, open_engine, problem_seeds
from batchjob.clustering.search import NotFiniteError
from batchjob.codes import NO_LABEL, NOISE

P = 36


@dataclass(frozen=True)
class Way:
    """One way of clustering that must keep the contract."""

    algorithm: str
    engine: str
    device: str

    def __call__(self, rows, k, *, seeds=None, mask=None, n_init=4, distance="euclidean") -> Clusters:
        device = torch.device(self.device)
        seeds = torch.arange(len(rows)) if seeds is None else seeds
        mask = None if mask is None else mask.to(device)
        found = cluster(
            self.algorithm,
            rows.to(device),
            k,
            seeds.to(device),
            engine=open_engine(self.engine, device),
            distance=distance,
            n_init=n_init,
            mask=mask,
        )
        assert found.labels.device.type == self.device
        return Clusters(found.labels.cpu(), found.inertia.cpu(), found.k.cpu(), found.settled.cpu())

    @property
    def takes_k(self):
        return self.algorithm != "hdbscan"

    @property
    def repeats(self):
        return self.engine != "cuml"  # for this engine a seed does not guarantee equal labels


def ways():
    on_cpu = [(m, "batched") for m in ("kmeans", "spectral", "agglomerative", "hdbscan")]
    others = [(m, e) for e in ("compiled", "sklearn") for m in ("kmeans", "spectral")]
    for algorithm, engine in [*on_cpu, *others]:
        yield pytest.param(Way(algorithm, engine, "cpu"), id=f"{algorithm}-{engine}-cpu")
    for algorithm, engine in [*on_cpu, ("kmeans", "cuml"), ("spectral", "cuml")]:
        yield pytest.param(Way(algorithm, engine, "cuda"), id=f"{algorithm}-{engine}-cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=ways())
def way(request):
    if request.param.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    if request.param.engine == "cuml":
        pytest.importorskip("cuml")
    return request.param


def grouped(n, k, *, p=P, seed=0, noise=0.1):
    """Makes attention of patches that attend to their own group, a little unevenly; returns it and the groups."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.stack([torch.arange(p)[torch.randperm(p, generator=generator)] % c for c in k.tolist()])
    own = (groups[:, :, None] == groups[:, None, :]).float()
    rows = own * (1 + noise * torch.rand(n, p, p, generator=generator)) + 0.01
    return rows / rows.sum(-1, keepdim=True), groups


def appears_in_order(labels):
    """Says whether the clusters are numbered 0, 1, 2, … by first appearance."""
    numbers = list(dict.fromkeys(v for v in labels.tolist() if v not in (NO_LABEL, NOISE)))
    return numbers == list(range(len(numbers)))


def test_separated_groups_are_found_exactly_with_another_k_in_each_problem(way):
    k = torch.tensor([2, 3, 4, 5, 6, 2, 3])
    rows, groups = grouped(len(k), k)
    found = way(rows, k)
    assert found.labels.dtype == torch.uint8
    assert found.labels.shape == (7, P)
    assert found.inertia.dtype == torch.float32
    assert found.k.dtype == torch.uint8
    assert found.k.tolist() == k.tolist()
    for labels, truth in zip(found.labels, groups, strict=True):
        assert adjusted_rand_score(labels.tolist(), truth.tolist()) == 1
        assert appears_in_order(labels)


def test_patches_outside_the_mask_take_no_part_whatever_they_hold(way):
    k = torch.tensor([2, 3, 3, 2])
    rows, groups = grouped(4, k)
    mask = torch.ones(4, P, dtype=torch.bool)
    mask[:, ::6] = False
    mask[3] = True
    rows[~mask] = torch.rand(int((~mask).sum()), P) * 1e3
    found = way(rows, k, mask=mask)
    assert (found.labels[~mask] == NO_LABEL).all()
    assert found.k.tolist() == k.tolist()
    for labels, truth, inside in zip(found.labels, groups, mask, strict=True):
        assert adjusted_rand_score(labels[inside].tolist(), truth[inside].tolist()) == 1
        assert appears_in_order(labels)


def test_a_mask_that_leaves_nothing_gives_no_labels(way):
    rows, _ = grouped(2, torch.tensor([2, 2]))
    mask = torch.ones(2, P, dtype=torch.bool)
    mask[1] = False
    found = way(rows, 2, mask=mask)
    assert (found.labels[1] == NO_LABEL).all()
    assert found.k.tolist() == [2, 0]
    assert found.inertia[1] == 0


def test_labels_are_the_same_bits_in_any_batch_and_order(way):
    if not way.repeats:
        pytest.skip("cuml promises no equal labels for equal seeds")
    n = 23
    rows = torch.rand(n, P, P, generator=torch.Generator().manual_seed(3)).softmax(-1)
    k = torch.arange(n) % 7 + 1
    seeds = torch.arange(n) * 11
    whole = way(rows, k, seeds=seeds)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(4))
    shuffled = way(rows[order], k[order], seeds=seeds[order])
    assert torch.equal(shuffled.labels, whole.labels[order])
    assert torch.equal(shuffled.inertia, whole.inertia[order])
    for i in (0, 9, 22):
        alone = way(rows[i : i + 1], k[i : i + 1], seeds=seeds[i : i + 1])
        assert torch.equal(alone.labels[0], whole.labels[i])
    masked = way(rows, k, seeds=seeds, mask=torch.ones(n, P, dtype=torch.bool))
    if way.algorithm == "kmeans" and way.engine in ("batched", "compiled"):
        assert torch.equal(masked.labels, whole.labels)


def test_equal_rows_get_equal_labels(way):
    if way.algorithm == "hdbscan":
        pytest.skip("in a cloud without groups it may call one of two equal rows noise")
    half = P // 2
    rows = torch.rand(5, half, P, generator=torch.Generator().manual_seed(5)).softmax(-1)
    rows = torch.cat([rows, rows], 1)
    rows = rows[:, :, :half].repeat(1, 1, 2) / rows[:, :, :half].sum(-1, keepdim=True) / 2  # columns are repeated too
    found = way(rows, 4)
    assert torch.equal(found.labels[:, :half], found.labels[:, half:])


def test_rows_that_are_all_equal_make_one_cluster(way):
    found = way(torch.full((3, P, P), 1 / P), 4)
    if way.algorithm in ("kmeans", "agglomerative"):
        assert (found.labels == 0).all()
        assert found.k.tolist() == [1, 1, 1]
        assert found.inertia.abs().max() < 1e-9
    else:  # hdbscan labels them noise; spectral may cut equal affinities anywhere
        assert ((found.labels < 4) | (found.labels == NOISE)).all()
        assert (found.k <= 4).all()


def test_k_is_clipped_to_the_number_of_different_rows(way):
    if way.algorithm not in ("kmeans", "agglomerative"):
        pytest.skip("its clusters are not of the rows")
    rows = torch.eye(3)[torch.arange(P) % 3].repeat(1, P // 3)[None]
    rows = rows / rows.sum(-1, keepdim=True)
    found = way(rows, 9)
    assert found.k.tolist() == [3]
    assert found.labels[0].tolist() == [i % 3 for i in range(P)]
    assert found.inertia[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_rejected_with_the_problems_index(way, bad):
    rows = torch.rand(5, P, P).softmax(-1)
    rows[1, 3, 4] = bad
    rows[4, 0, 0] = bad
    with pytest.raises(NotFiniteError, match="2 clustering problems hold NaN or infinity: 1, 4") as caught:
        way(rows, 3)
    assert caught.value.problems == (1, 4)


def test_one_cluster_is_everything(way):
    rows = torch.rand(3, P, P).softmax(-1)
    found = way(rows, 1)
    if way.takes_k:
        assert (found.labels == 0).all()
        assert found.k.tolist() == [1, 1, 1]


def test_as_many_clusters_as_patches_are_one_each(way):
    if not way.takes_k:
        pytest.skip("it takes no k")
    found = way(torch.eye(P).expand(2, P, P) * 0.5 + 0.5 / P, P)
    assert found.k.tolist() == [P, P]
    assert found.labels.tolist() == [list(range(P))] * 2


def test_a_grid_of_one_patch_has_one_cluster(way):
    found = way(torch.ones(2, 1, 1), 3)
    assert found.labels.tolist() == ([[0], [0]] if way.takes_k else [[NOISE], [NOISE]])
    assert found.inertia.tolist() == [0, 0]


def test_zero_problems_give_zero_labels(way):
    found = way(torch.ones(0, P, P), 3)
    assert found.labels.shape == (0, P)
    assert found.k.shape == (0,)


@pytest.mark.parametrize("distance", ["cosine", "hellinger"])
def test_other_distances_find_separated_groups_too(way, distance):
    k = torch.tensor([2, 4])
    rows, groups = grouped(2, k)
    found = way(rows, k, distance=distance)
    for labels, truth in zip(found.labels, groups, strict=True):
        assert adjusted_rand_score(labels.tolist(), truth.tolist()) == 1


def test_ten_thousand_problems_are_solved_in_one_call(way):
    one_a_call = way.engine in ("sklearn", "cuml") or way.algorithm in ("agglomerative", "hdbscan")
    n = 600 if one_a_call else 10_000  # enough for worker processes
    k = torch.full((n,), 2)
    rows, groups = grouped(50, k[:50], p=12)
    found = way(rows.repeat(n // 50, 1, 1), k, seeds=torch.arange(n))
    expected = groups ^ groups[:, :1]  # numbered by first appearance
    assert torch.equal(found.labels.long(), expected.repeat(n // 50, 1))


def test_each_problem_has_a_seed_of_its_own_whatever_the_batch():
    rows = torch.tensor([0, 1, 5])
    seeds = problem_seeds(rows, 11, (0, 3), 5, 0)
    assert seeds.shape == (6,)
    assert len(set(seeds.tolist())) == 6
    assert problem_seeds(rows[2:], 11, (3,), 5, 0).tolist() == seeds[5:].tolist()
    assert problem_seeds(rows, 11, (0, 3), torch.full((6,), 5), 0).tolist() == seeds.tolist()
    for other in (problem_seeds(rows, 10, (0, 3), 5, 0), problem_seeds(rows, 11, (0, 3), 4, 0)):
        assert not set(other.tolist()) & set(seeds.tolist())
    assert not set(problem_seeds(rows, 11, (0, 3), 5, 1).tolist()) & set(seeds.tolist())

"""The batched engine: known answers, exact agreement from equal starts, quality, memory."""

import itertools
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from batchjob.clustering import batched, lloyd, open_engine
from batchjob.clustering.base import number_by_appearance, uniform
from batchjob.clustering.gram import _draw, centred_gram, plus_plus
from tests.conftest import ROOT
from tests.real_attention import attention_rows
from tests.test_clustering_methods import smooth

CPU = torch.device("cpu")


def solve(x, k, *, n_init=4, seeds=None, **more):
    k = torch.full((len(x),), k) if isinstance(k, int) else k
    seeds = torch.arange(len(x)) if seeds is None else seeds
    return open_engine("batched", CPU).kmeans(x, k, seeds, n_init=n_init, **more)


def from_starts(x, centres):
    """Returns labels uint8 [N, P] of our Lloyd's algorithm from the rows `centres` [N, K]."""
    n, p, _ = x.shape
    products = torch.empty(n, p, p)
    centred_gram(x, None, products)
    tiles = lloyd.Tiles(
        gram=products,
        square=torch.diagonal(products, dim1=1, dim2=2)[:, None].contiguous(),
        member=None,
        ones=torch.empty(n, centres.shape[1], 1, p),
        cost=torch.empty(n, 1),
        same=torch.zeros(n, dtype=torch.bool),
        order=torch.arange(n),
        tile=n,
    )
    lloyd.assign_to_rows(tiles, slice(0, n), centres[:, :, None])
    lloyd.run(tiles)
    return lloyd.best_restart(tiles)[0].argmax(1)


@pytest.mark.parametrize("k", [2, 5, 9])
def test_from_equal_starts_labels_are_scikit_learns_exactly(k):
    x = attention_rows(4)
    starts = torch.stack([torch.randperm(256, generator=torch.Generator().manual_seed(i))[:k] for i in range(len(x))])
    ours = from_starts(x, starts)
    differing = 0
    for rows, own, start in zip(x.numpy(), ours.numpy(), starts.numpy(), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = KMeans(k, init=rows[start], n_init=1, tol=0).fit(rows).labels_
        differing += int((own != theirs).sum())
    assert differing == 0


@pytest.mark.parametrize(("k", "n_init"), [(5, 1), (8, 4)])
def test_on_real_attention_the_mean_inertia_is_scikit_learns(k, n_init):
    x = attention_rows(4)
    ours, theirs = [], []
    for seed in range(3):
        ours.append(solve(x, k, n_init=n_init, seeds=torch.arange(len(x)) + 1000 * seed).inertia.double().mean())
        fits = [KMeans(k, n_init=n_init, random_state=seed).fit(rows) for rows in x.numpy()]
        theirs.append(np.mean([fit.inertia_ for fit in fits]))
    assert float(np.mean(ours)) <= 1.005 * float(np.mean(theirs))


def test_the_inertia_is_the_sum_of_squared_distances_to_the_own_mean():
    x = smooth(6)
    found = solve(x, 4)
    for rows, labels, inertia in zip(x.double(), found.labels, found.inertia, strict=True):
        own = [rows[labels == c] for c in range(4)]
        assert float(inertia) == pytest.approx(float(sum((r - r.mean(0)).square().sum() for r in own)), rel=1e-5)


def test_the_inertia_of_tight_clusters_far_apart_keeps_its_digits():
    x = torch.eye(3)[torch.arange(30) % 3][None] * 100 + 1e-3 * torch.rand(1, 30, 3)
    found = solve(x, 3)
    own = [x[0, c::3].double() for c in range(3)]
    exact = float(sum((r - r.mean(0)).square().sum() for r in own))
    assert float(found.inertia[0]) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**40, 1e-12, 3e5])
def test_scaling_the_rows_changes_no_label(factor):
    x = smooth(8)
    before, after = solve(x, 5), solve(x * factor, 5)
    assert torch.equal(before.labels, after.labels)


def test_more_restarts_never_cost_more():
    x = smooth(20)
    costs = [solve(x, 7, n_init=n).inertia for n in (1, 2, 4, 8)]
    for few, many in itertools.pairwise(costs):
        assert (many <= few * (1 + 1e-6)).all()  # the first restarts are the same
    assert costs[-1].mean() < costs[0].mean()


def test_another_seed_draws_other_starts():
    x = smooth(30)
    a, b = (solve(x, 7, n_init=1, seeds=torch.arange(30) + s).inertia for s in (0, 1000))
    assert (a != b).any()


def test_no_cluster_is_left_empty_where_rows_differ():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 30, 2, generator=generator).round()  # many equal rows, many ties
    distinct = torch.tensor([len(torch.unique(rows, dim=0)) for rows in x])
    found = solve(x, torch.minimum(torch.full((50,), 12), distinct), n_init=1)
    assert found.k.tolist() == torch.minimum(torch.full((50,), 12), distinct).tolist()


def test_a_start_with_equal_centres_is_repaired():
    x = torch.cat([torch.zeros(1, 5, 2), torch.tensor([[[9.0, 0.0], [0.0, 9.0]]])], 1)
    labels = from_starts(x, torch.tensor([[0, 1, 2]]))  # three times the same row
    assert number_by_appearance(labels, 254)[0].tolist() == [[0, 0, 0, 0, 0, 1, 2]]


def test_starts_are_drawn_by_squared_distance():
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0]).expand(1, 1, 4)
    uniforms = (torch.arange(1000, dtype=torch.float64) / 1000).view(1, 1, 1000)
    counts = torch.bincount(_draw(weights, uniforms).flatten(), minlength=4)
    assert counts[[0, 3]].tolist() == [0, 0]
    assert counts.tolist() == pytest.approx([0, 250, 750, 0], abs=1)


def test_a_greedy_start_takes_a_row_of_every_far_group():
    x = 100 * torch.eye(6)[torch.arange(36) % 6][None] + torch.rand(1, 36, 6)
    products = torch.empty(1, 36, 36)
    centred_gram(x, None, products)
    centres, starved = plus_plus(products, None, 6, torch.arange(1), 10)
    assert not starved.any()
    assert sorted((centres[0] % 6)[:, 0].tolist()) == list(range(6))


def test_random_numbers_are_uniform_and_differ_between_seeds():
    drawn = uniform(torch.arange(200), 0, count=50)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(drawn.std()) == pytest.approx(12**-0.5, abs=0.01)
    assert torch.equal(uniform(torch.tensor([7]), 3, count=2), drawn[7:8, 3:5])


def test_numbering_is_by_first_appearance_and_leaves_noise_and_none():
    labels = torch.tensor([[5, 5, 2, 254, 2, 255, 0], [255, 1, 1, 0, 0, 0, 0]])
    numbered, k = number_by_appearance(labels, 254)
    assert numbered.tolist() == [[0, 0, 1, 254, 1, 255, 2], [255, 0, 0, 1, 1, 1, 1]]
    assert k.tolist() == [3, 2]


def test_finished_problems_keep_their_answer_while_others_go_on():
    hard, easy = smooth(40), torch.eye(64)[torch.arange(64) % 4].repeat(40, 1, 1)
    mixed = torch.stack([hard, easy], 1).flatten(0, 1)
    found = solve(mixed, 4, seeds=torch.arange(80))
    assert (found.labels[1::2] == torch.arange(64) % 4).all()
    assert torch.equal(found.labels[::2], solve(hard, 4, seeds=torch.arange(0, 80, 2)).labels)


def test_labels_do_not_depend_on_the_memory_budget():
    x = smooth(70)
    k = torch.full((70,), 4)
    small, large = (
        batched.BatchedEngine(CPU, budget_bytes=b).kmeans(x, k, torch.arange(70), n_init=2) for b in (2 << 20, 64 << 20)
    )
    assert torch.equal(small.labels, large.labels)


def test_more_rows_than_a_gram_matrix_holds_are_refused():
    x = torch.zeros(1, 1, 1).expand(1, batched.MAX_ROWS + 1, 1)
    with pytest.raises(ValueError, match="the batched engine takes up to 16384"):
        solve(x, 2)


@pytest.mark.parametrize("wrong", ["k", "seeds", "mask"])
def test_shapes_that_do_not_fit_are_named(wrong):
    given = {"k": torch.full((3,), 2), "seeds": torch.arange(3), "mask": torch.ones(3, 8, dtype=torch.bool)}
    given[wrong] = given[wrong][:2]
    with pytest.raises(ValueError, match="3 problems of 8 rows need"):
        open_engine("batched", CPU).kmeans(torch.rand(3, 8, 8), n_init=1, **given)


@pytest.mark.parametrize("name", ["batched", "compiled", "sklearn"])
def test_more_clusters_than_a_byte_can_number_are_refused_but_not_a_k_above_the_rows(name):
    engine, x, k = open_engine(name, CPU), torch.rand(1, 300, 2), torch.tensor([255])
    with pytest.raises(ValueError, match="k is at most 254; found 255, for problems of 300 rows"):
        engine.kmeans(x, k, torch.arange(1), n_init=1)
    assert engine.kmeans(x[:, :9], k, torch.arange(1), n_init=1).k.tolist() == [9]


MEASURE = """
import resource, sys, torch
from batchjob.clustering.batched import BatchedEngine
engine = BatchedEngine(torch.device("cpu"), budget_bytes=64 << 20)
x = torch.rand(600, 196, 196)
k, seeds = torch.full((600,), 5), torch.arange(600)
engine.kmeans(x[:16], k[:16], seeds[:16], n_init=4)  # libraries settle
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
engine.kmeans(x, k, seeds, n_init=4)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_the_memory_taken_stays_within_the_budget():
    """Checks the memory: 600 Gram matrices would take 92 MB, and with careless copies several times that."""
    command, one_thread = [sys.executable, "-c", MEASURE], os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=one_thread, check=True, capture_output=True, text=True)
    assert int(run.stdout) <= 80 << 20

"""Tests in Triton's interpreter on a CPU, run by test_clustering_triton.py in a process of their own.

The interpreter replaces Triton's language when it is first imported, so it cannot share a process with other tests. It
takes a second or more for each problem, so the engines' contract is tested on fewer problems.
"""

import functools

import pytest
import torch

from batchjob.clustering import open_engine
from tests import test_clustering as contract
from tests.test_clustering import Way

CPU = torch.device("cpu")
WAY = Way("kmeans", "triton", "cpu")
grouped = functools.partial(contract.grouped, p=18)


@pytest.fixture
def interpreted():
    return open_engine("triton", CPU)


@pytest.fixture
def way(monkeypatch):
    """Solves smaller problems for the tests of the contract, since the interpreter is slow."""
    monkeypatch.setattr(contract, "P", 18)
    monkeypatch.setattr(contract, "grouped", grouped)
    return WAY


def test_labels_are_those_of_the_torch_version(interpreted):
    check(interpreted, p=18, n_init=2, k=[3], masked=True)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("p", "n_init"), [(20, 4), (33, 3), (70, 6), (16, 1)])
def test_labels_are_those_of_the_torch_version_in_every_shape(interpreted, p, n_init, masked):
    check(interpreted, p=p, n_init=n_init, k=[1, 2, 3, 5, 6], masked=masked)


@pytest.mark.slow
def test_many_clusters_take_several_products(interpreted):
    check(interpreted, p=70, n_init=4, k=[40], masked=False)


@pytest.mark.slow
@pytest.mark.parametrize("d", [3, 100])
def test_rows_need_not_be_as_wide_as_there_are_rows(interpreted, d):
    x = torch.randn(2, 20, d, generator=torch.Generator().manual_seed(d))
    check(interpreted, p=20, n_init=2, k=[3, 4], masked=False, x=x)


def check(engine, *, p, n_init, k, masked, x=None):
    """Checks that labels, k, inertia and settled are those of the torch engine."""
    generator = torch.Generator().manual_seed(p)
    x = torch.rand(len(k), p, p, generator=generator).softmax(-1) if x is None else x
    mask = torch.rand(len(k), p, generator=generator) > 0.25 if masked else None
    given = (x, torch.tensor(k), torch.arange(len(k)))
    ours = engine.kmeans(*given, n_init=n_init, mask=mask)
    theirs = open_engine("batched", CPU).kmeans(*given, n_init=n_init, mask=mask)
    assert torch.equal(ours.labels, theirs.labels)
    assert torch.equal(ours.k, theirs.k)
    assert torch.equal(ours.settled, theirs.settled)
    assert torch.allclose(ours.inertia, theirs.inertia, rtol=1e-5)


def test_rows_that_float32_cant_tell_apart_are_solved_again_in_float64(interpreted):
    x = torch.eye(3)[torch.arange(12) % 3][None]
    found = interpreted.kmeans(x, torch.tensor([4]), torch.arange(1), n_init=1)
    assert found.k.tolist() == [3]
    assert found.labels[0].tolist() == [i % 3 for i in range(12)]
    assert float(found.inertia[0]) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_an_empty_cluster_is_placed_at_the_row_farthest_from_its_mean(interpreted):
    """Makes two distant pairs and starts that are all in one pair, so that only the remedy reaches the other."""
    x = torch.randn(3, 24, 3, generator=torch.Generator().manual_seed(1))
    x[:, :3] += 50
    check(interpreted, p=24, n_init=2, k=[8] * 3, masked=False, x=x)


@pytest.mark.slow
def test_exchanges_of_means_find_what_plain_starts_miss(interpreted):
    x = torch.rand(1, 24, 24, generator=torch.Generator().manual_seed(0)).softmax(-1)
    k, seeds = torch.tensor([4]), torch.arange(1)
    best = float(open_engine("compiled", CPU).kmeans(x, k, seeds, n_init=0).inertia)
    plain = float(open_engine("batched", CPU).kmeans(x, k, seeds, n_init=8).inertia)
    found = float(interpreted.kmeans(x, k, seeds, n_init=0).inertia)
    assert plain > 1.005 * best
    assert found <= 1.002 * best


@pytest.mark.slow
@pytest.mark.parametrize(
    "test",
    [
        contract.test_separated_groups_are_found_exactly_with_another_k_in_each_problem,
        contract.test_patches_outside_the_mask_take_no_part_whatever_they_hold,
        contract.test_a_mask_that_leaves_nothing_gives_no_labels,
        contract.test_labels_are_the_same_bits_in_any_batch_and_order,
        contract.test_equal_rows_get_equal_labels,
        contract.test_rows_that_are_all_equal_make_one_cluster,
        contract.test_k_is_clipped_to_the_number_of_different_rows,
        contract.test_one_cluster_is_everything,
        contract.test_as_many_clusters_as_patches_are_one_each,
        contract.test_a_grid_of_one_patch_has_one_cluster,
        contract.test_zero_problems_give_zero_labels,
    ],
)
def test_the_engines_contract(way, test):
    test(way)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's warning about NaN, which a GPU does not give
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_rejected(way, bad):
    contract.test_numbers_that_are_not_finite_are_rejected_with_the_problems_index(way, bad)

"""What Triton's interpreter must show on a CPU: run by test_clustering_triton.py in a process of its own.

The interpreter replaces Triton's language when it is first imported, so it can't share a process with other tests.
"""

import pytest
import torch

from batchjob.clustering import open_engine, triton_engine

CPU = torch.device("cpu")


@pytest.fixture
def interpreted():
    return open_engine("triton", CPU)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("p", "n_init"), [(20, 4), (33, 3), (16, 1)])
def test_labels_are_those_of_the_torch_version(interpreted, p, n_init, masked):
    n = 5
    generator = torch.Generator().manual_seed(p)
    x = torch.rand(n, p, p, generator=generator).softmax(-1)
    k = torch.tensor([1, 2, 3, 5, 6])
    mask = torch.rand(n, p, generator=generator) > 0.25 if masked else None
    ours = interpreted.kmeans(x, k, torch.arange(n), n_init=n_init, mask=mask)
    theirs = open_engine("batched", CPU).kmeans(x, k, torch.arange(n), n_init=n_init, mask=mask)
    assert torch.equal(ours.labels, theirs.labels)
    assert torch.equal(ours.k, theirs.k)
    assert torch.allclose(ours.inertia, theirs.inertia, rtol=1e-5)


def test_a_problem_with_few_different_rows_goes_to_the_torch_version(interpreted):
    x = torch.eye(4)[torch.arange(20) % 4][None]
    found = interpreted.kmeans(x, torch.tensor([7]), torch.arange(1), n_init=2)
    assert found.k.tolist() == [4]
    assert found.labels[0].tolist() == [i % 4 for i in range(20)]


def test_an_empty_cluster_is_placed_at_the_row_farthest_from_its_mean(interpreted):
    """Two far pairs, and starts that all lie in one of them: only the remedy reaches the other."""
    x = torch.randn(6, 24, 3, generator=torch.Generator().manual_seed(1))
    x[:, :3] += 50
    k = torch.full((6,), 8)
    ours = interpreted.kmeans(x, k, torch.arange(6), n_init=2)
    theirs = open_engine("batched", CPU).kmeans(x, k, torch.arange(6), n_init=2)
    assert ours.k.tolist() == [8] * 6
    assert torch.equal(ours.labels, theirs.labels)


def test_the_matrix_in_half_precision_keeps_the_labels_of_separated_groups(interpreted, monkeypatch):
    monkeypatch.setattr(triton_engine, "HALF_FROM", 8)
    x = torch.eye(5)[torch.arange(30) % 5].repeat(3, 1, 1) + 0.05 * torch.rand(3, 30, 5)
    found = interpreted.kmeans(x, torch.full((3,), 5), torch.arange(3), n_init=2)
    assert found.labels.tolist() == [[i % 5 for i in range(30)]] * 3


def test_what_does_not_fit_a_chip_goes_to_the_torch_version(interpreted, monkeypatch):
    monkeypatch.setattr(triton_engine, "MAX_PATCHES", 8)
    monkeypatch.setattr(triton_engine, "launch", lambda *_: pytest.fail("launched"))
    x = torch.rand(2, 20, 20)
    ours = interpreted.kmeans(x, torch.full((2,), 3), torch.arange(2), n_init=2)
    theirs = open_engine("batched", CPU).kmeans(x, torch.full((2,), 3), torch.arange(2), n_init=2)
    assert torch.equal(ours.labels, theirs.labels)

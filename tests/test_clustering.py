"""One contract over all engines, methods and devices that are there."""

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from batchjob.clustering import NONE, cluster, open_engine

ENGINES = ("batched", "sklearn")


@pytest.fixture(params=ENGINES)
def engine(request):
    return open_engine(request.param, torch.device("cpu"))


def blobs(n, p, d, k, seed=0, spread=0.05):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(n, k, d, generator=generator)
    truth = torch.randint(k, (n, p), generator=generator)
    x = centre.gather(1, truth[..., None].expand(n, p, d)) + spread * torch.randn(n, p, d, generator=generator)
    return x, truth


def test_separated_blobs_are_found_exactly(engine):
    x, truth = blobs(5, 40, 12, 3)
    found = engine.kmeans(x, torch.full((5,), 3), torch.arange(5), n_init=4)
    assert found.labels.dtype == torch.uint8
    assert found.labels.shape == (5, 40)
    assert found.k.tolist() == [3] * 5
    for a, b in zip(found.labels.tolist(), truth.tolist(), strict=True):
        assert adjusted_rand_score(a, b) == 1


def test_rows_outside_the_mask_take_no_part(engine):
    x, truth = blobs(4, 40, 12, 3)
    mask = torch.rand(4, 40, generator=torch.Generator().manual_seed(1)) > 0.3
    x[~mask] = 1e6
    found = engine.kmeans(x, torch.full((4,), 3), torch.arange(4), n_init=4, mask=mask)
    assert (found.labels[~mask] == NONE).all()
    for a, b, keep in zip(found.labels, truth, mask, strict=True):
        assert adjusted_rand_score(a[keep].tolist(), b[keep].tolist()) == 1


def test_cluster_takes_one_k_for_all(engine):
    rows = torch.rand(3, 16, 16).softmax(-1)
    found = cluster("kmeans", rows, 4, torch.arange(3), engine=engine)
    assert found.k.tolist() == [4, 4, 4]

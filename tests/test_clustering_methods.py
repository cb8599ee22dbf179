"""The algorithms other than k-means, and the rules for k, against scikit-learn and known answers."""

import numpy as np
import pytest
import torch
from sklearn.cluster import HDBSCAN, AgglomerativeClustering, SpectralClustering
from sklearn.metrics import adjusted_rand_score, silhouette_score

from batchjob.clustering import cluster, lloyd, open_engine, pools
from batchjob.clustering.choose_k import _mean_silhouette, choose_k
from batchjob.clustering.gram import centred_gram
from batchjob.clustering.search import AUTO
from batchjob.clustering.spectral import decompose
from batchjob.codes import NOISE
from batchjob.errors import UserError
from tests.conftest import SAMPLE, TINY
from tests.runs import plan_what_is_there
from tests.test_clustering import grouped

CPU = torch.device("cpu")
ENGINE = open_engine("compiled", CPU)


def smooth(n, side=8, seed=0):
    """Makes attention like that of real heads: near patches, similar content, noise."""
    generator = torch.Generator().manual_seed(seed)
    p = side * side
    y, x = torch.arange(p) // side, torch.arange(p) % side
    far = ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2).float()
    content = torch.randn(n, p, 4, generator=generator)
    score = content @ content.mT - far / 8 + 0.3 * torch.randn(n, p, p, generator=generator)
    return score.softmax(-1)


def ward_cost(x, labels):
    return sum(((x[labels == c] - x[labels == c].mean(0)) ** 2).sum() for c in np.unique(labels))


def test_spectral_agrees_with_scikit_learn_on_separated_groups():
    k = torch.tensor([2, 3, 4])
    rows, _ = grouped(3, k)
    ours = cluster("spectral", rows, k, torch.arange(3), engine=open_engine("batched", CPU))
    for i in range(3):
        affinity = ((rows[i] + rows[i].T) / 2).double().numpy()
        theirs = SpectralClustering(int(k[i]), affinity="precomputed", random_state=0).fit(affinity).labels_
        assert adjusted_rand_score(ours.labels[i].tolist(), theirs) == 1


def test_spectral_is_no_worse_than_scikit_learn_by_its_own_objective():
    rows, k = smooth(6), 4
    ours = cluster("spectral", rows, k, torch.arange(6), engine=open_engine("batched", CPU), n_init=10)
    _, vectors = decompose(rows, None, k)
    ratios = []
    for i in range(6):
        affinity = ((rows[i] + rows[i].T) / 2).double().numpy()
        solver = SpectralClustering(k, affinity="precomputed", random_state=0, n_init=10, eigen_solver="arpack")
        theirs = solver.fit(affinity).labels_
        ratios.append(float(ours.inertia[i]) / ward_cost(vectors[i].double().numpy(), theirs))
    assert np.mean(ratios) <= 1.005


def test_eigenvalues_of_separate_components_are_zero():
    rows, _ = grouped(1, torch.tensor([4]))
    own = torch.where(rows > 0.05, rows, 0)
    values, _ = decompose(own, None, 6)
    assert values[0, :4].abs().max() < 1e-5
    assert values[0, 4] > 0.1


def test_ward_labels_are_those_of_scikit_learn():
    rows = smooth(3)
    ours = cluster("agglomerative", rows, 5, torch.arange(3), engine=open_engine("batched", CPU))
    for i in range(3):
        x = rows[i].double().numpy()
        theirs = AgglomerativeClustering(5, linkage="ward").fit(x).labels_
        assert adjusted_rand_score(ours.labels[i].tolist(), theirs) == 1
        assert float(ours.inertia[i]) == pytest.approx(ward_cost(x, theirs), rel=1e-5)


def test_hdbscan_labels_are_those_of_scikit_learn_with_noise_as_254():
    rows, _ = grouped(3, torch.tensor([2, 3, 4]))
    rows[:, 0] = torch.eye(rows.shape[1])[0]  # one patch differs from all others
    ours = cluster("hdbscan", rows, 5, torch.arange(3), engine=open_engine("batched", CPU))
    for i in range(3):
        theirs = HDBSCAN(copy=True).fit(rows[i].double().numpy()).labels_
        assert theirs[0] == -1
        assert ours.labels[i, 0] == NOISE
        assert ((ours.labels[i] == NOISE).numpy() == (theirs == -1)).all()
        assert adjusted_rand_score(ours.labels[i].tolist(), theirs) == 1
        assert int(ours.k[i]) == theirs.max() + 1


def test_worker_processes_give_the_labels_of_one_process():
    rows = smooth(20, side=5)
    k = torch.full((20,), 3)
    alone = pools.solve_each("agglomerative", rows, k, processes=1)
    shared = pools.solve_each("agglomerative", rows, k, processes=2)
    assert torch.equal(alone.labels, shared.labels)
    assert torch.equal(alone.inertia, shared.inertia)


def test_the_cost_of_a_problem_is_measured_beforehand():
    small, large = (pools._seconds_a_problem("agglomerative", patches) for patches in (16, 1200))
    assert 0 < small < large


def test_the_cost_of_all_problems_is_printed_in_a_fitting_unit(monkeypatch):
    monkeypatch.setattr(pools, "_seconds_a_problem", lambda algorithm, patches: 0.012)
    monkeypatch.setattr(pools, "usable_cores", lambda: 2)
    told = pools.forecast("hdbscan", 1_400_000, 196)
    assert told == (
        "hdbscan solves one problem after the other, 12 ms each on a CPU: "
        "1,400,000 problems on 2 CPUs take about 2.3 hours"
    )
    assert pools.forecast("hdbscan", 100, 196).endswith("take about 0.6 seconds")


def test_a_run_tells_the_cost_beforehand_and_how_many_problems_had_too_few_rows_for_k(tmp_path, batchjob):
    options = [*TINY, "--limit", "2", "--algorithm", "kmeans,agglomerative", "--workers", "0"]
    ended = batchjob("run", SAMPLE, tmp_path / "run", *options)
    assert ended.code == 0, ended.err
    assert "agglomerative solves one problem after the other" in ended.err
    assert "clipped" not in batchjob("show", tmp_path / "run").out
    run = tmp_path / "run"
    np.save(run / "index" / "k.npy", np.array([3, 5], np.uint8))  # as if the second problem had asked for 5
    plan_what_is_there(run)
    assert "clipped   6 problems have fewer different rows than k" in batchjob("show", tmp_path / "run").out


@pytest.mark.parametrize("masked", [False, True])
def test_the_silhouette_is_scikit_learns(masked):
    x = smooth(3)
    mask = torch.ones(3, 64, dtype=torch.bool)
    if masked:
        mask[:, ::5] = False
    member = mask.float()
    gram = torch.empty(3, 64, 64)
    centred_gram(x, mask, gram)
    ones, _, _ = lloyd.solve_tile(gram, member, 4, torch.arange(3), 2)
    square = torch.diagonal(gram, dim1=1, dim2=2)
    away = (square[:, :, None] + square[:, None] - 2 * gram).clamp_min(0).sqrt()
    torch.diagonal(away, dim1=1, dim2=2).zero_()
    ours = _mean_silhouette(away, ones, member)
    for i in range(3):
        labels = ones[i].argmax(0)[mask[i]].numpy()
        assert float(ours[i]) == pytest.approx(silhouette_score(x[i, mask[i]].numpy(), labels), abs=1e-4)


@pytest.mark.parametrize("rule", ["silhouette", "eigengap"])
def test_the_number_of_separated_groups_is_found(rule):
    k = torch.tensor([2, 3, 4, 5, 6])
    rows, _ = grouped(5, k)
    assert choose_k(rule, rows, torch.arange(5), engine=ENGINE).tolist() == k.tolist()


@pytest.mark.parametrize("rule", ["silhouette", "eigengap"])
def test_the_number_of_groups_inside_a_mask_is_found(rule):
    k = torch.tensor([2, 3, 4])
    rows, _ = grouped(3, k)
    mask = torch.ones(3, rows.shape[1], dtype=torch.bool)
    mask[:, ::6] = False
    rows[~mask] = torch.rand(int((~mask).sum()), rows.shape[1])
    assert choose_k(rule, rows, torch.arange(3), engine=ENGINE, mask=mask).tolist() == k.tolist()


@pytest.mark.parametrize("name", ["batched", "compiled", "sklearn"])
def test_the_silhouettes_k_is_the_one_scikit_learn_finds_for_the_engines_labels(name):
    rows, seeds, engine = smooth(4), torch.arange(4), open_engine(name, CPU)
    ours = choose_k("silhouette", rows, seeds, engine=engine, k_range=(2, 6), n_init=5)
    scores = np.array(
        [
            [silhouette_score(*pair) for pair in zip(rows.numpy(), labels.numpy(), strict=True)]
            for labels in (engine.kmeans(rows, torch.full((4,), k), seeds, n_init=5).labels for k in range(2, 7))
        ]
    )
    assert ours.tolist() == (scores.argmax(0) + 2).tolist()


def test_another_seed_chooses_the_same_k_since_each_clustering_is_searched_for():
    rows, seeds = smooth(48, side=6), torch.arange(48)
    agree = {}
    for n_init in (AUTO, 4):
        one, other = (choose_k("silhouette", rows, s, engine=ENGINE, n_init=n_init) for s in (seeds, seeds + 1000))
        agree[n_init] = float((one == other).float().mean())
    assert agree[AUTO] > 0.85
    assert agree[4] < 0.6


def test_equal_rows_have_no_silhouette_and_get_one_cluster():
    rows = torch.full((2, 20, 20), 0.05)
    assert choose_k("silhouette", rows, torch.arange(2), engine=ENGINE).tolist() == [1, 1]


def test_the_choice_of_k_does_not_depend_on_the_batch():
    rows = smooth(20, side=5)
    for rule in ("silhouette", "eigengap"):
        whole = choose_k(rule, rows, torch.arange(20), engine=ENGINE)
        alone = choose_k(rule, rows[13:14], torch.arange(13, 14), engine=ENGINE)
        assert alone.tolist() == whole[13:14].tolist()


def test_an_unknown_rule_method_or_distance_is_named_with_the_known_ones():
    rows, seeds, engine = torch.rand(1, 4, 4), torch.arange(1), open_engine("batched", CPU)
    with pytest.raises(UserError, match="'silhouete' is not a rule; did you mean 'silhouette'"):
        choose_k("silhouete", rows, seeds, engine=engine)
    with pytest.raises(UserError, match="'ward' is unknown; known: kmeans, spectral, agglomerative, hdbscan"):
        cluster("ward", rows, 2, seeds, engine=engine)
    with pytest.raises(UserError, match="'cosin' is unknown; did you mean 'cosine'"):
        cluster("kmeans", rows, 2, seeds, engine=engine, distance="cosin")

"""Scores of attention and of CLS maps: computed by hand, and equal to those of scikit-learn and scipy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from sklearn.metrics import mutual_info_score, roc_auc_score

from batchjob.metrics import attention, catalogue, saliency
from batchjob.metrics.objects import Mapped, Objects
from tests import scenes

# ---- attention ----


def test_attention_scores_by_hand_on_two_patches() -> None:
    rows = np.array([[[0.5, 0.5], [0.5, 0.5]], [[1, 0], [0, 1]], [[1, 0], [1, 0]]], float)
    found = attention.attention_scores(rows, (1, 2))
    np.testing.assert_allclose(found["attention_distance"], [0.5, 0, 0.5])
    np.testing.assert_allclose(found["attention_distance_relative"], [1, 0, 1])
    np.testing.assert_allclose(found["entropy"], [np.log(2), 0, 0])
    np.testing.assert_allclose(found["effective_patches"], [2, 1, 1])
    np.testing.assert_allclose(found["query_key_nmi"], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(found["sink"], [0.5, 0.5, 1])


@given(st.integers(0, 1000))
def test_mutual_information_is_scikit_learns_of_the_joint_distribution(seed: int) -> None:
    counts = np.random.default_rng(seed).integers(1, 9, (6, 6))
    counts[:, 0] += 60 - counts.sum(axis=1)  # every query has equal weight
    rows = counts / 60
    nmi = attention.attention_scores(rows[None], (2, 3))["query_key_nmi"][0]
    key = rows.mean(axis=0)
    information = mutual_info_score(None, None, contingency=counts)
    assert nmi == pytest.approx(information / np.sqrt(np.log(6) * -(key * np.log(key)).sum()), abs=1e-9)


@given(st.integers(0, 1000), st.booleans())
def test_auc_within_groups_is_scikit_learns_and_scipys(seed: int, with_ties: bool) -> None:
    random = np.random.default_rng(seed)
    values, positive, group = random.random((2, 50)), random.random(50) < 0.4, random.integers(0, 3, 50)
    values = np.round(values, 1) if with_ties else values
    found, ones, zeros = attention.group_auc(values, positive, group)
    for g in range(3):
        inside = group == g
        assert (ones[g], zeros[g]) == ((positive & inside).sum(), (~positive & inside).sum())
        for c in range(2):
            if ones[g] and zeros[g]:
                a, b = values[c, inside & positive], values[c, inside & ~positive]
                assert found[c, g] == pytest.approx(mannwhitneyu(a, b).statistic / (len(a) * len(b)))
                assert found[c, g] == pytest.approx(roc_auc_score(positive[inside], values[c, inside]))
            else:
                assert np.isnan(found[c, g])


@given(st.integers(0, 200), st.floats(0.01, 1000))
def test_pair_auc_does_not_change_with_the_scale_of_attention(seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    owner = random.integers(-1, 3, 20)
    owner[:6] = [0, 0, 1, 1, 2, 2]
    pairs = attention.draw_pairs(owner, np.zeros(3, int), row=seed, seed=0)
    rows = np.round(random.random((1, 20, 20)), 2)
    one, other = (attention.pair_scores(r, pairs, (4, 5)) for r in (rows, rows * scale))
    assert one["pair_auc"] == pytest.approx(other["pair_auc"], abs=0.02)  # rounding may make or break a tie
    assert one["pair_auc.distance"] == other["pair_auc.distance"]


def test_pairs_are_drawn_by_kind_up_to_the_limit_and_always_the_same() -> None:
    owner = np.repeat([0, 1, 2, 3, -1], 30)
    category = np.array([4, 4, 6, 8])
    everything = attention.draw_pairs(owner, category, row=3, seed=0)
    assert set(everything.group) == {0}  # only one category has two instances
    assert everything.same.sum() == 2 * 30 * 29 / 2
    assert (~everything.same).sum() == 900
    assert (everything.first < everything.second).all()
    assert (owner[everything.first] == owner[everything.second])[everything.same].all()
    some = attention.draw_pairs(owner, category, row=3, seed=0, limit=100)
    assert (some.same.sum(), (~some.same).sum()) == (100, 100)
    again = attention.draw_pairs(owner, category, row=3, seed=0, limit=100)
    assert (some.first == again.first).all()
    other = attention.draw_pairs(owner, category, row=4, seed=0, limit=100)
    assert not (some.first == other.first).all()


def test_attention_by_distance_alone_has_the_distance_nulls_auc_and_one_half_at_equal_distance() -> None:
    random = np.random.default_rng(0)
    owner = scenes.disks(2, random)
    pairs = attention.draw_pairs(owner, np.zeros(2, int), row=0, seed=0)
    near = np.exp(-attention.patch_distances(scenes.GRID))[None]
    found = attention.pair_scores(near, pairs, scenes.GRID)
    assert found["pair_auc"][0] == pytest.approx(found["pair_auc.distance"][0], abs=1e-9)
    assert found["pair_auc.distance"][0] > 0.9
    assert found["pair_auc_matched"][0] == pytest.approx(0.5)  # all ties within a distance


# ---- CLS maps ----


def test_the_fewest_patches_that_hold_the_mass() -> None:
    maps = np.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    assert saliency.mass_mask(maps, 0.6).tolist() == [[False, False, True, True], [True, True, True, False]]
    assert saliency.mass_mask(maps, 0.7).sum(axis=1).tolist() == [2, 3]
    assert saliency.mass_mask(maps, 0.9).sum(axis=1).tolist() == [3, 4]


def test_jaccard_is_the_iou_of_masks_up_sampled_to_pixels() -> None:
    random = np.random.default_rng(0)
    pixels = random.random((2, 8, 12)) < 0.4  # two instances on patches of 4x4 pixels
    coverage = pixels.reshape(2, 2, 4, 3, 4).mean(axis=(2, 4)).reshape(2, 6)
    mask = np.array([[True, False, True, True, False, False]])
    upsampled = mask.reshape(2, 3).repeat(4, axis=0).repeat(4, axis=1)
    expected = [(upsampled & p).sum() / (upsampled | p).sum() for p in pixels]
    np.testing.assert_allclose(saliency.jaccard(mask, coverage), [expected])


def test_corloc_takes_the_box_of_the_largest_four_connected_part() -> None:
    picture = "##.. ##.. ..## ...#"  # two parts of four and three patches that touch only at a corner
    mask = np.array([[c == "#" for c in picture.replace(" ", "")]])
    found = saliency.component_boxes(mask, (4, 4))
    assert found.tolist() == [[0, 0, 2, 2]]
    assert saliency.corloc(found, np.array([[0, 0, 2, 4.0], [3, 3, 4, 4]])).tolist() == [1]  # IoU one half
    assert saliency.corloc(found, np.array([[0, 0, 2, 4.1]])).tolist() == [0]
    assert np.isnan(saliency.corloc(found, np.zeros((0, 4)))).all()
    assert saliency.component_boxes(np.zeros((1, 16), bool), (4, 4)).tolist() == [[0, 0, 0, 0]]


def test_map_scores_are_means_over_instances_and_perfect_for_a_perfect_map() -> None:
    coverage = np.array([[1, 1, 0, 0], [0, 0, 1, 0]], float)
    maps = saliency.normalise(np.array([[5, 5, 0, 0], [0, 0, 3, 0]]))
    objects = Objects(np.array([0, 0, 1, -1]), np.array([4, 4]), np.array([[0, 0, 2, 1], [2, 0, 3, 1]]), coverage)
    own = Mapped(maps, (1, 4), 2, objects)
    found = {s.name: s.compute(own) for s in catalogue.SCORES if s.source in ("maps", "oracle") and s.compute}
    assert found["jaccard_60"].tolist() == [0.5, 0.5]
    assert found["jaccard_90"].tolist() == [0.5, 0.5]
    assert found["jaccard_oracle_90"].tolist() == [1]
    assert found["corloc"].tolist() == [1, 1]
    nothing = own.beside(Objects(np.full(4, -1), np.zeros(0, int), np.zeros((0, 4)), np.zeros((0, 4))))
    assert all(
        np.isnan(s.compute(nothing)).all() for s in catalogue.SCORES if s.source in ("maps", "oracle") and s.compute
    )

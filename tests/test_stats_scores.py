"""Every score: hand-computed on a few patches, against scikit-learn and scipy, unchanged by what must not matter."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import mannwhitneyu
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, mutual_info_score, roc_auc_score

from batchjob.metrics import agreement as partitions
from batchjob.metrics import attention, catalogue, nulls, saliency
from batchjob.metrics import clusters as scores
from batchjob.metrics.objects import Mapped, Objects
from batchjob.stats.image import stability
from batchjob.stats.position import position_labels
from tests import scenes
from tests.conftest import ROOT

labellings = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        arrays(np.uint8, (3, n), elements=st.integers(0, 6)), arrays(np.int64, n, elements=st.integers(0, 4))
    )
)


# ---- partitions ----


@given(labellings)
def test_ari_and_ami_are_scikit_learns(case: Any) -> None:
    labels, groups = case
    table = partitions.contingency(labels, groups)
    np.testing.assert_allclose(partitions.ari(table), [adjusted_rand_score(groups, row) for row in labels], atol=1e-12)
    np.testing.assert_allclose(
        partitions.ami(table), [adjusted_mutual_info_score(groups, row) for row in labels], atol=1e-7
    )


@given(labellings, st.randoms(use_true_random=False))
def test_renaming_clusters_or_moving_patches_changes_no_index(case: Any, random: Any) -> None:
    labels, groups = case
    names = list(range(7))
    random.shuffle(names)
    order = list(range(labels.shape[1]))
    random.shuffle(order)
    table, other = (
        partitions.contingency(labels, groups),
        partitions.contingency(np.array(names)[labels][:, order], groups[order]),
    )
    np.testing.assert_allclose(partitions.ari(table), partitions.ari(other), atol=1e-12)
    np.testing.assert_allclose(partitions.ami(table), partitions.ami(other), atol=1e-9)


def test_a_table_counts_by_hand_leaves_255_out_and_takes_noise_for_a_cluster() -> None:
    labels = np.array([[0, 0, 1, 254, 255, 1]], np.uint8)
    table = partitions.contingency(labels, np.array([0, 1, 1, 1, 0, -1]))
    assert table[0].tolist() == [[1, 1], [0, 1], [0, 1]]
    assert np.isnan(partitions.ari(partitions.contingency(labels, np.full(6, -1), 1))).all()


def test_ari_by_hand() -> None:
    # of six pairs two are together in the groups; crossed clusters share none of them: (0 − 2/3) / (2 − 2/3)
    table = partitions.contingency(np.array([[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]), np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(partitions.ari(table), [1, -0.5, 0])


# ---- clusters against instances ----


def test_instance_ari_is_the_mean_over_categories_of_the_index_over_their_own_patches() -> None:
    owner = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, -1, -1])
    category = np.array([7, 7, 9, 9, 5])
    labels = np.array([[0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 0, 1]], np.uint8)
    found = scores.instance_scores(labels, owner, category)
    # category 7 is separated, 9 is one cluster (index 0) in the first labelling; 5 has one instance and no say
    np.testing.assert_allclose(found["instance_ari"], [0.5, 1])
    np.testing.assert_allclose(found["instance_ami"], [0.5, 1], atol=1e-12)


@given(st.integers(0, 1000))
def test_instance_scores_are_scikit_learns_over_each_category(seed: int) -> None:
    random = np.random.default_rng(seed)
    owner, category = random.integers(-1, 5, 60), random.integers(0, 2, 5)
    owner[:5] = np.arange(5)
    labels = random.integers(0, 4, (3, 60)).astype(np.uint8)
    found = scores.instance_scores(labels, owner, category)
    for name, index in (("instance_ari", adjusted_rand_score), ("instance_ami", adjusted_mutual_info_score)):
        for c in range(3):
            values = [
                index(owner[inside], labels[c, inside])
                for value in np.unique(category)
                if (category == value).sum() >= 2
                for inside in [np.isin(owner, np.flatnonzero(category == value))]
            ]
            assert found[name][c] == pytest.approx(np.mean(values) if values else np.nan, abs=1e-9, nan_ok=True)


def test_images_without_two_instances_of_a_category_have_no_score() -> None:
    labels = np.zeros((2, 4), np.uint8)
    for owner, category in (([-1] * 4, []), ([0, 0, -1, -1], [3]), ([0, 0, 1, 1], [3, 4])):
        found = scores.instance_scores(labels, np.array(owner), np.array(category, int))
        assert np.isnan(found["instance_ari"]).all()
        assert np.isnan(found["instance_ami"]).all()


def test_image_ari_takes_the_background_for_one_more_group_and_leaves_padding_out() -> None:
    owner = np.array([-1, -1, 0, 0, 1, 1, -1])
    labels = np.array([[2, 2, 0, 0, 1, 1, 255], [0, 0, 0, 1, 1, 1, 255]], np.uint8)
    expected = [1, adjusted_rand_score([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1])]
    np.testing.assert_allclose(scores.image_ari(partitions.contingency(labels, owner + 1)), expected)
    assert np.isnan(scores.image_ari(partitions.contingency(labels, np.zeros(7, int)))).all()


def test_pair_ari_and_its_modifiers_by_hand() -> None:
    # two by four patches: instance 0 on the left, 1 beside it, 2 of another category, 3 of the first at the right
    owner = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    category = np.array([1, 1, 8, 1])
    boxes = np.array([[0, 0, 2, 2], [1, 0, 2, 2], [2, 0, 3, 2], [3, 0, 4, 2]], float)
    pairs = scores.instance_pairs(owner, category, boxes, (2, 4))
    assert list(zip(pairs.first, pairs.second, strict=True)) == [(0, 1), (0, 3), (1, 3)]
    assert pairs.distance.tolist() == [1, 3, 2]
    assert pairs.box_iou.tolist() == [0.5, 0, 0]
    assert pairs.smaller.tolist() == pairs.larger.tolist() == [2, 2, 2]
    labels = np.array([[0, 1, 0, 1, 0, 1, 0, 1]], np.uint8)
    table = partitions.contingency(labels, owner)
    np.testing.assert_allclose(scores.pair_ari(table, pairs.first, pairs.second), [[1, 1, 0]])
    none = scores.instance_pairs(owner[:0], category[:0], boxes[:0], (0, 0))
    assert scores.pair_ari(table[:, :, :0], none.first, none.second).shape == (1, 0)


def test_coherence_sizes_and_agreement_by_hand() -> None:
    labels = np.array([[0, 0, 1, 1], [0, 1, 1, 255], [0, 0, 0, 254]], np.uint8)  # on 2x2 patches
    np.testing.assert_allclose(scores.coherence(labels, (2, 2)), [0.5, 0, 0.5])
    sizes = scores.cluster_sizes(labels)
    assert sizes["clusters"].tolist() == [2, 2, 2]
    np.testing.assert_allclose(sizes["largest_cluster"], [0.5, 2 / 3, 0.75])
    np.testing.assert_allclose(sizes["smallest_cluster"], [0.5, 1 / 3, 0.25])
    table = scores.agreement(labels[[0, 2]], labels[[0, 2]])
    expected = adjusted_rand_score([0, 0, 1, 1], [0, 0, 0, 1])
    np.testing.assert_allclose(table, [[1, expected], [expected, 1]], atol=1e-12)


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
    counts[:, 0] += 60 - counts.sum(axis=1)  # every query equally often
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
    assert one["pair_auc"] == pytest.approx(other["pair_auc"], abs=0.02)  # a rounding may make or break a tie
    assert one["pair_auc.distance"] == other["pair_auc.distance"]


def test_pairs_are_drawn_by_kind_up_to_the_limit_and_always_the_same() -> None:
    owner = np.repeat([0, 1, 2, 3, -1], 30)
    category = np.array([4, 4, 6, 8])
    everything = attention.draw_pairs(owner, category, row=3, seed=0)
    assert set(everything.group) == {0}  # one category has two instances
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
    picture = "##.. ##.. ..## ...#"  # two parts that meet at a corner only: four patches, and three
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


# ---- other photos' objects ----


def test_photos_of_as_many_objects_lend_them_and_never_the_image_itself() -> None:
    counts = np.array([2] * 30 + [3] * 2 + [5] * 3 + [0])
    donors = nulls.Donors(counts, counts > 0, seed=1)
    for row in range(30):
        lent = donors.of(row)
        assert len(set(lent.tolist())) == nulls.SWAPS
        assert row not in lent
        assert (counts[lent] == 2).all()
    lent = donors.of(31)  # one is alike: photos of the nearest number, two, join it
    assert (np.sort(counts[lent])[::-1][:1] == 3).all()
    assert (counts[lent] == 2).sum() == nulls.SWAPS - 1
    assert len(donors.of(len(counts) - 1)) == 0  # no objects, no null
    assert (donors.of(7) == nulls.Donors(counts, counts > 0, seed=1).of(7)).all()
    assert sorted(donors.of(7)) != sorted(nulls.Donors(counts, counts > 0, seed=2).of(7))


def test_padded_photos_of_the_same_shape_lend_first() -> None:
    counts, shapes = np.resize([2, 3], 40), np.arange(40) // 20
    donors = nulls.Donors(counts, counts > 0, shapes, seed=0)
    assert set(donors.of(3)) == set(range(1, 20, 2)) - {3}  # nine of the same number and shape are enough


def test_an_image_with_two_of_a_kind_gets_photos_with_two_of_a_kind() -> None:
    counts, twins = np.full(20, 2), np.arange(20) % 2 == 0
    donors = nulls.Donors(counts, twins, seed=0)
    assert twins[donors.of(4)].all()
    assert len(donors.of(4)) == 9
    assert len(donors.of(3)) == 19


def test_objects_that_fall_into_padding_are_left_out() -> None:
    owner = np.array([0, 0, 1, 1, 2, 2, -1, 1])
    objects = Objects(owner, np.array([7, 8, 7]), np.zeros((3, 4)), np.eye(3, 8))
    inside = objects.inside(np.array([1, 1, 1, 0, 1, 0, 1, 1], bool))
    assert inside.owner.tolist() == [0, 0, 1, -1, -1, -1, -1, 1]
    assert inside.category.tolist() == [7, 8]
    assert objects.has_twins
    assert not inside.has_twins
    assert objects.inside(None) is objects


# ---- the four scenes ----

KNOWN = {"class": (0, 0.66), "instance": (0.99, 1.0), "local": (0.70, 0.02), "random": (0, 0)}


@pytest.mark.parametrize("kind", list(KNOWN))
def test_attention_made_by_a_rule_scores_what_it_must(kind: str) -> None:
    random = np.random.default_rng(0)
    found = []
    for i in range(24):
        count = (2, 3, 6)[i % 3]
        owner = scenes.disks(count, random)
        labels = scenes.k_means(scenes.attention(kind, owner, random), count + 1, i)
        category = np.zeros(count, int)
        own = scores.instance_scores(labels, owner, category)["instance_ari"][0]
        found.append((own, scores.image_ari(partitions.contingency(labels, owner + 1))[0]))
    instance, image = np.mean(found, axis=0)
    assert instance == pytest.approx(KNOWN[kind][0], abs=0.12), (instance, image)
    assert image == pytest.approx(KNOWN[kind][1], abs=0.12), (instance, image)


def test_local_attention_is_no_better_than_the_position_null_and_instance_attention_is() -> None:
    random = np.random.default_rng(1)
    gains: dict[str, list[float]] = {"local": [], "instance": []}
    for i in range(18):
        count = (2, 3, 6)[i % 3]
        owner = scenes.disks(count, random)
        null = position_labels(scenes.GRID, count + 1)
        by_position = scores.instance_scores(null, owner, np.zeros(count, int))["instance_ari"].mean()
        for kind, into in gains.items():
            labels = scenes.k_means(scenes.attention(kind, owner, random), count + 1, i)
            into.append(scores.instance_scores(labels, owner, np.zeros(count, int))["instance_ari"][0] - by_position)
    assert abs(np.mean(gains["local"])) < 0.15
    assert np.mean(gains["instance"]) > 0.1


def test_shuffled_labels_score_nothing_within_their_error() -> None:
    random = np.random.default_rng(2)
    found = []
    for i in range(60):
        owner = scenes.disks(3, random)
        labels = np.where(owner < 0, 3, owner)[None].astype(np.uint8)
        shuffled = nulls.shuffle(labels, row=i, seed=0)
        assert (np.sort(shuffled) == np.sort(labels)).all()
        found.append(scores.instance_scores(shuffled, owner, np.zeros(3, int))["instance_ari"][0])
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(60)


def test_repeats_that_agree_are_stable() -> None:
    repeats = np.array([[[0, 0, 1, 1], [1, 1, 0, 0]], [[0, 0, 1, 1], [0, 1, 0, 1]]], np.uint8)
    np.testing.assert_allclose(stability(repeats), [1, -0.5])
    assert np.isnan(stability(repeats[:, :1])).all()


def test_the_page_of_metrics_explains_every_score_and_null_with_small_pictures() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    names = {row.name for row in catalogue.SCORES} | {n for row in catalogue.SCORES for n in row.nulls} | {"random"}
    assert [n for n in sorted(names) if f"`{n}`" not in page and not n.startswith("jaccard")] == []
    pictures = re.findall(r"!\[.+\]\((.+?)\)", page)
    assert len(pictures) >= 7
    assert [p for p in pictures if (ROOT / "docs" / p).stat().st_size > 150_000] == []

"""Null models: the photos whose objects an image gets, and the scores of scenes with a known answer."""

import numpy as np
import pytest

from batchjob.metrics import agreement as partitions
from batchjob.metrics import catalogue, nulls
from batchjob.metrics import clusters as scores
from batchjob.metrics.objects import Mapped, Objects
from batchjob.stats.position import position_labels
from tests import scenes

# ---- other photos' objects ----


def test_objects_come_from_photos_with_as_many_and_never_from_the_image_itself() -> None:
    counts = np.array([2] * 30 + [3] * 2 + [5] * 3 + [0])
    donors = nulls.Donors(counts, counts > 0, seed=1)
    for row in range(30):
        lent = donors.of(row)
        assert len(set(lent.tolist())) == nulls.SWAPS
        assert row not in lent
        assert (counts[lent] == 2).all()
    lent = donors.of(31)  # one photo has the same number, so photos of the nearest number, two, are added
    assert (np.sort(counts[lent])[::-1][:1] == 3).all()
    assert (counts[lent] == 2).sum() == nulls.SWAPS - 1
    assert len(donors.of(len(counts) - 1)) == 0  # an image without objects does not have a null score
    assert (donors.of(7) == nulls.Donors(counts, counts > 0, seed=1).of(7)).all()
    assert sorted(donors.of(7)) != sorted(nulls.Donors(counts, counts > 0, seed=2).of(7))


def test_objects_of_padded_photos_of_the_same_shape_come_first() -> None:
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
    inside = objects.inside(np.array([1, 1, 1, 0, 1, 0, 1, 1], bool), (2, 4))
    assert inside.owner.tolist() == [0, 0, 1, -1, -1, -1, -1, 1]
    assert inside.category.tolist() == [7, 8]
    assert objects.has_twins
    assert not inside.has_twins
    assert objects.inside(None, (2, 4)) is objects
    assert len(objects.inside(np.zeros(8, bool), (2, 4)).category) == 0


def test_a_box_ends_where_the_photo_ends() -> None:
    """A map that covers all of a lent object that is on the photo finds it, although most of it lies in the padding."""
    grid, keep = (14, 14), np.arange(196) < 7 * 14
    tall = np.zeros(grid)
    tall[:, :6] = 1
    box = np.array([[0.0, 0.5, 6.0, 14.0]])
    lent = Objects(np.where(tall.ravel() > 0, 0, -1), np.array([7]), box, tall.reshape(1, -1))
    inside = lent.inside(keep, grid)
    assert inside.boxes.tolist() == [[0, 0.5, 6, 7]]
    found = tall.ravel() * keep
    own = Mapped((found / found.sum())[None], grid, 1, inside)
    corloc = catalogue.score("corloc")
    assert corloc is not None
    assert corloc.compute is not None
    assert corloc.compute(own).tolist() == [1]


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

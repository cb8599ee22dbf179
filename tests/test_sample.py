"""The embedded sample with DINOv2's own weights: figures that a fault in preprocessing or token order would change."""

import numpy as np
import pytest

import batchjob as package
from batchjob import plan as plans
from batchjob.data import annotations as coco
from batchjob.metrics import clusters as scores
from tests.conftest import SAMPLE

# Within-class adjusted Rand index by head: mean over the sample's photos with two or more instances of a class.
# The photo 000000311303.jpg is one of them only by the rule that the smaller of two masks with equal coverage owns a
# patch. Its scores lower the means. tests/test_stats_sample.py says how the clusters were checked.
GOLDEN = [0.10, 0.40, 0.04, 0.25, 0.22, 0.24]


def within_class_ari(run: object) -> np.ndarray:
    plan = plans.load(run)  # type: ignore[arg-type]
    found = package.open(run)  # type: ignore[arg-type]
    known = coco.open_annotations(plan.annotations)
    values = []
    for row, name in enumerate(found["image_id"].values):
        size = int(found["height"][row]), int(found["width"][row])
        image = known.image(str(name))
        assert image is not None
        patches = coco.instances_on_grid(image, plan.geometry, *size)
        labels = found["labels"].values[row, 0, 0].reshape(6, -1)
        values.append(scores.instance_scores(labels, patches.owner, patches.category)["instance_ari"])
    return np.nanmean(values, axis=0)


def test_each_head_separates_objects_of_one_class_as_well_as_before(sample_run: object) -> None:
    assert within_class_ari(sample_run).round(2).tolist() == pytest.approx(GOLDEN, abs=0.011)


def test_heads_look_at_the_objects_rather_than_at_the_background(sample_run: object) -> None:
    plan, found = plans.load(sample_run), package.open(sample_run)  # type: ignore[arg-type]
    known = coco.open_annotations(str(SAMPLE))
    gains = []
    for row, name in enumerate(found["image_id"].values):
        image = known.image(str(name))
        assert image is not None
        owner = coco.instances_on_grid(image, plan.geometry, image.height, image.width).owner
        if not (owner >= 0).any():
            continue  # a flock of birds that are all smaller than a patch
        attention = found["cls_attention"].values[row, 0].reshape(6, -1).astype(np.float64).mean(0)
        gains.append(attention[owner >= 0].mean() / attention.mean())
    assert len(gains) >= 7
    assert np.mean(gains) > 1.2, gains

"""Parts of a run: images that are picked or put together keep every array that was read."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from batchjob.store.part import Part, join

IMAGES = 5
NAMES = [field.name for field in fields(Part) if field.name not in ("start", "scores")]


def made_up(**arrays: Any) -> Part:
    """Returns a part in which every number tells its array and its image."""
    found = {name: np.arange(IMAGES * 2).reshape(IMAGES, 2) + 100 * i for i, name in enumerate(NAMES)}
    return Part(start=7, scores={"a": np.arange(IMAGES), "b": -np.arange(IMAGES)}, **(found | arrays))


@pytest.mark.parametrize("name", NAMES)
def test_picked_images_keep_an_array(name: str) -> None:
    part = made_up()
    picked = part.pick(np.array([3, 0]))
    assert picked.start == part.start
    np.testing.assert_array_equal(getattr(picked, name), getattr(part, name)[[3, 0]])
    assert picked.scores["b"].tolist() == [-3, 0]
    assert getattr(made_up(**{name: None}).pick(np.array([1])), name) is None


@pytest.mark.parametrize("name", NAMES)
def test_parts_that_are_joined_are_the_whole(name: str) -> None:
    part = made_up()
    whole = join([part.pick(np.array([0, 1, 2])), part.pick(np.array([3])), part.pick(np.array([4]))])
    np.testing.assert_array_equal(getattr(whole, name), getattr(part, name))
    assert whole.scores["a"].tolist() == [0, 1, 2, 3, 4]
    without = made_up(**{name: None})
    assert getattr(join([without, without]), name) is None

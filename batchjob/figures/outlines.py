"""Outlines of objects: the class, the colours of their categories, and their counts in words."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from batchjob.figures.palette import OBJECT_COLOURS

Kind = Literal["instance", "small", "crowd"]


@dataclass(frozen=True, slots=True)
class Outline:
    """One object. A `small` one owns fewer than two patches; like crowds, it does not count in any score."""

    category: str
    kind: Kind
    lines: tuple[NDArray[np.float64], ...]  # [n, (x, y)] each, in widths and heights of the shown photo


def colours_of(photos: Iterable[Sequence[Outline]]) -> dict[str, str]:
    """Gives each category a colour for all photos of a picture; the most common category gets the first colour."""
    objects = [o for outlines in photos for o in outlines]
    counts = Counter(o.category for o in objects if o.kind == "instance")
    others = Counter(o.category for o in objects if o.kind != "instance")
    order = sorted(counts, key=lambda name: (-counts[name], name))
    order += sorted((n for n in others if n not in counts), key=lambda name: (-others[name], name))
    return {name: OBJECT_COLOURS[i % len(OBJECT_COLOURS)] for i, name in enumerate(order)}


def count_words(outlines: Sequence[Outline]) -> tuple[list[tuple[str, int]], str]:
    """Counts instances by category, the most common first, and says what else there is: `+ 14 small, 1 crowd`."""
    counts = Counter(o.category for o in outlines if o.kind == "instance")
    small, crowds = (sum(o.kind == kind for o in outlines) for kind in ("small", "crowd"))
    rest = ", ".join([f"{small} small"] * bool(small) + [f"{crowds} crowd{'s' * (crowds > 1)}"] * bool(crowds))
    return sorted(counts.items(), key=lambda item: (-item[1], item[0])), f"+ {rest}" if rest and counts else rest

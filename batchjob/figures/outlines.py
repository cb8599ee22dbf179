"""Outlines of objects: the class, the colours of their categories, and their counts in words."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from batchjob.figures.palette import OBJECT_COLOURS, object_likeness

Kind = Literal["instance", "small", "crowd"]


@dataclass(frozen=True, slots=True)
class Outline:
    """One object. A `small` one owns fewer than two patches; like crowds, it does not count in any score."""

    category: str
    kind: Kind
    lines: tuple[NDArray[np.float64], ...]  # [n, (x, y)] each, in widths and heights of the shown photo
    colour: str = OBJECT_COLOURS[0]  # of the category, the same in all pictures of a run


def choose_colours(photos: Iterable[Collection[str]], names: Iterable[str] = ()) -> dict[str, str]:
    """Gives each category one colour, so that few photos show two categories in the same colour or in similar ones.

    No two categories share a colour while there are colours left. Categories are given colours in the order of the
    number of their photos. Each gets the colour that is least like those of the categories it shares photos with.

    Parameters
    ----------
    photos
        The categories of each photo.
    names
        Categories to give a colour that may be in no photo.
    """
    sets = [frozenset(photo) for photo in photos]
    counts = Counter(name for photo in sets for name in photo)
    together = Counter((a, b) for photo in sets for a in photo for b in photo if a != b)
    places: dict[str, int] = {}
    for name in sorted({*counts, *names}, key=lambda name: (-counts[name], name)):
        photos_of, costs = Counter[int](), np.zeros(len(OBJECT_COLOURS))
        for other, place in places.items():
            photos_of[place] += counts[other]
            costs += together[name, other] * object_likeness()[place]
        left = [p for p in range(len(OBJECT_COLOURS)) if p not in photos_of] or range(len(OBJECT_COLOURS))
        places[name] = min(left, key=lambda p: (round(float(costs[p]), 6), photos_of[p], p))
    return {name: OBJECT_COLOURS[place] for name, place in places.items()}


def count_words(outlines: Sequence[Outline]) -> tuple[list[tuple[str, int]], str]:
    """Counts instances by category, the most common first, and says what else there is: `+ 14 small, 1 crowd`."""
    counts = Counter(o.category for o in outlines if o.kind == "instance")
    small, crowds = (sum(o.kind == kind for o in outlines) for kind in ("small", "crowd"))
    rest = ", ".join([f"{small} small"] * bool(small) + [f"{crowds} crowd{'s' * (crowds > 1)}"] * bool(crowds))
    return sorted(counts.items(), key=lambda item: (-item[1], item[0])), f"+ {rest}" if rest and counts else rest


def sharing(outlines: Sequence[Outline]) -> dict[str, list[str]]:
    """Returns the categories that share a colour in a photo, in alphabetical order, by their colour."""
    by_colour: dict[str, list[str]] = {}
    for category, colour in sorted({(o.category, o.colour) for o in outlines}):
        by_colour.setdefault(colour, []).append(category)
    return {colour: names for colour, names in by_colour.items() if len(names) > 1}


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """What the key of a photo says about one colour."""

    text: str  # `person 4`; where categories share the colour, `cup 2, fork 1 (one colour)`
    colour: str
    objects: int  # that it counts


def key_entries(outlines: Sequence[Outline]) -> list[KeyEntry]:
    """Makes the entries of a photo's key, the most common category first. Small ones and crowds have none."""
    counts = dict(count_words(outlines)[0])
    colours, shared = {o.category: o.colour for o in outlines}, sharing(outlines)
    entries: dict[str, KeyEntry] = {}
    for name in counts:
        colour = colours[name]
        if colour not in entries:
            all_names = sorted(shared.get(colour, [name]), key=lambda one: -counts.get(one, 0))
            words = ", ".join(f"{one} {counts[one]}" if one in counts else one for one in all_names)
            text = words + " (one colour)" * (len(all_names) > 1)
            entries[colour] = KeyEntry(text, colour, sum(counts.get(one, 0) for one in all_names))
    return list(entries.values())

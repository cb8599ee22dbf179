"""Every score in one table: what it is computed from, its words, its null models, and what it is used for."""

from dataclasses import dataclass
from typing import Literal

Source = Literal["labels", "maps", "oracle", "attention", "pairs", "prefix"]
# The dimensions of a score's array beside the image, by what it is computed from.
DIMS: dict[Source, tuple[str, ...]] = {
    "labels": ("algorithm", "layer", "head"),
    "maps": ("layer", "head"),
    "oracle": ("layer",),
    "attention": ("layer", "head"),
    "pairs": ("layer", "head"),
    "prefix": ("layer", "head"),
}
LABELLING: tuple[Source, ...] = ("attention", "pairs")  # computed while labelling, by --scores


@dataclass(frozen=True, slots=True)
class Score:
    """One score; docs/metrics.md has its definition."""

    name: str
    source: Source
    words: str  # on an axis or over a column
    hint: str = ""  # a sentence, for whoever hovers over the column
    claim: str = ""  # what a head with a high score does
    nulls: tuple[str, ...] = ()  # the first decides whether the score means anything; `random` meets all of them
    lead: int = 0  # 1: the score that images, heads and tables go by where it is known; 2: the next; 0: never
    is_chosen: bool = False  # whether a head is chosen by it
    is_compared: bool = False  # whether several runs are compared by it
    is_column: bool = False  # whether the page's table of heads shows it

    @property
    def dims(self) -> tuple[str, ...]:
        """The dimensions of its array beside the image."""
        return DIMS[self.source]


_LABEL_NULLS = ("position", "locality", "shuffled")
_SEPARATES = "separates objects of one class"
_ATTENDS = "attends within objects rather than between objects of one class"
_COVERS = "covers objects"

SCORES: list[Score] = [
    Score(
        "instance_ari",
        "labels",
        "ARI within categories",
        "adjusted Rand index between clusters and instances, within categories",
        _SEPARATES,
        _LABEL_NULLS,
        lead=1,
        is_chosen=True,
        is_compared=True,
    ),
    Score(
        "instance_ami",
        "labels",
        "AMI within categories",
        "adjusted mutual information of clusters and instances, within categories",
        _SEPARATES,
        _LABEL_NULLS,
        is_chosen=True,
        is_compared=True,
    ),
    Score(
        "image_ari",
        "labels",
        "ARI of the whole image",
        "adjusted Rand index over the whole image",
        "finds the objects of an image",
        _LABEL_NULLS,
        lead=2,
        is_chosen=True,
        is_compared=True,
        is_column=True,
    ),
    Score(
        "pair_ari",
        "labels",
        "ARI of pairs",
        "adjusted Rand index of each pair of instances of a category",
        "separates two objects of one class",
        _LABEL_NULLS,
        is_chosen=True,
        is_compared=True,
    ),
    Score("pair_auc", "pairs", "pair AUC", claim=_ATTENDS, nulls=("distance", "locality"), is_chosen=True),
    Score(
        "pair_auc_matched",
        "pairs",
        "pair AUC at equal distance",
        "AUC of attention within against between instances, at equal patch distance; chance is 0.5",
        _ATTENDS,
        # at equal distance local attention still is stronger near the edges, and an AUC sees any difference
        ("locality", "distance"),
        lead=3,
        is_chosen=True,
        is_column=True,
    ),
    Score("pair_auc_exact", "pairs", "pair AUC, exact", claim=_ATTENDS, nulls=("locality", "half"), is_chosen=True),
    Score(
        "jaccard_60",
        "maps",
        "Jaccard at 60 %",
        "IoU of the patches that hold 60 % of the CLS attention with the instances",
        _COVERS,
        ("centre",),
        lead=4,
        is_chosen=True,
        is_compared=True,
        is_column=True,
    ),
    Score("jaccard_80", "maps", "Jaccard at 80 %", claim=_COVERS, nulls=("centre",), is_compared=True),
    Score("jaccard_90", "maps", "Jaccard at 90 %", claim=_COVERS, nulls=("centre",), is_compared=True),
    Score("jaccard_oracle_60", "oracle", "Jaccard at 60 %, best head of each object", nulls=("centre",)),
    Score("jaccard_oracle_80", "oracle", "Jaccard at 80 %, best head of each object", nulls=("centre",)),
    Score("jaccard_oracle_90", "oracle", "Jaccard at 90 %, best head of each object", nulls=("centre",)),
    Score(
        "corloc",
        "maps",
        "CorLoc",
        claim="finds an object's box",
        nulls=("centre",),
        is_chosen=True,
        is_compared=True,
    ),
    Score(
        "coherence",
        "labels",
        "coherence",
        "share of neighbouring patches with equal labels",
        nulls=("position", "locality"),
        lead=5,
        is_column=True,
    ),
    Score("clusters", "labels", "clusters"),
    Score("largest_cluster", "labels", "largest cluster"),
    Score("smallest_cluster", "labels", "smallest cluster"),
    Score(
        "attention_distance",
        "attention",
        "attention distance",
        "mean distance of attention, in patches",
        nulls=("locality",),
        is_column=True,
    ),
    Score("attention_distance_relative", "attention", "attention distance, relative", nulls=("locality",)),
    Score("entropy", "attention", "entropy", nulls=("locality",)),
    Score("effective_patches", "attention", "effective patches", nulls=("locality",)),
    Score("query_key_nmi", "attention", "query key NMI", nulls=("locality",)),
    Score("sink", "attention", "sink", nulls=("locality",)),
    Score(
        "prefix_mass",
        "prefix",
        "prefix mass",
        "attention of patches on CLS and registers",
        is_column=True,
    ),
]


def score(name: str) -> Score | None:
    """The row of a score, or None where the table has none of that name."""
    return next((s for s in SCORES if s.name == name), None)


def dims_of(name: str) -> tuple[str, ...]:
    """The dimensions beside the image of a score's array, or of its null's (`SCORE.NULL`)."""
    row = score(name.partition(".")[0])
    return row.dims if row else ("layer", "head")


def is_of_labels(name: str) -> bool:
    """Whether a score, or the score of a null, is one of clusters, and so has an algorithm."""
    return "algorithm" in dims_of(name)


def nulls_of(name: str) -> tuple[str, ...]:
    """The null models that meet a score; none where the table does not know it."""
    row = score(name)
    return row.nulls if row else ()


def main_null(name: str) -> str:
    """The null that decides whether a score means anything; empty where it has none."""
    return next(iter(nulls_of(name)), "")


def leading() -> list[str]:
    """The scores that images, heads and tables go by, the first that is known: the study's question first."""
    return [s.name for s in sorted(SCORES, key=lambda s: s.lead) if s.lead]


def names(*sources: Source) -> list[str]:
    """The scores that are computed from one of these."""
    return [s.name for s in SCORES if s.source in sources]


def labelling_arrays() -> dict[str, tuple[str, ...]]:
    """group of --scores -> the arrays of scores.zarr that labelling fills, nulls as `SCORE.NULL`."""
    held = ("pair_auc.distance", "pair_auc_matched.distance")
    return {group: (*names(group), *(held if group == "pairs" else ())) for group in LABELLING}

"""Every score in one table: its function, its words, its null models, and what it is used for.

To add a score is to write a function and a row. `stats` computes the scores of labels, repeats, maps and oracles, one
image at a time. The job computes the scores of attention, pairs and truth while it labels (`metrics.on_device`); their
rows have no function and say which arrays they fill.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from batchjob.metrics import clusters, saliency
from batchjob.metrics.agreement import ami, ari
from batchjob.metrics.nulls import BY_LENDER
from batchjob.metrics.objects import Labelled, Mapped

Floats = NDArray[np.float64]
Source = Literal["labels", "repeats", "maps", "oracle", "attention", "pairs", "truth", "prefix"]
# The dimensions of a score's array beside the image, by what it is computed from.
DIMS: dict[Source, tuple[str, ...]] = {
    "labels": ("algorithm", "layer", "head"),
    "repeats": ("algorithm", "layer", "head"),
    "maps": ("layer", "head"),
    "oracle": ("layer",),
    "attention": ("layer", "head"),
    "pairs": ("layer", "head"),
    "truth": ("layer", "head"),
    "prefix": ("layer", "head"),
}
# What each word of --scores has computed while labelling.
LABELLING: dict[str, tuple[Source, ...]] = {"attention": ("attention",), "pairs": ("pairs", "truth")}
OF_VECTORS: tuple[Source, ...] = ("truth",)  # the sources that exist for queries, keys, values and tokens too


@dataclass(frozen=True, slots=True)
class Score:
    """One score; docs/metrics.md has its definition."""

    name: str
    source: Source
    words: str  # its name on an axis or over a column
    hint: str = ""  # what it is, shown when the pointer is over the column
    claim: str = ""  # what a head with a high score does, after "head 3 …"
    short: str = ""  # the name of the index alone, for a sentence
    # gives the values [C] of one image: from Labelled for `labels`, from Mapped for `maps` and `oracle`
    compute: Callable[[Any], Floats] | None = None
    needs_objects: bool = True
    nulls: tuple[
        str, ...
    ] = ()  # the first one decides whether the score means anything; `random` applies to every score
    lead: int = 0  # rank among the scores by which images and heads are ordered: the first known one is taken; 0: never
    is_chosen: bool = False  # whether a head is chosen by it
    is_compared: bool = False  # whether several runs are compared by it
    is_column: bool = False  # whether the page's table of heads shows it

    @property
    def dims(self) -> tuple[str, ...]:
        """The dimensions of its array beside the image."""
        return DIMS[self.source]


RANDOM = "random"  # the null model of untrained runs, which every score has where such runs are given
QUESTION = "instance_ari"  # the one score that is tested; the others are exploratory


def _instance_ari(own: Labelled) -> Floats:
    return clusters.within_categories(ari, own.table[:, :, 1:], own.objects.category)


def _instance_ami(own: Labelled) -> Floats:
    return clusters.within_categories(ami, own.table[:, :, 1:], own.objects.category)


def _image_ari(own: Labelled) -> Floats:
    return clusters.image_ari(own.table)


def _pair_ari(own: Labelled) -> Floats:
    first, second = clusters.twins(own.objects.category)
    if not len(first):
        return np.full(len(own.labels), np.nan)
    return np.asarray(clusters.pair_ari(own.table[:, :, 1:], first, second).mean(axis=1))


def _jaccard(share: float, *, of_best_head: bool = False) -> Callable[[Mapped], Floats]:
    def score(own: Mapped) -> Floats:
        found = saliency.jaccard(own.mask(share), own.objects.coverage)  # [C, m]
        if of_best_head:
            found = found.reshape(len(found) // own.heads, own.heads, found.shape[1]).max(axis=1)
        return found.mean(axis=1) if found.shape[1] else np.full(len(found), np.nan)

    return score


def _corloc(own: Mapped) -> Floats:
    return saliency.corloc(own.largest_part, own.objects.boxes)


def _coherence(own: Labelled) -> Floats:
    return clusters.coherence(own.labels, own.grid)


def _size(name: str) -> Callable[[Labelled], Floats]:
    return lambda own: clusters.cluster_sizes(own.labels)[name]


_LABEL_NULLS = ("swap", "position")
_SEPARATES = "separates objects of one class"
_ATTENDS = "attends within objects rather than between objects of one class"
_COVERS = "covers objects"

SCORES: list[Score] = [
    Score(
        QUESTION,
        "labels",
        "ARI within categories",
        "adjusted Rand index between clusters and instances, within categories",
        _SEPARATES,
        "ARI",
        _instance_ari,
        nulls=_LABEL_NULLS,
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
        "AMI",
        _instance_ami,
        nulls=_LABEL_NULLS,
        is_chosen=True,
        is_compared=True,
    ),
    Score(
        "image_ari",
        "labels",
        "ARI of the whole image",
        "adjusted Rand index over the whole image",
        "finds the objects of an image",
        "ARI",
        _image_ari,
        nulls=_LABEL_NULLS,
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
        "ARI",
        _pair_ari,
        nulls=_LABEL_NULLS,
        is_chosen=True,
        is_compared=True,
    ),
    Score(
        "instance_ari_truth",
        "truth",
        "ARI from the truth",
        "ARI within categories of where k-means ends when it starts from the instances themselves",
        "keeps objects of one class apart once k-means starts from them",
        "ARI",
        nulls=("swap",),
        is_chosen=True,
        is_column=True,
    ),
    Score("pair_auc", "pairs", "pair AUC", claim=_ATTENDS, short="AUC", nulls=("swap", "distance"), is_chosen=True),
    Score(
        "pair_auc_matched",
        "pairs",
        "pair AUC at equal distance",
        "AUC of attention within against between instances, at equal patch distance",
        _ATTENDS,
        "AUC",
        nulls=("swap",),
        lead=3,
        is_chosen=True,
        is_column=True,
    ),
    Score(
        "jaccard_60",
        "maps",
        "Jaccard at 60 %",
        "IoU of the patches that hold 60 % of the CLS attention with the instances",
        _COVERS,
        "IoU",
        _jaccard(0.6),
        nulls=("swap",),
        lead=4,
        is_chosen=True,
        is_compared=True,
        is_column=True,
    ),
    *(
        Score(
            f"jaccard_{share}",
            "maps",
            f"Jaccard at {share} %",
            claim=_COVERS,
            short="IoU",
            compute=_jaccard(share / 100),
            nulls=("swap",),
            is_compared=True,
        )
        for share in (80, 90)
    ),
    *(
        Score(
            f"jaccard_oracle_{share}",
            "oracle",
            f"Jaccard at {share} %, best head of each object",
            compute=_jaccard(share / 100, of_best_head=True),
            nulls=("swap",),
        )
        for share in (60, 80, 90)
    ),
    Score(
        "corloc",
        "maps",
        "CorLoc",
        claim="finds an object's box",
        short="CorLoc",
        compute=_corloc,
        nulls=("swap",),
        is_chosen=True,
        is_compared=True,
    ),
    Score(
        "coherence",
        "labels",
        "coherence",
        "share of neighbouring patches with equal labels",
        compute=_coherence,
        needs_objects=False,
        lead=5,
        is_column=True,
    ),
    *(
        Score(name, "labels", name.replace("_", " "), compute=_size(name), needs_objects=False)
        for name in ("clusters", "largest_cluster", "smallest_cluster")
    ),
    Score("stability", "repeats", "stability", "mean ARI between repeats of the clustering", is_column=True),
    Score(
        "attention_distance",
        "attention",
        "attention distance",
        "mean distance of attention, in patches",
        is_column=True,
    ),
    Score("attention_distance_relative", "attention", "attention distance, relative"),
    Score("entropy", "attention", "entropy"),
    Score("effective_patches", "attention", "effective patches"),
    Score("query_key_nmi", "attention", "query key NMI"),
    Score("sink", "attention", "sink"),
    Score("prefix_mass", "prefix", "prefix mass", "attention of patches on CLS and registers", is_column=True),
]


def score(name: str) -> Score | None:
    """The row of a score, or None where the table has none of that name."""
    return next((s for s in SCORES if s.name == name), None)


def dims_of(name: str) -> tuple[str, ...]:
    """The dimensions beside the image of a score's array, or of the array of its null (`SCORE.NULL`)."""
    row = score(name.partition(".")[0])
    return row.dims if row else ("layer", "head")


def is_of_labels(name: str) -> bool:
    """Whether a score, or the score of a null (`SCORE.NULL`), is computed from clusters and so has an algorithm."""
    return "algorithm" in dims_of(name)


def nulls_of(name: str) -> tuple[str, ...]:
    """The null models that a score is compared with beside `RANDOM`; empty where the table does not know the score."""
    row = score(name)
    return row.nulls if row else ()


def main_null(name: str) -> str:
    """The null model that decides whether a score means anything; empty where it has none."""
    return next(iter(nulls_of(name)), "")


def leading() -> list[str]:
    """The scores by which images, heads and tables are ordered: the first one that is known is taken."""
    return [s.name for s in sorted(SCORES, key=lambda s: s.lead) if s.lead]


def names(*sources: Source) -> list[str]:
    """The scores that are computed from one of these sources, in the order of the table."""
    return [s.name for s in SCORES if s.source in sources]


def _by_lender(s: Score) -> tuple[str, ...]:
    return (s.name + BY_LENDER,) if "swap" in s.nulls else ()


def labelling_arrays(*, of_vectors: bool = False) -> dict[str, tuple[str, ...]]:
    """Lists for each word of --scores the arrays of scores.zarr that labelling fills.

    Those of nulls are `SCORE.NULL`; `SCORE.by_lender` has the values whose mean is `SCORE.swap`. With `of_vectors`,
    only those that do not need attention rows.
    """
    return {
        group: tuple(
            array
            for s in SCORES
            if s.source in sources and (s.source in OF_VECTORS or not of_vectors)
            for array in (s.name, *(f"{s.name}.{n}" for n in s.nulls), *_by_lender(s))
        )
        for group, sources in LABELLING.items()
    }

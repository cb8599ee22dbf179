"""Whether this process sees DATA, so that images which only can't be seen now are not stored as failed."""

import os
from collections.abc import Mapping, Sequence

from batchjob.data.index import ImageIndex
from batchjob.data.reading import escape
from batchjob.errors import WorkLeft, counted
from batchjob.retries import MAY_PASS
from batchjob.store.writer import Failure

_FEW_IMAGES = 3  # of a partition may be missing, whatever their share: photos do get deleted
_SMALL_SHARE = 0.05  # of a partition may be missing, or more where --max-failures allows more
_LOOKED_AT = 16


def raise_for_absence(index: ImageIndex, data: str) -> None:
    """Checks that this process sees DATA.

    Parameters
    ----------
    index
        The images.
    data
        DATA as it was planned.

    Raises
    ------
    WorkLeft
        DATA's folder is not there, or none of 16 photos (or of their shards) can be seen.
    """
    node = os.environ.get("SLURMD_NODENAME")  # on a cluster the node may be ill; elsewhere there is one machine
    where = f" on {node}" if node else ""
    again = "bring it back and run the same command again"
    if not index.shards and not os.path.isdir(index.root):
        raise WorkLeft(f"DATA {escape(index.root)} was planned and can't be seen{where}; {again}")
    count = len(index)
    rows = sorted({i * (count - 1) // max(1, _LOOKED_AT - 1) for i in range(_LOOKED_AT)})
    if count <= _FEW_IMAGES or any(os.path.lexists(index.file(row)) for row in rows):
        return
    if index.shards:
        raise WorkLeft(f"none of the shards of DATA {data} can be seen{where}; {again}")
    looked_at = "the" if len(rows) == count else f"{len(rows)} of the"
    if not os.path.isdir(data):
        raise WorkLeft(
            f"none of {looked_at} {count:,} paths of {data} can be seen{where}, such as {index.where(0)}; bring the "
            "photos back and run the same command again"
        )
    raise WorkLeft(f"none of {looked_at} {count:,} photos of DATA {data} can be seen{where}; {again}")


def may_pass(failures: Sequence[Failure]) -> int:
    """Counts the failures whose cause may be gone at the next attempt."""
    return sum(cause in MAY_PASS for _, cause, _ in failures)


def is_a_loss_of_data(failures: Sequence[Failure], count: int, max_failures: float) -> bool:
    """Judges whether the file system is to blame for a partition's failures, rather than its photos.

    Parameters
    ----------
    failures
        The failures of the partition.
    count
        How many images the partition has.
    max_failures
        `--max-failures`, a fraction.

    Returns
    -------
    Whether more than 3 images, and more than 5 % or the fraction, failed for a cause that may be gone next time.
    """
    return may_pass(failures) > max(_FEW_IMAGES, max(_SMALL_SHARE, max_failures) * count)


def describe_failures(causes: Mapping[str, int], count: int, *, retry: str) -> str:
    """Says how many images failed and why.

    Parameters
    ----------
    causes
        The number of failed images by cause.
    count
        How many images were labelled.
    retry
        How images are tried again, as `retries.sentence` says it; empty where that is of no use.

    Returns
    -------
    A sentence.
    """
    told = ", ".join(f"{number} {cause}" for cause, number in sorted(causes.items(), key=lambda item: -item[1]))
    return f"{sum(causes.values())} of {counted(count, 'image')} failed: {told}{'; ' if retry else ''}{retry}"

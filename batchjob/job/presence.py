"""Whether this process sees DATA: a loss that may pass must not become part of the result."""

import os
from collections.abc import Mapping, Sequence

from batchjob.data.index import ImageIndex
from batchjob.data.reading import escape
from batchjob.errors import WorkLeft
from batchjob.job.buffers import Failure

MAY_PASS = ("missing", "unreadable")  # causes that a file system may take back
FEW_IMAGES = 3  # of a partition may be missing, whatever share that is: photos do get deleted
SMALL_SHARE = 0.05
_LOOKED_AT = 16


def raise_for_absence(index: ImageIndex) -> None:
    """Raises WorkLeft where DATA's root, all of its shards, or each of 16 photos can't be seen."""
    node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    again = "bring it back and run the same command again"
    if not index.shards and not os.path.isdir(index.root):
        raise WorkLeft(f"DATA {escape(index.root)} was planned and can't be seen on {node}; {again}")
    count = len(index)
    rows = sorted({i * (count - 1) // max(1, _LOOKED_AT - 1) for i in range(_LOOKED_AT)})
    places = [index.where(row).split(": ")[0] if index.shards else index.where(row) for row in rows]
    if count > FEW_IMAGES and not any(os.path.lexists(place) for place in places):
        what = "the shards" if index.shards else f"{len(rows)} photos looked at"
        raise WorkLeft(f"none of {what} of DATA {escape(index.root)} can be seen on {node}; {again}")


def may_pass(failures: Sequence[Failure]) -> int:
    """How many of the failures have a cause that may pass."""
    return sum(cause in MAY_PASS for _, cause, _ in failures)


def is_a_loss_of_data(failures: Sequence[Failure], count: int, max_failures: float) -> bool:
    """Whether so many of a partition's `count` images can't be read that the file system is to blame, not photos."""
    return may_pass(failures) > max(FEW_IMAGES, max(SMALL_SHARE, max_failures) * count)


def describe_failures(causes: Mapping[str, int], count: int, *, retry: str) -> str:
    """One sentence: how many of `count` images failed and why, and the command `retry` where it may help."""
    told = ", ".join(f"{number} {cause}" for cause, number in sorted(causes.items(), key=lambda item: -item[1]))
    again = sum(causes.get(cause, 0) for cause in MAY_PASS)
    hint = f"; the {again} that are {' or '.join(MAY_PASS)} are tried again by: {retry}" if again else ""
    return f"{sum(causes.values())} of {count} images failed: {told}{hint}"

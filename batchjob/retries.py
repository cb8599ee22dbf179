"""The failures whose cause may be gone at the next attempt, and the command that tries these images again."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batchjob.codes import STATUS
from batchjob.config import command_of

if TYPE_CHECKING:
    from batchjob.store.run import Run

MAY_PASS = ("missing", "unreadable")
COUNT = " or ".join(MAY_PASS)  # what stats/counts.json calls the number of these images


def count_of(causes: Mapping[str, int]) -> int:
    """Counts the images whose cause of failure may be gone; `causes` counts all failed images by cause."""
    return sum(causes.get(cause, 0) for cause in MAY_PASS)


def sentence(count: int, data: str, run: Path, options: Mapping[str, Any]) -> str:
    """Says how images are tried again whose cause of failure may be gone.

    Parameters
    ----------
    count
        How many images there are.
    data, run
        DATA as it was planned, and the folder of the run.
    options
        The result options of the run by name, without which the command would be refused.

    Returns
    -------
    A sentence without its full stop; empty where `count` is 0.
    """
    if not count:
        return ""
    again = command_of(data, run, options, "--retry-failed")
    return f"those that are {COUNT} ({count:,}) are tried again by: {again} (with make: RETRY_FAILED=1)"


def without_images(run: "Run") -> str:
    """Says of a run in which no image is labelled how that is mended.

    Parameters
    ----------
    run
        The run.

    Returns
    -------
    A sentence without its full stop.
    """
    folder, asked = run.folder, run.data_asked
    if len(run.pending_rows):
        return f"{folder} has no labelled image yet; go on with: {command_of(asked, folder, run.options)}"
    may_pass = np.isin(run.read(0, run.rows, only=()).status, [STATUS[cause] for cause in MAY_PASS])
    remedy = sentence(int(may_pass.sum()), asked, folder, run.options) or "give other images, and another RUN for them"
    return f"all images of {folder} failed (batchjob show {folder} counts the causes); {remedy}"

"""The failures whose cause may be gone at the next attempt, and the command that tries these images again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.codes import PENDING, STATUS
from batchjob.config import command_of

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


def without_images(status: NDArray[np.uint8], data: str, run: Path, options: Mapping[str, Any]) -> str:
    """Says of a run in which no image is labelled how that is mended.

    Parameters
    ----------
    status
        [n], the images' `batchjob.codes.STATUS`.
    data, run, options
        As `sentence`.

    Returns
    -------
    A sentence without its full stop.
    """
    if (status == PENDING).any():
        return f"{run} has no labelled image yet; go on with: {command_of(data, run, options)}"
    may_pass = int(np.isin(status, [STATUS[cause] for cause in MAY_PASS]).sum())
    remedy = sentence(may_pass, data, run, options) or "give other images, and another RUN for them"
    return f"all images of {run} failed (batchjob show {run} counts the causes); {remedy}"

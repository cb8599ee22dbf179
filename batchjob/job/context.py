"""What a process works on and where, and how it is told to stop and says what it does: the same for all of a job."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from batchjob.config import Runtime
from batchjob.plan import Plan


@dataclass(frozen=True, slots=True)
class Context:
    """A planned run, the device and the options that it is worked on with, and the way back to who started that."""

    run: Path  # the folder of the run
    plan: Plan
    runtime: Runtime
    device: torch.device  # of the model, of its rows and of their clustering
    should_stop: Callable[[], bool]  # whether somebody wants this process to end; asked after each batch or iteration
    say: Callable[[str], None]  # gets a line for each choice and for progress

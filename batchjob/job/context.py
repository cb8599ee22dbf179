"""The run, device and options that a process works with, and how it is told to stop and says what it does."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from batchjob.config import Runtime
from batchjob.plan import Plan


@dataclass(frozen=True, slots=True)
class Context:
    """A planned run, the device and options that a process works on it with, and its links to whoever started it."""

    run: Path  # the folder of the run
    plan: Plan
    runtime: Runtime
    device: torch.device  # of the model, of its rows and of their clustering
    should_stop: Callable[[], bool]  # whether somebody wants this process to end; asked after each batch or iteration
    say: Callable[[str], None]  # gets a line for each choice and for progress

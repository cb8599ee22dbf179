"""RUN/fit/rows-RANK-of-WORLD.bin: the rows that a process of a fit has read, kept for another attempt."""

import os
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from batchjob.files import clear_disk_errors, removed_if_torn

_EVERY_S = 120.0  # between two savings
_MOST_SHARE = 0.05  # of the time may go into writing


@dataclass(slots=True)
class ReadRows:
    """Keeps rows [L, H, n, D] and their numbers [n] on disk, and from how many of a process's partitions they come.

    `key` names what the rows depend on; rows that were kept under another key are not read.
    """

    run: Path
    key: str
    rank: int
    world: int
    _last: float = field(default_factory=time.monotonic)
    _cost_s: float = 0.0

    @property
    def path(self) -> Path:
        """The file of this process."""
        return self.run / "fit" / f"rows-{self.rank}-of-{self.world}.bin"

    def is_due(self) -> bool:
        """Whether it is time to save: every two minutes, or less often where saving takes long."""
        return time.monotonic() - self._last > max(_EVERY_S, self._cost_s / _MOST_SHARE)

    def save(self, x: torch.Tensor, numbers: torch.Tensor, partitions: int) -> None:
        """Writes the file whole or not at all.

        Parameters
        ----------
        x
            [L, H, n, D] the rows of every layer and head, float32, on any device.
        numbers
            [n] their numbers in the data set, int64.
        partitions
            From how many of this process's partitions the rows come.

        Raises
        ------
        WorkLeft
            The disk is full.
        UserError
            RUN can't be written.
        """
        began = time.monotonic()
        part = self.path.with_suffix(f".part{os.getpid()}")
        with clear_disk_errors(self.run, f"cannot keep the rows that were read in {part}"), removed_if_torn(part):
            part.parent.mkdir(exist_ok=True)
            with part.open("wb") as file:
                np.save(file, np.array([self.key, str(partitions), str(x.shape[2])]))
                checksum = 0
                for values in (numbers, *x.flatten(0, 1)):  # one head at a time: a copy of all may not fit the host
                    on_host = np.ascontiguousarray(values.cpu().numpy())
                    checksum = zlib.crc32(on_host.data, checksum)
                    np.save(file, on_host)
                np.save(file, np.array(checksum, np.uint32))
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        self._last = time.monotonic()
        self._cost_s = self._last - began

    def load_into(self, x: torch.Tensor, numbers: torch.Tensor) -> tuple[int, int]:
        """Reads the rows that an earlier attempt kept.

        Parameters
        ----------
        x
            [L, H, m, D] takes the rows, from the first place on.
        numbers
            [m] takes their numbers.

        Returns
        -------
        (partitions, n): from how many partitions they come, and how many rows of each layer and head; (0, 0) where none
        were kept, they are damaged, of another key, or more than m.
        """
        try:
            with self.path.open("rb") as file:
                key, partitions, count = (str(v) for v in np.load(file))
                if key != self.key or int(count) > x.shape[2]:
                    return 0, 0
                checksum = 0
                for target in (numbers, *x.flatten(0, 1)):
                    values = np.load(file)
                    checksum = zlib.crc32(values.data, checksum)
                    target[: int(count)] = torch.from_numpy(values)
                is_whole = int(np.load(file)) == checksum
        except FileNotFoundError:
            return 0, 0
        except (OSError, ValueError, EOFError):  # damaged
            return 0, 0
        return (int(partitions), int(count)) if is_whole else (0, 0)

"""Locks of the file system that say which partitions a process works on."""

import fcntl
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from batchjob.files import NO_LOCKS


class Claims:
    """The partitions that this process works on, which no other process of any job on the same RUN can claim.

    A claim is a lock on one byte of the file `claims`. The kernel releases it when the process dies (on a network file
    system, its server does), so nobody has to clean up claims. A forked child does not have its parent's claims.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the file `claims` in a folder, which is RUN/work for partitions; makes it where it is not there."""
        self._path = folder / "claims"
        self._file = self._open()
        self._works = True

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def take(self, partition: int) -> bool:
        """Claims a partition; False where another process has it. On a file system without locks always True."""
        try:
            if self._works and not os.fstat(self._file).st_nlink:  # `finish` removed the file, and others use a new one
                os.close(self._file)
                self._file = self._open()
            if self._works:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, partition)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                return False
            self._works = False
            print("this file system has no locks: start no second job on the same RUN", file=sys.stderr)
        return True

    def release(self, partition: int) -> None:
        """Gives up the claim of a partition."""
        if self._works:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, partition)

    def close(self) -> None:
        """Gives up all claims."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

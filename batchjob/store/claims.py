"""Which partitions a process works on, told to all others by locks of the file system."""

import fcntl
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from batchjob.files import NO_LOCKS


class Claims:
    """Which partitions this process works on, known to every process of every job on the RUN.

    A claim is a byte-range lock on RUN/work/claims: the kernel (for a network file system, its server) lets it go when
    the process dies, so no claim outlives its owner and none must be cleaned up. Not shared with forked children.
    """

    def __init__(self, folder: Path) -> None:
        """`folder`: RUN/work, for the claims of partitions."""
        self._path = folder / "claims"
        self._file = self._open()
        self._works = True

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def take(self, partition: int) -> bool:
        """True if the partition is ours now; False while another process has it."""
        try:
            if self._works and not os.fstat(self._file).st_nlink:  # `finish` removed it, and others have a new one
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
        """Others may take the partition."""
        if self._works:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, partition)

    def close(self) -> None:
        """All claims are let go."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

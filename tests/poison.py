"""An index whose rows may do to their worker what damaged files, full disks and hung networks do."""

import ctypes
import os
import signal
import time

from batchjob.index import ImageIndex


class Poisoned(ImageIndex):
    """The rows of another index; `deeds` maps some to what reading them does."""

    def __init__(self, index: ImageIndex, deeds: dict[int, str], marker: str = "") -> None:
        self.__dict__.update(index.__dict__)
        self.index, self.deeds, self.marker = index, deeds, marker

    def __reduce__(self):
        return Poisoned, (self.index, self.deeds, self.marker)

    def read(self, i: int) -> bytes:
        deed = self.deeds.get(i, "")
        if deed == "segfault":
            ctypes.string_at(0)
        elif deed == "out of memory":  # as the kernel ends it
            os.kill(os.getpid(), signal.SIGKILL)
        elif deed == "exit":
            os._exit(3)
        elif deed == "hang":
            time.sleep(3600)
        elif deed == "once" and not os.path.exists(self.marker):
            with open(self.marker, "w"):
                os.kill(os.getpid(), signal.SIGKILL)
        elif deed == "shared memory":
            raise RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")
        elif deed == "bug":
            raise RuntimeError("a mistake of ours")
        return self.index.read(i)

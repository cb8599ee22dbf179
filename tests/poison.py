"""Makes good and bad files as rows, and rows that harm their worker as full disks and hung networks do."""

import ctypes
import os
import signal
import time
from pathlib import Path

from batchjob.codes import STATUS
from batchjob.data.decode import decode
from batchjob.data.index import ImageIndex, IndexBuilder
from batchjob.data.reading import ReadFailure
from batchjob.geometry import Geometry
from batchjob.loader import jpeg as fast_jpeg
from batchjob.loader.loader import Loader
from tests.pictures import bad_files, jpeg, png

GEOMETRY = Geometry(28, 28, 14, 14)
FILL = (1, 2, 3)


class Poisoned(ImageIndex):
    """Has the rows of another index; `deeds` maps some rows to what reading them does."""

    def __init__(self, index: ImageIndex, deeds: dict[int, str], marker: str = "") -> None:
        self.__dict__.update(index.__dict__)
        self.index, self.deeds, self.marker = index, deeds, marker

    def __reduce__(self):
        return Poisoned, (self.index, self.deeds, self.marker)

    def read(self, i: int) -> bytes:
        deed = self.deeds.get(i, "")
        if deed == "segfault":
            ctypes.string_at(0)
        elif deed == "out of memory":  # as the kernel ends a process that is out of memory
            os.kill(os.getpid(), signal.SIGKILL)
        elif deed == "exit":
            os._exit(3)
        elif deed == "hang":
            time.sleep(3600)
        elif deed == "once" and not os.path.exists(self.marker):
            with open(self.marker, "w"):
                os.kill(os.getpid(), signal.SIGKILL)
        elif deed == "slow":
            time.sleep(0.35)
        elif deed == "bug":
            raise RuntimeError("a mistake of ours")
        return self.index.read(i)


def make_files(root: Path) -> list[str]:
    """Writes good and bad files and returns their names."""
    for i in range(4):
        (root / f"good{i}.jpg").write_bytes(jpeg(40 + i, 30, seed=i))
        (root / f"good{i}.png").write_bytes(png(30, 40 + i, seed=i))
    for name, (data, _) in bad_files().items():
        (root / name).write_bytes(data)
    (root / "dangling.jpg").symlink_to("nowhere")
    os.mkfifo(root / "fifo.jpg")
    (root / "folder.jpg").mkdir()
    return sorted(p.name for p in root.iterdir())


def read_alone(root: Path, names: list[str]):
    """Reads the files one by one in this process and returns name -> (status, height, width, pixels)."""
    found = {}
    for name in [*names, "missing.jpg"]:
        try:
            image = decode(root / name, GEOMETRY, FILL, accelerate=fast_jpeg)
            found[name] = (0, image.height, image.width, image.pixels)
        except ReadFailure as failure:
            found[name] = (STATUS[failure.cause], 0, 0, None)
    return found


def rows_of(root: Path, names: list[str]) -> ImageIndex:
    builder = IndexBuilder()
    for i, name in enumerate(names):
        builder.add(os.fsencode(name), id=f"{i}")
    return builder.build(os.fsencode(root))


def good_rows(root: Path, count: int) -> ImageIndex:
    return rows_of(root, [f"good{i % 4}.jpg" for i in range(count)])


def open_loader(index, *, batch_size=4, workers=2, **options) -> Loader:
    return Loader(index, GEOMETRY, fill_rgb=FILL, batch_size=batch_size, workers=workers, **options)

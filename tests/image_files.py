"""Helpers for the tests of DATA: tiny pictures on the disk and in tars, and the results of reading them."""

import io
import tarfile

from PIL import Image

from batchjob.data.reading import ReadFailure


def png(red: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


PNG = png()


def write(path, data=PNG):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def causes(index) -> list[str]:
    found = []
    for i in range(len(index)):
        try:
            index.read(i)
            found.append("ok")
        except ReadFailure as failure:
            found.append(failure.cause)
    return found

"""Reading images: one worker against timm's own transform, tars against files, workers against one, decoding hidden.

The photos are the sample's, scaled to 640×480 (COCO's size); $BATCHJOB_BENCH_PHOTOS names a folder of others, as is.
"""

import io
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm.data
import torch
from PIL import Image

import batchjob.sample
from batchjob import jpeg
from batchjob.geometry import Geometry
from batchjob.images import decode
from batchjob.loader import Loader, usable_cores
from batchjob.sources import index_images
from tests.benchmarks.harness import Contest

GEOMETRY = Geometry(224, 224, 16, 16)
FILL = (124, 116, 104)


def contests(*, smoke: bool) -> Iterator[Contest]:
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as folder:
        count = 4 if smoke else 64
        names = write_photos(Path(folder), count)
        yield one_worker(names)
        yield from sources(Path(folder), names)
        yield from many_workers(Path(folder), count=count if smoke else 512)
        yield from overlap(Path(folder), count=count)


def write_photos(folder: Path, count: int) -> list[Path]:
    """`count` JPEGs, the photos repeated."""
    asked = os.environ.get("BATCHJOB_BENCH_PHOTOS")
    originals = sorted(Path(asked or Path(batchjob.sample.__file__).parent / "val2017").glob("*.jpg"))
    names = []
    for i in range(count):
        original = originals[i % len(originals)]
        names.append(folder / f"{i:04}.jpg")
        if asked:
            names[-1].write_bytes(original.read_bytes())
        else:
            Image.open(original).convert("RGB").resize((640, 480)).save(names[-1], quality=90)
    with tarfile.open(folder / "all.tar", "w") as tar:
        for name in names:
            tar.add(name, name.name)
    return names


def one_worker(names: list[Path]) -> Contest:
    """JPEG bytes to the model's uint8 input, in one process."""
    data = [name.read_bytes() for name in names]
    reference = timm.data.create_transform(
        (3, 224, 224), is_training=False, interpolation="bicubic", crop_pct=1.0, use_prefetcher=True
    )
    slow = [decode(d, GEOMETRY, FILL).pixels.astype(int) for d in data]
    apart = [np.abs(s - decode(d, GEOMETRY, FILL, accelerate=jpeg).pixels) for s, d in zip(slow, data, strict=True)]
    return Contest(
        name="one worker: 640×480 JPEG to uint8 at 224",
        peer="timm's transform (PIL decode, resize, crop), uint8",
        unit="images",
        items=len(data),
        ours=lambda: [decode(d, GEOMETRY, FILL, accelerate=jpeg) for d in data],
        theirs=lambda: [reference(Image.open(io.BytesIO(d)).convert("RGB")) for d in data],
        aim=2.3,
        note=f"against Pillow: mean {np.mean(apart):.4f} grey levels, at most {np.max(apart)}",
    )


def sources(folder: Path, names: list[Path]) -> Iterator[Contest]:
    """Reading bytes, nothing decoded."""
    files, tar = index_images(str(folder)), index_images(str(folder / "all.tar"))

    def by_tarfile() -> None:
        with tarfile.open(folder / "all.tar") as archive:
            for name in names:
                member = archive.extractfile(name.name)
                assert member is not None
                member.read()

    rows = range(len(names))
    yield Contest(
        name="tar by offset",
        peer="the same images as files",
        unit="images",
        items=len(names),
        ours=lambda: [tar.read(i) for i in rows],
        theirs=lambda: [files.read(i) for i in rows],
        aim=1.0,
    )
    yield Contest(
        name="tar by offset",
        peer="tarfile",
        unit="images",
        items=len(names),
        ours=lambda: [tar.read(i) for i in rows],
        theirs=by_tarfile,
    )


def many_workers(folder: Path, *, count: int) -> Iterator[Contest]:
    """All cores' worth of workers against one, decoding alone."""
    cores = usable_cores()
    (folder / "list.csv").write_text("path,id\n" + "".join(f"{i % 4:04}.jpg,{i}\n" for i in range(count)))
    index = index_images(str(folder / "list.csv"))
    loaders = [
        Loader(index, GEOMETRY, fill_rgb=FILL, batch_size=64, workers=workers, pin=False) for workers in (cores, 1)
    ]
    many, one = (lambda loader=loader: sum(1 for _ in loader.batches(0, count)) for loader in loaders)
    yield Contest(
        name=f"{cores} workers",
        peer="1 worker",
        unit="images",
        items=count,
        ours=many,
        theirs=one,
        aim=0.85 * cores,
    )
    for loader in loaders:
        loader.close()


def overlap(folder: Path, *, count: int) -> Iterator[Contest]:
    """A model of a known pace on a device of its own (it sleeps): what of the decoding is not hidden behind it."""
    index = index_images(str(folder))
    loader = Loader(index, GEOMETRY, fill_rgb=FILL, batch_size=16, workers=1)
    pace_s = 0.012 * 16  # a batch; slower than one worker decodes it

    def alone() -> None:
        for _ in range(0, count, 16):
            time.sleep(pace_s)

    def joined() -> None:
        for _ in loader.batches(0, count):
            time.sleep(pace_s)

    yield Contest(
        name="decoding behind a model of 83 images/s",
        peer="the model alone",
        unit="images",
        items=count,
        ours=joined,
        theirs=alone,
        aim=0.95,
        note="end to end over model alone",
    )
    loader.close()

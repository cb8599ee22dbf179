"""Measures reading: a worker against timm's transform, tars against files, many workers against one, hidden decoding.

The photos are the sample's, scaled to 640×480 (COCO's size); $BATCHJOB_BENCH_PHOTOS names a folder of others, as is.
"""

import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm.data
import torch
from PIL import Image

import batchjob.sample
from batchjob.config import Options
from batchjob.data.decode import decode
from batchjob.data.index import ImageIndex
from batchjob.data.sources import index_images
from batchjob.geometry import Geometry
from batchjob.loader import jpeg
from batchjob.loader.loader import Loader
from batchjob.machine import usable_cores
from batchjob.model.attention import Extractor
from batchjob.model.describe import describe, load_model
from tests.benchmarks.harness import Contest

GEOMETRY = Geometry(224, 224, 16, 16)
FILL = (124, 116, 104)


def contests(*, smoke: bool) -> Iterator[Contest]:
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        count = 4 if smoke else 64
        names = write_photos(root, count)
        yield one_worker("640×480 JPEG", [name.read_bytes() for name in names], aim=2.3)
        stored = [photo.read_bytes() for photo in sample_photos()]
        yield one_worker("the sample's JPEGs as COCO stores them (4:4:4)", stored, aim=None)
        yield from sources(root, names)
        yield from many_workers(root, count=count if smoke else 512)
        yield from overlap_with_a_sleeper(root, count=count if smoke else 256)
        yield from overlap_with_a_vit(root, count=count)


def sample_photos() -> list[Path]:
    asked = os.environ.get("BATCHJOB_BENCH_PHOTOS")
    return sorted(Path(asked or Path(batchjob.sample.__file__).parent / "val2017").glob("*.jpg"))


def write_photos(folder: Path, count: int) -> list[Path]:
    """`count` JPEGs, the photos repeated."""
    originals = sample_photos()
    names = []
    for i in range(count):
        original = originals[i % len(originals)]
        names.append(folder / f"{i:04}.jpg")
        if os.environ.get("BATCHJOB_BENCH_PHOTOS"):
            names[-1].write_bytes(original.read_bytes())
        else:
            Image.open(original).convert("RGB").resize((640, 480)).save(names[-1], quality=90)
    with tarfile.open(folder / "all.tar", "w") as tar:
        for name in names:
            tar.add(name, name.name)
    return names


def one_worker(what: str, data: list[bytes], *, aim: float | None) -> Contest:
    """Makes contests from JPEG bytes to the model's uint8 input, in one process."""
    reference = timm.data.create_transform(
        (3, 224, 224), is_training=False, interpolation="bicubic", crop_pct=1.0, use_prefetcher=True
    )
    slow = [decode(d, GEOMETRY, FILL).pixels.astype(int) for d in data]
    apart = [np.abs(s - decode(d, GEOMETRY, FILL, accelerate=jpeg).pixels) for s, d in zip(slow, data, strict=True)]
    return Contest(
        name=f"one worker: {what} to uint8 at 224",
        peer="timm's transform (PIL decode, resize, crop), uint8",
        unit="images",
        items=len(data),
        ours=lambda: [decode(d, GEOMETRY, FILL, accelerate=jpeg) for d in data],
        theirs=lambda: [reference(Image.open(io.BytesIO(d)).convert("RGB")) for d in data],
        aim=aim,
        note=f"against Pillow: mean {np.mean(apart):.4f} grey levels, at most {np.max(apart)}",
    )


def sources(folder: Path, names: list[Path]) -> Iterator[Contest]:
    """Makes contests of reading bytes without decoding."""
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
    """Makes a contest of one worker for each core against a single worker, decoding alone."""
    cores = usable_cores()
    index = repeated(folder, count)
    loaders = [Loader(index, GEOMETRY, fill_rgb=FILL, batch_size=64, workers=workers) for workers in (cores, 1)]
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


def repeated(folder: Path, count: int) -> ImageIndex:
    """Makes `count` rows that repeat four files."""
    (folder / "list.csv").write_text("path,id\n" + "".join(f"{i % 4:04}.jpg,{i}\n" for i in range(count)))
    return index_images(str(folder / "list.csv"))


def overlap_with_a_sleeper(folder: Path, *, count: int) -> Iterator[Contest]:
    """Makes a contest with a model that only sleeps, to show how much of the decoding is not hidden behind a device."""
    pace_s = 0.012 * 16  # for each batch; slower than one worker decodes it
    return overlap(
        "decoding behind a device of 83 images/s (asleep)",
        folder,
        count,
        lambda pixels: time.sleep(pace_s),
        "first batch",
    )


def overlap_with_a_vit(folder: Path, *, count: int) -> Iterator[Contest]:
    """Makes a contest with the attention of a ViT-S/14, on a GPU or on all cores, which it shares with the worker."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    spec = describe(Options())
    model = load_model(spec, None, precision="fp16" if device.type == "cuda" else "fp32", device=device)
    extract = Extractor(model, (spec.num_layers - 1,), tuple(range(spec.num_heads)))

    def forward(pixels: torch.Tensor) -> None:
        torch.set_num_threads(usable_cores())
        for maps in extract(pixels):
            del maps
        torch.set_num_threads(1)

    if device.type == "cpu":
        yield from overlap(
            "decoding behind a ViT-S/14 on all cores", folder, count, forward, "first batch, cores shared"
        )
    else:
        yield from on_a_gpu(folder, 64 * count, forward, device)


def on_a_gpu(
    folder: Path, count: int, forward: Callable[[torch.Tensor], None], device: torch.device
) -> Iterator[Contest]:
    """Makes a contest of loader and model together against the slower of the two alone."""
    batch_size, workers = 128, max(1, min(14, usable_cores() - 1))
    index = repeated(folder, count)
    with Loader(index, GEOMETRY, fill_rgb=FILL, batch_size=batch_size, workers=workers, pin_for=device) as loader:
        ready = torch.zeros((batch_size, 3, GEOMETRY.height, GEOMETRY.width), dtype=torch.uint8).pin_memory()

        def model_alone() -> None:
            for first in range(0, count, batch_size):
                forward(ready[: min(batch_size, count - first)])
            torch.cuda.synchronize()

        def loader_alone() -> None:
            for _ in loader.batches(0, count):
                pass

        def joined() -> None:
            for batch in loader.batches(0, count):
                forward(batch.pixels)
            torch.cuda.synchronize()

        alone = {"the model alone": model_alone, "the loader alone": loader_alone}
        took = {}
        for name, work in alone.items():
            work()
            began = time.perf_counter()
            work()
            took[name] = time.perf_counter() - began
        slower = max(took, key=lambda name: took[name])
        yield Contest(
            name=f"JPEG files to attention on a GPU, {workers} workers",
            peer=f"{slower}, the slower of model and loader",
            unit="images",
            items=count,
            ours=joined,
            theirs=alone[slower],
            aim=0.90,
            note=", ".join(f"{name} {count / seconds:.0f} images/s" for name, seconds in took.items()),
        )


def overlap(
    name: str, folder: Path, count: int, forward: Callable[[torch.Tensor], None], included: str
) -> Iterator[Contest]:
    """Passes batches of 16 from a loader to `forward`, against one batch in memory passed as often."""
    loader = Loader(repeated(folder, count), GEOMETRY, fill_rgb=FILL, batch_size=16, workers=1)
    ready = torch.zeros((16, 3, GEOMETRY.height, GEOMETRY.width), dtype=torch.uint8)

    def alone() -> None:
        for first in range(0, count, 16):
            forward(ready[: min(16, count - first)])

    def joined() -> None:
        for batch in loader.batches(0, count):
            forward(batch.pixels)

    yield Contest(
        name=name,
        peer="the model alone",
        unit="images",
        items=count,
        ours=joined,
        theirs=alone,
        aim=0.95,
        note=f"end to end over model alone; included: the wait for the {included}",
    )
    loader.close()

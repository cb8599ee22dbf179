"""Measures the whole job against a study's script: one image at a time, all layers, scikit-learn for each head."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.cluster import KMeans
from timm.data import create_transform, resolve_model_data_config

from batchjob import plan as plans
from batchjob.config import Options, Runtime
from batchjob.job import label as job
from batchjob.job import opening
from batchjob.job.prepare import prepare
from batchjob.loader.loader import Batch
from batchjob.machine import usable_cores
from batchjob.model.describe import load_model
from batchjob.model.weights import Weights, state_dict
from batchjob.store import lifecycle as store
from tests.benchmarks.harness import Contest
from tests.conftest import SAMPLE

MODEL, PX, K, N_INIT = "vit_small_patch14_dinov2.lvd142m", 224, 5, 4


def contests(*, smoke: bool) -> Iterator[Contest]:
    """Makes a contest from photos to stored labels, last layer, all heads, on this machine's processors."""
    torch.set_num_threads(usable_cores())  # another benchmark in this process may have set the number to one
    photos = sorted((SAMPLE / "val2017").glob("*.jpg"))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        count = 2 if smoke else 64
        data = work / "photos"
        data.mkdir()
        for i, photo in zip(range(count), itertools.cycle(photos)):
            shutil.copy(photo, data / f"{i:03d}.jpg")
        few = sorted(data.iterdir())[: 1 if smoke else 8]
        weights = "random" if smoke else ""
        runs = itertools.count()

        def ours(n_init: str) -> None:
            run = work / f"run{next(runs)}"
            options = Options(model=MODEL, weights=weights, k=str(K), n_init=n_init)
            prepare(str(data), run, options, say=lambda line: None)
            job.label(run, Runtime(), range(len(plans.load(run).partitions)), say=lambda line: None)
            store.finish(run)

        net = timm.create_model(MODEL, pretrained=False, img_size=PX, num_classes=0).eval()
        for n_init, aim in (("auto", 3), (str(N_INIT), 8)):
            yield Contest(
                name=f"job: photo to labels, ViT-S/14, 6 heads, k = 5, n_init = {n_init}",
                peer="a study's script: PIL, batch of 1, all layers unfused, scikit-learn, 4 starts, a file an image",
                unit="image",
                items=count,
                ours=partial(ours, n_init),
                theirs=lambda: study(net, few, work),
                theirs_items=len(few),
                aim=aim,
                note="ours with its start (plan, model, workers); theirs without",
            )
        yield from_memory(data, work, weights, smoke=smoke)


class InMemory:
    """Replaces the loader: the images are decoded already, and page-locked if a GPU takes them."""

    workers = 0

    def __init__(self, pixels: torch.Tensor, batch_size: int) -> None:
        self._pixels, self._batch_size = pixels, batch_size

    def __enter__(self) -> "InMemory":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def announce(self, ranges: object) -> None:
        pass

    def wait(self) -> None:
        pass

    def verdict(self, total_s: float, device: str) -> str:
        return ""

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        for first in range(start, stop, self._batch_size):
            rows = np.arange(first, min(first + self._batch_size, stop))
            size = np.full(len(rows), PX, np.int32)
            yield Batch(rows, self._pixels[first : rows[-1] + 1], np.zeros(len(rows), np.uint8), size, size, [])


def from_memory(data: Path, work: Path, weights: str, *, smoke: bool) -> Contest:
    """Makes a contest of the loop without decoding against timm's plain forward pass of the same batches."""
    is_gpu = torch.cuda.is_available()
    device, batch_size = torch.device("cuda" if is_gpu else "cpu"), 256 if is_gpu else 16
    photos = sorted(data.iterdir())
    count = 16384 if is_gpu and not smoke else len(photos)
    (work / "list.csv").write_text("path,id\n" + "".join(f"{photos[i % len(photos)]},{i}\n" for i in range(count)))
    options = Options(
        model=MODEL, weights=weights, k=str(K), n_init=str(N_INIT), precision="fp16" if is_gpu else "fp32"
    )
    planned = work / "planned"
    plan = prepare(str(work / "list.csv"), planned, options, say=lambda line: None)
    pixels = torch.randint(0, 256, (count, 3, PX, PX), dtype=torch.uint8)
    loader = InMemory(pixels.pin_memory() if is_gpu else pixels, batch_size)
    state = state_dict(Weights(**plan.weights))
    model = load_model(plan.model, state, precision=plan.precision, device=device, seed=options.seed)
    runs = itertools.count()

    def ours() -> None:
        run = work / f"memory{next(runs)}"
        shutil.copytree(planned, run)
        with mock.patch.multiple(opening, _open_loader=lambda *_: loader, load_model=lambda *_, **__: model):
            job.label(run, Runtime(), range(len(plan.partitions)), say=lambda line: None)

    def theirs() -> None:
        with torch.no_grad():
            for batch in loader.batches(0, count):
                model(batch.pixels.to(device, non_blocking=True))
        if is_gpu:
            torch.cuda.synchronize()

    return Contest(
        name="images in memory to labels in Zarr, ViT-S/14, 6 heads, k = 5, n_init = 4",
        peer="timm's plain fused forward pass",
        unit="images",
        items=count,
        ours=ours,
        theirs=theirs,
        aim=0.95 if is_gpu else None,
        note=f"{device.type}, {plan.precision}, batches of {batch_size}",
    )


@torch.no_grad()
def study(net: torch.nn.Module, photos: list[Path], out: Path) -> None:
    """Does what a notebook does: keeps every layer's softmax, fits each head of the last, saves one array an image."""
    transform = create_transform(**resolve_model_data_config(net) | {"input_size": (3, PX, PX)})
    kept: list[torch.Tensor] = []
    hooks = []
    for block in net.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: kept.append(output)))
    for photo in photos:
        kept.clear()
        net.forward_features(transform(Image.open(photo).convert("RGB"))[None])  # type: ignore[operator]
        rows = kept[-1][0, :, 1:, 1:].numpy()
        rows = rows / rows.sum(-1, keepdims=True)
        labels = [KMeans(K, n_init=N_INIT, random_state=0).fit(head).labels_ for head in rows]
        np.save(out / f"{photo.stem}.npy", np.stack(labels))
    for hook in hooks:
        hook.remove()

"""Computes attention rows of real photos with real weights, for tests and benchmarks of the clustering."""

import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from batchjob.config import Options
from batchjob.data.decode import decode
from batchjob.geometry import Geometry
from batchjob.model import describe as model
from batchjob.model import weights
from batchjob.model.attention import Extractor, renormalise

SAMPLE = Path(__file__).parent.parent / "batchjob" / "sample" / "val2017"


def photos(limit: int) -> list[Path]:
    """Returns the sample's photos, then those of the folder that BATCHJOB_BENCH_PHOTOS may name; at most `limit`."""
    found = sorted(SAMPLE.glob("*.jpg"))
    if more := os.environ.get("BATCHJOB_BENCH_PHOTOS"):
        found += sorted(Path(more).rglob("*.jpg"))
    return found[:limit]


@functools.lru_cache(maxsize=2)
def attention_rows(limit: int = 8, layers: tuple[int, ...] = (5, 11)) -> Tensor:
    """Returns float32 [N, 256, 256], rows of sum 1: DINOv2 ViT-S/14 at 224 px, ordered by image, layer, head."""
    spec = model.describe(Options())
    state = weights.state_dict(weights.locate(spec.name, ""))
    net = model.load_model(spec, state, precision="fp32", device="cpu")
    extract = Extractor(net, layers, tuple(range(spec.num_heads)))
    geometry = Geometry(*spec.input_px, *spec.patch_px)
    rows = []
    with torch.inference_mode():
        for path in photos(limit):
            pixels = torch.from_numpy(decode(path, geometry, (124, 116, 104)).pixels)[None]
            rows += [renormalise(maps.rows).flatten(0, 1) for maps in extract(pixels)]
    return torch.cat(rows).clone()

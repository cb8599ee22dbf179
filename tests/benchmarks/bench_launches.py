"""Counts what labelling asks of a GPU, on a pretended one: no GPU is needed, and nothing is timed.

Kernels and waits do not depend on the number of problems (for the torch engine: within a tile), so few problems are
solved. Bytes are scaled to a layer of 256 images of 12 heads, and to batches of 256 images.
"""

import dataclasses
from collections.abc import Iterator

import torch

from batchjob.clustering import Engine, triton_engine
from batchjob.clustering.batched import TILE, BatchedEngine
from batchjob.clustering.triton_engine import AUTO_ROUNDS, AUTO_STARTS, COLUMNS, TritonEngine
from batchjob.config import Options, Runtime
from tests.counted import count_run, problems
from tests.pretended import Count, by_stage, pretended
from tests.stand_ins import counted_kernels

GPU = torch.device("cuda", 0)
LAYER = 256 * 12
LLOYD_STEPS = 8  # on average, to a fixed point
CACHE_BYTES_A_S, FLOPS, FORWARD_S = 5.5e12, 0.5 * 989e12, 55e-3  # assumed for an H100 at P = 196, not measured


def lines(*, smoke: bool) -> Iterator[str]:
    """Prints a line for the clustering of a layer by each engine, the search of `auto`, and each stage of the loop."""
    n = 12 if smoke else 48
    for p in (196,) if smoke else (196, 256):
        for engine, name in ((TritonEngine, "triton"), (BatchedEngine, "batched")):
            for k, words in ((torch.full((n,), 5), "k = 5"), (torch.arange(n) % 10 + 2, "10 values of k")):
                yield f"clustering, {name}, P = {p}, 4 starts, {words}: {count(engine, p, k)}"
        yield search_of_auto(p)
    options = Options(
        model="vit_base_patch16_224", weights="random", precision="fp16", layers="-1" if smoke else "all", n_init="4"
    )
    for scores in ("none", "pairs"):
        counted = count_run(
            dataclasses.replace(options, scores=scores), Runtime(device="cuda", workers="0", batch_size="4")
        )
        head = f"loop, {'1 layer' if smoke else '12 layers'}, --scores {scores}, {counted.batches} batches"
        for line in by_stage(counted.meter, scale=256 / 4):
            yield f"{head}, {line} (bytes scaled from 4 images a batch to 256)"


def count(engine: type[TritonEngine] | type[BatchedEngine], p: int, k: torch.Tensor) -> str:
    """Returns the counts of one call, with bytes scaled to a layer."""
    n = len(k)
    with pretended() as meter, counted_kernels(meter):
        solver: Engine = engine(GPU)
        x, seeds = problems(n, p).to(GPU), torch.arange(n).pin_memory()
        meter.reset()
        solver.kmeans(x, k.int().pin_memory() if engine is TritonEngine else k, seeds, n_init=4, checks=False)
    total: Count = meter.total
    if engine is TritonEngine:
        each = total.gram_bytes * LAYER / n / 2**30
        size = f"{total.bytes * LAYER / n / 2**30:.2f} GiB for {LAYER} problems (scaled from {n})"
        return f"{total.kernels} kernels, {total.syncs} waits, {size}, and {each:.2f} GiB for each read of G"
    tile = (
        f"one tile of {TILE['cuda']} problems a value of k, of which a layer fills {-(-LAYER // TILE['cuda'])} and more"
    )
    return f"{total.kernels} kernels, {total.syncs} waits, {total.bytes / 2**30:.1f} GiB ({tile})"


def forward_flop(p: int) -> int:
    """Operations of ViT-B's forward pass of one image with `p` patches of 16 × 16 pixels and CLS, products alone.

    A multiplication and an addition count as two. A block multiplies its T tokens with 12 · D² weights (queries, keys,
    values and output 4 · D², the MLP 8 · D²), and twice [T, T] with [T, D] over all heads.
    """
    blocks, width, t = 12, 768, p + 1
    return blocks * (24 * t * width**2 + 4 * t**2 * width) + 2 * p * (3 * 16 * 16) * width


def forward_s(p: int) -> float:
    """Seconds that 256 images of `p` patches are assumed to take: `FORWARD_S` at P = 196, else by operations."""
    return FORWARD_S * forward_flop(p) / forward_flop(196)


def search_of_auto(p: int) -> str:
    """Says how often `--n-init auto` reads the Gram matrix at most, and computes the time of that and the products."""
    shape = triton_engine._shape_of(p, AUTO_STARTS)
    reads = 3 * (AUTO_ROUNDS + 2) + LLOYD_STEPS
    size, padded = LAYER * p * p * 4, -(-p // 64) * 64
    work = reads * LAYER * 2 * 2 * COLUMNS * padded * padded
    seconds = max(reads * size / CACHE_BYTES_A_S, work / FLOPS)
    return (
        f"clustering, triton, P = {p}, n_init auto, k to {COLUMNS // shape.starts}: {AUTO_STARTS} starts, "
        f"{AUTO_ROUNDS} exchanges each: at most {reads} reads of G ({reads * size / 1e9:.0f} GB) and "
        f"{work / 1e12:.1f} TFLOP a layer; at {CACHE_BYTES_A_S / 1e12} TB/s and {FLOPS / 1e12:.0f} TFLOPS "
        f"{1e3 * seconds:.1f} ms, {seconds / forward_s(p):.1%} of a forward pass of ViT-B/16 on {p + 1} tokens, "
        f"{1e3 * forward_s(p):.0f} ms (computed, nothing was timed)"
    )

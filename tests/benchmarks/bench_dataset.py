"""Measures one k-means over a whole dataset: our torch engine against scikit-learn on a CPU, or cuML on a GPU."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batchjob.codebook.kmeans import Fit, Problem, TorchRefiner, fit
from tests.benchmarks.harness import Contest

K, WIDTH, STARTS = 64, 196, 4
BYTES_PER_S = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}  # bandwidth of memory, by the makers' data sheets


def contests(*, smoke: bool) -> Iterator[Contest]:
    """Yields 50,000 rows on a CPU; on a GPU a million rows, and as many as a third of its memory holds."""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        sizes = [20_000] if smoke else [1_000_000, memory // 3 // (4 * WIDTH)]
        for rows in sizes:
            yield from against_cuml(rows)
        return
    yield from against_sklearn(3000 if smoke else 50_000, k=8 if smoke else K)


def against_sklearn(rows: int, *, k: int) -> Iterator[Contest]:
    """Makes a contest on one thread with equal numbers of starts; the note has the ratio of the inertias."""
    from sklearn.cluster import KMeans

    torch.set_num_threads(1)
    x = smooth_rows(rows, torch.device("cpu"))

    def theirs() -> float:
        return float(KMeans(k, n_init=STARTS, random_state=0).fit(x.numpy()).inertia_)

    ratio = solve(x, k).inertia / theirs()
    yield Contest(
        name=f"dataset k-means, {rows:,} × {WIDTH}, k = {k}, CPU",
        peer=f"scikit-learn, n_init = {STARTS}",
        unit="rows",
        items=rows,
        ours=partial(solve, x, k),
        theirs=theirs,
        aim=1.0,
        note=f"inertia ours/theirs {ratio:.4f}; our restarts run on a sample of the rows",
    )


def against_cuml(rows: int) -> Iterator[Contest]:
    """Makes a contest with cuML's KMeans from its own start, n_init = 1; the floor is one read of the rows a step."""
    try:
        import cuml
        import cupy
    except ImportError:
        return
    device = torch.device("cuda")
    x = smooth_rows(rows, device)
    name = torch.cuda.get_device_name()
    speed = next((s for key, s in BYTES_PER_S.items() if key in name), 0.0)
    found = solve(x, K)
    floor = f"floor {found.iterations * x.numel() * 4 / speed:.3f} s" if speed else "floor unknown"

    def theirs() -> Any:
        model = cuml.cluster.KMeans(n_clusters=K, n_init=1, random_state=0, tol=1e-8, max_iter=300, output_type="cupy")
        scaled = cupy.from_dlpack(x)  # the rows already have unit spread
        model.fit(scaled)
        cupy.cuda.runtime.deviceSynchronize()
        return float(model.inertia_)

    yield Contest(
        name=f"dataset k-means, {rows:,} × {WIDTH}, k = {K}, {name}",
        peer="cuml.cluster.KMeans, n_init = 1",
        unit="rows",
        items=rows,
        ours=partial(_synchronised, x),
        theirs=theirs,
        note=f"inertia ours/cuML {found.inertia / theirs():.4f}; {floor} for {found.iterations} iterations",
    )


def solve(x: Tensor, k: int) -> Fit:
    """Fits by our engine with four starts."""
    problem = Problem(x, torch.arange(len(x), device=x.device), k, 0, STARTS)
    return fit(problem, TorchRefiner(), start=None, keep=lambda state: None)


def _synchronised(x: Tensor) -> Fit:
    found = solve(x, K)
    torch.cuda.synchronize()
    return found


def smooth_rows(rows: int, device: torch.device) -> Tensor:
    """Returns [rows, WIDTH] of about unit spread: softmax rows of a few smooth factors, without clear clusters."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(12, WIDTH, generator=generator).to(device)
    x = torch.empty(rows, WIDTH, device=device)
    for start in range(0, rows, 1 << 20):
        part = x[start : start + (1 << 20)]
        part.copy_(torch.softmax(torch.randn(len(part), 12, generator=generator).to(device) @ factors, 1))
    return x.div_(x[: 1 << 16].std())

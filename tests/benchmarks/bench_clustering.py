"""Measures our k-means of attention rows, from real photos and weights, against other libraries.

On a CPU each uses one thread. BATCHJOB_BENCH_PHOTOS=FOLDER adds photos to the sample's eight. A peer that is not
installed is left out with a message: `pip install -e '.[bench]'` installs them.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from batchjob.clustering import Engine, open_engine
from tests.benchmarks.harness import Contest
from tests.real_attention import attention_rows

CPU = torch.device("cpu")
Solve = Callable[[Tensor, int, int], Tensor]  # rows, k, n_init -> labels [N, P]


def contests(*, smoke: bool) -> Iterator[Contest]:
    """Yields every contest for this machine."""
    torch.set_num_threads(1)
    rows = attention_rows(1) if smoke else attention_rows(20)
    engine = open_engine("batched", CPU)
    few = rows[: 4 if smoke else 48]
    for k, n_init in ((5, 4), (5, 1), (8, 4)):
        yield versus(f"k-means, k={k}, n_init={n_init}", "scikit-learn loop", sklearn_loop, rows, few, k, n_init, 2.5)
    yield Contest(
        "4 restarts for less than 2 (aim: over 0.5)",
        "our own n_init=1",
        "problems",
        len(rows),
        lambda: ours(engine, rows, 5, 4),
        lambda: ours(engine, rows, 5, 1),
        aim=0.5,
    )
    for module, peer, solve, n_init in (
        ("faiss", "faiss-cpu loop", faiss_loop, 4),
        ("faiss", "faiss-cpu loop", faiss_loop, 1),
        ("fast_pytorch_kmeans", "fast-pytorch-kmeans loop", fast_pytorch_loop, 1),
        ("flash_kmeans", "flash-kmeans, torch path", flash_torch, 1),
        ("torch_kmeans", "torch-kmeans", torch_kmeans_batch, 4),
    ):
        if is_there(module, peer):
            part = few if module != "torch_kmeans" else few[:8]
            yield versus(f"k-means, k=5, n_init={n_init}", peer, solve, rows, part, 5, n_init, 1.0)
    if torch.cuda.is_available():
        yield from gpu_contests(rows, smoke=smoke)


def versus(name: str, peer: str, solve: Solve, rows: Tensor, few: Tensor, k: int, n_init: int, aim: float) -> Contest:
    """Makes a contest of ours on all rows against the peer on a few of them, with both inertias in the note."""
    engine = open_engine("batched", rows.device)
    theirs = float(inertia(few, solve(few, k, n_init)).mean())
    own = float(ours(engine, few, k, n_init).inertia.mean())
    return Contest(
        name,
        peer,
        "problems",
        len(rows),
        lambda: ours(engine, rows, k, n_init),
        lambda: solve(few, k, n_init),
        theirs_items=len(few),
        aim=aim,
        note=f"our inertia / theirs {own / theirs:.4f}",
    )


def ours(engine: Engine, rows: Tensor, k: int, n_init: int) -> Any:
    found = engine.kmeans(rows, torch.full((len(rows),), k), torch.arange(len(rows)), n_init=n_init)
    if rows.is_cuda:
        torch.cuda.synchronize()
    return found


def inertia(rows: Tensor, labels: Tensor) -> Tensor:
    """Returns float [N]: sums of squared distances to the clusters' means, computed alike for all."""
    ones = torch.nn.functional.one_hot(labels.long().to(rows.device)).to(rows.dtype)  # [N, P, K]
    means = ones.mT @ rows / ones.sum(1).clamp_min(1)[:, :, None]
    return (rows - ones @ means).square().sum((1, 2))


def is_there(module: str, peer: str) -> bool:
    """Says whether the peer is installed; if not, prints that its contest is left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except ImportError as error:
        print(f"left out: {peer} ({error}); pip install -e '.[bench]'", file=sys.stderr)
        return False
    return True


def sklearn_loop(rows: Tensor, k: int, n_init: int) -> Tensor:
    from sklearn.cluster import KMeans

    with threadpool_limits(1):
        return torch.stack(
            [
                torch.from_numpy(KMeans(k, n_init=n_init, random_state=i).fit(x.numpy()).labels_)
                for i, x in enumerate(rows)
            ]
        )


def faiss_loop(rows: Tensor, k: int, n_init: int) -> Tensor:
    import faiss

    faiss.omp_set_num_threads(1)
    found = []
    for i, x in enumerate(rows.numpy()):
        fit = faiss.Kmeans(x.shape[1], k, niter=25, nredo=n_init, seed=i + 1, min_points_per_centroid=1)
        fit.train(x)
        found.append(torch.from_numpy(fit.index.search(x, 1)[1][:, 0]))
    return torch.stack(found)


def fast_pytorch_loop(rows: Tensor, k: int, n_init: int) -> Tensor:
    from fast_pytorch_kmeans import KMeans

    return torch.stack([KMeans(k, init_method="kmeans++").fit_predict(x) for x in rows])


def flash_torch(rows: Tensor, k: int, n_init: int) -> Tensor:
    from flash_kmeans.torch_fallback import batch_kmeans_Euclid_torch_native

    return batch_kmeans_Euclid_torch_native(rows, k, max_iters=25, tol=0)[0]


def torch_kmeans_batch(rows: Tensor, k: int, n_init: int) -> Tensor:
    from torch_kmeans import KMeans

    return KMeans(init_method="k-means++", num_init=n_init, n_clusters=k, verbose=False)(rows).labels


def cuml_loop(rows: Tensor, k: int, n_init: int) -> Tensor:
    return ours(open_engine("cuml", rows.device), rows, k, n_init).labels


def flash_triton(rows: Tensor, k: int, n_init: int) -> Tensor:
    from flash_kmeans import batch_kmeans_Euclid

    found = batch_kmeans_Euclid(rows, k, max_iters=25, tol=0)[0]
    torch.cuda.synchronize()
    return found


def pool_of_16(rows: Tensor, k: int, n_init: int) -> Tensor:
    from joblib import Parallel, delayed

    parts = [part.cpu() for part in rows.chunk(16)]
    return torch.cat(Parallel(n_jobs=16)(delayed(sklearn_loop)(part, k, n_init) for part in parts))


def gpu_contests(rows: Tensor, *, smoke: bool) -> Iterator[Contest]:
    """Yields, on a GPU, thousands of problems against cuML, a pool of processes, flash-kmeans and the forward pass."""
    device = torch.device("cuda")
    many = rows.to(device).repeat(1 if smoke else 40, 1, 1)
    few = many[:64]
    if is_there("cuml", "cuml loop"):
        yield versus("GPU k-means, k=5, n_init=4", "cuml loop", cuml_loop, many, few, 5, 4, 100.0)
    yield versus("GPU k-means, k=5, n_init=4", "16-process scikit-learn pool", pool_of_16, many, many[:960], 5, 4, 10.0)
    if is_there("flash_kmeans", "flash-kmeans"):
        yield versus("GPU k-means, k=5, n_init=1", "flash-kmeans", flash_triton, many, many, 5, 1, 1.5)
    yield against_forward(device, smoke=smoke)


def against_forward(device: torch.device, *, smoke: bool) -> Contest:
    """Makes a contest of one layer's 12 heads against ten forward passes of ViT-B/16, in half precision."""
    import timm

    images = 16 if smoke else 256
    net = timm.create_model("vit_base_patch16_224").half().eval().to(device)
    pixels = torch.randn(images, 3, 224, 224, dtype=torch.half, device=device)
    rows = torch.randn(images * 12, 196, 196, device=device).softmax(-1)
    engine = open_engine("batched", device)

    def forward() -> None:
        with torch.inference_mode():
            net(pixels)
        torch.cuda.synchronize()

    name = "k-means of 12 heads, n_init=4 (10: a tenth of the forward)"
    return Contest(
        name, "ViT-B/16 forward, fp16", "images", images, lambda: ours(engine, rows, 5, 4), forward, aim=10.0
    )

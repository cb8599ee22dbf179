"""`python -m tests.benchmarks.kmeans_quality COCO`: how near to the optimum k-means comes, and in what time.

Problems are attention rows of the last layer at 224 px: heads 0 and 1 of photos that have two or more annotated
instances, with k = instances + 1. Each search is run with two seeds in one thread; its time is the thread's CPU time,
Gram matrix included. Every answer is judged by its inertia in float64 against the lowest that any search found, among
them `--reference` further ones with `auto`. Prints rows for docs/benchmarks.md.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from batchjob.clustering.engines import open_engine
from batchjob.clustering.search import AUTO, best_partition
from batchjob.config import Options
from batchjob.data.annotations import instances_on_grid, k_instances, open_annotations
from batchjob.data.decode import decode
from batchjob.geometry import Geometry
from batchjob.model import describe as model
from batchjob.model import weights
from batchjob.model.attention import Extractor, renormalise

MODELS = ("vit_small_patch14_dinov2.lvd142m", "vit_base_patch16_224")
HEADS = (0, 1)
SEEDS = (0, 1)
Rows = NDArray[np.float32]
Search = Callable[[Rows, int, int], NDArray[Any]]


def problems(name: str, file: str, coco: Path, count: int) -> list[tuple[Rows, int]]:
    """(rows float32 [P, P], k) of two heads of photo after photo, until there are `count`."""
    spec = model.describe(Options(model=name))
    found = weights.locate(spec.name, file)
    net = model.load_model(spec, weights.state_dict(found), precision="fp32", device="cpu")
    extract = Extractor(net, (spec.num_layers - 1,), HEADS)
    geometry = Geometry(*spec.input_px, *spec.patch_px)
    photos = sorted((coco / "val2017").glob("*.jpg"))
    known = open_annotations(str(coco)).join([f"val2017/{p.name}" for p in photos], str(coco))
    chosen: list[tuple[Rows, int]] = []
    for photo in photos:
        image, picture = known.image(f"val2017/{photo.name}"), decode(photo, geometry, (124, 116, 104))
        if image is None:
            continue
        k = k_instances(instances_on_grid(image, geometry, picture.height, picture.width).owner)
        if k < 3:
            continue
        with torch.inference_mode():
            (maps,) = extract(torch.from_numpy(picture.pixels)[None])
        chosen += [(head.numpy(), k) for head in renormalise(maps.rows)[0].float()]
        if len(chosen) >= count:
            break
    return chosen[:count]


def ours(n_init: int) -> Search:
    return lambda x, k, seed: best_partition(x, k, seed=seed, n_init=n_init).labels


def in_torch(n_init: int) -> Search:
    """Returns the search of the torch engine, which makes tensors of many problems; here it has one at a time."""
    engine = open_engine("batched", torch.device("cpu"))

    # its starts have the seeds that follow each other
    def search(x: Rows, k: int, seed: int) -> NDArray[Any]:
        found = engine.kmeans(torch.from_numpy(x)[None], torch.tensor([k]), torch.tensor([1000 * seed]), n_init=n_init)
        return found.labels[0].numpy()

    return search


def scikit_learn(n_init: int) -> Search:
    return lambda x, k, seed: KMeans(k, n_init=n_init, random_state=seed).fit(x).labels_


def faiss(n_init: int) -> Search | None:
    try:
        import faiss as library
    except ImportError:
        return None

    def search(x: Rows, k: int, seed: int) -> NDArray[Any]:
        fit = library.Kmeans(x.shape[1], k, niter=300, nredo=n_init, seed=seed + 1, min_points_per_centroid=1)
        fit.train(x)
        return np.asarray(fit.index.search(x, 1)[1][:, 0])

    return search


def inertia(x: Rows, labels: NDArray[Any]) -> float:
    wide = x.astype(np.float64)
    return sum(((wide[labels == c] - wide[labels == c].mean(0)) ** 2).sum() for c in np.unique(labels))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kmeans_quality", description=__doc__)
    parser.add_argument("coco", type=Path, help="a COCO root: val2017/ and annotations/")
    parser.add_argument("--problems", type=int, default=60, help="of each model")
    parser.add_argument(
        "--reference", type=int, default=128, help="searches with auto, of other seeds, to compare with"
    )
    parser.add_argument("--weights", default="", help=f"a file for {MODELS[1]}; else they are fetched from the hub")
    parser.add_argument("--save", type=Path, help="keep the problems of each model as FOLDER/MODEL.npz")
    given = parser.parse_args()
    torch.set_num_threads(1)
    searches: dict[str, Search | None] = {f"scikit-learn, {n} starts": scikit_learn(n) for n in (4, 20, 100)}
    searches |= {"faiss, 4 starts": faiss(4), "torch engine, 4 starts": in_torch(4)}
    searches |= {f"`--n-init {n}`": ours(n) for n in (1, 4, 16)} | {"`--n-init auto`": ours(AUTO)}
    for name, file in zip(MODELS, ("", given.weights), strict=True):
        found = problems(name, file, given.coco, given.problems)
        print(f"{name}: {len(found)} problems of {found[0][0].shape[0]} rows, k {sorted({k for _, k in found})}")
        if given.save:
            padded = np.stack([x for x, _ in found])
            np.savez_compressed(given.save / f"{name}.npz", x=padded, k=np.array([k for _, k in found]))
        lowest = np.full(len(found), np.inf)
        for i, (x, k) in enumerate(found):
            for seed in range(given.reference):
                lowest[i] = min(lowest[i], inertia(x, best_partition(x, k, seed=10_000 + seed).labels))
        answers = {}
        for label, search in searches.items():
            if search is None:
                print(f"{label}: not installed")
                continue
            search(*found[0], 0)  # compiled, imported, in the cache
            start = time.thread_time()
            labels = [[search(x, k, seed) for seed in SEEDS] for x, k in found]
            spent = (time.thread_time() - start) / (len(SEEDS) * len(found))
            reached = np.array([[inertia(x, one) for one in both] for (x, _), both in zip(found, labels, strict=True)])
            agree = np.mean([adjusted_rand_score(*both) for both in labels])
            answers[label] = (spent, reached, agree)
        lowest = np.minimum(lowest, np.min([reached.min(1) for _, reached, _ in answers.values()], axis=0))
        for label, (spent, reached, agree) in answers.items():
            excess = reached / lowest[:, None] - 1
            print(
                f"| {label} | {1000 * spent:.2f} ms, {100 * excess.mean():.2f} %, "
                f"{100 * (excess > 1e-3).mean():.0f} % of problems over 0.1 %, {agree:.2f} |"
            )
        settled = np.mean([best_partition(x, k, seed=s).settled for x, k in found for s in SEEDS])
        print(f"settled with auto: {100 * settled:.0f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())

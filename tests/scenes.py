"""Makes scenes whose answer is known: m disks of one category on a patch grid, and attention by a rule."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
GRID = (14, 14)


def disks(count: int, random: np.random.Generator, grid: tuple[int, int] = GRID) -> NDArray[np.int64]:
    """Returns [P]: the owner of each patch, −1 for background; equal disks touch neither each other nor the edge."""
    radius = {2: 2.6, 3: 2.3}.get(count, 1.6)
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    while True:
        owner = np.full(grid[0] * grid[1], -1)
        centres: list[Floats] = []
        for _ in range(200):
            centre = random.uniform(radius, np.array(grid) - 1 - radius)
            if all(np.hypot(*(centre - c)) > 2 * radius + 1.5 for c in centres):
                owner[np.hypot(y - centre[0], x - centre[1]) <= radius] = len(centres)
                centres.append(centre)
                if len(centres) == count:
                    return owner


def attention(kind: str, owner: NDArray[Any], random: np.random.Generator, grid: tuple[int, int] = GRID) -> Floats:
    """Returns [P, P], rows of sum 1: uniform over class or instance, Gaussian in distance (with noise), or random."""
    patches = grid[0] * grid[1]
    if kind == "random":
        rows = random.random((patches, patches))
    elif kind.startswith("local"):
        y, x = np.divmod(np.arange(patches), grid[1])
        distance = np.hypot(y[:, None] - y, x[:, None] - x)
        rows = np.exp(-(distance**2) / (2 * 3.0**2))
        if kind == "local × noise":  # without objects: the habit of looking nearby, and noise of its own in every image
            rows = rows * np.exp(random.normal(0, 1.5, rows.shape))
    else:
        group = owner if kind == "instance" else np.minimum(owner, 0)
        rows = (group[:, None] == group[None, :]).astype(np.float64)
    # noise, since k-means of exactly equal rows finds fewer clusters than asked; real rows are never exactly equal
    rows = rows / rows.sum(axis=1, keepdims=True)
    rows = rows * (1 + 0.01 * random.standard_normal(rows.shape))
    return np.asarray(rows / rows.sum(axis=1, keepdims=True))


def k_means(rows: Floats, k: int, seed: int, starts: int = 4) -> NDArray[np.uint8]:
    """Returns [1, P]: scikit-learn's labels of the rows."""
    from sklearn.cluster import KMeans

    return np.asarray(KMeans(k, n_init=starts, random_state=seed).fit(rows).labels_[None], np.uint8)

"""From attention rows to the vectors that a dataset-wide k-means clusters, and from those to labels.

Letters beside the README's: R rows of an image (its P patches, or 1 for CLS), M rows in hand.
"""

import torch
from torch import Tensor

from batchjob.clustering.algorithms import prepare, prepare_vectors
from batchjob.clustering.base import Clusters
from batchjob.codebook.nearest import assign
from batchjob.codebook.rows import RowKind, offset_cells
from batchjob.codes import NO_LABEL


def features(rows: Tensor, places: Tensor, kind: RowKind, *, distance: str) -> Tensor:
    """float32 [M, H, D]: the rows, pooled by offset where `kind` says so, with the distance's transform.

    `rows` float32 [M, H, P]: attention rows that sum to 1 over what is not padding, or vectors [M, H, D]; `places`
    int64 [M]: the patch of each query.
    """
    if kind.vector_size:
        return prepare_vectors(rows, distance)
    if kind.features == "relative":
        rows = pool_by_offset(rows, places, kind.grid)
    return prepare(rows, distance, None)


def pool_by_offset(rows: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
    """[M, H, D]: each row's mass by the offset (dy, dx) from its query to the key, summed over cells of some patches.

    Mass is kept: a row that sums to 1 does so afterwards. A query near the edge has none beyond it.
    """
    height, width = grid
    down = _cells(height, rows)[places // width]  # [M, gh, cells]
    across = _cells(width, rows)[places % width]
    maps = rows.reshape(len(rows), -1, height, width)
    # one axis at a time: together they would need [P, P, D], gigabytes on a fine grid
    maps = torch.einsum("mhuv,mvc->mhuc", maps, across)
    return torch.einsum("mhuc,mud->mhdc", maps, down).flatten(2)


def _cells(patches: int, like: Tensor) -> Tensor:
    """[query, key, cell]: 1 where the offset from query to key falls into the cell."""
    size, cells = offset_cells(patches)
    place = torch.arange(patches, device=like.device)
    cell = torch.div(place[None, :] - place[:, None] + size // 2, size, rounding_mode="floor") + cells // 2
    return torch.nn.functional.one_hot(cell, cells).to(like.dtype)


def nearest_centroids(
    rows: Tensor, centroids: Tensor, kind: RowKind, *, distance: str, mask: Tensor | None = None
) -> Clusters:
    """Labels uint8 [B · H, R]: the number of the nearest of this layer's `centroids` [H, K, D]; `NO_LABEL` in padding.

    `rows` float32 [B, H, R, P], or [B, H, R, D], as for `features`; `mask` bool [B, P]. `inertia` [B · H]: the image's
    squared distances, summed; `k`: how many centroids occur in it.
    """
    batch, heads, per_image, _ = rows.shape
    places = torch.arange(per_image, device=rows.device).repeat(batch)
    labels = torch.empty(batch, heads, per_image, dtype=torch.int64, device=rows.device)
    squares = torch.empty(batch, heads, per_image, dtype=torch.float32, device=rows.device)
    for head in range(heads):  # all heads at once would double the memory of the maps
        own = rows[:, head].flatten(0, 1)
        x = features(own[:, None], places, kind, distance=distance)[:, 0]
        found, far = assign(x, centroids[head])
        labels[:, head], squares[:, head] = found.view(batch, per_image), far.view(batch, per_image)
    if mask is not None and kind.queries == "rows":
        labels = torch.where(mask[:, None], labels, NO_LABEL)
        squares = torch.where(mask[:, None], squares, 0)
    occurs = torch.zeros(batch, heads, NO_LABEL + 1, dtype=torch.bool, device=labels.device).scatter_(2, labels, True)
    found = occurs[..., :NO_LABEL].sum(2).flatten().byte()
    settled = torch.ones_like(found, dtype=torch.bool)  # the nearest centroid is not searched for
    return Clusters(labels.flatten(0, 1).to(torch.uint8), squares.sum(2).flatten(), found, settled)

"""From attention rows to the vectors that a dataset-wide k-means clusters, and from these to labels.

Letters: B images, H heads, P patches, D numbers of a vector, K centroids; R rows of an image (its P patches, or 1 row
for CLS); M rows of any images.
"""

import torch
from torch import Tensor

from batchjob.clustering.algorithms import prepare, prepare_vectors
from batchjob.clustering.base import Clusters
from batchjob.codebook.nearest import assign
from batchjob.codebook.rows import RowKind, offset_cells
from batchjob.codes import NO_LABEL


def features(rows: Tensor, places: Tensor, kind: RowKind, *, distance: str) -> Tensor:
    """Transforms rows so that the Euclidean distance between two of them is the wanted one.

    Parameters
    ----------
    rows
        float [M, H, P] attention rows that sum to 1 over the patches that are not padding, or [M, H, D] vectors where
        `kind.vector_size` is not 0.
    places
        int64 [M]: the number of the query patch of each row; it matters only for relative features.
    kind
        The rows of the run. With relative features each row is pooled by the offset from its query.
    distance
        `euclidean`, `cosine`, or for attention rows `hellinger`.

    Returns
    -------
    float32 [M, H, D], D = `kind.width`, on the device of `rows`.

    Raises
    ------
    UserError
        The distance is unknown, or is not for vectors.
    """
    if kind.vector_size:
        return prepare_vectors(rows, distance)
    if kind.features == "relative":
        rows = _pool_by_offset(rows, places, kind.grid)
    return prepare(rows, distance, None)


def _pool_by_offset(rows: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
    """[M, H, D]: the mass of each row [M, H, P] by the offset (dy, dx) from query to key, summed over cells of offsets.

    `places` [M] are the query patches. A row that sums to 1 does so afterwards. A query near the edge of the grid has
    no mass at offsets that lead beyond it.
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
    """Labels the rows of a batch with the numbers of the nearest centroids of one layer.

    Parameters
    ----------
    rows
        float [B, H, R, P] attention rows, or [B, H, R, D] vectors, as for `features`.
    centroids
        float32 [H, K, D].
    kind, distance
        As for `features`.
    mask
        bool [B, P], False for patches of padding. None: every patch is image.

    Returns
    -------
    Labels uint8 [B · H, R], the head running fastest, `NO_LABEL` for padding. `inertia` [B · H] is the sum of the
    squared distances of an image's rows, and `k` the number of centroids that occur in the image.
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
    settled = torch.ones_like(found, dtype=torch.bool)  # the nearest centroid is found exactly
    return Clusters(labels.flatten(0, 1).to(torch.uint8), squares.sum(2).flatten(), found, settled)

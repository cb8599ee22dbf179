"""Scores that need the attention itself, computed on the device while labelling: no P × P array leaves it.

`rows` [B, H, P, P] is attention from query to key; each row sums to 1 (`model.attention.renormalise`). The NumPy
functions of the same names in `metrics.attention` and `metrics.clusters` are the specification: the tests compare them.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from batchjob.metrics import catalogue
from batchjob.metrics.attention import patch_distances
from batchjob.metrics.pair_table import PairTable

ATTENTION_SCORES = catalogue.labelling_arrays()["attention"]
PAIR_NAMES = ("pair_auc", "pair_auc_matched", "pair_auc.distance")
_ELEMENTS_AT_ONCE = 1 << 26  # of one temporary copy of the rows: 256 MB


def attention_scores(rows: Tensor, grid: tuple[int, int], keep: Tensor | None = None) -> dict[str, Tensor]:
    """Computes `metrics.attention.attention_scores` of every image and head, on the device of the rows.

    Parameters
    ----------
    rows
        float [B, H, P, P] attention.
    grid
        (rows, columns) of the P patches.
    keep
        bool [B, P], False for patches of padding: they count neither as queries nor as keys, and the rows are
        renormalised over the other patches. None: all patches are image.

    Returns
    -------
    score -> float32 [B, H], for every name in `ATTENTION_SCORES`.
    """
    size = max(1, _ELEMENTS_AT_ONCE // max(1, rows[0].numel()))
    parts = [
        _attention_scores(rows[start : start + size], grid, None if keep is None else keep[start : start + size])
        for start in range(0, len(rows), size)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in ATTENTION_SCORES}


def _attention_scores(rows: Tensor, grid: tuple[int, int], keep: Tensor | None) -> dict[str, Tensor]:
    images, heads, patches, _ = rows.shape
    rows = rows.float()
    inside = torch.ones(images, patches, device=rows.device) if keep is None else keep.to(rows.dtype)
    if keep is not None:
        rows = rows * inside[:, None, None, :]
        rows = rows / rows.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    count = inside.sum(dim=1, keepdim=True).clamp_min(1)
    weight = inside / count  # [B, P], of each query
    distances = _distances_on(grid, rows.device)
    by_pair = weight[:, :, None] * distances
    distance = torch.bmm(rows.reshape(images, heads, -1), by_pair.reshape(images, -1, 1))[..., 0]
    uniform = (by_pair * inside[:, None, :]).sum(dim=(1, 2)) / count[:, 0]
    entropy = (_entropy(rows) * weight[:, None, :]).sum(dim=-1)
    key = torch.matmul(weight[:, None, None, :], rows)[:, :, 0, :]
    key_entropy = _entropy(key)
    norm = (count.log() * key_entropy).sqrt()
    return {
        "attention_distance": distance,
        "attention_distance_relative": distance / uniform.where(uniform > 0, torch.ones_like(uniform))[:, None],
        "entropy": entropy,
        "effective_patches": entropy.exp(),
        "query_key_nmi": torch.where(norm > 1e-6, (key_entropy - entropy).clamp_min(0) / norm.clamp_min(1e-6), 0.0),
        "sink": key.amax(dim=-1),
    }


def _entropy(shares: Tensor) -> Tensor:
    """[...]: entropy of shares [..., P] in nats. `torch.special.entr` takes twice as long on a CPU."""
    logarithm = shares.clamp_min(torch.finfo(shares.dtype).tiny).log_()
    return -logarithm.mul_(shares).sum(dim=-1)


@functools.lru_cache(maxsize=4)
def _distances_on(grid: tuple[int, int], device: torch.device) -> Tensor:
    """float32 [P, P]: Euclidean distances between patches; copied to a device once."""
    return torch.from_numpy(patch_distances(grid)).float().to(device)


def pair_scores(rows: Tensor, table: PairTable) -> dict[str, Tensor]:
    """Computes `metrics.attention.pair_scores` of n drawings of pairs of patches, without waiting for the device.

    Parameters
    ----------
    rows
        float [B, H, P, P] attention.
    table
        The drawings, each with the image on which it is scored; on the device of `rows`.

    Returns
    -------
    score -> float32 [n, H], for every name in `PAIR_NAMES`; NaN for a drawing without pairs.

    Notes
    -----
    The bits do not depend on what else is in the batch: ranks are sums of halves, exact in float64 in any order.
    """
    heads = rows.shape[1]
    if table.is_empty:
        return {name: torch.full((table.count, heads), torch.nan, device=rows.device) for name in PAIR_NAMES}
    at, first, second = (table[name] for name in ("image", "first", "second"))
    strength = (rows[at, :, first, second].float() + rows[at, :, second, first].float()).T  # [H, N]
    # the last row is the distance null: `nearness` in place of −distance, since only numbers ≥ 0 can be sorted
    values = torch.cat([strength, table["nearness"].float()[None, :]])
    auc = _sum_by(_group_auc(values, table, "group"), table["group_of_drawing"]) * table["groups"]
    in_bins = torch.nan_to_num(_group_auc(strength, table, "bin"))
    matched = _sum_by(in_bins * table["share"], table["bin_of_group"]) * table["has_bin"]
    matched = _sum_by(matched, table["group_of_drawing"]) * table["groups_with_bin"]
    found = dict(zip(PAIR_NAMES, (auc[:-1], matched, auc[-1:]), strict=True))
    return {name: values.T.float().expand(table.count, heads).contiguous() for name, values in found.items()}


def mean_by_owner(values: Tensor, members: Tensor) -> Tensor:
    """Averages the finite values of each owner.

    Parameters
    ----------
    values
        float [N, H].
    members
        int64 [most, n] from `pair_table.members_of`: the numbers of the values of each of n owners, N where an owner
        has fewer than `most`.

    Returns
    -------
    float32 [n, H]; NaN where an owner has no finite value.

    Notes
    -----
    The values of an owner are added one after the other, so that a sum does not depend on what else is in the batch.
    """
    known = torch.isfinite(values)
    total = _sum_by(torch.where(known, values, 0.0).double().T, members)
    number = _sum_by(known.double().T, members)
    return torch.where(number > 0, total / number.clamp_min(1), torch.nan).float().T


def by_owner(values: Tensor, members: Tensor, slots: int) -> Tensor:
    """Sorts values by their owners.

    Parameters
    ----------
    values
        float [N, H].
    members
        int64 [most, n] as in `mean_by_owner`; `most` is at most `slots`.
    slots
        The length of the last dimension.

    Returns
    -------
    float [n, H, slots]: each owner's values in their order, then NaN.
    """
    missing = values.new_full((1, values.shape[1]), torch.nan)
    found = torch.cat([values, missing])[members]  # [most, n, H]
    return torch.nn.functional.pad(found.permute(1, 2, 0), (0, slots - len(members)), value=torch.nan)


def _group_auc(values: Tensor, table: PairTable, by: str) -> Tensor:
    """float64 [C, G]: AUC of values [C, N] ≥ 0 within each of the groups 0 to G − 1, ties as ½; NaN where undefined.

    It sorts pairs (group, value) once, as integers: the bits of floats that are not negative order as the floats do.
    """
    keys = (table[by] << 32) | values.float().contiguous().view(torch.int32).to(torch.int64)
    ordered, order = torch.sort(keys, dim=1)
    places = torch.arange(keys.shape[1], device=values.device).expand_as(keys)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.where(new, places, 0).cummax(dim=1).values
    ends = torch.ones_like(new)
    ends[:, :-1] = new[:, 1:]
    last = torch.where(ends, places, keys.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    hits = table["same"][order] > 0
    sums = torch.where(hits, (first + last).to(torch.float64) / 2, 0.0).cumsum(dim=1)
    sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], dim=1).index_select(1, table[f"{by}.ends"]).diff(dim=1)
    return (sums - table[f"{by}.least"]) / table[f"{by}.product"]


def _sum_by(values: Tensor, members: Tensor) -> Tensor:
    """[C, n]: columns of values [C, N] summed by owner, in the order of `members` [most, n], where N adds nothing."""
    padded = torch.cat([values, torch.zeros_like(values[:, :1])], dim=1)
    result = torch.zeros(len(values), members.shape[1], dtype=values.dtype, device=values.device)
    for each in members:  # the i-th of every owner at once; an owner has few
        result = result + padded.index_select(1, each)
    return result


def instance_ari(labels: Tensor, owner: Tensor, twins: Tensor, *, clusters: int) -> Tensor:
    """Computes `instance_ari` (`metrics.clusters.instance_scores`) of n clusterings in each head, without waiting.

    Parameters
    ----------
    labels
        Integer [n, H, P], below `clusters`; a negative label leaves the patch out.
    owner
        int64 [n, P]: the instance of each patch, −1 for none; on the device of `labels`.
    twins
        float64 [n, M, G] from `twins_of`, on the device of `labels`.
    clusters
        K, one more than the largest label.

    Returns
    -------
    float32 [n, H], at most 1; NaN where no category has two instances.

    Notes
    -----
    The bits do not depend on what else is in the batch: counts are whole numbers, exact in float64 in any order.
    """
    n, heads, _ = labels.shape
    most = twins.shape[1]
    if not twins.numel():
        return torch.full((n, heads), torch.nan, device=labels.device)
    size = max(1, _ELEMENTS_AT_ONCE // (2 * heads * max(clusters, 1) * (most + twins.shape[2] + 1)))
    parts = []
    for start in range(0, n, size):
        part = slice(start, start + size)
        table = _contingency(labels[part], owner[part], clusters, most)
        parts.append(_ari_of_categories(table, twins[part]))
    return torch.cat(parts)


def twins_of(categories: Sequence[np.ndarray]) -> np.ndarray:
    """bool [n, M, G]: whether an instance of an image is of its g-th category that has two instances or more.

    `categories` has an array [m] for each of n images: the category of each of its instances. M is the largest m and G
    the largest number of such categories; where an image has fewer, the rest is False.
    """
    groups = [[c == value for value in np.unique(c) if (c == value).sum() > 1] for c in categories]
    most = max((len(c) for c in categories), default=0)
    which = np.zeros((len(categories), most, max((len(g) for g in groups), default=0)), bool)
    for image, of_image in enumerate(groups):
        for place, members in enumerate(of_image):
            which[image, : len(members), place] = members
    return which


def _contingency(labels: Tensor, owner: Tensor, clusters: int, most: int) -> Tensor:
    """float64 [n, H, K, M]: patches by cluster and instance; a patch that lacks either is not counted."""
    n, heads, patches = labels.shape
    owners = owner[:, None].expand(n, heads, patches)
    code = labels.long() * most + owners
    code = torch.where((labels >= 0) & (owners >= 0), code, clusters * most)
    table = torch.zeros(n, heads, clusters * most + 1, dtype=torch.float64, device=labels.device)
    table.scatter_add_(2, code, torch.ones_like(code, dtype=torch.float64))
    return table[..., :-1].view(n, heads, clusters, most)


def _ari_of_categories(table: Tensor, which: Tensor) -> Tensor:
    """float32 [n, H]: the mean over categories of `agreement.ari` of their columns of the tables [n, H, K, M]."""
    of_category = table @ which[:, None]  # [n, H, K, G]
    total = of_category.sum(2)
    both = (table.square().sum(2, keepdim=True) @ which[:, None])[:, :, 0]
    one_cluster = of_category.square().sum(2)
    one_group = (table.sum(2, keepdim=True).square() @ which[:, None])[:, :, 0]
    together, split, joined = both - total, one_group - both, one_cluster - both
    apart = total * total - split - joined - both
    below = (together + split) * (split + apart) + (together + joined) * (joined + apart)
    above = 2 * (together * apart - split * joined)
    index = torch.where((split == 0) & (joined == 0), 1.0, above / below.where(below > 0, torch.ones_like(below)))
    index = torch.where(total > 0, index, torch.nan)
    is_one = (which.sum(1) > 0)[:, None]  # an image has fewer categories than the widest of the batch
    number = is_one.sum(-1)
    return torch.where(number > 0, index.where(is_one, 0).sum(-1) / number.clamp_min(1), torch.nan).float()

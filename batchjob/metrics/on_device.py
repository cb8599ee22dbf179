"""Scores that need the attention itself, computed on the device while labelling: nothing P × P leaves it.

`rows` [B, H, P, P] is attention from query to key, each row summing to 1 (`attention.renormalise`). `keep` [B, P] is
False for patches of padding. The specification is `metrics.attention` and `metrics.clusters`, in NumPy; the tests hold
the two together.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from batchjob.metrics import catalogue
from batchjob.metrics.attention import PatchPairs, patch_distances

ATTENTION_SCORES = catalogue.labelling_arrays()["attention"]
PAIR_NAMES = ("pair_auc", "pair_auc_matched", "pair_auc.distance")
_ELEMENTS_AT_ONCE = 1 << 26  # of one temporary copy of the rows: 256 MB


def attention_scores(rows: Tensor, grid: tuple[int, int], keep: Tensor | None = None) -> dict[str, Tensor]:
    """`ATTENTION_SCORES`; see `attention.attention_scores`. Reads the rows four times.

    Parameters
    ----------
    rows
        [B, H, P, P] attention.
    grid
        (rows, columns) of the P patches.
    keep
        bool [B, P], False for patches of padding.

    Returns
    -------
    score -> float32 [B, H].
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
    weight = inside / count  # of each query, [B, P]
    distances = torch.as_tensor(patch_distances(grid), dtype=torch.float32, device=rows.device)
    by_pair = weight[:, :, None] * distances
    distance = torch.bmm(rows.reshape(images, heads, -1), by_pair.reshape(images, -1, 1))[..., 0]
    uniform = (by_pair * inside[:, None, :]).sum(dim=(1, 2)) / count[:, 0]
    entropy = (torch.special.entr(rows).sum(dim=-1) * weight[:, None, :]).sum(dim=-1)  # type: ignore[no-untyped-call, unused-ignore]
    key = torch.matmul(weight[:, None, None, :], rows)[:, :, 0, :]
    key_entropy = torch.special.entr(key).sum(dim=-1)  # type: ignore[no-untyped-call, unused-ignore]
    norm = (count.log() * key_entropy).sqrt()
    return {
        "attention_distance": distance,
        "attention_distance_relative": distance / uniform.where(uniform > 0, torch.ones_like(uniform))[:, None],
        "entropy": entropy,
        "effective_patches": entropy.exp(),
        "query_key_nmi": torch.where(norm > 1e-6, (key_entropy - entropy).clamp_min(0) / norm.clamp_min(1e-6), 0.0),
        "sink": key.amax(dim=-1),
    }


def pair_scores(
    rows: Tensor, pairs: Sequence[PatchPairs], grid: tuple[int, int], image: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """`pair_auc`, `pair_auc_matched` and `pair_auc.distance`, float32 [n, H] each; NaN where there are no pairs.

    Parameters
    ----------
    rows
        [B, H, P, P] attention.
    pairs
        n drawings of pairs of patches.
    grid
        (rows, columns) of the P patches.
    image
        Which of the B images each drawing is scored on; by default the i-th on the i-th. The `swap` null scores many
        photos' pairs on one image.

    Notes
    -----
    Bit for bit the same whatever else is in the batch: ranks are sums of halves, exact in float64 in any order.
    """
    device, heads = rows.device, rows.shape[1]
    if not any(len(p.group) for p in pairs):
        return {n: torch.full((len(pairs), heads), torch.nan, device=device) for n in PAIR_NAMES}
    flat = _flatten(pairs, grid)
    of_image = np.arange(len(pairs)) if image is None else np.asarray(image)
    at = torch.as_tensor(of_image[flat["drawing"]], device=device)
    first, second = (torch.as_tensor(flat[name], device=device) for name in ("first", "second"))
    strength = (rows[at, :, first, second].float() + rows[at, :, second, first].float()).T  # [H, N]
    # the last row is the distance null; what is sorted must not be negative
    nearness = torch.as_tensor(flat["distance"].max() - flat["distance"], dtype=torch.float32, device=device)
    values = torch.cat([strength, nearness[None, :]])
    owner = flat["drawing"][np.unique(flat["group"], return_index=True)[1]]  # of each category, over all drawings
    auc = _mean_by(_group_auc(values, flat["same"], flat["group"]), np.ones(len(owner), bool), owner, len(pairs))
    matched = _mean_by(*_binned_auc(strength, flat, np.rint(flat["distance"] ** 2)), owner, len(pairs))
    found = dict(zip(PAIR_NAMES, (auc[:-1], matched, auc[-1:]), strict=True))
    return {n: v.T.float().expand(len(pairs), heads).contiguous() for n, v in found.items()}


def _flatten(pairs: Sequence[PatchPairs], grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """All drawings end to end; `group` counts categories over all of them."""
    sizes = [int(p.group.max()) + 1 if len(p.group) else 0 for p in pairs]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    first, second, same = (np.concatenate([getattr(p, n) for p in pairs]) for n in ("first", "second", "same"))
    return {
        "drawing": np.repeat(np.arange(len(pairs)), [len(p.group) for p in pairs]),
        "first": first,
        "second": second,
        "same": same,
        "group": np.concatenate([p.group + offset for p, offset in zip(pairs, offsets, strict=False)]),
        "distance": patch_distances(grid)[first, second],
    }


def _binned_auc(values: Tensor, flat: dict[str, np.ndarray], bins: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """[C, G] weighted by min(#same, #different) over the bins of each category; and which categories have a bin [G]."""
    width = int(bins.max()) + 1
    used, dense = np.unique(flat["group"] * width + bins.astype(np.int64), return_inverse=True)
    owner = used // width
    ones = np.bincount(dense, flat["same"])
    weight = np.minimum(ones, np.bincount(dense) - ones)
    total = np.bincount(owner, weight)
    share = torch.as_tensor(weight / np.maximum(total, 1)[owner], device=values.device)
    in_bins = torch.nan_to_num(_group_auc(values, flat["same"], dense))
    return _sum_by(in_bins * share, owner, len(total)), total > 0


def _mean_by(values: Tensor, use: np.ndarray, owner: np.ndarray, count: int) -> Tensor:
    """[C, count]: mean over each drawing's categories [C, G] that count; NaN for a drawing without."""
    number = np.bincount(owner[use], minlength=count)
    scale = torch.as_tensor(np.where(number > 0, 1 / np.maximum(number, 1), np.nan), device=values.device)
    return _sum_by(values * torch.as_tensor(use, device=values.device), owner, count) * scale


def _group_auc(values: Tensor, positive: np.ndarray, group: np.ndarray) -> Tensor:
    """float64 [C, G]: AUC of values [C, N] ≥ 0 within each of the groups 0 to G − 1, ties as ½; NaN where undefined.

    One integer sort of (group, value): the bits of floats that are not negative order as the floats do.
    """
    device = values.device
    groups = torch.as_tensor(group, device=device)
    size = np.bincount(group)
    ones = np.bincount(group, positive)
    keys = (groups << 32) | values.float().contiguous().view(torch.int32).to(torch.int64)
    ordered, order = torch.sort(keys, dim=1)
    places = torch.arange(keys.shape[1], device=device).expand_as(keys)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.where(new, places, 0).cummax(dim=1).values
    ends = torch.ones_like(new)
    ends[:, :-1] = new[:, 1:]
    last = torch.where(ends, places, keys.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    hits = torch.as_tensor(positive, device=device)[order]
    sums = torch.where(hits, (first + last).to(torch.float64) / 2, 0.0).cumsum(dim=1)
    stops = np.cumsum(size)
    sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], dim=1)[:, np.concatenate([[0], stops])].diff(dim=1)
    above = sums - torch.as_tensor(ones * (stops - size) + ones * (ones - 1) / 2, device=device)
    both = ones * (size - ones)
    return above / torch.as_tensor(np.where(both > 0, both, np.nan), device=device)


def _sum_by(values: Tensor, owner: np.ndarray, count: int) -> Tensor:
    """[C, count]: columns of values [C, n] summed by owner (ascending), one owner's never mixed with another's."""
    result = torch.zeros(values.shape[0], count, dtype=values.dtype, device=values.device)
    starts = np.searchsorted(owner, np.arange(count + 1))
    width = int(np.diff(starts).max())
    for step in range(width):  # the i-th of every owner at once; an owner has few
        owners = np.flatnonzero(np.diff(starts) > step)
        result[:, owners] += values[:, starts[owners] + step]
    return result


def instance_ari(labels: Tensor, owner: np.ndarray, categories: Sequence[np.ndarray]) -> Tensor:
    """`instance_ari` of clusters, float32 [n, H]; NaN where no category has two instances. See `clusters`.

    Parameters
    ----------
    labels
        Integer [n, H, P] of H heads; negative ones are left out.
    owner
        int16 [n, P]: the instance of each patch, −1 for none.
    categories
        n arrays: the category of each instance.

    Notes
    -----
    Bit for bit the same whatever else is in the batch: counts are whole numbers, exact in float64 in any order.
    """
    which = _twins(categories)  # [n, M, G]
    n, heads, _ = labels.shape
    if not which.any():
        return torch.full((n, heads), torch.nan, device=labels.device)
    most, clusters = which.shape[1], int(labels.max()) + 1
    size = max(1, _ELEMENTS_AT_ONCE // (2 * heads * max(clusters, 1) * (most + which.shape[2] + 1)))
    parts = []
    for start in range(0, n, size):
        part = slice(start, start + size)
        chosen = torch.as_tensor(which[part], dtype=torch.float64, device=labels.device)
        of_patch = torch.as_tensor(owner[part].astype(np.int64), device=labels.device)
        table = _contingency(labels[part], of_patch, clusters, most)
        parts.append(_ari_of_categories(table, chosen))
    return torch.cat(parts)


def _twins(categories: Sequence[np.ndarray]) -> np.ndarray:
    """bool [n, M, G]: which of an image's up to M instances are of its g-th category with two instances or more."""
    groups = [[c == value for value in np.unique(c) if (c == value).sum() > 1] for c in categories]
    most = max((len(c) for c in categories), default=0)
    which = np.zeros((len(categories), most, max((len(g) for g in groups), default=0)), bool)
    for image, of_image in enumerate(groups):
        for place, members in enumerate(of_image):
            which[image, : len(members), place] = members
    return which


def _contingency(labels: Tensor, owner: Tensor, clusters: int, most: int) -> Tensor:
    """float64 [n, H, K, M]: patches by cluster and instance; those without either are not counted."""
    n, heads, patches = labels.shape
    owners = owner[:, None].expand(n, heads, patches)
    code = labels.long() * most + owners
    code = torch.where((labels >= 0) & (owners >= 0), code, clusters * most)
    table = torch.zeros(n, heads, clusters * most + 1, dtype=torch.float64, device=labels.device)
    table.scatter_add_(2, code, torch.ones_like(code, dtype=torch.float64))
    return table[..., :-1].view(n, heads, clusters, most)


def _ari_of_categories(table: Tensor, which: Tensor) -> Tensor:
    """float32 [n, H]: the index over each category's part of tables [n, H, K, M], its mean; see `agreement.ari`."""
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

"""Lloyd's algorithm from clusters that are given rather than drawn: compiled on a CPU, in torch on other devices."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchjob.clustering.gram import centred_gram

_STEPS_AT_ONCE = 4  # before finished problems are put aside
GPU_STEPS = 40  # a fixed point was reached after 6 to 36


def settle(x: Tensor, starts: Tensor) -> Tensor:
    """Carries given clusterings of each problem's rows to fixed points of Lloyd's algorithm.

    Every row goes to the nearest mean; of equally near means (to 1e-6 of the longest row's square), to that of the
    lowest cluster number. A cluster that has lost all its rows stays empty.

    Parameters
    ----------
    x
        float [B, H, P, D]: P rows of each of B · H problems. Euclidean distances between rows count.
    starts
        int16 [B, S, P] on the CPU: S clusterings, the same for the H problems of an image. A row with −1 takes no part
        in any of them. An image with fewer than S clusterings has −1 throughout in the others, which stay as they are;
        its first one is never such.

    Returns
    -------
    int16 [B, H, S, P] on the device of `x`, with the numbers of `starts`. The labels of a problem that holds NaN mean
    nothing. On a GPU every clustering makes `GPU_STEPS` steps, so that nobody waits to learn whether it has ended.
    """
    if x.device.type == "cpu":
        return torch.from_numpy(_settle_compiled(x.float().numpy(), starts.numpy()))
    return _settle_in_torch(x, starts)


def _settle_compiled(x: NDArray[np.float32], starts: NDArray[np.int16]) -> NDArray[np.int16]:
    from batchjob.clustering import centred, steps  # numba takes a moment to import

    images, heads, _, depth = x.shape
    found = np.repeat(starts[:, None], heads, axis=1)

    def solve(problem: int) -> None:
        image, head = divmod(problem, heads)
        keep = np.flatnonzero(starts[image, 0] >= 0)
        packed = np.empty(-(-len(keep) // centred.LANES) * centred.LANES * depth, np.float32)
        factor = centred.centre(x[image, head], keep, packed)
        if np.isnan(factor):
            return
        gram = np.zeros((len(keep), len(keep)), np.float32)
        if factor:
            centred.multiply(packed, depth, gram)
        labels = starts[image][:, keep].astype(np.int32)
        steps.settle(gram, labels)
        found[image, head][:, keep] = labels

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # the compiled code lets go of the lock
        list(pool.map(solve, range(images * heads)))
    return found


def _settle_in_torch(x: Tensor, starts: Tensor, *, budget_bytes: int = 1 << 29) -> Tensor:
    """`settle` in torch, on any device.

    Beside the rows and the labels it takes `budget_bytes` of memory, or what one image needs if that is more.
    """
    images, heads, patches, _ = x.shape
    found = torch.full((images, heads, *starts.shape[1:]), -1, dtype=torch.int16, device=x.device)
    clusters = starts.flatten(1).amax(1) + 1 if images else torch.zeros(0)
    order = clusters.argsort(descending=True)  # images of a part share the first one's number
    first = 0
    while first < images:
        one = 4 * heads * patches * (2 * patches + 4 * starts.shape[1] * int(clusters[order[first]]))
        part = order[first : first + max(1, budget_bytes // one)]
        of_part = _send(part, x)
        found[of_part] = _settle_part(x[of_part], _send(starts[part], x), int(clusters[order[first]]))
        first += len(part)
    return found


def _send(values: Tensor, like: Tensor) -> Tensor:
    """The host's tensor on the device of `like`; a GPU copies it in the background."""
    return values.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else values.to(like.device)


def _settle_part(x: Tensor, starts: Tensor, clusters: int) -> Tensor:
    from batchjob.clustering.steps import EQUALLY_NEAR, MAX_STEPS

    images, heads, patches, _ = x.shape
    keep = (starts >= 0).any(1).repeat_interleave(heads, 0)  # [N, P]
    gram = x.new_empty(images * heads, patches, patches, dtype=torch.float32)
    centred_gram(x.flatten(0, 1).float(), keep, gram)
    labels = starts.long().repeat_interleave(heads, 0)  # [N, S, P]
    noise = EQUALLY_NEAR * torch.diagonal(gram, dim1=1, dim2=2).amax(1)
    if x.is_cuda:
        for _ in range(GPU_STEPS if clusters else 0):
            labels = _step(gram, labels, clusters, noise)
        return labels.view(images, heads, *starts.shape[1:]).to(torch.int16)
    found, going = labels.clone(), torch.arange(len(labels), device=x.device)
    for _ in range(0, MAX_STEPS if clusters else 0, _STEPS_AT_ONCE):
        for _ in range(_STEPS_AT_ONCE):
            before, labels = labels, _step(gram, labels, clusters, noise)
        found[going] = labels
        moving = (before != labels).any(2).any(1).nonzero()[:, 0]
        if not len(moving):
            break
        gram, labels, noise, going = gram[moving], labels[moving], noise[moving], going[moving]
    return found.view(images, heads, *starts.shape[1:]).to(torch.int16)


def _step(gram: Tensor, labels: Tensor, clusters: int, noise: Tensor) -> Tensor:
    n, starts, patches = labels.shape
    numbers = torch.arange(clusters, device=labels.device)
    ones = (labels[:, :, None] == numbers[:, None]).to(gram.dtype)  # [N, S, K, P]
    sums = torch.bmm(ones.view(n, -1, patches), gram).view(n, starts, clusters, patches)
    size = ones.sum(-1, keepdim=True)
    norm = (ones * sums).sum(-1, keepdim=True)
    away = norm / size.square().clamp_min(1) - 2 * sums / size.clamp_min(1)
    away = away.masked_fill(size == 0, torch.inf)
    is_near = away <= away.amin(2, keepdim=True) + noise[:, None, None, None]
    return torch.where(labels >= 0, is_near.to(torch.uint8).argmax(2), labels)  # the first of those that are near

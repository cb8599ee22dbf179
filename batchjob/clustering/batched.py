"""k-means of thousands of small problems at once, in torch, on any device.

Labels and inertia need no centroids, only the Gram matrix G = X Xᵀ of the centred rows: one product a problem, shared
by all its restarts. Every product and every sum has a fixed shape (a tile of problems of equal P, k and restarts), and
every problem draws from its own counter: its labels are the same bits whatever else is in the batch, wherever it
stands there.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from batchjob.clustering import gram, lloyd
from batchjob.clustering.base import Clusters, check_finite, check_shapes, number_by_appearance
from batchjob.codes import NO_LABEL

BUDGET_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}  # of working memory
TILE = {"cpu": 16, "cuda": 512}  # a GPU waits for launches: few large tiles; a CPU for memory: small ones
MAX_ROWS = 16384  # a Gram matrix of 1 GiB
AUTO_STARTS = 16  # restarts have no swaps: about 1 % above the best known
SAME = 1e-6  # two inertias that are relatively this close are of one optimum
CANCELLED = 1e-3  # an inertia below this share of the total has lost digits to it


class Workspace:
    """Memory kept from call to call: on a CPU, fresh pages for the Gram matrices cost as much as the products."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the device of `like`, valid until the next one of this name is taken."""
        count = math.prod(shape)
        kept = self._kept.get((name, dtype))
        if kept is None or len(kept) < count or kept.device != like.device:
            self._kept[name, dtype] = kept = torch.empty(count, dtype=dtype, device=like.device)
        return kept[:count].view(shape)


@dataclass(frozen=True, slots=True)
class Problems:
    """What the engine was given, and where the answers go."""

    x: Tensor
    seeds: Tensor
    n_init: int
    mask: Tensor | None
    labels: Tensor  # uint8 [N, P]
    inertia: Tensor  # float32 [N]
    settled: Tensor  # bool [N]

    def rows(self, part: Tensor) -> Tensor:
        """x of the problems `part`, a view where they stand side by side."""
        if part.is_cuda:
            return self.x[part]
        first, last = int(part[0]), int(part[-1])
        if last - first + 1 == len(part) and bool((part.diff() == 1).all()):
            return self.x[first : last + 1]
        return self.x[part]


class BatchedEngine:
    """Batched k-means in torch; the default on a GPU."""

    name = "batched"

    def __init__(self, device: torch.device, *, budget_bytes: int = 0) -> None:
        self._budget_bytes = budget_bytes or BUDGET_BYTES[device.type]
        self._tile = TILE[device.type]
        self._space = Workspace()

    def kmeans(
        self, x: Tensor, k: Tensor, seeds: Tensor, *, n_init: int, mask: Tensor | None = None, checks: bool = True
    ) -> Clusters:
        """See `Engine.kmeans`. Beside the results it holds about `budget_bytes`, or one problem's if that is more.

        Raises ValueError for more than MAX_ROWS rows a problem: the engine is for small problems.
        """
        check_shapes(x, k, seeds, mask)
        n, p, _ = x.shape
        if p > MAX_ROWS:
            raise ValueError(f"{p} rows a problem; the batched engine takes up to {MAX_ROWS}: use sklearn or cuml")
        labels = torch.full((n, p), NO_LABEL, dtype=torch.uint8, device=x.device)
        problems = Problems(
            x,
            seeds.to(x.device),
            n_init or AUTO_STARTS,
            mask,
            labels,
            torch.zeros(n, device=x.device),
            torch.zeros(n, dtype=torch.bool, device=x.device),
        )
        k = k.cpu().long()
        k = k.clamp_max(p) if mask is None else torch.minimum(k, mask.sum(1).cpu())
        again = self._solve_all(problems, k, torch.arange(n)[k > 0], torch.float32)
        if len(again):
            k[again] = torch.minimum(k[again], _distinct_rows(problems, again))
            self._solve_all(problems, k, again, torch.float64)
        numbered, found = number_by_appearance(labels, NO_LABEL - 1)
        return Clusters(numbered, problems.inertia, found, problems.settled)

    def _solve_all(self, problems: Problems, k: Tensor, which: Tensor, dtype: torch.dtype) -> Tensor:
        """int64 [A]: problems that fp32 can't tell well (rows that are nearly equal), after answering for all."""
        again = []
        for wanted in sorted(set(k[which].tolist())):
            tile, tiles = self._shape(problems, wanted, dtype)
            of_k = which[k[which] == wanted]
            for start in range(0, len(of_k), tile * tiles):
                part = of_k[start : start + tile * tiles]
                doubtful = self._solve(problems, wanted, part.to(problems.x.device), tile, dtype)
                again += part[doubtful.cpu()].tolist()
        return torch.tensor(again, dtype=torch.int64)

    def _shape(self, problems: Problems, k: int, dtype: torch.dtype) -> tuple[int, int]:
        """(problems a tile, tiles at once) within the budget: from the shape of one problem alone."""
        _, p, d = problems.x.shape
        kept = p * p + k * problems.n_init * p  # G and memberships
        passing = 2 * p * d + 2 * k * problems.n_init * p + 12 * problems.n_init * p * (2 + k.bit_length())
        tile = max(1, min(self._tile, self._budget_bytes // (dtype.itemsize * (kept + passing))))
        tiles = (self._budget_bytes // dtype.itemsize - tile * passing) // (kept * tile)
        return tile, max(1, tiles)

    def _solve(self, problems: Problems, k: int, part: Tensor, tile: int, dtype: torch.dtype) -> Tensor:
        """bool [len(part)]: answers of which fp32's rounding leaves doubt, after writing all; `part` are indices."""
        m, (_, p, d) = -(-len(part) // tile) * tile, problems.x.shape
        device, r, space = part.device, problems.n_init, self._space
        padded = torch.cat([part, part[-1:].expand(m - len(part))])  # the last tile is filled with its last problem
        mask = None if problems.mask is None else problems.mask[padded]
        tiles = lloyd.Tiles(
            gram=space.take("gram", (m, p, p), part, dtype),
            square=torch.empty(m, 1, p, dtype=dtype, device=device),
            member=None if mask is None else mask.to(dtype)[:, None, None],
            ones=space.take("ones", (m, k, r, p), part, dtype),
            cost=torch.empty(m, r, dtype=dtype, device=device),
            same=torch.zeros(m, dtype=torch.bool, device=device),
            order=torch.arange(m, device=device),
            tile=tile,
        )
        factor = torch.empty(m, dtype=dtype, device=device)
        starved = torch.empty(m, dtype=torch.bool, device=device)
        for start in range(0, m, tile):
            at = slice(start, start + tile)
            inside = None if mask is None else mask[at]
            scratch = space.take("rows", (tile, p, d), part, dtype)
            factor[at] = gram.centred_gram(problems.rows(padded[at]), inside, tiles.gram[at], scratch)
            tiles.square[at, 0] = torch.diagonal(tiles.gram[at], dim1=1, dim2=2)
            member = None if tiles.member is None else tiles.member[at, 0, 0]
            centres, starved[at] = gram.plus_plus(tiles.gram[at], member, k, problems.seeds[padded[at]], r)
            lloyd.assign_to_rows(tiles, at, centres)
        total = tiles.square.sum((1, 2))
        if not bool(total.isfinite().all()):
            check_finite(problems.x, problems.mask)
        lloyd.run(tiles)
        ones, cost = lloyd.best_restart(tiles)
        numbers = torch.arange(k, dtype=dtype, device=device) @ ones
        back = tiles.order.argsort()[: len(part)]
        problems.settled[part] = ((tiles.cost <= cost[:, None] * (1 + SAME)).sum(1) > 1)[back]
        labels, cost = numbers.to(torch.uint8)[back], cost[back]
        problems.labels[part] = labels if problems.mask is None else torch.where(problems.mask[part], labels, NO_LABEL)
        problems.inertia[part] = (cost / factor[: len(part)].square()).float()
        return starved[: len(part)] | (cost < CANCELLED * total[: len(part)])


def _distinct_rows(problems: Problems, which: Tensor) -> Tensor:
    """int64 [len(which)]: how many different rows each of these problems has."""
    counts = []
    for i in which.tolist():
        rows = problems.x[i] if problems.mask is None else problems.x[i, problems.mask[i]]
        counts.append(len(torch.unique(rows, dim=0)))
    return torch.tensor(counts)

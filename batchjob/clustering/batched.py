"""k-means of thousands of small problems at once, in torch, on any device.

Labels and inertia need no centroids, only the Gram matrix G = X Xᵀ of the centred rows. It is one product for each
problem, and all restarts share it. A problem's labels are the same bits in any batch and at any place in it, for two
reasons: every product and every sum has a fixed shape (a tile of problems of equal P, k and restarts), and every
problem draws random numbers of its own.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from batchjob.clustering import gram, lloyd
from batchjob.clustering.base import Clusters, check_finite, number_by_appearance
from batchjob.clustering.search import check_shapes
from batchjob.codes import NO_LABEL

BUDGET_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}  # of working memory
TILE = {"cpu": 16, "cuda": 512}  # problems: large tiles keep a GPU busy, small ones stay in a CPU's cache
MAX_ROWS = 16384  # of a problem: a Gram matrix of 1 GiB
AUTO_STARTS = 16  # without exchanges of centres they end about 1 % above the best known inertia
SAME = 1e-6  # inertias with a smaller relative difference belong to one optimum
CANCELLED = 1e-3  # an inertia below this share of the total has lost its digits in float32


class _Workspace:
    """Memory kept from call to call: on a CPU, new pages for the Gram matrices cost as much time as the products."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the device of `like`, valid until the next one of the same name is taken."""
        count = math.prod(shape)
        kept = self._kept.get((name, dtype))
        if kept is None or len(kept) < count or kept.device != like.device:
            self._kept[name, dtype] = kept = torch.empty(count, dtype=dtype, device=like.device)
        return kept[:count].view(shape)


@dataclass(frozen=True, slots=True)
class _Problems:
    """What the engine was given, and where the answers go."""

    x: Tensor  # float [N, P, D]
    seeds: Tensor  # int64 [N]
    n_init: int
    mask: Tensor | None  # bool [N, P]
    labels: Tensor  # uint8 [N, P]
    inertia: Tensor  # float32 [N]
    settled: Tensor  # bool [N]

    def rows(self, part: Tensor) -> Tensor:
        """The rows of the problems with the numbers `part`: on a CPU a view, where they are next to each other."""
        if part.is_cuda:
            return self.x[part]
        first, last = int(part[0]), int(part[-1])
        if last - first + 1 == len(part) and bool((part.diff() == 1).all()):
            return self.x[first : last + 1]
        return self.x[part]


class BatchedEngine:
    """Batched k-means in torch, on any device."""

    name = "batched"

    def __init__(self, device: torch.device, *, budget_bytes: int = 0) -> None:
        self._budget_bytes = budget_bytes or BUDGET_BYTES[device.type]
        self._tile = TILE[device.type]
        self._space = _Workspace()

    def kmeans(
        self, x: Tensor, k: Tensor, seeds: Tensor, *, n_init: int, mask: Tensor | None = None, checks: bool = True
    ) -> Clusters:
        """Clusters many problems at once.

        Beside the results it takes about `budget_bytes` of memory, or what one problem needs if that is more.

        Parameters
        ----------
        x, k, seeds, n_init, mask, checks
            As in `Engine.kmeans`; it always checks.

        Returns
        -------
        The clusters.

        Raises
        ------
        NotFiniteError, ValueError
            As `Engine.kmeans`; also ValueError for more than `MAX_ROWS` rows a problem.
        """
        check_shapes(x, k, seeds, mask)
        n, p, _ = x.shape
        if p > MAX_ROWS:
            raise ValueError(f"{p} rows a problem; the batched engine takes up to {MAX_ROWS}: use sklearn or cuml")
        labels = torch.full((n, p), NO_LABEL, dtype=torch.uint8, device=x.device)
        problems = _Problems(
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

    def _solve_all(self, problems: _Problems, k: Tensor, which: Tensor, dtype: torch.dtype) -> Tensor:
        """Writes the answers of all problems `which`; int64 [A]: those of which float32's rounding leaves doubt."""
        again = []
        for wanted in sorted(set(k[which].tolist())):
            tile, tiles = self._shape(problems, wanted, dtype)
            of_k = which[k[which] == wanted]
            for start in range(0, len(of_k), tile * tiles):
                part = of_k[start : start + tile * tiles]
                doubtful = self._solve(problems, wanted, part.to(problems.x.device), tile, dtype)
                again += part[doubtful.cpu()].tolist()
        return torch.tensor(again, dtype=torch.int64)

    def _shape(self, problems: _Problems, k: int, dtype: torch.dtype) -> tuple[int, int]:
        """(problems in a tile, tiles at once) within the budget; they depend on the shape of one problem alone."""
        _, p, d = problems.x.shape
        kept = p * p + k * problems.n_init * p  # G and memberships
        passing = 2 * p * d + 2 * k * problems.n_init * p + 12 * problems.n_init * p * (2 + k.bit_length())
        tile = max(1, min(self._tile, self._budget_bytes // (dtype.itemsize * (kept + passing))))
        tiles = (self._budget_bytes // dtype.itemsize - tile * passing) // (kept * tile)
        return tile, max(1, tiles)

    def _solve(self, problems: _Problems, k: int, part: Tensor, tile: int, dtype: torch.dtype) -> Tensor:
        """Writes the answers of the problems `part`; bool [len(part)]: whether float32's rounding leaves doubt."""
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


def _distinct_rows(problems: _Problems, which: Tensor) -> Tensor:
    """int64 [len(which)]: how many distinct rows each of these problems has."""
    counts = []
    for i in which.tolist():
        rows = problems.x[i] if problems.mask is None else problems.x[i, problems.mask[i]]
        counts.append(len(torch.unique(rows, dim=0)))
    return torch.tensor(counts)

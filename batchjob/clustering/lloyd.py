"""Lloyd's algorithm on Gram matrices, without centroids, for a tile of problems and all their restarts at once.

Let W [K, P] be the memberships in clusters divided by the sizes of the clusters. Then W G holds the products of rows
with cluster means. A squared distance is ⟨mean, mean⟩ − 2 ⟨row, mean⟩ + ⟨row, row⟩, and no comparison of means needs
the last term. Memberships stay 0/1 floats from step to step: labels as integers or bools would take several times as
long on a CPU. Letters: M problems in tiles of T, P rows, K clusters, R restarts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from batchjob.clustering.gram import plus_plus

MAX_STEPS = 300  # as in scikit-learn; a fixed point was reached after 6 to 40


@dataclass(slots=True)
class Tiles:
    """M problems, a multiple of `tile`, in the order in which they are worked on."""

    gram: Tensor  # [M, P, P]
    square: Tensor  # [M, 1, P]: the diagonal of `gram`
    member: Tensor | None  # [M, 1, 1, P]: 1, or 0 for rows that take no part; None: all take part
    ones: Tensor  # [M, K, R, P]: 1 where the row is in the cluster, else 0
    cost: Tensor  # [M, R]: sum of squared distances to the own mean
    same: Tensor  # bool [M]: whether the last step changed nothing
    order: Tensor  # int64 [M]: the number of the problem at this place
    tile: int

    def _swap(self, a: Tensor, b: Tensor) -> None:
        """Exchanges finished problems at `a` with others at `b`; the finished ones lose their Gram matrices."""
        self.gram[a] = self.gram[b]
        for field in (self.square, self.member, self.ones, self.cost, self.same, self.order):
            if field is not None:
                field[a], field[b] = field[b], field[a]


def assign_to_rows(tiles: Tiles, part: slice, centres: Tensor) -> None:
    """Puts every row of a tile into the cluster of the nearest centre.

    Parameters
    ----------
    tiles
        The problems; `ones` of the tile is written.
    part
        The places of the tile's T problems.
    centres
        int64 [T, K, R]: the numbers of the rows that are centres.
    """
    gram, t, p = tiles.gram[part], tiles.tile, tiles.gram.shape[1]
    offset = (torch.arange(t, device=gram.device) * p)[:, None, None]
    rows = gram.view(t * p, p).index_select(0, (centres + offset).view(-1)).view(*centres.shape, p)
    norm = tiles.square[part][:, 0].gather(1, centres.view(t, -1)).view(*centres.shape, 1)
    distance = torch.sub(norm, rows, alpha=2, out=rows)
    _nearest(distance, tiles.member[part] if tiles.member is not None else None, tiles.ones[part])


def run(tiles: Tiles) -> None:
    """Carries the memberships and costs of all problems to fixed points; problems change places (`order`).

    A tile makes several steps at a visit: its Gram matrices are then in the cache, and a GPU is asked only between
    visits which problems have ended. Another step does not change a finished problem. After a visit unfinished problems
    move to the front, so that whole tiles drop out.
    """
    scratch = torch.empty_like(tiles.ones[: tiles.tile]), torch.empty_like(tiles.ones[: tiles.tile])
    active, on_gpu = len(tiles.order), tiles.gram.is_cuda
    steps = 4 if on_gpu else 8
    for _ in range(-(-MAX_STEPS // steps)):
        for start in range(0, active, tiles.tile):
            part = slice(start, start + tiles.tile)
            for _ in range(steps):
                _step(tiles, part, scratch)
                if not on_gpu and bool(tiles.same[part].all()):
                    break
        active = _compact(tiles, active)
        if not active:
            return


def solve_tile(
    gram: Tensor, member: Tensor | None, k: int, seeds: Tensor, n_init: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters the problems of one tile, whose Gram matrices are at hand.

    Parameters
    ----------
    gram
        float [T, P, P]; it stays as it is.
    member, k, seeds, n_init
        As in `gram.plus_plus`.

    Returns
    -------
    (0/1 float [T, K, P], float [T], bool [T]): the clusters and the inertia of each problem's best restart, and whether
    a start ran out of rows. Inertia is in the unit of `gram`.
    """
    t, p, _ = gram.shape
    tiles = Tiles(
        gram=gram,
        square=torch.diagonal(gram, dim1=1, dim2=2)[:, None].contiguous(),
        member=None if member is None else member[:, None, None],
        ones=gram.new_empty(t, k, n_init, p),
        cost=gram.new_empty(t, n_init),
        same=torch.zeros(t, dtype=torch.bool, device=gram.device),
        order=torch.arange(t, device=gram.device),
        tile=t,
    )
    centres, starved = plus_plus(gram, member, k, seeds, n_init)
    assign_to_rows(tiles, slice(0, t), centres)
    run(tiles)
    ones, cost = best_restart(tiles)
    return ones, cost, starved


def best_restart(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """(0/1 float [M, K, P], float [M]): memberships and cost of the cheapest restart of the problem at each place."""
    best = tiles.cost.argmin(1)  # the first of equals, on every device
    at = torch.arange(len(best), device=best.device)
    return tiles.ones[at, :, best], tiles.cost[at, best].clamp_min(0)


def _compact(tiles: Tiles, active: int) -> int:
    """Moves the unfinished of the first `active` problems to the front; how many places, in whole tiles, they take."""
    going = (~tiles.same[:active]).nonzero()[:, 0]
    needed = -(-len(going) // tiles.tile) * tiles.tile
    if 0 < needed < active:
        movers = going[going >= needed]
        holes = tiles.same[:needed].nonzero()[: len(movers), 0]
        tiles._swap(holes, movers)
    return needed


def _step(tiles: Tiles, part: slice, scratch: tuple[Tensor, Tensor]) -> None:
    distance, new = scratch
    gram, ones = tiles.gram[part], tiles.ones[part]
    member = None if tiles.member is None else tiles.member[part]
    t, k, r, p = ones.shape
    size = ones.sum(-1, keepdim=True)  # [T, K, R, 1]
    torch.bmm(ones.view(t, k * r, p), gram, out=distance.view(t, k * r, p))
    shrink = size.clamp_min(1).reciprocal()
    norm = (ones * distance).sum(-1, keepdim=True) * shrink.square()
    torch.addcmul(norm, distance, shrink, value=-2, out=distance)
    if gram.is_cuda or bool((size == 0).any()):
        _place_empty(distance, gram, tiles.square[part], ones, size, member)
    nearest = _nearest(distance, member, new)
    tiles.cost[part] = (
        nearest + tiles.square[part] if member is None else (nearest + tiles.square[part]) * member[:, 0]
    ).sum(-1)
    total = float(r * p) if member is None else member.sum((1, 2, 3)) * r
    tiles.same[part] = (new * ones).sum((1, 2, 3)) == total  # whole numbers: exact
    ones.copy_(new)


def _nearest(distance: Tensor, member: Tensor | None, out: Tensor) -> Tensor:
    """[T, R, P]: the least of the distances [T, K, R, P]; `out` becomes 1 for the first such cluster, else 0."""
    least = distance.amin(1)
    torch.eq(distance, least[:, None], out=out)
    if out.is_cuda or bool(out.sum(1).amax() > 1):  # ties go to the first
        out.mul_(out.cumsum(1) == 1)
    if member is not None:
        out.mul_(member)
    return least


def _place_empty(
    distance: Tensor, gram: Tensor, square: Tensor, ones: Tensor, size: Tensor, member: Tensor | None
) -> None:
    """Gives each problem's first empty cluster the row farthest from its own mean as mean; other empty ones wait.

    scikit-learn does the same. Where no cluster is empty nothing changes, so that a GPU need not be asked before.
    """
    empty = size == 0
    first = empty & (empty.cumsum(1) == 1)
    away = square + (ones * distance).sum(1)  # [T, R, P]; an empty cluster's distances count 0 times
    if member is not None:
        away = torch.where(member[:, 0] > 0, away, -torch.inf)
    t, r, p = away.shape
    far = away.argmax(-1)  # [T, R]
    offset = (torch.arange(t, device=gram.device) * p)[:, None]
    rows = gram.view(t * p, p).index_select(0, (far + offset).view(-1)).view(t, 1, r, p)
    placed = square[:, 0].gather(1, far)[:, None, :, None] - 2 * rows
    distance.copy_(torch.where(first, placed, torch.where(empty, torch.inf, distance)))

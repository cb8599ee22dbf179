"""The Triton kernel that solves k-means: one program for each problem, and all starts as rows of one product.

`gram.plus_plus` and `lloyd.run` do the same for a tile of problems in torch and are the specification: the draws are
equal, and the labels are equal but for rounding. A Gram matrix stays in global memory and is read at every step, from
the second-level cache where few programs run side by side; no GPU needs room for it in shared memory. The numbers of
problems, rows, clusters and starts are data, so that few variants are compiled. `TRITON_INTERPRET=1` runs the kernels
on a CPU. Letters as in `triton_steps`.
"""

# mypy: ignore-errors
# (Triton's language looks like Python; its types are its own)

import triton
import triton.language as tl

from batchjob.clustering.triton_gram import exact_gram
from batchjob.clustering.triton_steps import NO_LABEL, distances_to, draw, keep, look, mix, start, sum_up, uniform

SAME = tl.constexpr(1e-6)  # inertias with a smaller relative difference belong to one optimum
AGREE = tl.constexpr(1e-6)  # the same as a share of the inertia of a single cluster: the rounding of float32 sums
CANCELLED = tl.constexpr(1e-3)  # an inertia below this share of the total has lost its digits in float32


@triton.jit
def _exchange(
    gram_ptr, square, member, first, to_first, second, to_second, streams, counter, i, p, k,
    R: tl.constexpr, PB: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Labels [R, P] after one mean of each start was replaced by a row.

    The row is the one that helps most of a few that are drawn in proportion to their squared distances, and the mean is
    the one whose loss costs least (Lattanzi and Sohler, ICML 2019; Fränti 2018). `to_first` and `to_second` are full
    squared distances, with the row's own square.
    """
    least = tl.zeros([R], square.dtype) + float("inf")
    replaced = tl.zeros([R], tl.int32)
    best = to_first
    for candidate in range(CANDIDATES):
        drawn = draw(to_first, uniform(streams, counter + candidate), p - 1)
        away = distances_to(gram_ptr, square, drawn, i, p, member)
        nearer = tl.minimum(away, to_first)
        missed = tl.where(member[None, :], tl.minimum(away, to_second) - nearer, 0.0)
        kept = tl.sum(nearer, 1)
        for c0 in range(0, k, 4):
            c = c0 + tl.arange(0, 4)
            hit = first[:, None, :] == c[None, :, None]
            cost = kept[:, None] + tl.sum(tl.where(hit, missed[:, None, :], 0.0), 2)  # [R, 4]
            cost = tl.where((c < k)[None, :], cost, float("inf"))
            lowest = tl.min(cost, 1)
            better = lowest < least
            replaced = tl.where(better, c0 + tl.argmin(cost, 1), replaced)
            best = tl.where(better[:, None], away, best)
            least = tl.minimum(lowest, least)
    gone = first == replaced[:, None]
    labels = tl.where(gone, second, first)
    return tl.where(best < tl.where(gone, to_second, to_first), replaced[:, None], labels)


@triton.jit
def _improve(
    gram_ptr, scale, square, member, total, labels, streams, starts_ptr, sums_ptr, norm_ptr, size_ptr, i, p, k, live,
    rounds, R: tl.constexpr, C: tl.constexpr, B: tl.constexpr, PB: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(labels [R, P], inertia [R]): exchanges means and moves rows as `look` says; keeps what lowers the inertia.

    A round tries one exchange for every start. The rounds end after `rounds`, or once two starts agree on the lowest
    inertia and nothing was gained for three rounds. The first and the last round only move rows.
    """
    r = tl.arange(0, R)
    inertia = tl.zeros([R], square.dtype) + float("inf")
    kept, first, second = labels, labels, labels
    to_first = tl.zeros([R, PB], square.dtype)
    to_second = to_first
    stale, turn, last = k * 0, k * 0, k * 0
    while last < 2:
        trial = kept
        if (turn > 0) & (last == 0):
            trial = _exchange(
                gram_ptr,
                square,
                member,
                first,
                to_first,
                second,
                to_second,
                streams,
                4096 + 4 * turn,
                i,
                p,
                k,
                R,
                PB,
                4,
            )
        now, one, near, two, far, reached = trial, first, to_first, second, to_second, inertia
        for _ in range(3):
            now = trial
            keep(now, member, starts_ptr, r, i, p)
            sum_up(gram_ptr, scale, starts_ptr, sums_ptr, norm_ptr, size_ptr, p, k, R, C, B, EXACT)
            tl.debug_barrier()
            one, near, two, far, trial, within = look(
                gram_ptr, square, member, now, sums_ptr, norm_ptr, size_ptr, i, p, k, R, PB, True
            )
            reached = tl.where(live, total - within, float("inf"))
        helps = reached < inertia - total * 1e-7
        before = tl.min(inertia)
        inertia = tl.where(helps, reached, inertia)
        takes = helps[:, None]
        near = tl.where(member[None, :], tl.maximum(near + square[None, :], 0.0), 0.0)
        far = tl.where(member[None, :], tl.maximum(far + square[None, :], 0.0), 0.0)
        kept, first, second = tl.where(takes, now, kept), tl.where(takes, one, first), tl.where(takes, two, second)
        to_first, to_second = tl.where(takes, near, to_first), tl.where(takes, far, to_second)
        lowest = tl.min(inertia)
        stale = tl.where(lowest < before, 0, stale + 1)
        agree = tl.sum((inertia <= lowest + total * AGREE).to(tl.int32))
        turn += 1
        last = tl.where((last > 0) | (turn > rounds) | ((agree > 1) & (stale >= 3)), last + 1, last)
    return kept, inertia


@triton.jit
def _number(labels, member, i, p):
    """(labels int32 [P] numbered by the first row of each cluster, number of clusters)."""
    left, numbered = member, tl.zeros_like(labels) + NO_LABEL
    count = tl.sum(left.to(tl.int32)) * 0
    while tl.sum(left.to(tl.int32)) > 0:
        place = tl.min(tl.where(left, i, p))
        cluster = tl.sum(tl.where(i == place, labels, 0))
        numbered = tl.where(left & (labels == cluster), count, numbered)
        left = left & (labels != cluster)
        count += 1
    return numbered, count


@triton.jit
def search_kernel(
    gram_ptr,
    x_ptr,
    mean_ptr,
    mask_ptr,
    factor_ptr,
    k_ptr,
    seeds_ptr,
    labels_ptr,
    inertia_ptr,
    found_ptr,
    settled_ptr,
    doubtful_ptr,
    numbers_ptr,
    starts_ptr,
    problems,
    p,
    d,
    most_k,
    n_init,
    max_steps,
    rounds,
    noise,
    R: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
    PB: tl.constexpr,
    HAS_MASK: tl.constexpr,
    NUMBER: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Solves all problems, each from `n_init` starts of which the best is kept.

    Parameters
    ----------
    gram_ptr
        float32 [N, P, P]; with EXACT float64 [programs, P, P], scratch.
    x_ptr, mean_ptr
        float [N, P, D] and float64 [N, D], read only with EXACT.
    mask_ptr, factor_ptr
        uint8 [N, P] and float32 [N], as in `triton_gram.measure_kernel`.
    k_ptr, seeds_ptr
        int32 [N] and int64 [N].
    labels_ptr
        uint8 [N, P], written: numbered by first appearance, 255 for rows that take no part.
    inertia_ptr
        float32 [N], written: NaN where rows are not finite.
    found_ptr, settled_ptr
        uint8 [N] each, written: number of clusters, and whether two starts found the lowest inertia.
    doubtful_ptr
        uint8 [N]: whether float32 can't tell rows apart. Written, and with EXACT read: only such problems are solved.
    numbers_ptr, starts_ptr
        Scratch: NUMBER [programs, most_k · R · (P + 2)] and uint8 [programs, R, P].
    problems, p, d, most_k, n_init
        N, P, D, the largest K, and the number of starts of each problem.
    max_steps
        The most steps of Lloyd's algorithm.
    rounds
        Exchanges of a mean that each start tries; 0: none.
    noise
        Squared distances up to this share of the longest row's square are rounding.
    R, C, B, PB, HAS_MASK
        As in `triton_steps`; a block of G is B × B.
    NUMBER, EXACT
        float32 and False, or float64 and True.
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i, r = tl.arange(0, PB), tl.arange(0, R)
    sums = numbers_ptr + program * most_k * R * (p + 2)
    norm = sums + most_k * R * p
    size = norm + most_k * R
    starts = starts_ptr + program * R * p
    for n in range(program, problems, programs):
        factor = tl.load(factor_ptr + n).to(NUMBER)
        wanted = True
        if EXACT:
            wanted = tl.load(doubtful_ptr + n) != 0
        if wanted:
            member = i < p
            if HAS_MASK:
                member = tl.load(mask_ptr + n * p + i, mask=member, other=0) != 0
            count = tl.sum(member.to(tl.int32))
            k = tl.maximum(tl.minimum(tl.load(k_ptr + n), count), 1)
            if EXACT:
                gram = gram_ptr + program * p * p
                exact_gram(x_ptr, mask_ptr, mean_ptr, factor, gram, n, p, d, 16, HAS_MASK)
                tl.debug_barrier()
            else:
                gram = gram_ptr + n * p * p
            square = tl.load(gram + i * (p + 1), mask=i < p, other=0.0)
            total = tl.sum(tl.where(member, square, 0.0))
            largest = tl.max(square).to(tl.float32)
            power = tl.minimum(tl.maximum(267 - ((largest.to(tl.int32, bitcast=True) >> 23) & 255), 1), 254)
            scale = (power << 23).to(tl.float32, bitcast=True)  # brings `largest` to [2^13, 2^14)
            if EXACT:
                scale = scale * 0.0 + 1.0
            seed = tl.load(seeds_ptr + n).to(tl.uint64, bitcast=True)
            least = tl.max(square) * 0.0 + float("inf")
            agree, starved_any = 0, 0
            for begin in range(0, n_init, R):
                live = begin + r < n_init
                streams = mix(seed + (begin + r).to(tl.uint64))
                labels, starved = start(gram, square, member, i, p, k, streams, noise * tl.max(square), EXACT)
                starved_any = tl.maximum(starved_any, tl.max((starved & live).to(tl.int32)))
                cost = tl.zeros([R], NUMBER)
                going, step = 1, 0
                while (going > 0) & (step < max_steps):
                    keep(labels, member, starts, r, i, p)
                    sum_up(gram, scale, starts, sums, norm, size, p, k, R, C, B, EXACT)
                    tl.debug_barrier()
                    first, near, _, _, _, _ = look(
                        gram, square, member, labels, sums, norm, size, i, p, k, R, PB, False
                    )
                    cost = tl.sum(tl.where(member[None, :], near + square[None, :], 0.0), 1)
                    going = tl.sum(((first != labels) & member[None, :] & live[:, None]).to(tl.int32))
                    labels = first
                    step += 1
                if rounds > 0:
                    labels, cost = _improve(
                        gram, scale, square, member, total, labels, streams, starts, sums, norm, size, i, p, k, live,
                        rounds, R, C, B, PB, EXACT,
                    )  # fmt: skip
                cost = tl.where(live, cost, float("inf"))
                lowest = tl.min(cost)
                same = lowest * SAME
                if rounds > 0:
                    same = total * AGREE
                if lowest < least:
                    agree = tl.where(least <= lowest + same, agree, 0)
                    best = tl.sum(tl.where(r[:, None] == tl.argmin(cost, 0), labels, 0), 0)
                    tl.store(labels_ptr + n * p + i, best.to(tl.uint8), mask=i < p)
                    least = lowest
                agree += tl.sum((cost <= least + same).to(tl.int32))
            tl.debug_barrier()
            best = tl.load(labels_ptr + n * p + i, mask=i < p, other=0).to(tl.int32)
            tl.debug_barrier()
            best, found = _number(best, member, i, p)
            least = tl.maximum(least, 0.0)
            bad = (factor != factor) & (count > 0)
            tl.store(labels_ptr + n * p + i, tl.where(bad, NO_LABEL, best).to(tl.uint8), mask=i < p)
            inertia = tl.where(count > 0, least / (factor * factor), 0.0).to(tl.float32)
            tl.store(inertia_ptr + n, tl.where(bad, float("nan"), inertia))
            tl.store(found_ptr + n, found.to(tl.uint8))
            tl.store(settled_ptr + n, (agree > 1).to(tl.uint8))
            if EXACT == 0:
                doubt = ((starved_any > 0) | (least < total * CANCELLED)) & (count > 0) & (bad == 0)
                tl.store(doubtful_ptr + n, doubt.to(tl.uint8))

"""Starts and steps of k-means on one Gram matrix, for the Triton kernel.

`gram.plus_plus` and `lloyd._step` do the same in torch. Letters: R starts side by side, P rows, K clusters, C clusters
of all starts in one product. An array over rows in registers has PB entries, a power of two from P on; [P] stands for
it below. Three arguments recur: `i` int32 [P] are the numbers of the rows, 0 to PB − 1; `p` is P; `member` bool [P] is
False for rows that take no part, and from P on.
"""

# mypy: ignore-errors
# (Triton's language looks like Python; its types are its own)

import triton
import triton.language as tl

from batchjob.clustering.triton_gram import LOW, parts_of

NO_LABEL = tl.constexpr(255)
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_A = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_B = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def mix(x):
    """Applies the finaliser of SplitMix64 to uint64 words, as `base.mix`."""
    x = (x ^ (x >> 30)) * tl.full([], MIX_A, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full([], MIX_B, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def uniform(streams, counter):
    """Gives a uniform random number of each stream, as `base.uniform`.

    Parameters
    ----------
    streams
        uint64 [R].
    counter
        The place of the number in its stream, from 0; a tensor.

    Returns
    -------
    float64 [R] in [0, 1).
    """
    step = (tl.full([], 1, tl.uint64) + counter.to(tl.uint64)) * tl.full([], GOLDEN, tl.uint64)
    return (mix(streams + step) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def draw(weights, uniforms, last):
    """Draws a row for each start in proportion to weights, in whole numbers as `gram._draw`.

    Parameters
    ----------
    weights
        float [R, P], not negative.
    uniforms
        float64 [R] in [0, 1).
    last
        The largest number that may be drawn.

    Returns
    -------
    int32 [R].
    """
    most = tl.maximum(tl.max(weights, 1), 1e-28)
    whole = (weights * (1073741824.0 / most)[:, None]).to(tl.int64)
    running = tl.cumsum(whole, 1)
    target = (uniforms * tl.sum(whole, 1).to(tl.float64)).to(tl.int64)
    return tl.minimum(tl.sum((running <= target[:, None]).to(tl.int32), 1), last)


@triton.jit
def _trials(k):
    """`2 + int(log(k))`: the number of candidates of each draw of k-means++, for k up to 254."""
    more = (k >= 3).to(tl.int32) + (k >= 8).to(tl.int32) + (k >= 21).to(tl.int32)
    return 2 + more + (k >= 55).to(tl.int32) + (k >= 149).to(tl.int32)


@triton.jit
def distances_to(gram_ptr, square, chosen, i, p, member):
    """Computes the squared distances of all rows to one chosen row for each start.

    Parameters
    ----------
    gram_ptr, square
        NUMBER [P, P], and its diagonal [P].
    chosen
        int32 [R]: the numbers of the chosen rows.
    i, p, member
        See the top of this file.

    Returns
    -------
    [R, P], at least 0; 0 for rows that take no part.
    """
    products = tl.load(gram_ptr + chosen[:, None] * p + i[None, :], mask=(i < p)[None, :], other=0.0)
    own = tl.load(gram_ptr + chosen * (p + 1))
    return tl.where(member[None, :], tl.maximum(own[:, None] - 2.0 * products + square[None, :], 0.0), 0.0)


@triton.jit
def start(gram_ptr, square, member, i, p, k, streams, noise, EXACT: tl.constexpr):
    """Labels the rows by greedy k-means++, for R starts.

    Parameters
    ----------
    gram_ptr, square, member, i, p
        As in `distances_to`.
    k
        K.
    streams
        uint64 [R]: the random stream of each start.
    noise
        Squared distances up to this are rounding.
    EXACT
        Whether numbers are float64.

    Returns
    -------
    (labels int32 [R, P], bool [R]: whether a start ran out of rows, because every row was equal, but for rounding, to a
    centre already drawn). Such a start goes on with those rows; in float64 it has fewer clusters.
    """
    weights = tl.where(member[None, :], 1.0, 0.0) + tl.zeros_like(streams).to(square.dtype)[:, None]
    closest = distances_to(gram_ptr, square, draw(weights, uniform(streams, k * 0), p - 1), i, p, member)
    labels = tl.zeros_like(closest).to(tl.int32)
    starved = tl.max(closest, 1) < 0.0
    trials = _trials(k)
    for c in range(1, k):
        out = tl.max(closest, 1) <= noise
        starved = starved | out
        least = tl.max(closest, 1) * 0.0 + float("inf")
        best, nearest = closest, closest
        for trial in range(trials):
            drawn = draw(closest, uniform(streams, 1 + (c - 1) * trials + trial), p - 1)
            away = distances_to(gram_ptr, square, drawn, i, p, member)
            nearer = tl.minimum(away, closest)
            potential = tl.sum(nearer, 1)
            better = (potential < least)[:, None]
            best, nearest = tl.where(better, away, best), tl.where(better, nearer, nearest)
            least = tl.minimum(potential, least)
        joins = best < closest
        if EXACT:
            joins = joins & (out == 0)[:, None]
        labels = tl.where(joins, c, labels)
        closest = tl.minimum(nearest, closest)
    return labels, starved


@triton.jit
def sum_up(
    gram_ptr, scale, labels_ptr, sums_ptr, norm_ptr, size_ptr, p, k,
    R: tl.constexpr, C: tl.constexpr, B: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Sums up G over the clusters of all starts; C clusters of R starts at a time are the rows of one product with G.

    Parameters
    ----------
    gram_ptr
        NUMBER [P, P], G.
    scale
        A power of two that brings G into the range of fp16; 1 with EXACT.
    labels_ptr
        uint8 [R, P], 255 for rows that take no part (`keep`).
    sums_ptr
        NUMBER [K, R, P], written: S[c, r, p] = Σ of G[i, p] over the rows i of cluster c of start r.
    norm_ptr, size_ptr
        NUMBER [K, R] each, written: Σ of S[c, r, p] over the rows p of the cluster, and its number of rows.
    p, k
        P and K.
    R, C, B, EXACT
        Starts, clusters of one product, rows and columns of a block of G, and whether NUMBER is float64.
    """
    m = tl.arange(0, R * C)
    own = m // C  # the start of each row
    for c0 in range(0, k, C):
        cluster = c0 + m % C
        live = cluster < k
        at = cluster * R + own
        norm = tl.zeros([R * C], gram_ptr.dtype.element_ty)
        size = tl.zeros([R * C], gram_ptr.dtype.element_ty)
        for j0 in range(0, p, B):
            j = j0 + tl.arange(0, B)
            high_sum = tl.zeros([R * C, B], gram_ptr.dtype.element_ty)
            low_sum = tl.zeros([R * C, B], gram_ptr.dtype.element_ty)
            for i0 in range(0, p, B):
                i = i0 + tl.arange(0, B)
                label = tl.load(labels_ptr + own[:, None] * p + i[None, :], mask=(i < p)[None, :], other=NO_LABEL)
                ones = label.to(tl.int32) == cluster[:, None]
                fits = (i < p)[:, None] & (j < p)[None, :]
                products = tl.load(gram_ptr + i[:, None] * p + j[None, :], mask=fits, other=0.0)
                if EXACT:
                    high_sum += tl.sum(tl.where(ones[:, :, None], products[None, :, :], 0.0), 1)
                else:
                    high, low = parts_of(products * scale)
                    high_sum = tl.dot(ones.to(tl.float16), high, high_sum)
                    low_sum = tl.dot(ones.to(tl.float16), low, low_sum)
            sums = (high_sum + low_sum * (1.0 / LOW)) / scale
            label = tl.load(labels_ptr + own[:, None] * p + j[None, :], mask=(j < p)[None, :], other=NO_LABEL)
            ones = label.to(tl.int32) == cluster[:, None]
            norm += tl.sum(tl.where(ones, sums, 0.0), 1)
            size += tl.sum(ones.to(tl.int32), 1).to(size.dtype)
            tl.store(sums_ptr + at[:, None] * p + j[None, :], sums, mask=live[:, None] & (j < p)[None, :])
        tl.store(norm_ptr + at, norm, mask=live)
        tl.store(size_ptr + at, size, mask=live)


@triton.jit
def look(
    gram_ptr, square, member, labels, sums_ptr, norm_ptr, size_ptr, i, p, k,
    R: tl.constexpr, PB: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Finds the two nearest means of every row, and with SEARCH the cluster to which it should move.

    Parameters
    ----------
    gram_ptr, square, member, i, p
        As in `distances_to`.
    labels
        int32 [R, P]: the own cluster of each row.
    sums_ptr, norm_ptr, size_ptr, k
        From `sum_up`.
    R, PB
        Starts, and rows with padding.
    SEARCH
        Whether the last two results are wanted.

    Returns
    -------
    (first, to_first, second, to_second, goes, within). The first four are [R, P]: number of the nearest cluster,
    squared distance to its mean less G[p, p], and the same of the second nearest. `goes` int32 [R, P] is the cluster to
    which a row should move, and `within` [R] the sum over clusters of the squared length of the mean times the size.

    Notes
    -----
    A row at squared distance d from the mean of its own n rows leaves it at a gain of d n / (n − 1), and joins another
    cluster at a price of d n / (n + 1) (Hartigan 1975; Telgarsky and Vattani, AISTATS 2010). As in
    `lloyd._place_empty`, a start's first empty cluster gets the row farthest from its own mean as its mean.
    """
    r = tl.arange(0, R)
    within = tl.zeros([R], square.dtype)
    least = tl.zeros([R, PB], square.dtype) + float("inf")
    goes = tl.zeros([R, PB], tl.int32)
    to_first = tl.zeros([R, PB], square.dtype) + float("inf")
    to_second, to_own = to_first, tl.zeros([R, PB], square.dtype)
    first = tl.zeros([R, PB], tl.int32)
    second, empty = first, tl.zeros([R], tl.int32) + k
    for c in range(k):
        at = c * R + r
        sums = tl.load(sums_ptr + at[:, None] * p + i[None, :], mask=(i < p)[None, :], other=0.0)
        size = tl.load(size_ptr + at)
        shrink = 1.0 / tl.maximum(size, 1.0)
        norm = tl.load(norm_ptr + at) * shrink
        away = (norm * shrink)[:, None] - 2.0 * sums * shrink[:, None]
        to_own = tl.where(labels == c, away, to_own)
        if SEARCH:
            within += norm
            leaves = tl.where(size > 1.0, size / tl.maximum(size - 1.0, 1.0), 0.0)
            rate = tl.where(labels == c, leaves[:, None], (size / (size + 1.0))[:, None])
            price = tl.where((size > 0.0)[:, None], tl.maximum(away + square[None, :], 0.0) * rate, float("inf"))
            goes, least = tl.where(price < least, c, goes), tl.minimum(price, least)
        away = tl.where((size > 0.0)[:, None], away, float("inf"))
        empty = tl.where((size == 0.0) & (empty == k), c, empty)
        is_first, is_second = away < to_first, away < to_second
        to_second = tl.where(is_first, to_first, tl.where(is_second, away, to_second))
        second = tl.where(is_first, first, tl.where(is_second, c, second))
        to_first, first = tl.where(is_first, away, to_first), tl.where(is_first, c, first)
    if tl.min(empty) < k:
        off = tl.where(member[None, :], square[None, :] + to_own, -float("inf"))
        far = tl.argmax(off, 1)
        products = tl.load(gram_ptr + far[:, None] * p + i[None, :], mask=(i < p)[None, :], other=0.0)
        away = tl.load(gram_ptr + far * (p + 1))[:, None] - 2.0 * products
        takes = (away < to_first) | ((away == to_first) & (empty[:, None] < first))
        takes = takes & (empty < k)[:, None]
        to_second, second = tl.where(takes, to_first, to_second), tl.where(takes, first, second)
        to_first, first = tl.where(takes, away, to_first), tl.where(takes, empty[:, None], first)
        goes = tl.where(takes, empty[:, None], goes)
    return first, to_first, second, to_second, goes, within


@triton.jit
def keep(labels, member, labels_ptr, r, i, p):
    """Stores the labels where `sum_up` reads them.

    Parameters
    ----------
    labels
        int32 [R, P].
    labels_ptr
        uint8 [R, P], written: 255 for rows that take no part.
    r
        int32 [R]: the numbers of the starts.
    member, i, p
        As in `distances_to`.
    """
    tl.debug_barrier()  # all warps have read the old labels
    tl.store(
        labels_ptr + r[:, None] * p + i[None, :],
        tl.where(member[None, :], labels, NO_LABEL).to(tl.uint8),
        mask=(i < p)[None, :],
    )
    tl.debug_barrier()

"""One Triton kernel: a program takes one problem's Gram matrix on the chip and keeps it there to the last step.

It does for one problem, all its restarts at once, what `gram.plus_plus` and `lloyd.run` do for a tile; those are its
specification, and its argument names are theirs. Rows are read from the matrix by products with 0/1 rows, which is how
a matrix in shared memory can be read at all in Triton. `TRITON_INTERPRET=1` runs it on a CPU.
"""

# mypy: ignore-errors
# (Triton's language looks like Python; its types are its own)

import triton
import triton.language as tl


@triton.jit
def _rows_of(gram, index, i, rows: tl.constexpr):
    """[rows, PB] float32: the rows `index` [rows] of the matrix, exactly."""
    pick = (index[:, None] == i[None, :]).to(gram.dtype)
    return tl.dot(pick, gram, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _draw(weights, uniforms, last, shape_r: tl.constexpr, shape_l: tl.constexpr, shape_p: tl.constexpr):
    """int32 [R, L]: rows drawn in proportion to `weights` [R, PB]; whole numbers, as gram.draw."""
    most = tl.maximum(tl.max(weights, 1), 1e-28)
    whole = (weights * (1073741824.0 / most)[:, None]).to(tl.int64)
    running = tl.cumsum(whole, 1)
    target = uniforms * tl.sum(whole, 1).to(tl.float64)[:, None]  # [R, L]
    before = running.to(tl.float64)[:, None, :] <= target[:, :, None]
    return tl.minimum(tl.sum(before.to(tl.int32), 2), last)


@triton.jit
def kmeans_kernel(
    gram_ptr,  # float32 [N, P, P]
    scale_ptr,  # float32 [N]: brings the matrix to the size of 1
    member_ptr,  # float32 [N, P]: 0 for rows left out
    k_ptr,  # int32 [N]
    trials_ptr,  # int32 [N]
    uniforms_ptr,  # float64 [N, R, DRAWS]
    labels_ptr,  # uint8 [N, P], written
    starved_ptr,  # int32 [N], written
    p,
    draws,
    noise,
    max_steps,
    R: tl.constexpr,  # restarts
    RB: tl.constexpr,  # these and the next three: powers of two that hold R, k, the trials and P
    KB: tl.constexpr,
    LB: tl.constexpr,
    PB: tl.constexpr,
    HALF: tl.constexpr,  # keep the matrix in fp16 (sums stay fp32), half the shared memory
):
    """labels: the nearest means of the cheapest restart; starved: a start ran out of rows."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PB)
    inside = i < p
    square_mask = inside[:, None] & inside[None, :]
    gram = tl.load(gram_ptr + n * p * p + i[:, None] * p + i[None, :], mask=square_mask, other=0.0)
    gram = gram * tl.load(scale_ptr + n)
    square = tl.sum(tl.where(i[:, None] == i[None, :], gram, 0.0), 1)  # [PB]
    if HALF:
        gram = gram.to(tl.float16)
    member = tl.load(member_ptr + n * p + i, mask=inside, other=0.0)
    k = tl.load(k_ptr + n)
    trials = tl.load(trials_ptr + n)
    r = tl.arange(0, RB)
    live = r < R
    trial = tl.arange(0, LB)
    c = tl.arange(0, KB)
    uniforms_at = uniforms_ptr + (n * R + tl.where(live, r, 0)) * draws  # the padding repeats the first restart

    everywhere = tl.zeros([RB, PB], tl.float32) + member[None, :]
    first = tl.load(uniforms_at)[:, None] + tl.zeros([RB, LB], tl.float64)
    drawn = tl.reshape(_draw(everywhere, first, p - 1, RB, LB, PB), [RB * LB])
    rows = _rows_of(gram, drawn, i, RB * LB)
    own = tl.sum(tl.where(drawn[:, None] == i[None, :], square[None, :], 0.0), 1)
    from_first = tl.maximum(own[:, None] - 2.0 * rows + square[None, :], 0.0) * member[None, :]
    closest = tl.max(tl.reshape(from_first, [RB, LB, PB]), 1)  # all L are the same row here
    labels = tl.zeros([RB, PB], tl.int32)
    limit = noise * tl.max(square)
    starved = tl.zeros([RB], tl.int32)
    for centre in range(1, k):
        starved = tl.maximum(starved, (tl.max(closest, 1) <= limit).to(tl.int32))
        at = uniforms_at[:, None] + 1 + (centre - 1) * trials + trial[None, :]
        uniforms = tl.load(at, mask=(trial < trials)[None, :] & live[:, None], other=0.0)
        drawn = tl.reshape(_draw(closest, uniforms, p - 1, RB, LB, PB), [RB * LB])
        rows = _rows_of(gram, drawn, i, RB * LB)
        own = tl.sum(tl.where(drawn[:, None] == i[None, :], square[None, :], 0.0), 1)
        flat = tl.maximum(own[:, None] - 2.0 * rows + square[None, :], 0.0) * member[None, :]
        away = tl.reshape(flat, [RB, LB, PB])
        nearer = tl.minimum(away, closest[:, None, :])
        potential = tl.where((trial < trials)[None, :], tl.sum(nearer, 2), float("inf"))
        chosen = trial[None, :] == tl.argmin(potential, 1)[:, None]
        away_chosen = tl.sum(tl.where(chosen[:, :, None], away, 0.0), 1)
        labels = tl.where(away_chosen < closest, centre, labels)
        closest = tl.sum(tl.where(chosen[:, :, None], nearer, 0.0), 1)

    cost = tl.zeros([RB], tl.float32)
    going = 1
    step = 0
    while (going > 0) & (step < max_steps):
        ones = tl.where(labels[:, None, :] == c[None, :, None], member[None, None, :], 0.0)  # [RB, KB, PB]
        size = tl.sum(ones, 2)
        sums = tl.dot(
            tl.reshape(ones, [RB * KB, PB]).to(gram.dtype), gram, input_precision="ieee", out_dtype=tl.float32
        )
        inner = tl.reshape(sums, [RB, KB, PB])
        shrink = 1.0 / tl.maximum(size, 1.0)
        norm = tl.sum(ones * inner, 2) * shrink * shrink
        distance = norm[:, :, None] - 2.0 * inner * shrink[:, :, None]
        empty = (size == 0.0) & (c < k)[None, :]
        if tl.sum(empty.to(tl.int32)) > 0:  # the first empty cluster moves to the row farthest from its mean
            off = square[None, :] + tl.sum(tl.where(ones > 0.0, distance, 0.0), 1)
            far = tl.argmax(tl.where(member[None, :] > 0.0, off, -float("inf")), 1)  # [RB]
            which = tl.min(tl.where(empty, c[None, :], KB), 1)
            index = tl.reshape(far[:, None] + tl.zeros([RB, KB], tl.int32), [RB * KB])
            far_rows = tl.reshape(_rows_of(gram, index, i, RB * KB), [RB, KB, PB])
            far_own = tl.sum(tl.where(far[:, None] == i[None, :], square[None, :], 0.0), 1)
            placed = far_own[:, None, None] - 2.0 * far_rows
            distance = tl.where((c[None, :] == which[:, None])[:, :, None], placed, distance)
            empty = empty & (c[None, :] != which[:, None])
        distance = tl.where((empty | (c >= k)[None, :])[:, :, None], float("inf"), distance)
        least = tl.min(distance, 1)
        nearest = tl.argmin(distance, 1)
        changed = (nearest != labels) & (member[None, :] > 0.0) & live[:, None]
        going = tl.sum(changed.to(tl.int32))
        cost = tl.sum((least + square[None, :]) * member[None, :], 1)
        labels = nearest
        step += 1

    best = tl.argmin(tl.where(live, cost, float("inf")), 0)
    answer = tl.sum(tl.where(r[:, None] == best, labels, 0), 0)
    tl.store(labels_ptr + n * p + i, answer.to(tl.uint8), mask=inside)
    tl.store(starved_ptr + n, tl.max(tl.where(live, starved, 0)))

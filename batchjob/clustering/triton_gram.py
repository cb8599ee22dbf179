"""Gram matrices of centred rows by Triton: one kernel for the mean and scale of each problem, one for the products.

`gram.centred_gram` does the same in torch. Products are of fp16 parts: a number is scaled by a power of two so that it
uses the range of fp16, and is `high + low / 2048` to 22 bits, both in fp16. Tensor cores of every generation multiply
such parts exactly and add in float32. Letters: N problems of P rows with D numbers.
"""

# mypy: ignore-errors
# (Triton's language looks like Python; its types are its own)

import triton
import triton.language as tl

LOW = tl.constexpr(2048.0)  # 2^11: the factor of the lower part of a number
RANGE = tl.constexpr(16384.0)  # 2^14: the factor of numbers in [−1, 1] before they are split


@triton.jit
def parts_of(x):
    """(high, low): fp16 parts of float32 numbers up to `RANGE` in size, so that x = high + low / `LOW` to 22 bits."""
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * LOW).to(tl.float16)


@triton.jit
def _load_rows(x_ptr, mask_ptr, n, rows, columns, p, d, HAS_MASK: tl.constexpr):
    """Loads (numbers [rows, columns] of problem n, whether they count): 0 outside the problem and its mask."""
    inside = (rows < p)[:, None] & (columns < d)[None, :]
    if HAS_MASK:
        member = tl.load(mask_ptr + n * p + rows, mask=rows < p, other=0) != 0
        inside = inside & member[:, None]
    return tl.load(x_ptr + (n * p + rows[:, None]) * d + columns[None, :], mask=inside, other=0.0), inside


@triton.jit
def measure_kernel(
    x_ptr,
    mask_ptr,
    mean_ptr,
    factor_ptr,
    p,
    d,
    BP: tl.constexpr,
    BD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """Computes the mean row of each problem, and the power of two that brings its centred rows into [−1, 1].

    Parameters
    ----------
    x_ptr, mask_ptr
        float [N, P, D]; uint8 [N, P], 0 for rows that take no part, read only with HAS_MASK.
    mean_ptr
        NUMBER [N, D], written.
    factor_ptr
        float32 [N], written: NaN where a row holds NaN or infinity, and 1 where all rows are equal.
    p, d
        P and D.
    BP, BD
        Rows and columns of a block.
    HAS_MASK
        Whether there is a mask.
    NUMBER
        Type of the sums, float32 or float64.
    """
    n = tl.program_id(0).to(tl.int64)
    most = tl.zeros([BP, BD], tl.float32)
    wrong = 0
    for d0 in range(0, d, BD):
        columns = d0 + tl.arange(0, BD)
        total = tl.zeros([BD], NUMBER)
        count = tl.zeros([BD], NUMBER)
        for p0 in range(0, p, BP):
            x, inside = _load_rows(x_ptr, mask_ptr, n, p0 + tl.arange(0, BP), columns, p, d, HAS_MASK)
            total += tl.sum(x.to(NUMBER), 0)
            count += tl.sum(inside.to(NUMBER), 0)
        mean = total / tl.maximum(count, 1.0)
        tl.store(mean_ptr + n * d + columns, mean, mask=columns < d)
        for p0 in range(0, p, BP):
            x, inside = _load_rows(x_ptr, mask_ptr, n, p0 + tl.arange(0, BP), columns, p, d, HAS_MASK)
            away = tl.where(inside, tl.abs((x.to(NUMBER) - mean[None, :]).to(tl.float32)), 0.0)
            wrong += tl.sum(tl.where(away < float("inf"), 0, 1))  # of NaN the comparison is False
            most = tl.maximum(most, away)
    largest = tl.max(most)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    power = tl.minimum(tl.maximum(253 - exponent, 1), 254)  # 2^-(exponent - 126): `largest` comes to [0.5, 1)
    factor = tl.where(largest > 0.0, (power << 23).to(tl.float32, bitcast=True), 1.0)
    tl.store(factor_ptr + n, tl.where(wrong > 0, float("nan"), factor))


@triton.jit
def gram_kernel(
    x_ptr,
    mask_ptr,
    mean_ptr,
    factor_ptr,
    gram_ptr,
    p,
    d,
    BLOCK: tl.constexpr,
    BD: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Computes the products of all centred and scaled rows of each problem.

    Parameters
    ----------
    x_ptr, mask_ptr, p, d, HAS_MASK
        As in `measure_kernel`.
    mean_ptr, factor_ptr
        float32 [N, D] and [N], from `measure_kernel`.
    gram_ptr
        float32 [N, P, P], written: the products times the square of the factor; 0 for rows outside the mask.
    BLOCK, BD
        Rows and columns of a block of the result, and numbers of a row that are multiplied at a time.
    """
    n, i0, j0 = tl.program_id(2).to(tl.int64), tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    if i0 <= j0:  # the other half is this one's mirror image
        i, j = i0 + tl.arange(0, BLOCK), j0 + tl.arange(0, BLOCK)
        factor = tl.load(factor_ptr + n) * RANGE
        exact = tl.zeros([BLOCK, BLOCK], tl.float32)
        rest = tl.zeros([BLOCK, BLOCK], tl.float32)
        for d0 in range(0, d, BD):
            columns = d0 + tl.arange(0, BD)
            mean = tl.load(mean_ptr + n * d + columns, mask=columns < d, other=0.0)
            x, inside = _load_rows(x_ptr, mask_ptr, n, i, columns, p, d, HAS_MASK)
            y, inside_y = _load_rows(x_ptr, mask_ptr, n, j, columns, p, d, HAS_MASK)
            high_x, low_x = parts_of(tl.where(inside, (x.to(tl.float32) - mean[None, :]) * factor, 0.0))
            high_y, low_y = parts_of(tl.where(inside_y, (y.to(tl.float32) - mean[None, :]) * factor, 0.0))
            exact = tl.dot(high_x, tl.trans(high_y), exact)
            rest = tl.dot(high_x, tl.trans(low_y), rest)
            rest = tl.dot(low_x, tl.trans(high_y), rest)
        product = (exact + rest * (1.0 / LOW)) * (1.0 / (RANGE * RANGE))
        fits = (i < p)[:, None] & (j < p)[None, :]
        tl.store(gram_ptr + (n * p + i[:, None]) * p + j[None, :], product, mask=fits)
        if i0 < j0:
            tl.store(gram_ptr + (n * p + j[None, :]) * p + i[:, None], product, mask=fits)


@triton.jit
def exact_gram(x_ptr, mask_ptr, mean_ptr, factor, gram_ptr, n, p, d, B: tl.constexpr, HAS_MASK: tl.constexpr):
    """Computes the products of one problem's centred and scaled rows in float64, by one program.

    Parameters
    ----------
    x_ptr, mask_ptr, p, d, HAS_MASK
        As in `measure_kernel`.
    mean_ptr
        float64 [N, D], from `measure_kernel`.
    factor
        float64: the factor of this problem.
    gram_ptr
        float64 [P, P], written.
    n
        The number of the problem.
    B
        Rows and columns of a block of the result, and numbers of a row that are multiplied at a time.
    """
    for i0 in range(0, p, B):
        for j0 in range(0, p, B):
            i, j = i0 + tl.arange(0, B), j0 + tl.arange(0, B)
            product = tl.zeros([B, B], tl.float64)
            for d0 in range(0, d, B):
                columns = d0 + tl.arange(0, B)
                mean = tl.load(mean_ptr + n * d + columns, mask=columns < d, other=0.0)
                x, inside = _load_rows(x_ptr, mask_ptr, n, i, columns, p, d, HAS_MASK)
                y, inside_y = _load_rows(x_ptr, mask_ptr, n, j, columns, p, d, HAS_MASK)
                x = tl.where(inside, (x.to(tl.float64) - mean[None, :]) * factor, 0.0)
                y = tl.where(inside_y, (y.to(tl.float64) - mean[None, :]) * factor, 0.0)
                product += tl.sum(x[:, None, :] * y[None, :, :], 2)
            fits = (i < p)[:, None] & (j < p)[None, :]
            tl.store(gram_ptr + i[:, None] * p + j[None, :], product, mask=fits)

"""Uncertainty over images: bootstrap intervals, sign-flip tests, Holm's correction, and halves that choose fairly."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 2000
FLIPS = 100_000
ENOUGH_IMAGES = 50  # with fewer, a 95 % interval covers less than it says (docs/metrics.md)
AN_EXAMPLE = 8  # images; a result on fewer is told as an example
FEWEST_IMAGES = 20  # with fewer, nothing is claimed
FEWEST_INFORMATIVE = 10  # images whose value is not the most common one; with fewer, nothing is claimed
SURE = 0.05  # the largest p-value of a claim, corrected where several heads were tested
_MOST_EXCESS = 1 / 3  # of the squares; that is the share with a single lender
_BLOCK = 1 << 23  # numbers in one block of weights: 64 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """Means over images and the bounds of their intervals, [C] each; NaN where no image has a value."""

    mean: Floats
    low: Floats
    high: Floats
    n: NDArray[np.int64]  # [C] images with a value


def interval(
    values: Floats, lent: Floats | None = None, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Averages over images, with percentile bootstrap intervals (Efron 1979).

    All columns with values of the same images are resampled together, so that their differences are paired.

    Parameters
    ----------
    values
        [n, C]; NaN where an image has no value, which leaves the image out of that column.
    lent
        [n, C] for gains over `swap`: what each image's objects add to the nulls of other images (`stats.lent`). A drawn
        image then brings its own gain and takes this off the others'.
    level
        The share of such intervals that should cover the true mean, from 0 to 1.
    resamples
        How often n images are drawn with replacement.
    seed
        Equal seeds give equal draws.

    Returns
    -------
    C means with their bounds, which are NaN where fewer than two images have a value: one image says nothing of others.
    """
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    filled = np.where(finite, values, 0)
    mean = np.where(count > 0, filled.sum(axis=0) / np.maximum(count, 1), np.nan)
    low, high = np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    for columns in _equal_columns(finite):
        rows = finite[:, columns[0]]
        if rows.sum() > 1:
            if lent is None:
                means = resampled_means(filled[np.ix_(rows, columns)], resamples=resamples, seed=seed)
            else:
                means = _resampled_gains(filled[:, columns], rows, lent[:, columns], resamples, seed)
            tails = [50 * (1 - level), 100 - 50 * (1 - level)]
            low[columns], high[columns] = np.percentile(means, tails, axis=0)
    return Interval(mean, low, high, count)


def _resampled_gains(gains: Floats, known: NDArray[np.bool_], lent: Floats, resamples: int, seed: int) -> Floats:
    """[R, C] mean gains over `swap`, R ≤ `resamples`: images without a gain are drawn, too, where they lend their
    objects, and a resample of such images alone has no mean.
    """
    rows = known | lent.any(axis=1)
    weight = np.broadcast_to(known[rows, None], gains[rows].shape).astype(np.float64)
    means = resampled_ratios(gains[rows], weight, resamples=resamples, seed=seed)
    taken = resampled_means(lent[rows], resamples=resamples, seed=seed)  # of the same draws, since n is the same
    found = means - taken * (rows.sum() / known.sum())
    return np.asarray(found[np.isfinite(found).all(axis=1)])


def mean_known(values: Floats, axis: int) -> Floats:
    """Averages the finite values along an axis.

    Parameters
    ----------
    values
        An array of any shape.
    axis
        The axis over which is averaged.

    Returns
    -------
    The shape of `values` without that axis; NaN where no value is finite.
    """
    known = np.isfinite(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0).sum(axis=axis)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def resampled_means(values: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Averages over images that are drawn with replacement, many times.

    Parameters
    ----------
    values
        [n, C], all finite.
    resamples
        How often n images are drawn.
    seed
        Equal seeds and n give equal draws.

    Returns
    -------
    [resamples, C].
    """
    n = len(values)
    means = [counts @ values / n for counts in _counts(n, resamples, seed)]
    return np.concatenate(means)


def resampled_ratios(above: Floats, below: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Averages over the items of images that are drawn with replacement, many times; images hold unequally many items.

    Parameters
    ----------
    above
        [n, C] the sum over the items of each image.
    below
        [n, C] the number of items of each image.
    resamples, seed
        As in `resampled_means`.

    Returns
    -------
    [resamples, C]: Σ above / Σ below; NaN where the drawn images have no items.
    """
    n = len(above)
    parts = []
    for counts in _counts(n, resamples, seed):
        total = counts @ below
        parts.append(np.where(total > 0, counts @ above / np.where(total > 0, total, 1), np.nan))
    return np.concatenate(parts)


def _counts(n: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yields how often each of n images is drawn, in blocks [some of the resamples, n] whose memory is bounded."""
    random = np.random.default_rng((seed, n))
    block = max(1, _BLOCK // max(n, 1))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = random.integers(0, n, (size, n)) + np.arange(size)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _equal_columns(finite: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Groups of columns that are finite in the same rows."""
    if not finite.shape[1]:
        return []
    _, inverse = np.unique(finite, axis=1, return_inverse=True)
    inverse = inverse.ravel()
    return [np.flatnonzero(inverse == g) for g in range(int(inverse.max()) + 1)]


def sign_flip(
    gains: Floats, lent: Floats | None = None, excess: Floats | None = None, *, flips: int = FLIPS, seed: int = 0
) -> Floats:
    """Tests whether a mean gain is zero, by flipping the signs of whole images.

    It takes all 2ⁿ combinations of signs where there are at most `flips` of them, else that many random ones and the
    observed one.

    Parameters
    ----------
    gains
        [n, C]; NaN where an image has no gain, which leaves the image out of that column.
    lent
        [n, C] as in `interval`: what is flipped is an image's gain less this. Their sum is the sum of the gains.
    excess
        [C] by how much the squares of what is flipped exceed the variance of the sum of gains (`stats.lent.excess`).
        The flipped sums are made smaller accordingly, so that their variance is that of the sum.
    flips
        The most combinations of signs.
    seed
        Equal seeds give equal flips.

    Returns
    -------
    [C] two-sided p-values; NaN with fewer than two images.
    """
    gains = np.asarray(gains, np.float64)
    result = np.full(gains.shape[1], np.nan)
    finite = np.isfinite(gains)
    for columns in _equal_columns(finite):
        rows = finite[:, columns[0]]
        if rows.sum() > 1:
            flipped = gains[:, columns]
            if lent is not None:
                flipped = np.where(rows[:, None], flipped, 0) - lent[:, columns]
                rows = rows | lent[:, columns].any(axis=1)
            flipped, scale = flipped[rows], np.ones(len(columns))
            if excess is not None:
                squares = (flipped**2).sum(axis=0)
                share = np.divide(excess[columns], squares, out=np.zeros_like(squares), where=squares > 0)
                scale = np.sqrt(1 - np.minimum(share, _MOST_EXCESS))
            result[columns] = _sign_flip(flipped, scale, flips, seed)
    return result


def _sign_flip(gains: Floats, scale: Floats, flips: int, seed: int) -> Floats:
    """[C] p-values of the sums of gains [n, C], against flipped sums that are multiplied by `scale` [C]."""
    n = len(gains)
    total = gains.sum(axis=0)
    # flipping those of a subset takes twice their sum away; equal sums must compare equal in spite of rounding
    reached = np.abs(total) / scale - 1e-9 * np.abs(gains).sum(axis=0)
    hits = np.zeros(gains.shape[1])
    if 2**n <= flips:
        codes = np.arange(2**n)[:, None] >> np.arange(n)[None, :] & 1
        hits = (np.abs(total - 2 * (codes @ gains)) >= reached).sum(axis=0)
        return np.asarray(np.maximum(hits, 2) / 2**n)  # the gains as they are, and all of them flipped, always count
    random = np.random.default_rng((seed, n, 2))
    # float32 halves the cost of the only product that grows with n × flips; its rounding is far below a flip's effect
    light: NDArray[Any] = gains.astype(np.float32) if n > 2000 else gains
    block = max(1, _BLOCK // n)
    width = -(-n // 8)
    for start in range(0, flips, block):
        size = min(block, flips - start)
        packed = np.frombuffer(random.bytes(size * width), np.uint8).reshape(size, width)
        bits = np.unpackbits(packed, axis=1, count=n).astype(light.dtype)
        hits += (np.abs(total - 2 * (bits @ light)) >= reached).sum(axis=0)
    return np.asarray((hits + 1) / (flips + 1))


def informative(values: Floats) -> int:
    """Counts the finite values [n] that differ from the most common one: 3 for 0, 0, 0, 0, 0.2, 0.3, 0.5."""
    known = values[np.isfinite(values)]
    return int(len(known) - np.unique(known, return_counts=True)[1].max(initial=0))


def is_enough(n: int, informative_n: int) -> bool:
    """Tells whether there are enough images for a claim; with fewer, intervals are too narrow.

    Parameters
    ----------
    n
        Number of images with a value.
    informative_n
        Number of those whose value is not the most common one.

    Returns
    -------
    True from `FEWEST_IMAGES` and `FEWEST_INFORMATIVE` on.
    """
    return n >= FEWEST_IMAGES and informative_n >= FEWEST_INFORMATIVE


def holm(p: Floats) -> Floats:
    """[C]: p-values [C] corrected for their number by Holm's step-down method; NaN stays NaN and does not count."""
    p = np.asarray(p, np.float64)
    result = np.full(p.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    result[order] = np.minimum(np.maximum.accumulate(steps), 1) if len(order) else steps
    return result


def first_half(image_ids: Sequence[str]) -> NDArray[np.bool_]:
    """bool [n]: whether an image is in the half that chooses the best head, by the first bit of its id's SHA-256."""
    return np.array([hashlib.sha256(i.encode("utf-8", "surrogateescape")).digest()[0] < 128 for i in image_ids], bool)

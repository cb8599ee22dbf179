"""How alike two groupings of the same patches are: contingency tables, adjusted Rand index and mutual information.

All functions take stacks: C labellings of one image (by head, algorithm or seed) against the same groups.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchjob.codes import NOISE

Floats = NDArray[np.float64]


def contingency(labels: NDArray[np.integer[Any]], groups: NDArray[np.integer[Any]], count: int = 0) -> Floats:
    """Counts the patches of each cluster and group, for a stack of labellings.

    Parameters
    ----------
    labels
        [C, P] or [P]. A patch labelled 255 is left out. Noise (254) is one further cluster.
    groups
        [P] number of the group of each patch. A patch with a negative number is left out.
    count
        G, the number of groups. 0 stands for one more than the largest number in `groups`.

    Returns
    -------
    float64 [C, K, G]. K is two more than the largest label: the last cluster counts the noise.
    """
    labels = np.atleast_2d(labels).astype(np.int64)
    groups = np.asarray(groups, np.int64)
    count = count or int(groups.max(initial=-1)) + 1
    clusters = int(labels[labels < NOISE].max(initial=-1)) + 3  # + noise + none
    codes = np.where(labels >= NOISE, labels - NOISE + clusters - 2, labels)[:, groups >= 0]
    codes = (np.arange(len(codes))[:, None] * clusters + codes) * count + groups[groups >= 0]
    table = np.bincount(codes.ravel(), minlength=len(labels) * clusters * count)
    return table.reshape(len(labels), clusters, count)[:, :-1].astype(np.float64)


def ari(table: Floats) -> Floats:
    """[...]: the adjusted Rand index of each contingency table [..., K, G]; at most 1, and about 0 by chance.

    It is 1 where clusters and groups are equal, also where both put all patches together or all apart, and NaN without
    patches. Hubert and Arabie 1985, eq. 5, over pairs as scikit-learn's `pair_confusion_matrix` counts them.
    """
    total = table.sum(axis=(-2, -1))
    both = np.square(table).sum(axis=(-2, -1))
    one_cluster = np.square(table.sum(axis=-1)).sum(axis=-1)
    one_group = np.square(table.sum(axis=-2)).sum(axis=-1)
    together, split, joined = both - total, one_group - both, one_cluster - both
    apart = total * total - split - joined - both
    below = (together + split) * (split + apart) + (together + joined) * (joined + apart)
    above = 2 * (together * apart - split * joined)
    trivial = (split == 0) & (joined == 0)
    result = np.where(trivial, 1.0, above / np.where(below > 0, below, 1.0))
    return np.where(total > 0, result, np.nan)


def ami(table: Floats) -> Floats:
    """[...]: the adjusted mutual information of each contingency table [..., K, G], over the mean of the two entropies.

    As in scikit-learn it is 1 where both sides have one group only, and 0 where one of them has. It is NaN without
    patches. Vinh, Epps and Bailey 2010.
    """
    shape = table.shape[:-2]
    table = table.reshape(-1, *table.shape[-2:])
    total = table.sum(axis=(1, 2))
    a, b = table.sum(axis=2), table.sum(axis=1)  # sizes of clusters [C, K] and of groups [C, G]
    entropy_a, entropy_b = _entropy(a), _entropy(b)
    information = np.maximum(entropy_a + entropy_b - _entropy(table.reshape(len(table), -1)), 0)
    expected = _expected_information(a, b, total)
    below = (entropy_a + entropy_b) / 2 - expected
    forced = np.abs(below) < 1e-12  # chance alone reaches the maximum: every patch its own cluster and its own group
    scaled = np.where(forced, 1.0, (information - expected) / np.where(forced, 1.0, below))
    single_a, single_b = (a > 0).sum(axis=1) <= 1, (b > 0).sum(axis=1) <= 1
    result = np.where(single_a | single_b, np.where(single_a & single_b, 1.0, 0.0), scaled)
    return np.where(total > 0, result, np.nan).reshape(shape)


def _entropy(counts: Floats) -> Floats:
    """[...]: the entropy in nats of counts [..., n]."""
    total = np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    share = counts / total
    return np.asarray(-(share * np.log(np.where(share > 0, share, 1))).sum(axis=-1))


@functools.lru_cache(maxsize=8)
def _log_factorials(limit: int) -> Floats:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, limit + 1)))])


def _expected_information(a: Floats, b: Floats, total: Floats) -> Floats:
    """[C]: the mutual information in nats, averaged over all labellings with these sizes (Vinh et al., eq. 24a).

    `a` [C, K] are sizes of clusters, `b` [C, G] sizes of groups, `total` [C] their sums. A term depends only on the
    size of the cluster, the size of the group and the total. Heads share most terms, so each is computed once.
    """
    triples = np.stack(np.broadcast_arrays(a[:, :, None], b[:, None, :], total[:, None, None]), axis=-1)
    wanted = (triples > 0).all(axis=-1)
    if not wanted.any():
        return np.zeros(len(a))
    base = int(total.max()) + 1
    keys = (triples[wanted] @ np.array([base * base, base, 1.0])).astype(np.int64)
    unique, inverse = np.unique(keys, return_inverse=True)
    x, y, n = unique // (base * base), unique // base % base, unique % base
    log_factorial = _log_factorials(base)
    both = np.arange(1, int(np.minimum(x, y).max()) + 1)[None, :]
    x, y, n = x[:, None], y[:, None], n[:, None]
    possible = (both <= np.minimum(x, y)) & (both >= x + y - n)
    both = np.where(possible, both, np.maximum(1, x + y - n))
    chance = (
        log_factorial[x]
        + log_factorial[y]
        + log_factorial[n - x]
        + log_factorial[n - y]
        - log_factorial[n]
        - log_factorial[both]
        - log_factorial[x - both]
        - log_factorial[y - both]
        - log_factorial[n - x - y + both]
    )
    terms = both / n * (np.log(n) + np.log(both) - np.log(x) - np.log(y)) * np.exp(chance)
    result = np.zeros(wanted.shape)
    result[wanted] = np.where(possible, terms, 0).sum(axis=1)[inverse]
    return np.asarray(result.sum(axis=(1, 2)))

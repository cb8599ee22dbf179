"""Random numbers for compiled code: a stream for each seed and purpose, the same on every machine."""

import numpy as np
from numpy.typing import NDArray

from batchjob.clustering.jit import inner


@inner
def uniform(state: NDArray[np.uint64]) -> float:
    """Draws the next number in [0, 1) of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); `state` [1] advances."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    word = state[0]
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word = word ^ (word >> np.uint64(31))
    return float(word >> np.uint64(11)) * 2.0**-53


@inner
def seed_stream(state: NDArray[np.uint64], seed: int, stream: int) -> None:
    """Sets the state of a random stream.

    Parameters
    ----------
    state
        uint64 [1], written.
    seed, stream
        Every pair of numbers gives a stream of its own.
    """
    state[0] = np.uint64(seed) + np.uint64(stream) * np.uint64(0xD1342543DE82EF95)
    uniform(state)
    state[0] ^= np.uint64(uniform(state) * 2.0**53)


@inner
def draw(running: NDArray[np.float64], state: NDArray[np.uint64]) -> int:
    """Draws an index in proportion to weights.

    Parameters
    ----------
    running
        [n] running sums of the weights.
    state
        uint64 [1]; it advances.

    Returns
    -------
    From 0 to n − 1.
    """
    low, high = 0, len(running) - 1
    target = uniform(state) * running[high]
    while low < high:
        middle = (low + high) // 2
        if running[middle] > target:
            high = middle
        else:
            low = middle + 1
    return low

"""Writes numbers as text: with a true minus sign, with a dash where there is no value, differences with their sign."""

from collections.abc import Sequence

import numpy as np

SEEDS = 3  # of untrained runs that the null `random` should be a mean of
_WORDS = ("no", "one", "two", "three")


def number(value: float, digits: int = 3) -> str:
    """Writes a value with a true minus sign, or a dash if it is NaN or infinite.

    Parameters
    ----------
    value
        Any number.
    digits
        How many follow the decimal point.

    Returns
    -------
    `−0.123`; a value that rounds to zero has no sign.
    """
    return "–" if not np.isfinite(value) else f"{value:z.{digits}f}".replace("-", "−")


def gain(value: float, digits: int = 3) -> str:
    """Writes a difference with its sign, or a dash if it is NaN or infinite.

    Parameters
    ----------
    value, digits
        As `number`.

    Returns
    -------
    `+0.123`; a difference that rounds to zero has no sign.
    """
    if not np.isfinite(value):
        return "–"
    text = f"{value:+z.{digits}f}".replace("-", "−")
    return text if text.strip("+0.") else text[1:]


def gain_interval(low: float, high: float, digits: int = 3) -> str:
    """Writes the interval of a difference.

    Parameters
    ----------
    low, high
        Its ends.
    digits
        As `number`.

    Returns
    -------
    `[+0.123, +0.456]`; `[–]` where it has no ends.
    """
    return f"[{gain(low, digits)}, {gain(high, digits)}]" if np.isfinite([low, high]).all() else "[–]"


def mean_interval(low: float, high: float) -> str:
    """Writes the interval of a mean.

    Parameters
    ----------
    low, high
        Its ends.

    Returns
    -------
    `[0.123, 0.456]`; `[–]` where it has no ends.
    """
    return f"[{number(low)}, {number(high)}]" if np.isfinite([low, high]).all() else "[–]"


def p_value(value: float, *, enough: bool = True) -> str:
    """Writes a p-value for a sentence.

    Parameters
    ----------
    value
        The p-value.
    enough
        Whether there are enough images for a claim (`metrics.uncertainty.is_enough`).

    Returns
    -------
    `p = 0.012`, `p < 0.001`, or `p unknown` for NaN; `too few to say` where the images are not enough.
    """
    if not enough:
        return "too few to say"
    text = p_number(value)
    return "p unknown" if text == "–" else f"p {text}" if text.startswith("<") else f"p = {text}"


def seeds(count: int) -> str:
    """Says how many seeds of untrained runs there are: `three seeds`, or `one seed where three are asked for`."""
    number = _WORDS[count] if count < len(_WORDS) else str(count)
    asked = "" if count >= SEEDS else f" where {_WORDS[SEEDS]} are asked for"
    return f"{number} seed{'s' * (count != 1)}{asked}"


def listed(words: Sequence[str]) -> str:
    """Joins words for a sentence: `a`, `a and b`, or `a, b and c`."""
    return " and ".join([part for part in (", ".join(words[:-1]), *words[-1:]) if part])


def p_number(value: float, *, enough: bool = True) -> str:
    """Writes a p-value for a table.

    Parameters
    ----------
    value, enough
        As `p_value`.

    Returns
    -------
    `0.012`, `< 0.001`, or a dash for NaN; `too few` where the images are not enough.
    """
    if not np.isfinite(value):
        return "–"
    return "too few" if not enough else "< 0.001" if value < 1e-3 else f"{value:.2g}"

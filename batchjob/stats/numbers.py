"""Figures as text: a true minus sign, a dash for nothing, a sign before a difference."""

import numpy as np


def number(value: float, digits: int = 3) -> str:
    """A value with a true minus sign; a dash where it is not known.

    Parameters
    ----------
    value
        Any number.
    digits
        Behind the point.
    """
    return "–" if not np.isfinite(value) else f"{value:z.{digits}f}".replace("-", "−")


def gain(value: float, digits: int = 3) -> str:
    """A difference with its sign, unless it rounds to nothing; a dash where it is not known.

    Parameters
    ----------
    value
        Any number.
    digits
        Behind the point.
    """
    if not np.isfinite(value):
        return "–"
    text = f"{value:+z.{digits}f}".replace("-", "−")
    return text if text.strip("+0.") else text[1:]


def p_value(value: float) -> str:
    """`p = 0.012`; `p < 0.001` for less, since the tests draw 100,000 flips."""
    return "p unknown" if not np.isfinite(value) else "p < 0.001" if value < 1e-3 else f"p = {value:.2g}"

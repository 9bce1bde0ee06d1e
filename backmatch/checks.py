"""Settings are checked where they enter, and refused rather than rewritten."""

from __future__ import annotations

import math


def check_in(name: str, value: float, low: float, high: float = math.inf, *, low_open: bool = False, high_open: bool = True) -> None:
    """Raise unless ``value`` lies in the interval from ``low`` to ``high``; NaN lies in none.

    Args:
        name: How the user calls the setting.
        value: The value seen.
        low: Lower end, allowed itself unless ``low_open``.
        high: Upper end, excluded itself unless ``high_open`` is False.

    Raises:
        TypeError: If ``value`` is not a real number.
        ValueError: If ``value`` is outside; the text says which values are allowed.
    """
    allowed = f"{'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Invalid {name}: {value!r} ({type(value).__name__}). Must be a number in {allowed}.")
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):
        raise ValueError(f"Invalid {name}: {value}. Must be in {allowed}.")

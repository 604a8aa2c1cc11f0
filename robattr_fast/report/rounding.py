"""Numbers as people read them, rounded to the safe side: what is printed holds too."""

from __future__ import annotations

import math


def percent(share: float) -> str:
    """A certified share, rounded down."""
    return f"{math.floor(1000 * share + 1e-9) / 10:.1f} %"


def rounded_cosine(value: float) -> str:
    """A certified cosine, rounded down to three digits."""
    return f"{math.floor(1000 * value) / 1000:.3f}".removeprefix("0")


def radius(value: float) -> str:
    """A certified radius, rounded down to three significant digits (what is certified holds below it)."""
    if value <= 0 or math.isinf(value):
        return "0" if value <= 0 else "any"
    digits = 2 - math.floor(math.log10(value))
    return f"{math.floor(value * 10**digits) / 10**digits:.{max(0, digits)}f}"

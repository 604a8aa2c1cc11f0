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


def grey_levels(radius: float) -> int:
    """How many values (of 256 grey levels) may change by one level each within an L2 radius, for values in [0, 1]."""
    return math.floor((255 * radius) ** 2 * (1 + 1e-12))


def psnr(radius: float, values: int) -> float:
    """Of an image of so many values in [0, 1] with any other within an L2 radius: at least so many dB, or infinite."""
    return math.inf if radius == 0 else 10 * math.log10(values / radius**2)


def rounded_psnr(decibels: float) -> str:
    """Rounded down."""
    return "any" if math.isinf(decibels) else f"{math.floor(10 * decibels) / 10:.1f} dB"

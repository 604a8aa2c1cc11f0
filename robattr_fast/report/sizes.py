"""Sizes of a top set, as a person gives them: a count of elements, or a share of all."""

from __future__ import annotations

from robattr_fast.reference._select import selected


def checked_size(k: float) -> float:
    """A share in (0, 1/2], or a count: an int >= 1. Raises ValueError."""
    if k >= 1 and k == int(min(k, 2**53)):
        return int(k)
    if not 0 < k <= 0.5:
        raise ValueError(f"k: got {k}, expected a share of the elements in (0, 0.5], or a number of them (1, 50)")
    return k


def top_size(k: float, n: int) -> int:
    """The number of elements in the top set of a map of ``n``. Raises ValueError where that is more than half of it."""
    size = int(k) if k >= 1 else selected(k, n)
    if not 1 <= size <= n // 2:
        raise ValueError(f"k: got {size} of the {n} elements of a map, expected at most half of them, {n // 2}")
    return size


def size_words(k: float) -> str:
    """``20 %``, or ``50``."""
    return f"{int(k)}" if k >= 1 else f"{100 * k:.3g} %"

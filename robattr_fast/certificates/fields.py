"""What values the fields of `Settings` may have: their types, ranges and sizes, whoever wrote them.

A check returns the value as it is stored: plain ints and floats, tuples for lists. It raises TypeError or ValueError;
the message names the field and shows what it got as repr does, so that nothing in a file reaches a terminal unescaped.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

Check = Callable[[str, Any], Any]

_LONGEST = 1000
_SHOWN = 80


def shown(value: Any) -> str:
    """A value in a message: as repr shows it, cut to one line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def boolean(name: str, value: Any) -> bool:
    """True or False, no number."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {shown(value)}")
    return value


def integer(low: int, high: int) -> Check:
    """An integer in [low, high], no bool; numpy's too."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer, got {shown(value)}")
        if not low <= int(value) <= high:
            raise ValueError(f"{name} must lie in {low}..{high}, got {shown(value)}")
        return int(value)

    return check


def number(low: float, high: float, *, beyond: bool = False) -> Check:
    """A number in [low, high], or (low, high] if ``beyond``; no bool, no NaN."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {shown(value)}")
        # Written so that NaN fails; integers beyond the range of floats are compared as they are.
        size = int(value) if isinstance(value, numbers.Integral) else float(value)
        if not low <= size <= high or (beyond and size == low):
            raise ValueError(f"{name} must lie in {'(' if beyond else '['}{low:g}, {high:g}], got {shown(value)}")
        return float(value)

    return check


def text(name: str, value: Any) -> str:
    """Printable characters on one line: names end up in tables, pages and terminals."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {shown(value)}")
    if not value.isprintable() or len(value) > _LONGEST:
        raise ValueError(f"{name} must be at most {_LONGEST} printable characters, got {shown(value)}")
    return value


def one_of(*values: Any) -> Check:
    """One of a few names."""

    def check(name: str, value: Any) -> Any:
        if not any(value is one or (isinstance(value, str) and value == one) for one in values):
            raise ValueError(f"{name}: got {shown(value)}, expected one of {', '.join(map(str, values))}")
        return value

    return check


def optional(check: Check) -> Check:
    """The same, or None."""
    return lambda name, value: None if value is None else check(name, value)


def each(check: Check, *, fewest: int = 0, most: float = math.inf) -> Check:
    """A tuple (or a list) of such values."""

    def check_all(name: str, value: Any) -> tuple:
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{name} must be a sequence, got {shown(value)}")
        if not fewest <= len(value) <= most:
            raise ValueError(f"{name} must have {fewest} to {most} entries, got {len(value)}")
        return tuple(check(name, one) for one in value)

    return check_all


def names(name: str, value: Any) -> dict[str, str]:
    """Texts by their names."""
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be a dict, got {shown(value)}")
    return {text(name, key): text(f"{name}[{shown(key)}]", one) for key, one in value.items()}


def intervals(name: str, value: Any) -> tuple:
    """Sorted, disjoint, half-open pairs of sample indices."""
    pairs = each(each(integer(0, 2**32), fewest=2, most=2))(name, value)
    edges = [edge for pair in pairs for edge in pair]
    if edges != sorted(edges) or any(first == end for first, end in pairs):
        raise ValueError(f"{name} must be sorted, disjoint pairs (first, end), got {shown(value)}")
    return pairs

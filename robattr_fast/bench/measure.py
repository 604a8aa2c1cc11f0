"""Sides measured in turns within one run, and what their rounds say: medians, spread, ratios, targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robattr_fast.bench.process import Process, SideError

OURS = "robattr_fast"
"""The label of our side."""

FLOOR = "floor"
"""In place of a peer: the time in which the bytes that must move can move."""

Rounds = dict[str, list[dict[str, Any]]]
"""What each side said, round by round; a side that cannot run has none."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75])
    return {"median": float(middle), "q1": float(low), "q3": float(high)}


def rates(rounds: list[dict[str, Any]]) -> list[float]:
    """Seconds per unit of work of each round."""
    return [one["seconds"] / one["units"] for one in rounds]


@dataclass
class Result:
    """What one entry found; ``to_json`` is its record but for the provenance.

    Attributes:
        entry, title, unit: of the `registry.Entry`.
        gate: "ok", or why what would have been measured computes something wrong. Then nothing else is set.
        sides: per label median, q1, q3 of time per unit of work in ``unit``, or ``error``, why it cannot run.
        ratios: held against targets; see `ratio` and `limit`.
        floor: time per unit of work that moving the bytes takes, in ``unit``, and how it was found.
        details: whatever else the entry tells.
        base: the commit that was measured beside, or None.
    """

    entry: str
    title: str
    unit: str
    gate: str = "ok"
    sides: dict[str, dict[str, Any]] = field(default_factory=dict)
    ratios: list[dict[str, Any]] = field(default_factory=list)
    floor: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    quick: bool = False
    base: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dict(vars(self))

    @property
    def failed(self) -> bool:
        """Whether the gate is red, or our own side could not run."""
        return self.gate != "ok" or "error" in self.sides.get(OURS, {})


def interleave(
    sides: dict[str, tuple[Process, str]], rounds: int, told: Callable[[str], None] = lambda what: None
) -> tuple[Rounds, dict[str, str]]:
    """Round after round of every side in turn; also why a side stopped running, which ends it alone.

    sides: per label its process and the key under which it was prepared.
    """
    found: Rounds = {label: [] for label in sides}
    errors: dict[str, str] = {}
    for number in range(rounds):
        for label, (process, key) in sides.items():
            if label in errors:
                continue
            told(f"round {number + 1} of {rounds}: {label}")
            try:
                found[label].append(process.round(key))
            except SideError as error:
                errors[label] = short(error)
    return found, errors


def short(error: BaseException) -> str:
    """The first sentence."""
    return str(error).splitlines()[0].split(". ")[0][:200]


def ratio(peer: list[float], ours: list[float], *, of: str, target: float | None) -> dict[str, Any]:
    """How many times the peer's time is ours, by rounds measured next to each other; ``target``: at least."""
    factors = spread([a / b for a, b in zip(peer, ours, strict=True)])
    met = None if target is None else factors["median"] >= target
    return {"of": of, **factors, "unit": "times", "sense": "at least", "target": target, "met": met}


def limit(values: Sequence[float], *, of: str, unit: str, target: float | None) -> dict[str, Any]:
    """Something that is to stay small; ``target``: at most."""
    found = spread(values)
    met = None if target is None else found["median"] <= target
    return {"of": of, **found, "unit": unit, "sense": "at most", "target": target, "met": met}

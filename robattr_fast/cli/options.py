"""Values of options that several commands take, checked."""

from __future__ import annotations

import math

import torch

DEFAULT_RADII = (0.01, 0.03, 0.06)


def checked_radii(radii: list[float] | None) -> list[float]:
    """Sorted, each once; the default if none was given."""
    for radius in radii or ():
        if not (math.isfinite(radius) and radius >= 0):
            raise ValueError(f"radius: got {radius}, takes a finite number >= 0")
    return sorted(set(radii or DEFAULT_RADII))


def checked_share(k: float) -> float:
    """The size of a top set as a share of all elements."""
    if not 0 < k <= 0.5:
        raise ValueError(f"k: got {k}, takes a share of the elements in (0, 0.5]")
    return k


def at_least_one(name: str, value: int) -> int:
    """A positive integer."""
    if value < 1:
        raise ValueError(f"{name}: got {value}, takes an integer >= 1")
    return value


def checked_device(device: str | None) -> torch.device:
    """cpu or cuda; the default is cuda where there is one."""
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device: got {device!r}, takes cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch sees no CUDA device (robattr-fast doctor says more)")
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

"""What the selection operators share: how many elements a fraction selects, and the type scores are compared in."""

from __future__ import annotations

import math

import torch


def selected(fraction: float, n: int) -> int:
    """k = max(1, floor(fraction * n + 1e-9)); the small term makes .29 of 100 elements 29, as on paper."""
    return max(1, math.floor(fraction * n + 1e-9))


def comparable(scores: torch.Tensor) -> torch.Tensor:
    """Scores as they are compared: float32, or float64 if they are float64."""
    return scores if scores.dtype == torch.float64 else scores.to(torch.float32)

"""Argument checks shared by the operators: each names the argument, what it got and what it takes."""

from __future__ import annotations

import math

import torch

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_LEVELS = 15  # with level 0 sixteen values: a nibble


def float_tensor(name: str, value: object, *, min_dim: int = 1) -> torch.Tensor:
    """A non-empty floating-point tensor of at least ``min_dim`` dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, takes a tensor")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got dtype {value.dtype}, takes float32, float64, bfloat16 or float16")
    if value.dim() < min_dim:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, takes at least {min_dim} dimensions")
    if value.numel() == 0:
        raise ValueError(f"{name}: got the empty shape {tuple(value.shape)}, takes at least one element")
    return value


def comparable_dtype(scores: torch.Tensor) -> torch.dtype:
    """The dtype of everything computed from scores: float32, or float64 for float64."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def positive(name: str, value: float) -> float:
    """A finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value}, takes a finite number > 0")
    return float(value)


def temperature(value: float) -> float:
    """A finite number above zero; a tensor would lose its gradient in silence."""
    if isinstance(value, torch.Tensor):
        raise TypeError("temperature: got a tensor, takes a number: nothing is differentiated in it")
    return positive("temperature", value)


def integer(name: str, value: int, low: int, high: int) -> int:
    """An integer in [low, high]."""
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, takes an integer")
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, takes an integer in [{low}, {high}]")
    return value


def fractions(tau: float, gamma: float | None) -> tuple[float, float]:
    """tau in (0, 1] and gamma in (0, tau]; gamma=None means tau."""
    if not 0 < tau <= 1:
        raise ValueError(f"tau: got {tau}, takes a fraction in (0, 1]")
    if gamma is not None and not 0 < gamma <= tau:
        raise ValueError(f"gamma: got {gamma}, takes a fraction in (0, tau={tau}], or None for tau")
    return float(tau), float(tau if gamma is None else gamma)


def seed(value: int) -> int:
    """0 <= seed < 2^64, as the int64 with the same bits."""
    integer("seed", value, 0, 2**64 - 1)
    return value - 2**64 if value >= 2**63 else value

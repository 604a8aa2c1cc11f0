"""Argument checks shared by the operators: each names the argument, what it got and what it takes."""

from __future__ import annotations

import math
import numbers

import torch

from robattr_fast.reference._pack_levels import packed_row_bytes

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_LEVELS = 15  # with level 0 sixteen values: a nibble
MAX_COUNT = 2**31 - 1
# Asking the abstract classes alone would take longer than a small kernel.
_INTEGRAL, _REAL = (int, numbers.Integral), (float, int, numbers.Real)
INDEX_END = 2**32  # sample indices and image ids are one 32-bit word of the counter


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


def positive(name: str, value: float, expected: str = "a finite number > 0") -> float:
    """A finite number above zero; ``expected`` is what an error says."""
    if not isinstance(value, _REAL):
        raise TypeError(f"{name}: got {type(value).__name__}, takes {expected}")
    if not 0 < value < math.inf:  # torch.compile traces no math.isfinite of a number that varies
        raise ValueError(f"{name}: got {value}, takes {expected}")
    return float(value)


def not_negative(name: str, value: float) -> float:
    """A finite number, zero or above."""
    return 0.0 if isinstance(value, _REAL) and value == 0 else positive(name, value, expected="a finite number >= 0")


def temperature(value: float) -> float:
    """A finite number above zero; a tensor would lose its gradient in silence."""
    if isinstance(value, torch.Tensor):
        raise TypeError("temperature: got a tensor, takes a number: nothing is differentiated in it")
    return positive("temperature", value)


def integer(name: str, value: int, low: int, high: int) -> int:
    """An integer in [low, high], of Python or numpy."""
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, _INTEGRAL):
        raise TypeError(f"{name}: got {type(value).__name__}, takes an integer")
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, takes an integer in [{low}, {high}]")
    return int(value)


def fractions(tau: float, gamma: float | None) -> tuple[float, float]:
    """tau in (0, 1] and gamma in (0, tau]; gamma=None means tau."""
    if not 0 < tau <= 1:
        raise ValueError(f"tau: got {tau}, takes a fraction in (0, 1]")
    if gamma is not None and not 0 < gamma <= tau:
        raise ValueError(f"gamma: got {gamma}, takes a fraction in (0, tau={tau}], or None for tau")
    return float(tau), float(tau if gamma is None else gamma)


def seed(value: int) -> int:
    """0 <= seed < 2^64, as the int64 with the same bits."""
    value = integer("seed", value, 0, 2**64 - 1)
    return value - 2**64 if value >= 2**63 else value


def image_ids(value: torch.Tensor | None, batch: int) -> None:
    """None, or int64 [batch]; what they hold is judged by `given_image_ids`."""
    if value is not None and (value.dtype != torch.int64 or value.shape != (batch,)):
        raise ValueError(f"image_ids: got {value.dtype} {tuple(value.shape)}, takes int64 {(batch,)}")


def given_image_ids(value: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Ids in [0, 2^32) on x's device, contiguous, by default arange(B)."""
    if value is None:
        return torch.arange(x.shape[0], device=x.device)
    if not bool(((value >= 0) & (value < INDEX_END)).all()):
        raise ValueError(f"image_ids: got {value.tolist()}, takes integers in [0, 2^32)")
    return value.to(x.device).contiguous()


def sample_offset(value: torch.Tensor | None, x: torch.Tensor) -> None:
    """None, or int64 [1] or [B] on x's device; what it holds is judged by `sample_indices`."""
    if value is None:
        return
    batch = x.shape[0]
    if value.dtype != torch.int64 or value.shape not in ((1,), (batch,)) or value.device != x.device:
        got, takes = f"{value.dtype} {tuple(value.shape)} on {value.device}", "" if batch == 1 else f" or {(batch,)}"
        raise ValueError(f"sample_offset: got {got}, takes int64 (1,){takes} on x's device, {x.device}")


def sample_indices(first_sample: int, offset: torch.Tensor | None, num_samples: int) -> None:
    """All below 2^32, where the offset can be read without waiting for a device."""
    if offset is not None and offset.device.type == "cpu":
        for first in offset.tolist():
            integer("first_sample + sample_offset", first_sample + first, 0, INDEX_END - num_samples)


def counts(
    value: torch.Tensor, packed: torch.Tensor | None, batch: int, samples: int, n: int, device: torch.device
) -> None:
    """counts int32 [batch, n, L] and packed uint8 [batch, samples, row_bytes] that a kernel can write into."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"counts: got {type(value).__name__}, takes a tensor")
    if value.dtype != torch.int32:
        raise TypeError(f"counts: got dtype {value.dtype}, takes int32")
    if value.dim() != 3 or value.shape[:2] != (batch, n):
        raise ValueError(f"counts: got shape {tuple(value.shape)}, takes [{batch}, {n}, L]")
    integer("counts.shape[2] (L)", value.shape[2], 1, MAX_LEVELS)
    integer("n * L", n * value.shape[2], 1, MAX_COUNT)
    _written("counts", value, device)
    if packed is None:
        return
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"packed: got {type(packed).__name__}, takes a tensor or None")
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: got dtype {packed.dtype}, takes uint8")
    shape = (batch, samples, packed_row_bytes(n, value.shape[2]))
    if packed.shape != shape:
        raise ValueError(f"packed: got shape {tuple(packed.shape)}, takes {shape}")
    _written("packed", packed, device)


def _written(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}, takes {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {tensor.stride()}, takes a contiguous tensor")

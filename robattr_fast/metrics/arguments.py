"""What every metric does with its maps."""

from __future__ import annotations

import torch

from robattr_fast.ops import _check


def check_maps(name: str, maps: torch.Tensor) -> None:
    """A float batch of maps [B, *M]."""
    _check.float_tensor(name, maps, min_dim=2)


def check_pair(a: torch.Tensor, b: torch.Tensor) -> None:
    """Two float batches of maps of one shape [B, *M], on one device."""
    check_maps("a", a)
    check_maps("b", b)
    if a.shape != b.shape:
        raise ValueError(f"a, b: got shapes {tuple(a.shape)} and {tuple(b.shape)}, expected two equal shapes [B, *M]")
    if a.device != b.device:
        raise ValueError(f"a, b: got devices {a.device} and {b.device}, expected one")


def varies(maps: torch.Tensor) -> torch.Tensor:
    """Which maps [B, *M] are finite and not constant, bool [B]: of the others no metric says anything."""
    least, most = torch.aminmax(maps.detach().flatten(1), dim=1)  # NaN is both
    return torch.isfinite(least) & torch.isfinite(most) & (least < most)


def where_both_vary(value: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """float64 [B]: ``value`` where both maps vary, else NaN."""
    return torch.where(varies(a) & varies(b), value.double(), torch.nan)

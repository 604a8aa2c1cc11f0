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


def both_vary(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where both maps do, bool [B]."""
    return varies(a) & varies(b)


def float64_rows(maps: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """maps [B, *M] in float64; in place of those that are not ``known`` a ramp, which has a value and no NaN in its
    gradient, that would reach the others by way of what they share.
    """
    ramp = torch.arange(maps[0].numel(), dtype=torch.float64, device=maps.device).view(maps.shape[1:])
    return torch.where(known.view(-1, *[1] * (maps.dim() - 1)), maps.double(), ramp)


def where_known(value: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """float64 [B]: ``value`` where it is known, else NaN."""
    return torch.where(known, value.double(), torch.nan)

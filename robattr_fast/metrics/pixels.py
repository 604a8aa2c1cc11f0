"""What is certified pixel by pixel, and where it lies: measures of Anani, Lorenz, Fritz, Schiele (ICML 2025)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from robattr_fast.metrics.arguments import check_maps
from robattr_fast.ops import _check


class CertifiedShares(NamedTuple):
    """Shares of the pixels of a map, float64 [B], which sum to 1."""

    top: torch.Tensor
    """Certified to be selected, that is, among the largest of most noisy copies."""
    rest: torch.Tensor
    """Certified not to be."""
    abstained: torch.Tensor

    @property
    def certified(self) -> torch.Tensor:
        """Certified either way: "%certified" of the paper."""
        return self.top + self.rest


def certified_shares(pixels: torch.Tensor) -> CertifiedShares:
    """How many pixels are certified. pixels: int8 [B, *M] of 1, -1 and 0, as `Certificate.pixels` gives at one radius.

    The code of the paper says "top" or "rest" where more than tau of the samples do, and derives the radius
    sigma Phi^-1(tau): ask for ``certificate.pixels(sigma * Phi^-1(tau))`` to compare.
    """
    if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.int8:
        raise TypeError(f"pixels: got {getattr(pixels, 'dtype', type(pixels).__name__)}, expected int8")
    if pixels.dim() < 2 or pixels.numel() == 0:
        raise ValueError(f"pixels: got shape {tuple(pixels.shape)}, expected [B, *M]")
    return CertifiedShares(*((pixels == sign).flatten(1).double().mean(dim=1) for sign in (1, -1, 0)))


def localization(maps: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """The share of what is positive in maps [B, *M] that lies in a region, float64 [B].

    On a grid of images (`image_grid`), with a map of the class of one cell and the region of that cell, this is the
    grid pointing game (Böhle, Fritz, Schiele 2021; Rao, Böhle, Schiele 2022): 1/4 by chance on 2 x 2. Certified
    localization (Anani et al. 2025) is that of the pixels certified to be selected:
    ``localization((certificate.pixels(radius) == 1).float(), region)``.

    Args:
        maps: float [B, *M]; negative values count as 0. Sum over channels before.
        region: bool, M or [B, *M].

    NaN where nothing is positive (where the code of these papers has 0), or a map is not finite.
    """
    check_maps("maps", maps)
    if region.dtype != torch.bool:
        raise TypeError(f"region: got dtype {region.dtype}, expected bool")
    if region.shape not in (maps.shape, maps.shape[1:]):
        raise ValueError(f"region: got shape {tuple(region.shape)}, expected {tuple(maps.shape)} or without its B")
    region = region.to(maps.device)
    positive = maps.double().clamp(min=0)
    inside, total = ((positive * where).flatten(1).sum(dim=1) for where in (region, torch.ones_like(region)))
    known = (total > 0) & torch.isfinite(maps.detach()).flatten(1).all(dim=1)
    return torch.where(known, inside / torch.where(total > 0, total, 1), torch.nan)


def image_grid(images: torch.Tensor) -> torch.Tensor:
    """n * n images [n * n, C, H, W] as one, [1, C, n * H, n * W], row by row from the top left."""
    _check.float_tensor("images", images, min_dim=4)
    side = math.isqrt(len(images))
    if images.dim() != 4 or side * side != len(images):
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected [n * n, C, H, W]")
    rows = [torch.cat(list(images[row * side : (row + 1) * side]), dim=-1) for row in range(side)]
    return torch.cat(rows, dim=-2)[None]


def grid_regions(height: int, width: int, side: int = 2) -> torch.Tensor:
    """The cells of a side x side grid of this size in pixels, bool [side * side, height, width], as `image_grid`."""
    side = _check.integer("side", side, 1, 2**15)
    for name, length in (("height", height), ("width", width)):
        if _check.integer(name, length, 1, 2**31 - 1) % side:
            raise ValueError(f"{name}: got {length}, expected a multiple of {side}")
    row = torch.arange(height) // (height // side)
    column = torch.arange(width) // (width // side)
    return (row[:, None] * side + column) == torch.arange(side * side)[:, None, None]

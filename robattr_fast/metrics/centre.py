"""How far the centre of mass of a map moves."""

from __future__ import annotations

import torch

from robattr_fast.metrics.arguments import both_vary, check_maps, check_pair, float64_rows, where_known


def centre(maps: torch.Tensor) -> torch.Tensor:
    """Centre of mass of absolute values, float64 [B, 2] as (row, column), in pixels from the first.

    maps: [B, H, W], or [B, C, ..., H, W], of which the sizes are summed over what comes before H. Maps [B, N] of one
    dimension have a centre [B, 1]. Differentiable.
    """
    check_maps("maps", maps)
    sizes = maps.double().abs()
    if sizes.dim() > 3:
        sizes = sizes.flatten(1, -3).sum(dim=1)
    total = sizes.flatten(1).sum(dim=1)
    found = []
    for dim in range(1, sizes.dim()):
        others = [other for other in range(1, sizes.dim()) if other != dim]
        along = sizes.sum(dim=others) if others else sizes
        found.append((along * torch.arange(sizes.shape[dim], device=maps.device)).sum(dim=1) / total)
    return torch.stack(found, dim=1)


def centre_shift(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distance between the centres of mass of maps [B, *M] (`centre`), in pixels, float64 [B].

    The measure of Ghorbani et al. 2019, whose code cuts both coordinates down to integers first. Differentiable where
    the centres differ. NaN where a map is constant or not finite.
    """
    check_pair(a, b)
    known = both_vary(a, b)
    first, second = (centre(float64_rows(maps, known)) for maps in (a, b))
    return where_known((first - second).norm(dim=1), known)

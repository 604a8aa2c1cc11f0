"""How alike two maps are, by their values: cosine."""

from __future__ import annotations

import torch

from robattr_fast.metrics.arguments import check_pair, where_both_vary


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a . b / (|a| |b|) of maps [B, *M], float64 [B] in [-1, 1]: a similarity, where Quantus returns 1 minus it.

    Differentiable. NaN where a map is constant or not finite.
    """
    check_pair(a, b)
    x, y = (maps.flatten(1).double() for maps in (a, b))
    # Scaled first: squares of small gradients vanish even in float64.
    x, y = (rows / rows.detach().abs().amax(dim=1, keepdim=True) for rows in (x, y))
    value = (x * y).sum(dim=1) / (x.norm(dim=1) * y.norm(dim=1))
    return where_both_vary(value.clamp(-1, 1), a, b)

"""How much two maps agree on their largest elements."""

from __future__ import annotations

import torch

from robattr_fast.ops import _check


def top_k(values: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the k largest of the last dimension, bool [..., n]; ties go to the lowest index."""
    order = values.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, True)


def overlap(a: torch.Tensor, b: torch.Tensor, k: int) -> torch.Tensor:
    """|top-k(a) & top-k(b)| / k of two batches of maps [B, *M], float64 [B]; ties go to the lowest index.

    The measure R(x, x~, K) of Levine et al. 2019, and what `Certificate.overlap` bounds from below.
    """
    if a.shape != b.shape or a.dim() < 2:
        raise ValueError(f"a, b: got shapes {tuple(a.shape)} and {tuple(b.shape)}, takes two equal shapes [B, *M]")
    _check.integer("k", k, 1, a[0].numel())
    return (top_k(a.flatten(1), k) & top_k(b.flatten(1), k)).sum(dim=1).double() / k

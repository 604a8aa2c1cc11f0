"""The soft top-k of each row, sigmoids that sum to k: the definition.

Source: the entropic relaxation of "choose k of n" (Xie et al., "Differentiable Top-k with Optimal Transport", 2020) in
its closed form: over all h in [0, 1]^n that sum to k, h maximises s.h plus T times the binary entropy of h.
"""

from __future__ import annotations

import math

import torch

from robattr_fast.reference._select import comparable
from robattr_fast.reference.topk_threshold import topk_threshold

_LOWEST = -750.0  # exp(-750) = 0 in float64


def soft_topk(scores: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scores [..., n], 0 < k < n, T = temperature > 0 -> h [..., n], pivot [...], offset [...].

    h_i = sigmoid((s_i - nu) / T) with the one nu for which sum h = k; nu = pivot + T offset, the pivot being the k-th
    largest score. In these terms nu keeps its digits where T is small, and the offset lies between two bounds: at
    ln(n - k + 1) the n - k + 1 sigmoids from the pivot down sum to less than 1, hence all to less than k; at -750 the
    largest k are 1. Between them it is found by bisection.

    Computed in float64; h and pivot are float32, or float64 for float64 scores; the offset is float64. A row that holds
    NaN or inf gives NaN.
    """
    scores = comparable(scores)
    pivot = topk_threshold(scores, k)
    u = (scores.double() - pivot.double()[..., None]) / temperature
    low = torch.full_like(u[..., :1], _LOWEST)
    high = torch.full_like(low, math.log(scores.shape[-1] - k + 1))
    for _ in range(64):
        x = u - (low + high) / 2
        # The sum of h less k: sigmoids near 1 by what they lack, so that nothing cancels.
        share = torch.sigmoid(-x.abs())
        excess = torch.where(x >= 0, -share, share).sum(dim=-1, keepdim=True) + (x >= 0).sum(dim=-1, keepdim=True) - k
        low, high = torch.where(excess > 0, (low + high) / 2, low), torch.where(excess > 0, high, (low + high) / 2)
    valid = torch.isfinite(scores).all(dim=-1, keepdim=True)
    h = torch.where(valid, torch.sigmoid(u - low), torch.nan).to(scores.dtype)
    return h, torch.where(valid[..., 0], pivot, torch.nan), torch.where(valid, low, torch.nan)[..., 0]

"""The exact k-th largest score of each row: the definition."""

from __future__ import annotations

import torch

from robattr_fast.reference._select import comparable


def topk_threshold(scores: torch.Tensor, k: int) -> torch.Tensor:
    """scores [..., n] -> [...]: element k-1 of the row sorted in descending order, 1 <= k <= n.

    Equal elements count separately. NaN is larger than +inf, whatever its sign and payload. -0 equals +0, and a zero
    result is +0. float32 result, for float64 scores float64.
    """
    scores = comparable(scores)
    threshold = scores.sort(dim=-1, descending=True).values[..., k - 1]
    return torch.where(threshold == 0, 0.0, threshold)

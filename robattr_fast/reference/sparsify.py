"""The sparsified saliency map: the definition.

Source: Levine, Singla, Feizi, "Certifiably Robust Interpretation in Deep Learning" (arXiv 1905.12105), sparsified
SmoothGrad and its relaxation. Two things differ: at ties the support never exceeds k_tau, and the relaxed map may be
rounded to L+1 values, so that the smoothed map is a function of integer counts.
"""

from __future__ import annotations

import torch

from robattr_fast.reference._select import comparable, selected
from robattr_fast.reference.topk_threshold import topk_threshold


def level_values(levels: int, like: torch.Tensor) -> torch.Tensor:
    """l / L for l = 0..L, in the type of ``like``."""
    # Tensor by tensor: CUDA divides by a Python number through its rounded reciprocal.
    return torch.arange(levels + 1, dtype=like.dtype, device=like.device) / like.new_full((levels + 1,), levels)


def _support(scores, tau, gamma):
    """Comparable scores, their support, g = s_[k_gamma] and which rows are valid: the last two [..., 1]."""
    scores = comparable(scores)
    n = scores.shape[-1]
    k_tau = selected(tau, n)
    threshold = topk_threshold(scores, k_tau)[..., None]
    # Elements tied at the threshold are kept if all of them fit, else none: the support never exceeds k_tau.
    fits = (scores >= threshold).sum(dim=-1, keepdim=True) <= k_tau
    support = ((scores > threshold) | ((scores == threshold) & fits)) & (scores > 0)
    g = topk_threshold(scores, selected(tau if gamma is None else gamma, n))[..., None].clamp(min=0)
    return scores, support, g, torch.isfinite(scores).all(dim=-1, keepdim=True)


def sparsify_levels(
    scores: torch.Tensor, tau: float, gamma: float | None, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Level 0..L of every element (int64, the shape of scores) and which rows are valid (bool [..., 1])."""
    scores, support, g, valid = _support(scores, tau, gamma)
    level = torch.zeros(scores.shape, dtype=torch.int64, device=scores.device)
    for value in level_values(levels, scores)[:-1]:
        level += scores > g * value
    return torch.where(support, level, 0), valid


def sparsify(scores: torch.Tensor, tau: float, gamma: float | None = None, *, levels: int | None = 1) -> torch.Tensor:
    """scores [..., n] -> h [..., n] in [0, 1]; 0 < gamma <= tau <= 1, gamma=None means tau.

    The support is {i : s_i >= s_[k_tau], s_i > 0}, s_[j] the j-th largest score. On it, with g = max(s_[k_gamma], 0):
    ``levels=L`` gives h_i = l_i / L, l_i the number of l in 0..L-1 with s_i > g * (l / L), both operations rounded;
    ``levels=None`` gives h_i = min(s_i / g, 1), which is 1 where g = 0. Elsewhere h_i = 0.
    A row that holds NaN or inf has h = NaN. float32 result, for float64 scores float64.
    """
    if levels is None:
        scores, support, g, valid = _support(scores, tau, gamma)
        h = torch.where(support, torch.where(scores < g, scores / g, 1.0), 0.0)
    else:
        level, valid = sparsify_levels(scores, tau, gamma, levels)
        h = level_values(levels, comparable(scores))[level]
    return torch.where(valid, h, torch.nan)

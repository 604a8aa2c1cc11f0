"""Which elements provably stay in, or out of, the top-k of a smoothed map: one radius per element, in closed form.

Within radius rho of x, Phi^-1(p_j) moves by at most rho/sigma (T1). Element j cannot leave the top-k as long as at most
k elements, itself among them, may reach its own least value; it cannot enter as long as k others surely exceed its
greatest. All of Phi^-1(L) and all of Phi^-1(U) shift alike, so both conditions compare with one order statistic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.special import ndtri

from robattr_fast.ops import _check


class Membership(NamedTuple):
    """L2 radii in the units of x, float64 of the bounds' shape; 0 where nothing is certified, and never both > 0."""

    stays_in: torch.Tensor
    """Below this radius the element is in the top-k."""
    stays_out: torch.Tensor
    """Below this radius it is not."""


def membership(lower: torch.Tensor, upper: torch.Tensor, k: int, sigma: float) -> Membership:
    """The certified radii of membership in the top-k.

    Args:
        lower, upper: bounds of the smoothed map that hold all together, float64 [..., n] in [0, 1].
        k: 1 <= k < n.
        sigma: standard deviation of the noise, in the units of x.

    Raises:
        ValueError: k out of range.
    """
    k = _check.integer("k", k, 1, lower.shape[-1] - 1)
    low, high = ndtri(lower.double()), ndtri(upper.double())
    rival = high.topk(k + 1, dim=-1).values[..., -1:]
    bar = low.topk(k, dim=-1).values[..., -1:]
    # Equal infinities (values of exactly 0 or 1 at both ends) leave the inequality false, hence radius 0.
    stays_in = (low - rival).mul(sigma / 2).nan_to_num(nan=0.0, posinf=torch.inf).clamp_min(0)
    stays_out = (bar - high).mul(sigma / 2).nan_to_num(nan=0.0, posinf=torch.inf).clamp_min(0)
    return Membership(stays_in, stays_out)

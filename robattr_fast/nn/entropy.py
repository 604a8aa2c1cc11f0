"""The entropy of attention, and how little of it a bounded range of logits allows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from robattr_fast.ops import _check


class Entropy(NamedTuple):
    """Entropies in nats, one per row of weights, with ``lower <= value <= upper``."""

    value: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor


def attention_entropy(weights: torch.Tensor, keep: torch.Tensor | None = None) -> Entropy:
    """H = -sum_j a_j ln a_j of each row of attention weights, between log n - Delta^2 / 8 and log n.

    Delta = max_j l_j - min_j l_j is the range of the logits l_j = ln a_j, for softmax attention that of the scores
    q . k / sqrt(D). *Proof.* Let A(t) = ln (1/n) sum_j exp(t l_j), so that A'(t) and A''(t) are the mean and the
    variance of l under a(t) proportional to exp(t l). The divergence of a = a(1) from uniform is
    log n - H = A'(1) - A(1), the integral of t A''(t) over t in [0, 1]; and A''(t) <= Delta^2 / 4, as no variance
    within a range Delta is larger (Popoviciu). So the integral is at most Delta^2 / 8.

    Softmax attention whose logits have a small range is therefore close to uniform: the entropy constraint to which
    arXiv 2605.29983 attributes that robustness does not carry over to softmax attention.

    Args:
        weights: [..., n] >= 0, rows of any positive sum: each is divided by its own.
        keep: bool, broadcast to weights, True where the row sees the key: n is the number of these. None: all.

    Returns:
        Entropy(value, lower, upper), each [...], float32 or float64. ``lower`` is 0 where a key that is seen has the
        weight 0 (Delta infinite), and nowhere less. A row of zeros has value 0 and lower 0.

    Raises:
        TypeError, ValueError: no float tensor, negative or non-finite weights, a mask of another dtype.
    """
    _check.float_tensor("weights", weights)
    if keep is None:
        keep = torch.ones((), dtype=torch.bool, device=weights.device)
    elif keep.dtype != torch.bool:
        raise TypeError(f"keep: got dtype {keep.dtype}, takes bool (True = the row sees the key)")
    keep = keep.expand(weights.shape)
    weights = torch.where(keep, weights.to(_check.comparable_dtype(weights)), 0)
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("weights: got a negative or non-finite one, takes attention weights >= 0")
    total = weights.sum(-1, keepdim=True)
    share = weights / torch.where(total > 0, total, 1)
    positive = share > 0
    logs = torch.where(positive, share, 1).log()
    value = -(share * logs).sum(-1)
    seen = keep.sum(-1)
    upper = seen.clamp(min=1).to(share.dtype).log()
    spread = logs.masked_fill(~positive, -math.inf).amax(-1) - logs.masked_fill(~positive, math.inf).amin(-1)
    bounded = (positive == keep).all(-1) & (seen > 0)
    lower = torch.where(bounded, upper - spread.square() / 8, 0).clamp(min=0)
    return Entropy(value, lower, upper)

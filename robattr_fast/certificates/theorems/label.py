"""T6: the label certificate of randomized smoothing, from the class counts of the samples that made the map."""

from typing import NamedTuple

import torch
from torch.special import ndtri

from robattr_fast.certificates.theorems.bounds import marginal_bounds


class Prediction(NamedTuple):
    """The certified label of each image and the L2 radius, in the units of x, below which it holds."""

    label: torch.Tensor
    """int64 [B]; -1 abstains."""
    radius: torch.Tensor
    """float64 [B]; 0 where the label abstains."""


def certify_label(
    class_counts: torch.Tensor, samples: torch.Tensor, alpha: float, sigma: float, bound: str
) -> Prediction:
    """The class of the largest count with its certified radius sigma Phi^-1(L); abstains unless L > 1/2.

    L is the lower bound of the share of that class at level alpha/2. The half pays for choosing the class from the
    same samples: a class of share p <= 1/2 passes with chance at most p alpha, the one above 1/2 is overstated with
    chance at most alpha/2; together at most alpha.

    class_counts: int32 [B, classes], samples: int64 [B]. Samples without a class vote for none.
    Source: Cohen, Rosenfeld, Kolter, Certified adversarial robustness via randomized smoothing, ICML 2019.
    """
    most, label = class_counts.max(1)
    lower, _ = marginal_bounds(bound, alpha / 2, most[:, None, None], samples)
    lower = lower[:, 0]
    # A lower bound above 1/2 takes more than half of the samples, so that no tie passes.
    certified = lower > 0.5
    radius = torch.where(certified, sigma * ndtri(lower), 0.0)
    return Prediction(torch.where(certified, label, -1), radius)

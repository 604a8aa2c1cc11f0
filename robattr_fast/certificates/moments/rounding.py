"""Factors by which the formulas of T7 are rounded to the safe side (docs/second-moments.md, Rounding)."""

import torch

EPS = torch.finfo(torch.float64).eps

OUTWARD = 1e-9
"""Relative, added to a bound: floating-point noise of the formulas is some 1e-13."""
INWARD = 1 - 1e-9
"""Of a distance or a radius that must not be too large."""
UP = 1 + 1e-14
"""Of a sum of a few terms that must not be too small."""

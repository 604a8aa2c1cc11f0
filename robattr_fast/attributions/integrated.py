"""Integrated gradients (Sundararajan, Taly, Yan 2017)."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.attributions.contract import Target, mapped
from robattr_fast.ops import _check

RULES = ("gausslegendre", "riemann_left", "riemann_middle", "riemann_right")


def integrated_gradients(
    model: nn.Module,
    x: torch.Tensor,
    target: Target = None,
    create_graph: bool = False,
    *,
    steps: int = 50,
    baseline: float | torch.Tensor = 0.0,
    rule: str = "gausslegendre",
    batch_size: int = 64,
) -> torch.Tensor:
    """(x - baseline) * mean of d f_c / d z over z on the straight line from the baseline to x.

    Equal to captum.attr.IntegratedGradients with the same ``n_steps``, ``baselines`` and ``method``, which places
    points in float32. (Its trapezoids are left out: their weights do not sum to 1.) The class is one for the whole
    line: with target=None that of x.

    Args:
        model, x, target, create_graph: see `gradient`.
        steps: points on the line.
        baseline: a number, or a tensor that broadcasts to x; nothing is differentiated in it.
        rule: points and weights, one of `RULES`. Ghorbani et al. 2019 use "riemann_right" with 100 steps.
        batch_size: rows of one forward pass, at least one per image. With create_graph all passes stay in memory.

    Returns:
        [B, *S] in x's dtype, float32 for half types.

    Raises:
        TypeError, ValueError: a bad argument. ModelError: training mode, no logits, no gradient.
    """
    steps = _check.integer("steps", steps, 1, 2**20)
    batch_size = _check.integer("batch_size", batch_size, 1, 2**20)
    places, weights = _quadrature(rule, steps)

    def rows(leaf: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
        base = _broadcast(baseline, leaf)
        if classes is None:
            with torch.no_grad():
                classes = _model.forward(model, leaf.detach().clone()).argmax(dim=1)
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        total = torch.zeros(leaf.shape, dtype=dtype, device=leaf.device)
        at_once = max(1, batch_size // len(leaf))
        for first in range(0, steps, at_once):
            shape = (-1, *[1] * leaf.dim())
            place, weight = (
                torch.tensor(values[first : first + at_once], dtype=dtype, device=leaf.device).view(shape)
                for values in (places, weights)
            )
            points = (base + place.to(leaf.dtype) * (leaf - base)).flatten(0, 1)
            found, _ = _model.input_gradient(model, points, classes.repeat(len(place)), create_graph=create_graph)
            total = total + (weight * found.view(len(place), *leaf.shape)).sum(dim=0)
        return (leaf - base) * total

    return mapped(model, x, target, create_graph, rows)


def _broadcast(baseline: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    base = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).detach()
    try:
        return base.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"baseline: got shape {tuple(base.shape)}, expected one that broadcasts to {tuple(x.shape)}"
        ) from None


def _quadrature(rule: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in [0, 1] and weights that sum to 1."""
    if rule == "gausslegendre":
        places, weights = np.polynomial.legendre.leggauss(steps)
        return (1 + places) / 2, weights / 2
    if rule not in RULES:
        raise ValueError(f"rule: got {rule!r}, expected one of {', '.join(RULES)}")
    offset = {"riemann_left": 0.0, "riemann_middle": 0.5, "riemann_right": 1.0}[rule]
    return (np.arange(steps) + offset) / steps, np.full(steps, 1 / steps)

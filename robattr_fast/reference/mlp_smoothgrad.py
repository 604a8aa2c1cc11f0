"""Sparsified SmoothGrad of a perceptron, from noise to counts: the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from robattr_fast.reference.count_sparsified import count_sparsified_
from robattr_fast.reference.noisy_samples import noisy_samples

ACTIVATIONS = {"relu": F.relu, "tanh": F.tanh, "gelu": F.gelu, "silu": F.silu, "softplus": F.softplus, "elu": F.elu}


def gradient_sizes(
    z: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    activation: str,
    target: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(|d f_c / d z| [B, q, n], classes int64 [B, q]) of z [B, q, n]: c is ``target`` [B], or the largest logit.

    f is Linear, activation, Linear, ..., Linear of weights [outputs, inputs] and biases [outputs]. Scores are NaN where
    a logit is not finite; classes are those of the largest logit, the first of equal ones, also with a target.
    """
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():
        logits = F.linear(leaf, weights[0], biases[0])
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            logits = F.linear(ACTIVATIONS[activation](logits), weight, bias)
        classes = logits.argmax(dim=2)
        explained = classes if target is None else target[:, None].expand_as(classes)
        (gradient,) = torch.autograd.grad(logits.gather(2, explained[..., None]).sum(), leaf)
    finite = torch.isfinite(logits.detach()).all(dim=2, keepdim=True)
    return torch.where(finite, gradient.abs(), torch.nan), classes


def mlp_smoothgrad(
    counts: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    sigma: float,
    num_samples: int,
    tau: float,
    gamma: float | None = None,
    *,
    activation: str = "relu",
    target: torch.Tensor | None = None,
    seed: int = 0,
    first_sample: int = 0,
    image_ids: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """counts int32 [B, n, L] += the levels of the sparsified gradients of ``num_samples`` noisy copies of x [B, *S].

    The same as `noisy_samples`, `gradient_sizes` and `count_sparsified_`, one after the other. Returns the class of the
    largest logit of each sample, int64 [B, num_samples]: -1 where the sample is invalid.
    """
    z = noisy_samples(x.flatten(1), sigma, num_samples, seed=seed, first_sample=first_sample, image_ids=image_ids)
    scores, classes = gradient_sizes(z, weights, biases, activation, target)
    count_sparsified_(counts, scores, tau, gamma, packed=packed)
    return torch.where(torch.isfinite(scores).all(dim=2), classes, -1)

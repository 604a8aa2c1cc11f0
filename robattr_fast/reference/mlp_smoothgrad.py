"""Sparsified SmoothGrad of a perceptron, from noise to counts: the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from robattr_fast.reference._autocast import without_autocast
from robattr_fast.reference.count_sparsified import count_sparsified_
from robattr_fast.reference.noisy_samples import noisy_samples

_aten = torch.ops.aten

# phi(x), and grad * phi'(x) as autograd has it, of (grad, x).
ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "relu": (F.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0)),
    "tanh": (F.tanh, lambda grad, x: _aten.tanh_backward(grad, x.tanh())),
    "gelu": (F.gelu, lambda grad, x: _aten.gelu_backward(grad, x)),
    "silu": (F.silu, lambda grad, x: _aten.silu_backward(grad, x)),
    "softplus": (F.softplus, lambda grad, x: _aten.softplus_backward(grad, x, 1, 20)),
    "elu": (F.elu, lambda grad, x: _aten.elu_backward(grad, 1, 1, 1, False, x)),
}


@without_autocast
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
    phi, backward = ACTIVATIONS[activation]
    sums = [F.linear(z, weights[0], biases[0])]
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        sums.append(F.linear(phi(sums[-1]), weight, bias))
    logits = sums.pop()
    classes = logits.argmax(dim=2)
    gradient = weights[-1][classes if target is None else target[:, None].expand_as(classes)]
    for weight in reversed(weights[:-1]):
        gradient = backward(gradient, sums.pop()) @ weight
    return torch.where(torch.isfinite(logits).all(dim=2, keepdim=True), gradient.abs(), torch.nan), classes


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

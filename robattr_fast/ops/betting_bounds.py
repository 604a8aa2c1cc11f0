"""`betting_bounds`: checks, public function, kernels. Definition: reference/."""

from __future__ import annotations

import math

import torch

from robattr_fast.ops import _check, _vmap
from robattr_fast.ops._register import register
from robattr_fast.reference.betting_bounds import betting_bounds as definition
from robattr_fast.reference.betting_bounds import betting_shares, check_arguments, counts_at_zero


def betting_bounds(
    counts: torch.Tensor, samples: torch.Tensor | int, delta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One-sided lower and upper confidence bounds of the mean of each element, each at level ``delta``.

    Args:
        counts: int32 [B, n, L], 1 <= L <= 15, as `count_sparsified_` makes them: ``counts[..., l - 1]`` samples of the
            element had the value l/L, all others 0.
        samples: number of samples q of each image, int64 [B] or one int for all, at most 2^31 - 1.
        delta: error probability of each of the two bounds, in (0, 1).

    Returns:
        lower, upper: float64 [B, n], with 0 <= lower <= upper <= 1. Each holds with probability 1 - delta at all
        sample sizes at once: counts may be looked at after every batch. Both are rounded outwards, hence never closer
        to the mean than the exact bounds; backends agree to max(1e-9, 1e-13 q) of the lower bound and of one minus the
        upper. No samples give [0, 1]. Not differentiable.

    Raises:
        TypeError, ValueError: an argument outside of what is named above; negative counts, or more counts than samples.
    """
    samples = check_arguments(counts, samples, delta)
    _check.integer("counts.shape[2] (L)", counts.shape[2], 1, _check.MAX_LEVELS)
    return _operator(counts, samples, float(delta))


def _fake(counts, samples, delta):
    return tuple(counts.new_empty(counts.shape[:2], dtype=torch.float64) for _ in range(2))


def _prepare(counts, samples, delta):
    counts_at_zero(counts, samples)  # raises for numbers that no samples give
    return counts, samples, delta


def _cpu(counts, samples, delta, *, out):
    shares = betting_shares(torch.device("cpu"))
    torch.ops.robattr_fast_C.betting_bounds(*out, counts.contiguous(), samples.contiguous(), shares, -math.log(delta))


def _triton(counts, samples, delta, *, out):
    from robattr_fast.kernels.betting_bounds import betting_bounds as launch

    lower, upper = (bound.view(-1) for bound in out)
    with_zero = torch.cat([counts_at_zero(counts, samples)[:, :, None], counts.long()], dim=2)
    launch(lower, upper, with_zero.flatten(0, 1), betting_shares(torch.device("cpu")), -math.log(delta))


_operator = register(
    "betting_bounds",
    definition,
    fake=_fake,
    prepare=_prepare,
    cpu=_cpu,
    triton=_triton,
    vmap=_vmap.folded("betting_bounds"),
)

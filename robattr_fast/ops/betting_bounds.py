"""`betting_bounds`: checks, public function, fake kernel, choice of backend. Definition: reference/."""

from __future__ import annotations

import math

import torch

from robattr_fast import _extension, backends
from robattr_fast.ops import _check, _schema
from robattr_fast.reference.betting_bounds import betting_bounds as _reference
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
    return torch.ops.robattr_fast.betting_bounds(counts, samples, delta)


def _empty_result(counts):
    return tuple(counts.new_empty(counts.shape[:2], dtype=torch.float64) for _ in range(2))


def _run(counts, samples, delta):
    counts_at_zero(counts, samples)
    lower, upper = _empty_result(counts)
    backends.call("betting_bounds", counts, lower, upper, samples, delta)
    return lower, upper


def _run_reference(counts, lower, upper, samples, delta):
    for out, bound in zip((lower, upper), _reference(counts, samples, delta), strict=True):
        out.copy_(bound)


def _run_cpu(counts, lower, upper, samples, delta):
    torch.ops.robattr_fast_C.betting_bounds(
        lower, upper, counts.contiguous(), samples.contiguous(), betting_shares(), -math.log(delta)
    )


def _run_triton(counts, lower, upper, samples, delta):
    from robattr_fast.kernels.betting_bounds import betting_bounds as launch

    with_zero = torch.cat([counts_at_zero(counts, samples)[:, :, None], counts.long()], dim=2)
    launch(lower.view(-1), upper.view(-1), with_zero.flatten(0, 1), betting_shares(), -math.log(delta))


backends.register("betting_bounds", "triton", _run_triton, _extension.can_run_triton)
backends.register("betting_bounds", "reference", _run_reference, _extension.can_run_anywhere)
backends.register("betting_bounds", "cpu", _run_cpu, _extension.can_run_cpu)
_schema.PUBLIC.impl("betting_bounds", _run, "CPU")
_schema.PUBLIC.impl("betting_bounds", _run, "CUDA")


@torch.library.register_fake("robattr_fast::betting_bounds", lib=_schema.PUBLIC)
def _fake(counts, samples, delta):
    return _empty_result(counts)

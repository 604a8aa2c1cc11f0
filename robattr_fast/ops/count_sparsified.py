"""`count_sparsified_`: checks, public function, fake kernel, choice of backend. Definition: reference/."""

from __future__ import annotations

import torch

from robattr_fast import _extension, backends
from robattr_fast.ops import _check, _schema
from robattr_fast.reference._select import selected
from robattr_fast.reference.count_sparsified import count_sparsified_ as _reference

_MAX_COUNT = 2**31 - 1


def count_sparsified_(
    counts: torch.Tensor, scores: torch.Tensor, tau: float, gamma: float | None = None
) -> torch.Tensor:
    """Add to ``counts`` how often each element of the sparsified maps of ``scores`` takes each level above 0.

    The same as adding up ``sparsify(scores, tau, gamma, levels=L)``, without ever storing a map. Integers: the result
    does not depend on the order, on the split into calls, or on the number of threads.

    Args:
        counts: int32 [B, n, L], contiguous, 1 <= L <= 15, changed in place: counts[b, i, l] grows by the number of
            samples in which element i of image b has level l+1, value (l+1)/L.
        scores: [B, q, n], q samples of each image; float32, float64, bfloat16 or float16, any strides. Detached.
        tau, gamma: as for `sparsify`.

    Returns:
        int32 [B]: the number of invalid samples (NaN or inf) of each image, which leave counts unchanged.

    Raises:
        TypeError, ValueError: an argument outside of what is named above.
        ValueError: a count passes 2^31 - 1. A call adds at most q to each, so this takes 2^31 samples in all. On a CPU
        the call itself notices; on other devices the count turns negative, which no certificate accepts.
    """
    _check.float_tensor("scores", scores)
    tau, gamma = _check.fractions(tau, gamma)
    if not isinstance(counts, torch.Tensor):
        raise TypeError(f"counts: got {type(counts).__name__}, takes a tensor")
    if counts.dtype != torch.int32:
        raise TypeError(f"counts: got dtype {counts.dtype}, takes int32")
    if scores.dim() != 3:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, takes [B, q, n]")
    batch, samples, n = scores.shape
    if counts.dim() != 3 or counts.shape[:2] != (batch, n):
        raise ValueError(f"counts: got shape {tuple(counts.shape)}, takes [{batch}, {n}, L] for these scores")
    _check.integer("counts.shape[2] (L)", counts.shape[2], 1, _check.MAX_LEVELS)
    _check.integer("scores.shape[1] (q)", samples, 1, _MAX_COUNT)
    _check.integer("n * L", n * counts.shape[2], 1, _MAX_COUNT)
    if counts.device != scores.device:
        raise ValueError(f"counts: got device {counts.device}, takes that of scores, {scores.device}")
    if not counts.is_contiguous():
        raise ValueError(f"counts: got strides {counts.stride()}, takes a contiguous tensor")
    return torch.ops.robattr_fast.count_sparsified_(counts, scores.detach(), tau, gamma)


def _run(counts, scores, tau, gamma):
    invalid = counts.new_zeros(counts.shape[:1])
    backends.call("count_sparsified_", scores, counts, invalid, tau, gamma)
    return invalid


def _check_overflow(overflow):
    if overflow:
        raise ValueError(f"counts: got a count that passes {_MAX_COUNT}, takes at most that many samples in total")


def _run_reference(scores, counts, invalid, tau, gamma):
    invalid.copy_(_reference(counts, scores, tau, gamma))
    _check_overflow(bool((counts < 0).any()))


def _run_cpu(scores, counts, invalid, tau, gamma):
    n = scores.shape[-1]
    _check_overflow(
        torch.ops.robattr_fast_C.count_sparsified_(counts, invalid, scores, selected(tau, n), selected(gamma, n))
    )


backends.register("count_sparsified_", "reference", _run_reference, _extension.can_run_anywhere)
backends.register("count_sparsified_", "cpu", _run_cpu, _extension.can_run_cpu)
_schema.PUBLIC.impl("count_sparsified_", _run, "CPU")
_schema.PUBLIC.impl("count_sparsified_", _run, "CUDA")


@torch.library.register_fake("robattr_fast::count_sparsified_", lib=_schema.PUBLIC)
def _fake(counts, scores, tau, gamma):
    return counts.new_empty(counts.shape[:1])

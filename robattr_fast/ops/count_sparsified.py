"""`count_sparsified_`: checks, public function, kernels. Definition: reference/."""

from __future__ import annotations

import torch

from robattr_fast.ops import _check, _vmap
from robattr_fast.ops._register import register
from robattr_fast.reference._select import selected
from robattr_fast.reference.count_sparsified import count_sparsified_ as definition


def count_sparsified_(
    counts: torch.Tensor,
    scores: torch.Tensor,
    tau: float,
    gamma: float | None = None,
    *,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add to ``counts`` how often each element of the sparsified maps of ``scores`` takes each level above 0.

    The same as adding up ``sparsify(scores, tau, gamma, levels=L)``, without ever storing a map. Integers: the result
    does not depend on the order, on the split into calls, or on the number of threads.

    Args:
        counts: int32 [B, n, L], contiguous, 1 <= L <= 15, changed in place: counts[b, i, l] grows by the number of
            samples in which element i of image b has level l+1, value (l+1)/L.
        scores: [B, q, n], q samples of each image; float32, float64, bfloat16 or float16, any strides. Detached.
        tau, gamma: as for `sparsify`.
        packed: uint8 [B, q, row_bytes], contiguous, overwritten with the levels of each sample as
            `reference.pack_levels` packs them, with zeros for an invalid one. None: levels are counted, not kept.

    Returns:
        int32 [B]: the number of invalid samples (NaN or inf) of each image, which leave counts unchanged.

    Raises:
        TypeError, ValueError: an argument outside of what is named above. NotImplementedError: under torch.vmap.
        ValueError: a count passes 2^31 - 1. A call adds at most q to each, so this takes 2^31 samples in all. On a CPU
        the call itself notices; on other devices the count turns negative, which no certificate accepts.
    """
    _check.float_tensor("scores", scores)
    tau, gamma = _check.fractions(tau, gamma)
    if scores.dim() != 3:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, takes [B, q, n]")
    batch, samples, n = scores.shape
    _check.integer("scores.shape[1] (q)", samples, 1, _check.MAX_COUNT)
    _check.counts(counts, packed, batch, samples, n, scores.device)
    return _operator(counts, scores.detach(), tau, gamma, packed)


def _fake(counts, scores, tau, gamma, packed):
    return counts.new_zeros(counts.shape[:1])


def check_overflow(overflow: bool) -> None:
    """ValueError where a count has wrapped."""
    if overflow:
        raise ValueError(
            f"counts: got a count that passes {_check.MAX_COUNT}, takes at most that many samples in total"
        )


def _define(counts, scores, tau, gamma, packed):
    invalid = definition(counts, scores, tau, gamma, packed=packed)
    check_overflow(bool((counts < 0).any()))
    return invalid


def _extension(counts, scores, tau, gamma, packed, *, out):
    n = scores.shape[-1]
    k_tau, k_gamma = selected(tau, n), selected(gamma, n)
    check_overflow(torch.ops.robattr_fast_C.count_sparsified_(counts, out, packed, scores, k_tau, k_gamma))


def _triton(counts, scores, tau, gamma, packed, *, out):
    from robattr_fast.kernels.count_sparsified import count_sparsified as launch

    n = scores.shape[-1]
    out.copy_(launch(counts, scores, selected(tau, n), selected(gamma, n), packed).sum(dim=1))
    # Elsewhere the host would have to wait for the device.
    check_overflow(counts.device.type == "cpu" and bool((counts < 0).any()))


_operator = register(
    "count_sparsified_",
    _define,
    fake=_fake,
    cpu=_extension,
    triton=_triton,
    cuda=_extension,
    vmap=_vmap.refused("count_sparsified_"),
)

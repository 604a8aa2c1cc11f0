"""`soft_topk`: checks, public function, fake kernel, autograd, choice of backend. Definition: reference/."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from robattr_fast import _extension, backends
from robattr_fast.ops import _check, _schema
from robattr_fast.reference.soft_topk import soft_topk as _reference

_FAR = 1e30  # a sigmoid is 0 or 1 long before; infinities have no softmax


def soft_topk(scores: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    """The soft top-k of each row: h_i = sigmoid((s_i - nu) / T), with the one nu for which the row sums to k.

    As T falls, h becomes 1 on the k largest scores and 0 elsewhere (elements that tie at the threshold share what is
    left); as it grows, every h_i becomes k/n.

    Args:
        scores: [..., n], float32, float64, bfloat16 or float16, any strides, n >= 2.
        k: 1 <= k <= n - 1. Sigmoids lie strictly between 0 and 1: no nu makes them sum to 0 or to n.
        temperature: T > 0, in the units of the scores; a number, in which h is not differentiated.

    Returns:
        [..., n] in [0, 1], float32 (float64 for float64 scores); each row sums to k up to rounding. A row that holds
        NaN or inf gives NaN, and so do gradients through it. Differentiable in the scores to every order:
        d h_i / d s_j = w_i / T (delta_ij - w_j / sum w), w = h (1 - h).

    Raises:
        TypeError, ValueError: an argument outside of what is named above.
    """
    _check.float_tensor("scores", scores)
    if scores.shape[-1] < 2:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, takes rows of at least 2 elements")
    _check.integer("k", k, 1, scores.shape[-1] - 1)
    return torch.ops.robattr_fast.soft_topk(scores, k, _check.temperature(temperature))[0]


def _empty_results(scores):
    dtype = _check.comparable_dtype(scores)
    h, pivot = scores.new_empty(scores.shape, dtype=dtype), scores.new_empty(scores.shape[:-1], dtype=dtype)
    return h, pivot, pivot.new_empty(pivot.shape, dtype=torch.float64)


def _run(scores, k, temperature):
    results = _empty_results(scores)
    backends.call("soft_topk", scores, *results, k, temperature)
    return results


def _run_reference(scores, h, pivot, offset, k, temperature):
    for out, result in zip((h, pivot, offset), _reference(scores, k, temperature), strict=True):
        out.copy_(result)


def _rows(scores, h, pivot, offset):
    n = scores.shape[-1]
    return h.view(-1, n), pivot.view(-1), offset.view(-1), scores.reshape(-1, n)


def _run_cpu(scores, h, pivot, offset, k, temperature):
    torch.ops.robattr_fast_C.soft_topk(*_rows(scores, h, pivot, offset), k, temperature)


def _run_triton(scores, h, pivot, offset, k, temperature):
    from robattr_fast.kernels.soft_topk import soft_topk as launch

    h_rows, pivots, offsets, rows = _rows(scores, h, pivot, offset)
    launch(h_rows, pivots, offsets, rows, k, temperature)


backends.register("soft_topk", "triton", _run_triton, _extension.can_run_triton)
backends.register("soft_topk", "reference", _run_reference, _extension.can_run_anywhere)
backends.register("soft_topk", "cpu", _run_cpu, _extension.can_run_cpu)
_schema.PUBLIC.impl("soft_topk", _run, "CPU")
_schema.PUBLIC.impl("soft_topk", _run, "CUDA")


@torch.library.register_fake("robattr_fast::soft_topk", lib=_schema.PUBLIC)
def _fake(scores, k, temperature):
    return _empty_results(scores)


def _setup_context(ctx, inputs, output):
    scores, _, ctx.temperature = inputs
    _, pivot, offset = output
    ctx.save_for_backward(scores, pivot, offset)


def _backward(ctx, grad, grad_pivot, grad_offset):
    # With the pivot held constant nu moves by its offset. That is an output of the operator, so that this formula,
    # differentiated again, is right to every order.
    scores, pivot, offset = ctx.saved_tensors
    u = (scores.double() - pivot.detach().double()[..., None]) / ctx.temperature
    x = (u - offset[..., None]).clamp(-_FAR, _FAR).to(grad.dtype)
    # Logarithms: h (1 - h) would lose its digits near h = 1, and all elements of a hard row would underflow.
    log_slope = logsigmoid(x) + logsigmoid(-x)
    share = log_slope.softmax(dim=-1)
    through_h = log_slope.exp() * (grad - (share * grad).sum(dim=-1, keepdim=True))
    through_offset = share * grad_offset[..., None].to(grad.dtype)
    return ((through_h + through_offset) / ctx.temperature).to(scores.dtype), None, None


torch.library.register_autograd("robattr_fast::soft_topk", _backward, setup_context=_setup_context, lib=_schema.PUBLIC)

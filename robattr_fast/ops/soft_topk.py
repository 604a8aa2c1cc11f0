"""`soft_topk`: checks, public function, kernels, derivatives. Definition: reference/."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from robattr_fast.ops import _check, _vmap
from robattr_fast.ops._register import register
from robattr_fast.reference.soft_topk import soft_topk as definition

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
        NaN or inf gives NaN, and so do gradients through it. Differentiable in the scores to every order, in reverse
        and forward mode:
        d h_i / d s_j = w_i / T (delta_ij - w_j / sum w), w = h (1 - h).

    Raises:
        TypeError, ValueError: an argument outside of what is named above.
    """
    _check.float_tensor("scores", scores)
    if scores.shape[-1] < 2:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, takes rows of at least 2 elements")
    k = _check.integer("k", k, 1, scores.shape[-1] - 1)
    return _operator(scores, k, _check.temperature(temperature))[0]


def _fake(scores, k, temperature):
    dtype = _check.comparable_dtype(scores)
    h, pivot = scores.new_empty(scores.shape, dtype=dtype), scores.new_empty(scores.shape[:-1], dtype=dtype)
    return h, pivot, pivot.new_empty(pivot.shape, dtype=torch.float64)


def _rows(scores, h, pivot, offset):
    n = scores.shape[-1]
    return h.view(-1, n), pivot.view(-1), offset.view(-1), scores.reshape(-1, n)


def _cpu(scores, k, temperature, *, out):
    torch.ops.robattr_fast_C.soft_topk(*_rows(scores, *out), k, temperature)


def _triton(scores, k, temperature, *, out):
    from robattr_fast.kernels.soft_topk import soft_topk as launch

    h, pivot, offset, rows = _rows(scores, *out)
    launch(h, pivot, offset, rows, k, temperature)


def _setup(ctx, inputs, output):
    scores, _, ctx.temperature = inputs
    _, pivot, offset = output
    ctx.save_for_backward(scores, pivot, offset)


def _slope_and_share(ctx, dtype):
    """T d h_i / d s_i with nu held constant, and its share of the row's, which is d nu / d s_i.

    With the pivot held constant nu moves by its offset. That is an output of the operator, so that formulas made of
    these, differentiated again, are right to every order.
    """
    scores, pivot, offset = ctx.saved_tensors
    u = (scores.double() - pivot.detach().double()[..., None]) / ctx.temperature
    x = (u - offset[..., None]).clamp(-_FAR, _FAR).to(dtype)
    # Logarithms: h (1 - h) would lose its digits near h = 1, and all elements of a hard row would underflow.
    log_slope = logsigmoid(x) + logsigmoid(-x)
    return log_slope.exp(), log_slope.softmax(dim=-1)


def _backward(ctx, grad, grad_pivot, grad_offset):
    slope, share = _slope_and_share(ctx, grad.dtype)
    through_h = slope * (grad - (share * grad).sum(dim=-1, keepdim=True))
    through_offset = share * grad_offset[..., None].to(grad.dtype)
    return ((through_h + through_offset) / ctx.temperature).to(ctx.saved_tensors[0].dtype)


def _jvp(ctx, tangent, *_):
    pivot = ctx.saved_tensors[1]
    slope, share = _slope_and_share(ctx, pivot.dtype)
    tangent = tangent.to(pivot.dtype) / ctx.temperature
    of_offset = (share * tangent).sum(dim=-1, keepdim=True)
    return slope * (tangent - of_offset), torch.zeros_like(pivot), of_offset[..., 0].double()


_operator = register(
    "soft_topk",
    definition,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    setup=_setup,
    backward=_backward,
    jvp=_jvp,
    vmap=_vmap.rows("soft_topk"),
)

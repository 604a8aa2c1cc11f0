"""`topk_threshold`: checks, public function, kernels, derivatives. Definition: reference/."""

from __future__ import annotations

import torch

from robattr_fast.ops import _check, _vmap
from robattr_fast.ops._register import register
from robattr_fast.reference.topk_threshold import topk_threshold as definition


def topk_threshold(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The exact k-th largest score of each row.

    Args:
        scores: [..., n], float32, float64, bfloat16 or float16, any strides, any values. NaN is larger than +inf.
        k: 1 <= k <= n.

    Returns:
        [...], float32 (float64 for float64 scores); a zero is +0. The gradient goes to the lowest index that
        attains the threshold; differentiable to every order, in reverse and forward mode.

    Raises:
        TypeError, ValueError: an argument outside of what is named above.
    """
    _check.float_tensor("scores", scores)
    return _operator(scores, _check.integer("k", k, 1, scores.shape[-1]))


def _fake(scores, k):
    return scores.new_empty(scores.shape[:-1], dtype=_check.comparable_dtype(scores))


def _extension(scores, k, *, out):
    torch.ops.robattr_fast_C.topk_threshold(out, scores.reshape(-1, scores.shape[-1]), k)


def _triton(scores, k, *, out):
    from robattr_fast.kernels.topk_threshold import topk_threshold as launch

    launch(scores, out, k)


def lowest_index(scores: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Index [..., 1] of the first element of scores [..., n] that attains threshold [...]."""
    threshold = threshold[..., None]
    attains = (scores == threshold) | (scores.isnan() & threshold.isnan())
    return attains.to(torch.uint8).argmax(dim=-1, keepdim=True)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx, grad):
    scores, threshold = ctx.saved_tensors
    index = lowest_index(scores, threshold)
    return torch.zeros_like(scores).scatter(-1, index, grad[..., None].to(scores.dtype))


def _jvp(ctx, tangent, _):
    scores, threshold = ctx.saved_tensors
    return tangent.gather(-1, lowest_index(scores, threshold))[..., 0].to(threshold.dtype)


_operator = register(
    "topk_threshold",
    definition,
    fake=_fake,
    cpu=_extension,
    triton=_triton,
    cuda=_extension,
    setup=_setup,
    backward=_backward,
    jvp=_jvp,
    vmap=_vmap.rows("topk_threshold"),
)

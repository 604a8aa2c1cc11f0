"""`topk_threshold`: checks, public function, fake kernel, autograd, choice of backend. Definition: reference/."""

from __future__ import annotations

import functools

import torch

from robattr_fast import _extension, backends
from robattr_fast.ops import _check, _schema
from robattr_fast.reference.topk_threshold import topk_threshold as _reference


def topk_threshold(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The exact k-th largest score of each row.

    Args:
        scores: [..., n], float32, float64, bfloat16 or float16, any strides, any values. NaN is larger than +inf.
        k: 1 <= k <= n.

    Returns:
        [...], float32 (float64 for float64 scores); a zero is +0. The gradient goes to the lowest index that
        attains the threshold; differentiable to every order.

    Raises:
        TypeError, ValueError: an argument outside of what is named above.
    """
    _check.float_tensor("scores", scores)
    _check.integer("k", k, 1, scores.shape[-1])
    return torch.ops.robattr_fast.topk_threshold(scores, k)


def _empty_result(scores):
    return scores.new_empty(scores.shape[:-1], dtype=_check.comparable_dtype(scores))


def _run(scores, k):
    out = _empty_result(scores)
    backends.call("topk_threshold", scores, out, k)
    return out


def _run_reference(scores, out, k):
    out.copy_(_reference(scores, k))


def _run_extension(scores, out, k):
    torch.ops.robattr_fast_C.topk_threshold(out, scores.reshape(-1, scores.shape[-1]), k)


def _run_triton(scores, out, k):
    from robattr_fast.kernels.topk_threshold import topk_threshold as launch

    launch(scores, out, k)


backends.register("topk_threshold", "triton", _run_triton, _extension.can_run_triton)
backends.register("topk_threshold", "reference", _run_reference, _extension.can_run_anywhere)
backends.register("topk_threshold", "cpu", _run_extension, _extension.can_run_cpu)
backends.register(
    "topk_threshold", "cuda", _run_extension, functools.partial(_extension.can_run_cuda, "topk_threshold")
)
_schema.PUBLIC.impl("topk_threshold", _run, "CPU")
_schema.PUBLIC.impl("topk_threshold", _run, "CUDA")


@torch.library.register_fake("robattr_fast::topk_threshold", lib=_schema.PUBLIC)
def _fake(scores, k):
    return _empty_result(scores)


def lowest_index(scores: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Index [..., 1] of the first element of scores [..., n] that attains threshold [...]."""
    threshold = threshold[..., None]
    attains = (scores == threshold) | (scores.isnan() & threshold.isnan())
    return attains.to(torch.uint8).argmax(dim=-1, keepdim=True)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx, grad):
    scores, threshold = ctx.saved_tensors
    index = lowest_index(scores, threshold)
    return torch.zeros_like(scores).scatter(-1, index, grad[..., None].to(scores.dtype)), None


torch.library.register_autograd(
    "robattr_fast::topk_threshold", _backward, setup_context=_setup_context, lib=_schema.PUBLIC
)

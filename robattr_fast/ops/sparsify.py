"""`sparsify`: checks, public function, fake kernel, autograd, choice of backend. Definition: reference/."""

from __future__ import annotations

import torch

from robattr_fast import _extension, backends
from robattr_fast.ops import _check, _schema
from robattr_fast.ops.topk_threshold import lowest_index
from robattr_fast.reference._select import comparable, selected
from robattr_fast.reference.sparsify import sparsify as _reference


def sparsify(scores: torch.Tensor, tau: float, gamma: float | None = None, *, levels: int | None = 1) -> torch.Tensor:
    """The sparsified map h of scores (Levine, Singla, Feizi, arXiv 1905.12105), each row by itself.

    Args:
        scores: [..., n], float32, float64, bfloat16 or float16, any strides. Only positive scores can be selected.
        tau: share of the row that may be selected, in (0, 1]: k_tau = max(1, floor(tau n + 1e-9)) elements.
        gamma: share of the row that gets the value 1, in (0, tau]; None means tau.
        levels: L in 1..15: h is rounded up to a multiple of 1/L (1: h is 0 or 1); None: h is not rounded.

    Returns:
        [..., n] in [0, 1], float32 (float64 for float64 scores). At most k_tau elements are above zero: elements that
        tie at the threshold are kept if all of them fit, else none. A row that holds NaN or inf gives NaN.
        For ``levels=None`` differentiable to every order, with the support held constant: gradients flow through the
        scores and g = s_[k_gamma] of the elements with 0 < h < 1; a tie in g goes to the lowest index. All other
        elements, g = 0 and rows with NaN or inf give zero. Rounded maps have no gradient.

    Raises:
        TypeError, ValueError: an argument outside of what is named above.
    """
    _check.float_tensor("scores", scores)
    tau, gamma = _check.fractions(tau, gamma)
    if levels is None:
        return torch.ops.robattr_fast.sparsify(scores, tau, gamma, None)
    _check.integer("levels", levels, 1, _check.MAX_LEVELS)
    return torch.ops.robattr_fast.sparsify(scores.detach(), tau, gamma, levels)


def _empty_result(scores):
    return scores.new_empty(scores.shape, dtype=_check.comparable_dtype(scores))


def _run(scores, tau, gamma, levels):
    out = _empty_result(scores)
    backends.call("sparsify", scores, out, tau, gamma, levels)
    return out


def _run_reference(scores, out, tau, gamma, levels):
    out.copy_(_reference(scores, tau, gamma, levels=levels))


def _run_cpu(scores, out, tau, gamma, levels):
    n = scores.shape[-1]
    torch.ops.robattr_fast_C.sparsify(
        out.view(-1, n), scores.reshape(-1, n), selected(tau, n), selected(gamma, n), levels or 0
    )


def _run_triton(scores, out, tau, gamma, levels):
    from robattr_fast.kernels.sparsify import sparsify as launch

    n = scores.shape[-1]
    launch(scores, out, selected(tau, n), selected(gamma, n), levels)


backends.register("sparsify", "triton", _run_triton, _extension.can_run_triton)
backends.register("sparsify", "reference", _run_reference, _extension.can_run_anywhere)
backends.register("sparsify", "cpu", _run_cpu, _extension.can_run_cpu)
_schema.PUBLIC.impl("sparsify", _run, "CPU")
_schema.PUBLIC.impl("sparsify", _run, "CUDA")


@torch.library.register_fake("robattr_fast::sparsify", lib=_schema.PUBLIC)
def _fake(scores, tau, gamma, levels):
    return _empty_result(scores)


def _setup_context(ctx, inputs, output):
    scores, _, ctx.gamma, ctx.levels = inputs
    ctx.preference = backends.preference()
    ctx.save_for_backward(scores, output)


def _backward(ctx, grad):
    if ctx.levels is not None:
        return None, None, None, None
    scores, h = ctx.saved_tensors
    s = comparable(scores)
    # On the support h < 1 exactly where s < g.
    active = (h > 0) & (h < 1)
    with backends.preferring(ctx.preference):
        g = torch.ops.robattr_fast.topk_threshold(s.detach(), selected(ctx.gamma, s.shape[-1]))
    index = lowest_index(s.detach(), g)
    g = s.gather(-1, index)
    through_s = torch.where(active, grad, 0.0) / torch.where(g > 0, g, 1.0)
    through_g = -(through_s * torch.where(active, s / torch.where(g > 0, g, 1.0), 0.0)).sum(dim=-1, keepdim=True)
    return through_s.scatter_add(-1, index, through_g).to(scores.dtype), None, None, None


torch.library.register_autograd("robattr_fast::sparsify", _backward, setup_context=_setup_context, lib=_schema.PUBLIC)

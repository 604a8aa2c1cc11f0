"""`sparsify`: checks, public function, kernels, derivatives. Definition: reference/."""

from __future__ import annotations

import torch

from robattr_fast.ops import _check, _vmap
from robattr_fast.ops._register import register
from robattr_fast.ops.topk_threshold import lowest_index
from robattr_fast.reference._select import comparable, selected
from robattr_fast.reference.sparsify import sparsify as definition


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
        For ``levels=None`` differentiable to every order, in reverse and forward mode, with the support held constant:
        gradients flow through the scores and g = s_[k_gamma] of the elements with 0 < h < 1; a tie in g goes to the
        lowest index. All other elements, g = 0 and rows with NaN or inf give zero. Rounded maps are constant: they
        carry no graph, and their tangents are zero.

    Raises:
        TypeError, ValueError: an argument outside of what is named above.
    """
    _check.float_tensor("scores", scores)
    tau, gamma = _check.fractions(tau, gamma)
    if levels is None:
        return _operator(scores, tau, gamma, None)
    return _operator(scores.detach(), tau, gamma, _check.integer("levels", levels, 1, _check.MAX_LEVELS))


def _fake(scores, tau, gamma, levels):
    return scores.new_empty(scores.shape, dtype=_check.comparable_dtype(scores))


def _cpu(scores, tau, gamma, levels, *, out):
    n = scores.shape[-1]
    torch.ops.robattr_fast_C.sparsify(
        out.view(-1, n), scores.reshape(-1, n), selected(tau, n), selected(gamma, n), levels or 0
    )


def _triton(scores, tau, gamma, levels, *, out):
    from robattr_fast.kernels.sparsify import sparsify as launch

    n = scores.shape[-1]
    launch(scores, out, selected(tau, n), selected(gamma, n), levels)


def _setup(ctx, inputs, output):
    scores, _, ctx.gamma, ctx.levels = inputs
    ctx.save_for_backward(scores, output)


def _moving(ctx):
    """Which elements move (on the support h < 1 exactly where s < g); s; g, 1 where it is 0; where g is attained."""
    scores, h = ctx.saved_tensors
    s = comparable(scores)
    g = torch.ops.robattr_fast.topk_threshold(s.detach(), selected(ctx.gamma, s.shape[-1]))
    index = lowest_index(s.detach(), g)
    g = s.gather(-1, index)
    return (h > 0) & (h < 1), s, torch.where(g > 0, g, 1.0), index


def _backward(ctx, grad):
    if ctx.levels is not None:
        return None
    active, s, g, index = _moving(ctx)
    through_s = torch.where(active, grad, 0.0) / g
    through_g = -(through_s * torch.where(active, s / g, 0.0)).sum(dim=-1, keepdim=True)
    return through_s.scatter_add(-1, index, through_g).to(ctx.saved_tensors[0].dtype)


def _jvp(ctx, tangent, *_):
    if ctx.levels is not None:
        return torch.zeros_like(ctx.saved_tensors[1])
    active, s, g, index = _moving(ctx)
    tangent = tangent.to(s.dtype)
    return torch.where(active, tangent - torch.where(active, s / g, 0.0) * tangent.gather(-1, index), 0.0) / g


_operator = register(
    "sparsify",
    definition,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    setup=_setup,
    backward=_backward,
    jvp=_jvp,
    vmap=_vmap.rows("sparsify"),
)

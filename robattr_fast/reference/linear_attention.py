"""Kernel attention and its first two derivatives: the definition.

With a_i = phi(q_i), b_j = phi(k_j) and A_ij = a_i . b_j over the keys that row i sees (all; with a mask those kept;
causal: j <= i):

    o_i = r_i n_i,   n_i = sum_j A_ij v_j,   r_i = 1 / d_i,   d_i = sum_j A_ij + eps,

or, not normalised, r_i = 1 / (number of keys that row i sees): the mean over the keys in both cases, which neither
padding nor what follows a causal row can change. r_i = 0 where 1 / d_i would overflow, d_i = 0 above all, so a row that
sees nothing gives zeros.

*Backward.* Let g_i be the gradient with respect to o_i. Then w_i = r_i g_i is that of n_i, and e_i = -r_i (g_i . o_i)
= -r_i (w_i . n_i) that of d_i (e_i = 0 if not normalised). With G_ij = w_i . v_j + e_i over the keys that row i sees

    grad a_i = sum_j G_ij b_j,   grad b_j = sum_i G_ij a_i,   grad v_j = sum_i A_ij w_i,

and grad q = phi'(q) grad a, grad k = phi'(k) grad b.

*Double backward.* What arrives are the gradients (u_q, u_k, u_v) with respect to (grad q, grad k, grad v), of
F = u_q . grad q + u_k . grad k + u_v . grad v: the derivative of sum_i g_i . o_i in the direction (u_q, u_k, u_v). As
that sum is linear in g, and its Hessian symmetric, all gradients of F are derivatives in that direction, written with
a dot: with respect to g it is that of the forward, and with respect to (q, k, v) that of the backward, g held fixed:

    a. = phi'(q) u_q,   b. = phi'(k) u_k,   v. = u_v,   A. = a. . b + a . b.,
    n. = sum_j A.v + A v.,   d. = sum_j A.,   rho = r d. (0 if not normalised),   o. = r (n. - rho n),
    w. = -rho w,   e. = -2 rho e - r (w . n.),   G. = w. . v + w . v. + e.,

and from these (grad a). = sum_j G.b + G b. and so on, (grad q). = phi''(q) u_q grad a + phi'(q) (grad a)..

*Linear time.* Nothing above needs an N x N array. Let S = sum_j b_j v_j^T and z = sum_j b_j, T = sum_i a_i w_i^T and
t = sum_i e_i a_i; causal: S_i and z_i over j <= i, T_j and t_j over i >= j. Then with P_i = S w_i, Q_i = S. w_i

    n_i = S^T a_i,   d_i = a_i . z + eps,   w_i . n_i = a_i . P_i,   w_i . n._i = a._i . P_i + a_i . Q_i,
    grad a_i = P_i + e_i z,   grad b_j = T v_j + t,   grad v_j = T^T b_j,

so neither derivative needs the output. The direction changes S by S. = sum_j b._j v_j^T + b_j v._j^T, z by
z. = sum_j b._j, and d. = a. . z + a . z.. With a'_i = a._i - rho_i a_i, T changes by T. = sum_i a'_i w_i^T and t by
t. = sum_i e_i a._i + e._i a_i, and

    o.  = r (S^T a' + S.^T a),       (grad a). = Q - rho P + e z. + e. z,
    (grad b). = T.v + T v. + t.,     (grad v). = T.^T b + T^T b.

The kernels compute this; here stand the sums over pairs.

Sources: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs", ICML 2020 (normalised, elu + 1); Mehrpanah,
Gamba, Azizpour (arXiv 2605.29983) on kernel attention in place of softmax for robust attribution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robattr_fast.reference._autocast import without_autocast

FEATURE_MAPS = ("elu", "relu", "squared_relu", "identity")


def features(x: Tensor, feature_map: str) -> tuple[Tensor, Tensor, Tensor]:
    """phi(x), phi'(x), phi''(x), element by element. At the kink of a relu the derivatives are those from the left."""
    if feature_map == "elu":
        # elu(x) + 1 cancels for negative x: in bfloat16 it is 0 from x = -6 on.
        exp = x.clamp(max=0).exp()
        return exp + x.relu(), exp, torch.where(x <= 0, exp, 0)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    if feature_map == "relu":
        return x.relu(), torch.where(x > 0, one, zero), zero
    if feature_map == "squared_relu":
        return x.relu().square(), 2 * x.relu(), torch.where(x > 0, 2 * one, zero)
    if feature_map == "identity":
        return x, one, zero
    raise ValueError(f"feature_map: got {feature_map!r}, takes one of {', '.join(FEATURE_MAPS)}")


def _in_compute_dtype(*tensors: Tensor) -> list[Tensor]:
    """float64 stays; all else is computed in float32."""
    return [x if x.dtype == torch.float64 else x.to(torch.float32) for x in tensors]


def _visible(q: Tensor, k: Tensor, causal: bool, key_padding_mask: Tensor | None) -> Tensor:
    """bool [B or 1, 1, Nq, Nk]: which keys each row sees."""
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
    return visible[None, None] if key_padding_mask is None else visible & key_padding_mask[:, None, None, :]


def _kept(x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Zeros in place of padding [B, H, Nk, ...], which may hold anything, NaN included."""
    return x if key_padding_mask is None else torch.where(key_padding_mask[:, None, :, None], x, 0)


def _reciprocal(weights: Tensor, visible: Tensor, normalize: bool, eps: float) -> Tensor:
    """r [B, H, Nq, 1]."""
    d = weights.sum(-1, keepdim=True) + eps if normalize else visible.sum(-1, keepdim=True).to(weights.dtype)
    overflows = d.abs() * torch.finfo(d.dtype).max < 1
    return torch.where(overflows, 0, 1 / torch.where(overflows, 1, d))


@without_autocast
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    key_padding_mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """q [B, H, Nq, D], k [B, H, Nk, D], v [B, H, Nk, Dv], key_padding_mask bool [B, Nk], True = keep -> [B, H, Nq, Dv].

    ``causal`` needs Nq = Nk. Computed in float32, or float64 for float64, and rounded to the dtype of q.
    """
    dtype = q.dtype
    visible = _visible(q, k, causal, key_padding_mask)
    q, k, v = _in_compute_dtype(q, k, v)
    a = features(q, feature_map)[0]
    b = features(_kept(k, key_padding_mask), feature_map)[0]
    weights = torch.where(visible, a @ b.mT, 0)
    r = _reciprocal(weights, visible, normalize, eps)
    return (weights @ _kept(v, key_padding_mask) * r).to(dtype)


class _FirstOrder(NamedTuple):
    """What both derivatives need, named as above."""

    visible: Tensor  # of `_visible`
    v: Tensor  # as it is computed with
    a: tuple[Tensor, Tensor, Tensor]  # phi(q), phi'(q), phi''(q)
    b: tuple[Tensor, Tensor, Tensor]  # phi(k), phi'(k), phi''(k)
    weights: Tensor  # A
    r: Tensor
    n: Tensor
    w: Tensor
    e: Tensor
    pairs: Tensor  # G


def _first_order(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str,
    causal: bool,
    normalize: bool,
    key_padding_mask: Tensor | None,
    eps: float,
) -> _FirstOrder:
    visible = _visible(q, k, causal, key_padding_mask)
    g, q, k, v = _in_compute_dtype(grad, q, k, v)
    k, v = _kept(k, key_padding_mask), _kept(v, key_padding_mask)
    a, b = features(q, feature_map), features(k, feature_map)
    weights = torch.where(visible, a[0] @ b[0].mT, 0)
    r = _reciprocal(weights, visible, normalize, eps)
    n = weights @ v
    w = r * g
    e = -r * (w * n).sum(-1, keepdim=True) * normalize
    pairs = torch.where(visible, w @ v.mT + e, 0)
    return _FirstOrder(visible, v, a, b, weights, r, n, w, e, pairs)


@without_autocast
def linear_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    key_padding_mask: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to (q, k, v) of sum(grad * linear_attention(q, k, v)); grad [B, H, Nq, Dv]."""
    dtype, kept = q.dtype, key_padding_mask
    first = _first_order(grad, q, k, v, feature_map, causal, normalize, kept, eps)
    (a, a_slope, _), (b, b_slope, _), pairs = first.a, first.b, first.pairs
    of_k, of_v = _kept(b_slope * (pairs.mT @ a), kept), first.weights.mT @ first.w
    return (a_slope * (pairs @ b)).to(dtype), of_k.to(dtype), of_v.to(dtype)


@without_autocast
def linear_attention_double_backward(
    u_q: Tensor,
    u_k: Tensor,
    u_v: Tensor,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    key_padding_mask: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to (grad, q, k, v) of sum(u_q * grad_q + u_k * grad_k + u_v * grad_v), of the backward."""
    dtype, kept = q.dtype, key_padding_mask
    visible, v, a_maps, b_maps, weights, r, n, w, e, pairs = _first_order(
        grad, q, k, v, feature_map, causal, normalize, kept, eps
    )
    (a, a_slope, a_curvature), (b, b_slope, b_curvature) = a_maps, b_maps
    u_q, u_k, u_v = _in_compute_dtype(u_q, u_k, u_v)
    u_k, u_v = _kept(u_k, kept), _kept(u_v, kept)

    a_dot, b_dot = a_slope * u_q, b_slope * u_k
    weights_dot = torch.where(visible, a_dot @ b.mT + a @ b_dot.mT, 0)
    n_dot = weights_dot @ v + weights @ u_v
    rho = r * weights_dot.sum(-1, keepdim=True) * normalize
    o_dot = r * (n_dot - rho * n)
    w_dot = -rho * w
    e_dot = (-2 * rho * e - r * (w * n_dot).sum(-1, keepdim=True)) * normalize
    pairs_dot = torch.where(visible, w_dot @ v.mT + w @ u_v.mT + e_dot, 0)

    grad_a_dot = pairs_dot @ b + pairs @ b_dot
    grad_b_dot = pairs_dot.mT @ a + pairs.mT @ a_dot
    of_q = a_curvature * u_q * (pairs @ b) + a_slope * grad_a_dot
    of_k = b_curvature * u_k * (pairs.mT @ a) + b_slope * grad_b_dot
    of_v = weights_dot.mT @ w + weights.mT @ w_dot
    return o_dot.to(dtype), of_q.to(dtype), _kept(of_k, kept).to(dtype), of_v.to(dtype)

"""Attention with a kernel in place of exp(q . k / sqrt(D)), and the weights that it gives.

The softmax kernel is a Gaussian times a function of each norm: with s = 2 sqrt(D),

    exp(q . k / sqrt(D)) = exp(-|q - k|^2 / s) exp(|q|^2 / s) exp(|k|^2 / s).

"gaussian" keeps the first factor alone (Chen et al., "Skyformer", NeurIPS 2021). "elu" and "relu" are the inner
products of `linear_attention`.
"""

from __future__ import annotations

import torch

from robattr_fast.ops import _check
from robattr_fast.ops.linear_attention import MAX_WIDTH, checked, linear_attention

LINEAR_KERNELS = ("elu", "relu")
KERNELS = (*LINEAR_KERNELS, "gaussian")


def check_kernel(kernel: str) -> str:
    """One of KERNELS."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel: got {kernel!r}, takes one of {', '.join(KERNELS)}")
    return kernel


def kernel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kernel: str = "elu",
    normalize: bool = True,
    causal: bool = False,
    key_padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """o_i = sum_j a_ij v_j with a_ij = w(q_i, k_j) / sum_l w(q_i, k_l), or w(q_i, k_j) / (number of keys that i sees).

    Args:
        q, k, v: [B, H, Nq, D], [B, H, Nk, D], [B, H, Nk, Dv], one dtype.
        kernel: w(q, k): "elu" or "relu", phi(q) . phi(k) in linear time, see `linear_attention`; or "gaussian",
            exp(-|q - k|^2 / (2 sqrt(D))), which forms all Nq x Nk weights. All are differentiable twice.
            Distances come from |q - c|^2 + |k - c|^2 - 2 (q - c) . (k - c), c the mean key. With unit roundoff u the
            exponent is off by up to about sqrt(D) u (|q - c| + |k - c|)^2 / 2: digits are lost where keys lie much
            farther apart than D^(1/4), the width of the Gaussian.
        normalize: whether the weights of a row sum to one. False: a mean over the keys of weights as they are; those of
            "gaussian" lie in [0, 1].
        causal: row i sees the keys 0..i; needs Nq = Nk.
        key_padding_mask: bool [B, Nk], True = keep.

    Returns:
        [B, H, Nq, Dv] in the dtype of q; computed in float32, for float64 in float64. Rows that see nothing give zeros.
        Under autocast q, k and v are cast first, as by `linear_attention`.

    Raises:
        TypeError, ValueError: an argument outside of what is named above.
    """
    if check_kernel(kernel) != "gaussian":
        return linear_attention(
            q, k, v, feature_map=kernel, causal=causal, normalize=normalize, key_padding_mask=key_padding_mask
        )
    q, k, v = checked(q, k, v, causal, key_padding_mask)
    with torch.autocast(q.device.type, enabled=False):
        weights = _gaussian_weights(q, k, normalize, causal, key_padding_mask)
        return (weights @ _kept(v, key_padding_mask).to(weights.dtype)).to(q.dtype)


def kernel_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    kernel: str = "elu",
    normalize: bool = True,
    causal: bool = False,
    key_padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The a_ij of `kernel_attention`, [B, H, Nq, Nk]: quadratic, for looking at them."""
    if check_kernel(kernel) == "gaussian":
        q, k, _ = checked(q, k, k, causal, key_padding_mask)
        with torch.autocast(q.device.type, enabled=False):
            return _gaussian_weights(q, k, normalize, causal, key_padding_mask).to(q.dtype)
    # Attention is linear in v: applied to the identity it shows its weights, here MAX_WIDTH columns at a time.
    identity = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
    columns = [
        linear_attention(
            q, k, part, feature_map=kernel, causal=causal, normalize=normalize, key_padding_mask=key_padding_mask
        )
        for part in identity.split(MAX_WIDTH, dim=-1)
    ]
    return torch.cat(columns, dim=-1)


def softmax_weights(
    q: torch.Tensor, k: torch.Tensor, *, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(scale q k^T + bias) [B, H, Nq, Nk], in float32 (float64 for float64) and rounded to the dtype of q.

    ``bias`` is added to the logits, or, if bool, tells which keys a row sees (True). Rows that see nothing are zeros,
    as in torch.nn.functional.scaled_dot_product_attention.
    """
    dtype = _check.comparable_dtype(q)
    with torch.autocast(q.device.type, enabled=False):
        logits = (q.to(dtype) @ k.to(dtype).mT) * scale
    if bias is None:
        return logits.softmax(-1).to(q.dtype)
    if bias.dtype == torch.bool:
        blind = ~bias.any(-1, keepdim=True)
        logits = logits.masked_fill(~bias, -torch.inf)
    else:
        blind = (bias == -torch.inf).all(-1, keepdim=True)
        logits = logits + bias
    # Finite before the softmax: NaN would come back as a gradient.
    return logits.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0).to(q.dtype)


def _kept(x, key_padding_mask):
    """Zeros in place of padding, which may hold anything, NaN included."""
    return x if key_padding_mask is None else torch.where(key_padding_mask[:, None, :, None], x, 0)


def _mean_key(k, key_padding_mask):
    """[B, H, 1, D], of the keys that are not padding; k holds zeros there."""
    if key_padding_mask is None:
        return k.mean(dim=2, keepdim=True)
    return k.sum(dim=2, keepdim=True) / key_padding_mask.sum(-1).clamp(min=1)[:, None, None, None]


def _gaussian_weights(q, k, normalize, causal, key_padding_mask):
    dtype = _check.comparable_dtype(q)
    q, k = q.to(dtype), _kept(k, key_padding_mask).to(dtype)
    # Distances do not change when everything moves; near the origin |q|^2 + |k|^2 - 2 q . k cancels least.
    centre = _mean_key(k, key_padding_mask).detach()
    q, k = q - centre, k - centre
    squared = q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :] - 2 * (q @ k.mT)
    # What rounding makes negative is 0, with the derivatives that it has: a clamp's own would be 0 wherever q is k.
    squared = squared + (squared.clamp(min=0) - squared).detach()
    logits = squared / (-2 * q.shape[-1] ** 0.5)
    visible = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]
    if normalize:
        # Finite in place of -inf: a row that sees nothing has no NaN, nor has its gradient.
        weights = torch.where(visible, logits, torch.finfo(dtype).min).softmax(-1)
        return torch.where(visible, weights, 0)
    seen = visible.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(visible, torch.where(visible, logits, 0).exp(), 0) / seen

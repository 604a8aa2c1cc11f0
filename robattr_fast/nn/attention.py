"""Modules with kernel attention in the form of torch.nn.MultiheadAttention and of timm's Attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from robattr_fast.nn.functional import check_kernel, kernel_attention, kernel_weights


def _no_dropout(module: nn.Module, rate: float) -> None:
    if module.training and rate > 0:
        raise ValueError(
            f"dropout: got {rate} in training mode; kernel attention forms no weights to drop from: set it to 0"
        )


def _settings(module: KernelAttention | KernelSelfAttention) -> dict[str, Any]:
    return {"kernel": module.kernel, "normalize": module.normalize}


class KernelAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention with a kernel in place of the softmax; the same parameters and state_dict.

    Differs from it in what it refuses: ``add_bias_kv``, ``add_zero_attn``, dropout in training, nested tensors, and an
    ``attn_mask`` other than the causal one (``is_causal=True``), because linear attention never forms the weights that
    an arbitrary mask would change.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, device, dtype: as in torch.nn.MultiheadAttention.
        kernel: "elu", "relu" or "gaussian"; see `kernel_attention`.
        normalize: whether each row of weights sums to one; False takes the mean over the keys instead.

    Raises:
        ValueError: a setting that kernel attention does not have.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kernel: str = "elu",
        normalize: bool = True,
    ) -> None:
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise ValueError(f"{name}: got True, kernel attention takes no extra keys")
        super().__init__(
            embed_dim, num_heads, dropout, bias, False, False, kdim, vdim, batch_first, device=device, dtype=dtype
        )
        self.kernel = check_kernel(kernel)
        self.normalize = normalize

    @classmethod
    def from_softmax(cls, attention: nn.MultiheadAttention, *, kernel: str = "elu", normalize: bool = True):
        """The same projections, parameter for parameter and shared, with a kernel in place of the softmax."""
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("attention: it has add_bias_kv or add_zero_attn; kernel attention takes no extra keys")
        new = cls(
            attention.embed_dim,
            attention.num_heads,
            attention.dropout,
            attention.in_proj_bias is not None,
            kdim=attention.kdim,
            vdim=attention.vdim,
            batch_first=attention.batch_first,
            device="meta",
            kernel=kernel,
            normalize=normalize,
        )
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            setattr(new, name, getattr(attention, name))
        new.out_proj = attention.out_proj
        return new.train(attention.training)

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        # torch's encoder layers read this before they hand the parameters to a fused softmax attention of their own.
        self._qkv_same_embed_dim = False

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state | {"_qkv_same_embed_dim": False})

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, kernel={self.kernel!r}, normalize={self.normalize}"

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As torch.nn.MultiheadAttention.forward: its shapes, and its masks, where True means *ignore*.

        Args:
            query, key, value: [B, Nq, E], [B, Nk, kdim], [B, Nk, vdim] with ``batch_first``, else [Nq, B, E] and so on;
                or without a batch [Nq, E] and so on.
            key_padding_mask: [B, Nk] ([Nk] without a batch): bool, True = ignore, or float, -inf = ignore and 0 = keep;
                other values are refused, but where torch.compile or a CUDA graph hides them: there they are ignored.
            need_weights: return the weights too, which takes quadratic memory.
            attn_mask: None, or anything with ``is_causal``, which then stands for it.
            average_attn_weights: whether the weights are averaged over heads.
            is_causal: each row sees the keys up to its own position.

        Returns:
            The output in the shape of query, and the weights [B, Nq, Nk] or [B, H, Nq, Nk], or None.
        """
        _no_dropout(self, self.dropout)
        q, k, v, settings = self._arguments(query, key, value, key_padding_mask, attn_mask, is_causal)
        out = kernel_attention(q, k, v, **settings)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        weights = None
        if need_weights:
            weights = kernel_weights(q, k, **settings)
            weights = weights.mean(dim=1) if average_attn_weights else weights
        if query.dim() == 2:
            return out[0], weights[0] if weights is not None else None
        return out if self.batch_first else out.transpose(0, 1), weights

    def weights(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """The attention weights [B, H, Nq, Nk] of a call of forward with these arguments (B = 1 without a batch)."""
        q, k, _, settings = self._arguments(query, key, value, key_padding_mask, attn_mask, is_causal)
        return kernel_weights(q, k, **settings)

    def _arguments(self, query, key, value, key_padding_mask, attn_mask, is_causal):
        """q, k, v [B, H, N, head_dim] and the settings of `kernel_attention`."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("query: got a nested tensor, kernel attention takes padded ones and key_padding_mask")
        if attn_mask is not None and not is_causal:
            raise ValueError(
                f"attn_mask: got shape {tuple(attn_mask.shape)}; kernel attention takes key_padding_mask and "
                "is_causal=True alone, because it never forms the weights that another mask would change"
            )
        if query.dim() == 2:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = key_padding_mask[None] if key_padding_mask is not None else None
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = projected(self, query, key, value)
        return q, k, v, _settings(self) | {"causal": is_causal, "key_padding_mask": _keep(key_padding_mask)}


def projected(
    attention: nn.MultiheadAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """q, k, v [B, H, N, head_dim] of a torch.nn.MultiheadAttention, or of ours in its form, from [B, N, width]."""
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.chunk(3)
    else:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    biases = attention.in_proj_bias.chunk(3) if attention.in_proj_bias is not None else (None,) * 3

    def heads(x, weight, bias):
        return F.linear(x, weight, bias).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)

    q, k = heads(query, weights[0], biases[0]), heads(key, weights[1], biases[1])
    return q, k, None if value is None else heads(value, weights[2], biases[2])


def _keep(key_padding_mask: torch.Tensor | None) -> torch.Tensor | None:
    """torch's mask of what to ignore, which its encoders hand on as 0 and -inf, as the mask of what to keep."""
    if key_padding_mask is None:
        return None
    if not key_padding_mask.is_floating_point():
        return ~key_padding_mask.bool()
    keep = key_padding_mask == 0
    # A graph, traced or captured, has no host that could look at values.
    traced = torch.compiler.is_compiling() or (key_padding_mask.is_cuda and torch.cuda.is_current_stream_capturing())
    if not traced and not bool((keep | (key_padding_mask == -torch.inf)).all()):
        raise ValueError("key_padding_mask: got a float mask with other values than 0 (keep) and -inf (ignore)")
    return keep


class KernelSelfAttention(nn.Module):
    """timm's Attention with a kernel in place of the softmax: the same constructor, parameters and state_dict.

    Args:
        dim, num_heads, attn_head_dim, dim_out, qkv_bias, qk_norm, scale_norm, proj_bias, gated, proj_drop, norm_layer,
            device, dtype: as in timm.layers.Attention.
        attn_drop: 0 in training: there are no weights to drop.
        kernel, normalize: see `kernel_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kernel: str = "elu",
        normalize: bool = True,
    ) -> None:
        super().__init__()
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"dim: got {dim}, takes a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.attn_dim = num_heads * self.head_dim
        self.kernel = check_kernel(kernel)
        self.normalize = normalize

        def norm(used: bool, width: int) -> nn.Module:
            if not used:
                return nn.Identity()
            if norm_layer is None:
                raise ValueError("norm_layer: got None, takes a layer for qk_norm and scale_norm")
            return norm_layer(width, device=device, dtype=dtype)

        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.q_norm = norm(qk_norm, self.head_dim)
        self.k_norm = norm(qk_norm, self.head_dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm(scale_norm, self.attn_dim)
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, device=device, dtype=dtype) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def from_softmax(cls, attention: Any, *, kernel: str = "elu", normalize: bool = True):
        """The submodules of a timm Attention, shared, with a kernel in place of the softmax."""
        ok, reason = is_timm_attention(attention)
        if not ok:
            raise ValueError(f"attention: {reason}")
        dim, width = attention.qkv.in_features, attention.qkv.out_features
        heads = attention.num_heads
        new = cls(dim, heads, width // 3 // heads, device="meta", kernel=kernel, normalize=normalize)
        for name, child in attention.named_children():
            setattr(new, name, child)
        return new.train(attention.training)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernel={self.kernel!r}, normalize={self.normalize}"

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """x [B, N, dim] -> [B, N, dim_out]; ``attn_mask`` is refused, as linear attention forms no weights to mask."""
        _no_dropout(self, self.attn_drop.p)
        if attn_mask is not None:
            raise ValueError(
                f"attn_mask: got shape {tuple(attn_mask.shape)}; kernel attention forms no weights that it could change"
            )
        q, k, v = timm_projections(self, x)
        out = kernel_attention(q, k, v, causal=is_causal, **_settings(self)).transpose(1, 2).flatten(2)
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def weights(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """The attention weights [B, H, N, N] of x."""
        q, k, _ = timm_projections(self, x)
        return kernel_weights(q, k, causal=is_causal, **_settings(self))


def timm_projections(attention: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, H, N, head_dim] of a timm Attention, or of ours in its form."""
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    if getattr(attention, "q_norm", None) is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q, k, v


_TIMM_REQUIRED = {"qkv", "proj"}
_TIMM_KNOWN = _TIMM_REQUIRED | {"q_norm", "k_norm", "attn_drop", "norm", "gate", "proj_drop"}


def is_timm_attention(module: nn.Module) -> tuple[bool, str]:
    """Whether a module is softmax attention in timm's form and nothing more; if not, the reason."""
    children = dict(module.named_children())
    name = type(module).__name__
    heads = getattr(module, "num_heads", None)
    if not (set(children) >= _TIMM_REQUIRED and isinstance(heads, int)):
        return False, f"{name} has not the qkv, proj and num_heads of timm's Attention"
    own = {key for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    unknown = sorted((set(children) - _TIMM_KNOWN) | own)
    if unknown:
        return False, f"{name} has {', '.join(unknown)}, which timm's Attention has not"
    if not isinstance(children["qkv"], nn.Linear) or children["qkv"].out_features % (3 * heads):
        return False, f"{name} has a qkv that is no linear layer to q, k and v of {heads} heads"
    return True, ""

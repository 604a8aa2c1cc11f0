"""`attention_maps`: the attention weights of every layer, softmax or kernel, of one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from robattr_fast.errors import ModelError
from robattr_fast.nn import interface
from robattr_fast.nn.attention import (
    KernelAttention,
    KernelSelfAttention,
    is_timm_attention,
    projected,
    timm_projections,
)
from robattr_fast.nn.functional import softmax_weights


def attention_maps(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """The attention weights of every attention in a model, from one call ``model(*args, **kwargs)``.

    Known are torch.nn.MultiheadAttention, timm's Attention, models of transformers (eager or sdpa), and the kernel
    attention of this package in each of these places. Weights are computed beside the model, which runs as it would
    without: only the fused paths of torch's encoders, which call no attention, are left for this call.

    Args:
        model: eval-mode module.
        args, kwargs: what it is called with.

    Returns:
        Name of the module -> weights [B, H, Nq, Nk], in the order in which they ran. Rows sum to one where the
        attention is normalised; rows that see nothing, and in kernel attention those whose features meet those of no
        key ("relu"), are zeros. The weights carry the graph where gradients are enabled: they can be attacked or
        trained.

    Raises:
        ModelError: training mode, no known attention, an attention that runs twice or whose weights are not known.
    """
    return followed_maps(model, args, kwargs, None)


def followed_maps(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    follow: Callable[[nn.Module, torch.Tensor, torch.Tensor], None] | None,
) -> dict[str, torch.Tensor]:
    """`attention_maps` of ``model(*args, **kwargs)``; ``follow``: see `interface.recording`."""
    if any(module.training for module in model.modules()):
        raise ModelError("model: it is in training mode; call model.eval() before looking at its attention")
    maps: dict[str, torch.Tensor] = {}
    names = {module: name for name, module in model.named_modules()}

    def record(module: nn.Module, weights: torch.Tensor) -> None:
        if names[module] in maps:
            raise ModelError(f"model: the attention {names[module]!r} runs more than once per forward")
        maps[names[module]] = weights

    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        for inner in interface.interface_models(model).values():
            stack.enter_context(interface.recording(inner, record, follow))
        for module in model.modules():
            for handle in _hooks(module, record):
                stack.callback(handle.remove)
        model(*args, **kwargs)
    if not maps:
        raise ModelError(
            "model: no known attention ran in it; known are torch.nn.MultiheadAttention, timm's Attention, models of "
            "transformers and the kernel attention of this package"
        )
    return maps


def _hooks(module: nn.Module, record: Any) -> list[Any]:
    """The hooks that record the weights of one module."""
    weights: Callable[..., torch.Tensor]
    if isinstance(module, KernelAttention):
        weights = KernelAttention.weights
    elif isinstance(module, nn.MultiheadAttention):
        weights = _multihead_weights
    elif isinstance(module, KernelSelfAttention):
        weights = KernelSelfAttention.weights
    elif type(module).__name__ == "Attention" and is_timm_attention(module)[0]:
        weights = _timm_weights
    else:
        return []

    def before(module, args, kwargs):
        record(module, weights(module, *args, **kwargs))

    return [module.register_forward_pre_hook(before, with_kwargs=True)]


def _multihead_weights(
    module,
    query,
    key,
    value,
    key_padding_mask=None,
    need_weights=True,
    attn_mask=None,
    average_attn_weights=True,
    is_causal=False,
):
    """What torch.nn.MultiheadAttention.forward gives with need_weights, which would take another path through it."""
    if query.is_nested or key.is_nested:
        raise ModelError(f"model: {type(module).__name__} got a nested tensor; attention maps need padded ones")
    batched = query.dim() == 3
    if not batched:
        query, key = query[None], key[None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif not module.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    q, k, _ = projected(module, query, key)
    batch, heads, _, width = q.shape
    mask = torch.zeros((), dtype=torch.float32, device=q.device)
    if attn_mask is not None:
        # [B * H, Nq, Nk] or [Nq, Nk]
        mask = mask + _added(attn_mask).unflatten(0, (batch, heads) if attn_mask.dim() == 3 else (1, 1, -1))
    if key_padding_mask is not None:
        mask = mask + _added(key_padding_mask)[:, None, None, :]
    extra = []
    if module.bias_k is not None:
        extra.append(module.bias_k.view(1, heads, 1, width).to(k.dtype).expand(batch, -1, -1, -1))
    if module.add_zero_attn:
        extra.append(k.new_zeros((batch, heads, 1, width)))
    if extra:
        mask = mask.expand(*torch.broadcast_shapes(mask.shape, (1, 1, 1, k.shape[2])))
        k, mask = torch.cat([k, *extra], dim=2), F.pad(mask, (0, len(extra)))
    return softmax_weights(q, k, scale=width**-0.5, bias=mask)


def _added(mask):
    """torch's masks, bool (True = ignore) or float, as what is added to the logits."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, -torch.inf)


def _timm_weights(module, x, attn_mask=None, is_causal=False):
    q, k, _ = timm_projections(module, x)
    if is_causal:
        attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scale = getattr(module, "scale", q.shape[-1] ** -0.5)
    return softmax_weights(q, k, scale=scale, bias=attn_mask)

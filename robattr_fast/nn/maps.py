"""`attention_maps`: the attention weights of every layer, softmax or kernel, of one forward pass."""

from __future__ import annotations

import functools
import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from robattr_fast.errors import ModelError
from robattr_fast.nn import interface
from robattr_fast.nn.attention import KernelSelfAttention, is_timm_attention, timm_projections
from robattr_fast.nn.functional import softmax_weights

_FORWARD = inspect.signature(nn.MultiheadAttention.forward)


def attention_maps(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """The attention weights of every attention in a model, from one call ``model(*args, **kwargs)``.

    Known are torch.nn.MultiheadAttention, timm's Attention, models of transformers (eager or sdpa), and the kernel
    attention of this package in each of these places. Fused paths, which form no weights, are left for this call.

    Args:
        model: eval-mode module.
        args, kwargs: what it is called with.

    Returns:
        Name of the module -> weights [B, H, Nq, Nk], in the order in which they ran. Rows sum to one where the
        attention is normalised; in kernel attention rows that see nothing, or whose features meet those of no key
        ("relu"), are zeros. The weights carry the graph where gradients are enabled: they can be attacked or trained.

    Raises:
        ModelError: training mode, no known attention, an attention that runs twice or whose weights are not known.
    """
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
            stack.enter_context(interface.recording(inner, record))
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
    if isinstance(module, nn.MultiheadAttention):
        calls: list[inspect.BoundArguments] = []
        return [
            module.register_forward_pre_hook(functools.partial(_ask_for_weights, calls=calls), with_kwargs=True),
            module.register_forward_hook(functools.partial(_take_weights, calls=calls, record=record)),
        ]
    if isinstance(module, KernelSelfAttention):
        weights = KernelSelfAttention.weights
    elif type(module).__name__ == "Attention" and is_timm_attention(module)[0]:
        weights = _timm_weights
    else:
        return []

    def before(module, args, kwargs):
        record(module, weights(module, *args, **kwargs))

    return [module.register_forward_pre_hook(before, with_kwargs=True)]


def _ask_for_weights(module, args, kwargs, *, calls):
    call = _FORWARD.bind(module, *args, **kwargs)
    call.apply_defaults()
    calls.append(call)
    asked = call.arguments | {"need_weights": True, "average_attn_weights": False}
    asked.pop("self")
    return (), asked


def _take_weights(module, args, output, *, calls, record):
    """Records the weights and gives the caller what it had asked for."""
    out, weights = output
    call = calls.pop().arguments
    batched = weights if weights.dim() == 4 else weights[None]
    record(module, batched)
    if not call["need_weights"]:
        return out, None
    return out, weights.mean(dim=-3) if call["average_attn_weights"] else weights


def _timm_weights(module, x, attn_mask=None, is_causal=False):
    q, k, _ = timm_projections(module, x)
    if is_causal:
        attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scale = getattr(module, "scale", q.shape[-1] ** -0.5)
    return softmax_weights(q, k, scale=scale, bias=attn_mask)

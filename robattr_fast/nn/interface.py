"""Kernel attention behind the attention interface of transformers; the library itself is imported inside functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from robattr_fast.errors import ModelError
from robattr_fast.nn.functional import check_kernel, kernel_attention, kernel_weights, softmax_weights

NAME = "robattr_linear"

# What a model may pass besides masks that changes the weights; None where it does not use it.
_REFUSED = ("position_bias", "softcap", "sliding_window", "s_aux", "cache")


def interface_name(kernel: str, normalize: bool) -> str:
    """The name under which `register` puts this attention by default: "robattr_linear" for elu, normalised."""
    name = NAME if kernel == "elu" else f"robattr_{kernel}"
    return name if normalize else f"{name}_mean"


def register(name: str | None = None, *, kernel: str = "elu", normalize: bool = True) -> str:
    """Add kernel attention to the attention and mask interfaces of transformers, for this process.

    Afterwards ``Model.from_pretrained(..., attn_implementation=name)`` and ``model.set_attn_implementation(name)`` use
    it. Its mask is the padding mask [B, N]. 4-D masks, dropout in training, sliding windows, packed sequences and
    cached keys of a causal model raise ValueError.

    Args:
        name: what to call it; None: "robattr_linear" for elu, normalised, else "robattr_{kernel}", with "_mean" if not
            normalised.
        kernel, normalize: see `kernel_attention`.

    Returns:
        The name.

    Raises:
        ImportError: transformers is not installed. ValueError: no such kernel.
    """
    name = name or interface_name(check_kernel(kernel), normalize)
    attention, mask = _interfaces()
    attention.register(name, functools.partial(attention_forward, kernel=kernel, normalize=normalize))
    mask.register(name, padding_mask)
    return name


def _interfaces() -> tuple[Any, Any]:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            f"the transformers integration needs transformers >= 5: pip install 'robattr-fast[integrations]' ({error})"
        ) from error
    return AttentionInterface, AttentionMaskInterface


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor | None:
    """bool [B, kv_length], True = keep, or None where nothing is padded: what transformers hands to the attention."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (bidirectional_mask_function, causal_mask_function):
        raise ValueError(
            "attention_mask: the model asks for a sliding window, packed sequences or a mask of its own; kernel "
            "attention takes padding and causality alone, because it never forms the weights that others would change"
        )
    if attention_mask is not None and attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, takes [B, N] = {(batch_size, kv_length)}"
        )
    return attention_mask


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kernel: str,
    normalize: bool,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, Nq, D], key, value [B, H or fewer, Nk, D] -> [B, Nq, H, Dv]; ``scaling`` belongs to the softmax."""
    if dropout:
        raise ValueError(
            f"dropout: got {dropout}; kernel attention forms no weights to drop from: set the model's attention "
            "dropout to 0 (config.attention_probs_dropout_prob, config.attention_dropout)"
        )
    key, value, masks = _arguments(module, query, key, value, attention_mask, is_causal, kwargs)
    out = kernel_attention(query, key, value, kernel=kernel, normalize=normalize, **masks)
    return out.transpose(1, 2), None


def _arguments(module, query, key, value, attention_mask, is_causal, kwargs):
    """key, value with as many heads as query, and the masks in the form of `kernel_attention`."""
    refused = [name for name in _REFUSED if kwargs.get(name) is not None]
    if refused:
        raise ValueError(f"{', '.join(refused)}: {type(module).__name__} uses it, kernel attention does not have it")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}; kernel attention takes a padding mask [B, N], "
            "because it never forms the N x N weights that a 4-D mask would change"
        )
    causal = _is_causal(module, is_causal)
    if causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"past_key_values: got {query.shape[2]} queries for {key.shape[2]} keys; causal kernel attention takes no "
            "cached keys: call the model with use_cache=False"
        )
    return *_all_heads(query, key, value), {"causal": causal, "key_padding_mask": attention_mask}


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    if is_causal is None:
        is_causal = getattr(module, "is_causal", None)
        if is_causal is None:
            raise ModelError(f"model: {type(module).__name__} does not say whether it is causal (no is_causal)")
        # A decoder may be told by its configuration to look both ways.
        is_causal = is_causal and getattr(getattr(module, "config", None), "is_causal", True)
    return bool(is_causal)


def _looks_back(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether sdpa of transformers is causal where it gets no mask."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _all_heads(query, key, value):
    groups = query.shape[1] // key.shape[1]
    return (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))


def interface_models(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost transformers models inside ``model``, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(outer == "" or name.startswith(outer + ".") for outer in found)
        if not inside and hasattr(module, "set_attn_implementation"):
            found[name] = module
    return found


def set_implementation(model: Any, name: str) -> None:
    """Make a transformers model use a registered attention; ModelError if it keeps its own."""
    model.set_attn_implementation(name)
    # It only warns where the model's code does not go through the interface.
    refused = sorted(part for part, used in _implementations(model).items() if used != name)
    if refused:
        raise ModelError(f"model: {', '.join(refused)} does not use the attention interface of transformers")


@contextmanager
def undone_on_failure(models: Collection[nn.Module]) -> Iterator[None]:
    """An exception inside gives every part of these transformers models the implementation that it had."""
    before = [(config, config._attn_implementation) for model in models for config in _configurations(model)]
    try:
        yield
    except BaseException:
        # Setting one sets those below it too, which therefore follow.
        for config, implementation in before:
            config._attn_implementation = implementation
        raise


def _configurations(model: nn.Module) -> Iterator[Any]:
    """Of a transformers model and of its parts, each before those that it holds."""
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "set_attn_implementation")]
    waiting = [part.config for part in reversed(parts)]
    while waiting:
        config = waiting.pop()
        yield config
        held = (getattr(config, name, None) for name in config.sub_configs)
        waiting += [inner for inner in held if inner is not None]


def _implementations(model: nn.Module) -> dict[str, str]:
    """Attention implementation of each class of transformers models in ``model``, itself included."""
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "set_attn_implementation")]
    return {type(part).__name__: part.config._attn_implementation for part in parts}


@contextmanager
def recording(
    model: Any,
    record: Callable[[nn.Module, torch.Tensor], None],
    follow: Callable[[nn.Module, torch.Tensor, torch.Tensor], None] | None = None,
) -> Iterator[None]:
    """Inside, every attention of a transformers model calls ``record(module, weights [B, H, Nq, Nk])`` as it runs.

    Then, where given, ``follow(module, values [B, H, Nk, D], output [B, Nq, H, D])``.

    Raises:
        ModelError: an implementation whose weights are not known here (takes eager, sdpa and those of `register`), or
            different ones in the parts of the model.
    """
    attention, mask = _interfaces()
    before, *others = sorted(set(_implementations(model).values()))
    if others:
        raise ModelError(f"model: its parts have the implementations {before}, {', '.join(others)}, takes one for all")
    implementation = attention().get(before)
    ours = getattr(implementation, "func", None) is attention_forward
    if not ours and before not in ("eager", "sdpa"):
        raise ModelError(f"model: attention implementation {before!r}, takes eager, sdpa or one of register()")

    def forward(module, query, key, value, attention_mask, *, scaling=None, is_causal=None, **kwargs):
        unrepeated = key, value
        if ours:
            key, value, masks = _arguments(module, query, key, value, attention_mask, is_causal, kwargs)
            weights = kernel_weights(query, key, **implementation.keywords, **masks)
        else:
            refused = [name for name in _REFUSED if name != "sliding_window" and kwargs.get(name) is not None]
            if refused:
                raise ModelError(f"model: {type(module).__name__} uses {', '.join(refused)}; its weights are not known")
            key, value = _all_heads(query, key, value)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            bias = attention_mask
            if bias is None and implementation is not None and query.shape[2] > 1 and _looks_back(module, is_causal):
                bias = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
            weights = softmax_weights(query, key, scale=scale, bias=bias)
        record(module, weights)
        if implementation is None:  # eager attention is code of the model, and this is what it does
            result = (weights @ value).transpose(1, 2), weights
        else:
            given = {"scaling": scaling, "is_causal": is_causal}
            result = implementation(module, query, *unrepeated, attention_mask, **given, **kwargs)
        if follow is not None:
            follow(module, value, result[0])
        return result

    name = "robattr_recording"
    attention.register(name, forward)
    mask.register(name, mask()[before])
    try:
        set_implementation(model, name)
        yield
    finally:
        model.set_attn_implementation(before)

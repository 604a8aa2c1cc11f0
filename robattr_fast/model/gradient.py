"""Logits, input gradients and scores of a batch, and whether they are a fixed function of each row."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable

import torch
from torch import nn

from robattr_fast.errors import ModelError
from robattr_fast.model.hooks import settle
from robattr_fast.model.output import checked_logits, logits_in
from robattr_fast.model.surroundings import users_defaults

# callable(model, batch [N, *S], target [N] or None) -> scores [N, *S]
Explanation = Callable[[nn.Module, torch.Tensor, "torch.Tensor | None"], torch.Tensor]

EXPLANATIONS = ("gradient", "input_x_gradient")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of torch gave up. That of the CPU raises a plain RuntimeError."""
    words = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


AUTOCAST = ("bfloat16", "float16")
"""Dtypes of torch.autocast."""


def dtype_name(dtype: torch.dtype) -> str:
    """As a certificate records it: "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str | None) -> torch.dtype | None:
    """The inverse of `dtype_name`; None for None."""
    return None if name is None else getattr(torch, name)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """torch.autocast in ``dtype``; None: nothing is changed. No cast is cached: a captured graph would outlive it."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def forward(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Logits [N, classes] of a batch [N, *S]; ModelError says what is wrong with anything else."""
    settle(model)
    try:
        with users_defaults():
            returned = model(batch)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        shape = tuple(batch.shape)
        raise ModelError(
            f"model: its forward failed on a batch of shape {shape}, {batch.dtype}: {error}{_hint(error, batch)}"
        ) from error
    if not isinstance(returned, torch.Tensor):
        _forms[model] = logits_in(returned)[1]
    return checked_logits(returned, batch)


_forms: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def output_form(model: nn.Module) -> str:
    """Where in what the model returned `forward` has found the logits: see `output.logits_in`; "" for a tensor."""
    return _forms.get(model, "")


def _hint(error: Exception, batch: torch.Tensor) -> str:
    if batch.dim() == 4 and "channels" in str(error):
        return (
            f" (the batch has {batch.shape[1]} channels; a model spec whose images are of another kind returns "
            "(module, preprocess), where preprocess makes the tensor [C, H, W] of an image)"
        )
    return ""


def selected_logits(logits: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
    """f_c per sample [N]: c is ``target`` [N], or the largest logit of that very sample where target is None."""
    index = logits.detach().argmax(dim=1) if target is None else target
    try:
        return logits.gather(1, index[:, None])[:, 0]
    except (RuntimeError, IndexError) as error:  # on a CPU; reading the classes would wait for a device
        if is_out_of_memory(error):
            raise
        raise ValueError(f"target: got {index.tolist()}, expected classes in [0, {logits.shape[1]})") from error


def input_gradient(
    model: nn.Module, batch: torch.Tensor, target: torch.Tensor | None, *, create_graph: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d f_c / d batch [N, *S], logits [N, classes]).

    With ``create_graph`` both carry their graph, to a batch that requires gradients and to the model's parameters.
    """
    leaf = batch if create_graph else batch.detach().requires_grad_()
    with torch.enable_grad():
        logits = _forward_of_leaf(model, leaf)
        if not logits.requires_grad:
            raise ModelError(_no_gradient(model))
        (gradient,) = torch.autograd.grad(
            selected_logits(logits, target).sum(), leaf, create_graph=create_graph, allow_unused=True
        )
    if gradient is None:
        raise ModelError(_no_gradient(model))
    return gradient, logits if create_graph else logits.detach()


_writing: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that write into their input, as nn.ReLU(inplace=True) in front: autograd allows it on a copy alone."""


def _forward_of_leaf(model: nn.Module, leaf: torch.Tensor) -> torch.Tensor:
    if model in _writing:
        return forward(model, leaf.clone())
    try:
        return forward(model, leaf)
    except ModelError as error:
        if "leaf Variable that requires grad" not in str(error):
            raise
    logits = forward(model, leaf.clone())
    _writing.add(model)
    return logits


def _no_gradient(model: nn.Module) -> str:
    reason = "model: its output does not depend on its input (no gradient flows back to it)"
    quantized = next((m for m in model.modules() if ".quantized" in f".{type(m).__module__}"), None)
    if quantized is not None:
        reason += f": {type(quantized).__name__} is quantized and has no gradient; explain the float model"
    elif torch.is_inference_mode_enabled():
        reason += ": torch.inference_mode() is on, under which none is recorded"
    return reason


def scores(
    model: nn.Module, batch: torch.Tensor, target: torch.Tensor | None, explain: str | Explanation
) -> tuple[torch.Tensor, torch.Tensor]:
    """(attribution scores, signed as they come, logits [N, classes]) of a batch [N, *S] by the method ``explain``.

    Scores [N, *S], or of a callable [N, *S[1:]]: one per pixel, as if they were summed over channels.
    """
    if explain == "gradient":
        return input_gradient(model, batch, target)
    if explain == "input_x_gradient":
        gradient, logits = input_gradient(model, batch, target)
        return gradient * batch, logits
    assert callable(explain)
    with torch.no_grad():
        logits = forward(model, batch.clone())  # a model may write into its input
    with torch.enable_grad(), users_defaults():  # also where the caller has switched gradients off
        attribution = explain(model, batch, target if target is not None else logits.argmax(dim=1))
    allowed = [batch.shape] if batch.dim() < 3 else [batch.shape, batch.shape[:1] + batch.shape[2:]]
    if not isinstance(attribution, torch.Tensor) or attribution.shape not in allowed:
        got = tuple(attribution.shape) if isinstance(attribution, torch.Tensor) else type(attribution).__name__
        pixels = "" if batch.dim() < 3 else f", or one per pixel, {tuple(allowed[1])}"
        raise ModelError(
            f"explain: the callable returned {got}, takes scores of the batch's shape {tuple(batch.shape)}{pixels}"
        )
    return attribution.detach(), logits

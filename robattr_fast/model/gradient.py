"""Logits, input gradients and scores of a batch, and whether they are a fixed function of each row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from robattr_fast.errors import ModelError

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
    try:
        logits = model(batch)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        shape = tuple(batch.shape)
        raise ModelError(f"model: its forward failed on a batch of shape {shape}, {batch.dtype}: {error}") from error
    return checked_logits(logits, batch)


def checked_logits(logits: object, batch: torch.Tensor) -> torch.Tensor:
    """What a model returned for a batch [N, *S], if it is floating-point logits [N, classes]; else ModelError."""
    if not isinstance(logits, torch.Tensor):
        raise ModelError(f"model: it returned {type(logits).__name__}, takes a model that returns one tensor of logits")
    if logits.dim() != 2 or logits.shape[0] != batch.shape[0]:
        raise ModelError(f"model: it returned shape {tuple(logits.shape)}, takes logits [{batch.shape[0]}, classes]")
    if not logits.is_floating_point():
        raise ModelError(f"model: it returned dtype {logits.dtype}, takes floating-point logits")
    return logits


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
        logits = forward(model, leaf)
        if not logits.requires_grad:
            raise ModelError("model: its output does not depend on its input (no gradient flows back to it)")
        (gradient,) = torch.autograd.grad(
            selected_logits(logits, target).sum(), leaf, create_graph=create_graph, allow_unused=True
        )
    if gradient is None:
        raise ModelError("model: its output does not depend on its input (no gradient flows back to it)")
    return gradient, logits if create_graph else logits.detach()


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
    attribution = explain(model, batch, target if target is not None else logits.argmax(dim=1))
    allowed = [batch.shape] if batch.dim() < 3 else [batch.shape, batch.shape[:1] + batch.shape[2:]]
    if not isinstance(attribution, torch.Tensor) or attribution.shape not in allowed:
        got = tuple(attribution.shape) if isinstance(attribution, torch.Tensor) else type(attribution).__name__
        pixels = "" if batch.dim() < 3 else f", or one per pixel, {tuple(allowed[1])}"
        raise ModelError(
            f"explain: the callable returned {got}, takes scores of the batch's shape {tuple(batch.shape)}{pixels}"
        )
    return attribution.detach(), logits


def check_fixed(alone: torch.Tensor, mixed: torch.Tensor, half_digits: float) -> None:
    """ModelError unless a sample has the same logits in every row of a batch of its like and beside other samples.

    Logits [N, classes], of which ``alone`` has one sample in all rows, ``mixed`` that sample in the first.
    """
    rows = alone.double()
    allowed = half_digits * float(rows[0].norm())
    among = float((rows - rows[0]).norm(dim=1).max())
    if among > allowed:
        raise ModelError(
            f"model: equal rows of one batch get different logits (by {among:.1e}): it is random, as by dropout "
            "that is active in eval mode (torch.nn.functional.dropout without training=self.training)"
        )
    apart = float((mixed[0].double() - rows[0]).norm())
    if apart > allowed:
        raise ModelError(
            f"model: the logits of an input change (by {apart:.1e}) with the other rows of the batch, or from call to "
            "call: a normalisation by the statistics of the batch, or randomness; takes a fixed function of each row"
        )


def check_repeatable(once: torch.Tensor, again: torch.Tensor, half_digits: float) -> None:
    """ModelError unless a callable gives one sample the same scores twice; NaN is judged later."""
    difference = float((once.double() - again.double()).nan_to_num().norm())
    if difference > half_digits * float(once.double().nan_to_num().norm()):
        raise ModelError(
            f"explain: the callable gives one sample different scores from call to call, or from row to row "
            f"of a batch (by {difference:.1e}); takes a fixed function of each row"
        )

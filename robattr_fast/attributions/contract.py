"""What every attribution does with its arguments: (model, x, target, create_graph) -> map per image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from robattr_fast import model as _model
from robattr_fast.errors import ModelError
from robattr_fast.sampling.arguments import check_images, check_target

Target: TypeAlias = int | Sequence[int] | torch.Tensor | None

Rows = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""(x [B, *S] that requires gradients, target [B] or None) -> maps [B, *M] with their graph."""


def mapped(model: nn.Module, x: torch.Tensor, target: Target, create_graph: bool, rows: Rows) -> torch.Tensor:
    """``rows(x, target)`` of checked arguments, detached unless ``create_graph``. Gradients may be disabled around it.

    With ``create_graph`` the maps carry their graph to x, where x requires gradients, and to the model's parameters,
    and fused attention, which has no second derivative, runs as its formula. Without, x is a copy, so that a model that
    writes into its input does not reach the caller's.
    """
    _model.check_mode(model)
    check_images(x)
    classes = check_target(target, x)
    with recording():
        classes = None if classes is None else classes.clone()
        fused = sdpa_kernel(SDPBackend.MATH) if create_graph else contextlib.nullcontext()
        leaf = x if create_graph and x.requires_grad else x.detach().clone().requires_grad_()
        with fused:
            maps = rows(leaf, classes)
        return maps if create_graph else maps.detach()


def recording() -> AbstractContextManager:
    """Gradients enabled, under torch.inference_mode too; tensors that were made there must be copied inside."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else torch.enable_grad()


def gradient_of(
    score: torch.Tensor, inputs: Sequence[torch.Tensor], create_graph: bool, what: str
) -> tuple[torch.Tensor, ...]:
    """d sum(score) / d inputs; ModelError, saying ``what`` does not reach the output, where there is none."""
    if not score.requires_grad:
        raise ModelError(f"model: its output does not depend on {what} (no gradient flows back to it)")
    found = torch.autograd.grad(score.sum(), inputs, create_graph=create_graph, allow_unused=True)
    if any(gradient is None for gradient in found):
        raise ModelError(f"model: its output does not depend on {what} (no gradient flows back to it)")
    return found

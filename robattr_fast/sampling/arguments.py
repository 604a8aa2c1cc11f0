"""Checks of arguments that all who sample share: each names the argument, what it got and what it takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from robattr_fast.model import AUTOCAST, EXPLANATIONS, Explanation, dtype_name, dtype_named
from robattr_fast.ops import _check


def check_images(x: torch.Tensor) -> torch.Tensor:
    """A finite, non-empty float batch [B, *S]."""
    _check.float_tensor("x", x, min_dim=2)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x: got NaN or infinite elements, takes finite images")
    return x


def check_image_ids(image_ids: torch.Tensor | Sequence[int] | None, x: torch.Tensor) -> torch.Tensor:
    """int64 [B] in [0, 2^32); default arange."""
    if image_ids is None:
        return torch.arange(x.shape[0])
    ids = torch.as_tensor(image_ids, dtype=torch.int64)
    if ids.shape != x.shape[:1]:
        raise ValueError(f"image_ids: got shape {tuple(ids.shape)}, takes ({x.shape[0]},), one per image")
    if not bool(((ids >= 0) & (ids < 2**32)).all()):
        raise ValueError(f"image_ids: got {ids.tolist()}, takes integers in [0, 2^32)")
    return ids


def check_explain(explain: str | Explanation, channel_sum: bool, x: torch.Tensor) -> None:
    """A named explanation or a callable, whose scores have channels to sum if they are to be."""
    if not (callable(explain) or explain in EXPLANATIONS):
        raise ValueError(f"explain: got {explain!r}, takes one of {', '.join(EXPLANATIONS)}, or a callable")
    if channel_sum and x.dim() < 3:
        raise ValueError(f"channel_sum: got x of shape {tuple(x.shape)}, takes [B, C, ...] of at least 3 dimensions")


def check_target(target: int | Sequence[int] | torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """int64 [B] on x's device, or None; one class for all images, or one each."""
    if target is None:
        return None
    classes = torch.as_tensor(target, device=x.device)
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool or classes.dim() > 1:
        raise TypeError(
            f"target: got {classes.dtype} of shape {tuple(classes.shape)}, takes an integer or one per image"
        )
    if classes.dim() == 1 and classes.shape != x.shape[:1]:
        raise ValueError(f"target: got {classes.numel()} classes, takes one, or one for each of {x.shape[0]} images")
    return classes.to(torch.int64).expand(x.shape[0])


def check_autocast(autocast: torch.dtype | str | None, x: torch.Tensor) -> torch.dtype | None:
    """A dtype of `AUTOCAST`, or None: without, or "auto" before it is measured."""
    if autocast is None:
        return None
    if x.dtype == torch.float32:
        if autocast == "auto":
            return None
        if isinstance(autocast, str) and autocast in AUTOCAST:
            return dtype_named(autocast)
        if isinstance(autocast, torch.dtype) and dtype_name(autocast) in AUTOCAST:
            return autocast
    takes = "None, or for float32 torch.bfloat16, torch.float16 or 'auto'"
    raise ValueError(f"autocast: got {autocast!r} for x of {x.dtype}, takes {takes}")

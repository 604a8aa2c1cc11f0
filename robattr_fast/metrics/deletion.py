"""How fast a prediction falls when what a map points at is removed (Petsiuk, Das, Saenko 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from robattr_fast.metrics.arguments import check_maps, varies
from robattr_fast.metrics.overlap import top_k
from robattr_fast.ops import _check


class Deletion(NamedTuple):
    """Probabilities of a class while pixels are deleted."""

    probability: torch.Tensor
    """float64 [S + 1, B]: of the image as it is, then after each step."""
    area: torch.Tensor
    """float64 [B]: under the curve of equally long steps, by trapezoids, in [0, 1]. Less is more faithful."""


def top_masks(maps: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """The top of maps [B, *M] at each share of their elements, bool [S, B, *M]; ties go to the lowest index."""
    check_maps("maps", maps)
    flat = maps.detach().flatten(1)
    masks = []
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"shares: got {share}, expected numbers in (0, 1]")
        masks.append(top_k(flat, max(1, int(share * flat.shape[1] + 1e-9))).view(maps.shape))
    return torch.stack(masks) & varies(maps).view(-1, *[1] * (maps.dim() - 1))


def deletion(
    model: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    masks: torch.Tensor,
    target: Sequence[int] | torch.Tensor,
    *,
    fill: float | torch.Tensor = 0.0,
) -> Deletion:
    """The probability of a class after each of S steps that delete pixels; a pixel once deleted stays so.

    Certified faithfulness (Anani et al. 2025) deletes what certificates of growing tau prove to be selected:
    ``masks = torch.stack([certificate.pixels(radius) == 1 for certificate in by_tau])``. Steps then delete as many
    pixels as are certified: look at their number beside the curve, an empty mask deletes nothing.

    Args:
        model: eval-mode module that returns logits [B, classes].
        x: images [B, C, *S].
        masks: bool [S, B, *S], pixels, or [S, B, C, *S], elements; see `top_masks`.
        target: the class of each image.
        fill: what takes the place of deleted pixels: a number, or a tensor that broadcasts to x (a blurred image).

    Raises:
        TypeError, ValueError: a bad argument.
    """
    _check.float_tensor("x", x, min_dim=3)
    if masks.dtype != torch.bool:
        raise TypeError(f"masks: got dtype {masks.dtype}, expected bool")
    of_pixels = masks.shape[1:] == x.shape[:1] + x.shape[2:]
    if not of_pixels and masks.shape[1:] != x.shape:
        raise ValueError(
            f"masks: got shape {tuple(masks.shape)}, expected [S, {len(x)}, *{tuple(x.shape[2:])}], of pixels, or "
            f"[S, *{tuple(x.shape)}]"
        )
    classes = torch.as_tensor(target, device=x.device)
    if classes.shape != x.shape[:1]:
        raise ValueError(f"target: got shape {tuple(classes.shape)}, expected one class for each of {len(x)} images")
    filling = torch.as_tensor(fill, dtype=x.dtype, device=x.device)
    deleted = torch.zeros(masks.shape[1:], dtype=torch.bool, device=x.device)
    found = [_probability(model, x, classes)]
    for mask in masks.to(x.device):
        deleted = deleted | mask
        found.append(_probability(model, torch.where(deleted[:, None] if of_pixels else deleted, filling, x), classes))
    probability = torch.stack(found)
    return Deletion(probability, torch.trapezoid(probability, dim=0) / max(1, len(masks)))


def _probability(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(x)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != len(x):
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"model: it returned {got}, expected logits [{len(x)}, classes]")
    return logits.double().softmax(dim=1).gather(1, classes[:, None])[:, 0]

"""Attention of several layers in one map: rollout (Abnar, Zuidema 2020), weighted by gradients (Chefer et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from robattr_fast.ops import _check

Maps = Mapping[str, torch.Tensor] | Sequence[torch.Tensor]
"""Weights [B, H, N, N] per layer, from the first to the last, as `attention_maps` returns them."""

_JOINED: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "mean": torch.mean,
    "max": torch.amax,
    "min": torch.amin,
}
HEADS = tuple(_JOINED)


def rollout(maps: Maps, *, residual: float = 0.5, heads: str = "mean") -> torch.Tensor:
    """The product over layers of (1 - residual) A + residual I, A the weights of a layer with rows that sum to one.

    Row i tells of which inputs token i is made after the last layer, if values were not changed on the way.

    Args:
        maps: weights of each layer.
        residual: share of the skip connection, in [0, 1).
        heads: how the heads of a layer are joined: "mean", as published, "max" or "min"; rows are then made to sum to
            one. A row of zeros stays one.

    Returns:
        [B, N, N], float32 or float64, with the graph of the maps.

    Raises:
        TypeError, ValueError: no maps, maps of several sizes or not square, another argument.
    """
    layers = _checked("maps", maps)
    if not 0 <= residual < 1:
        raise ValueError(f"residual: got {residual}, expected a share in [0, 1)")
    if heads not in HEADS:
        raise ValueError(f"heads: got {heads!r}, expected one of {', '.join(HEADS)}")
    identity = torch.eye(layers[0].shape[-1], dtype=layers[0].dtype, device=layers[0].device)
    product = identity.expand(len(layers[0]), -1, -1)
    for weights in layers:
        joined = _JOINED[heads](weights, 1)
        total = joined.sum(dim=-1, keepdim=True)
        joined = joined / torch.where(total == 0, 1, total)
        product = (residual * identity + (1 - residual) * joined) @ product
    return product


def gradient_rollout(maps: Maps, gradients: Maps) -> torch.Tensor:
    """R, updated by R + A+ R from the first layer to the last, A+ the mean over heads of relu(gradient * weights).

    Row i tells which inputs spoke for the score, through token i. Chefer, Gur, Wolf, ICCV 2021, for self-attention.

    Args:
        maps: weights [B, H, N, N] of each layer.
        gradients: of a score with respect to them, as many and in the same shapes (`maps_and_gradients`).

    Returns:
        [B, N, N], float32 or float64, with the graph of its arguments.
    """
    layers, slopes = _checked("maps", maps), _checked("gradients", gradients)
    if [one.shape for one in layers] != [one.shape for one in slopes]:
        raise ValueError("gradients: got other shapes than those of maps, expected one gradient per layer of maps")
    identity = torch.eye(layers[0].shape[-1], dtype=layers[0].dtype, device=layers[0].device)
    relevance = identity.expand(len(layers[0]), -1, -1)
    for weights, slope in zip(layers, slopes, strict=True):
        relevance = relevance + (weights * slope).relu().mean(dim=1) @ relevance
    return relevance


def _checked(name: str, maps: Maps) -> list[torch.Tensor]:
    """One per layer, float32 or float64."""
    layers = list(maps.values()) if isinstance(maps, Mapping) else list(maps)
    if not layers:
        raise ValueError(f"{name}: got none, expected the weights of at least one layer")
    for weights in layers:
        _check.float_tensor(name, weights, min_dim=4)
    shapes = sorted({(len(weights), *weights.shape[2:]) for weights in layers})
    if len(shapes) > 1 or len(shapes[0]) != 3 or shapes[0][1] != shapes[0][2]:
        got = ", ".join(str(tuple(weights.shape)) for weights in layers)
        raise ValueError(f"{name}: got shapes {got}, expected [B, H, N, N] with one B and one N: self-attention")
    return [weights.to(_check.comparable_dtype(weights)) for weights in layers]

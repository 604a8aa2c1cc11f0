"""Where a vision transformer looks: attention of one layer, rollout, and rollout weighted by gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.attributions.contract import Target, mapped
from robattr_fast.attributions.resize import check_resize, resized
from robattr_fast.errors import ModelError
from robattr_fast.nn.map_gradients import maps_and_gradients
from robattr_fast.nn.maps import attention_maps
from robattr_fast.nn.rollout import gradient_rollout as roll_gradients
from robattr_fast.nn.rollout import rollout as roll

_MOST_OTHER_TOKENS = 16
_QUERIES = ("class", "mean", None)


def attention(
    model: nn.Module,
    x: torch.Tensor,
    target: Target = None,
    create_graph: bool = False,
    *,
    layer: str | None = None,
    query: str | None = None,
    grid: Sequence[int] | None = None,
    resize: str | None = "linear",
) -> torch.Tensor:
    """Attention weights of one layer, averaged over heads, from the class token to the patches.

    It explains no class: ``target`` is checked and has no effect. Models as of `robattr_fast.nn.attention_maps`.

    Args:
        model, x, target, create_graph: see `gradient`; x is [B, C, *S]. The model may return anything.
        layer: name of the attention module; None: the last one.
        query: whose weights: "class", those of the first token; "mean", the mean over patches, for models that
            average over these; None: "class" where there are other tokens than patches.
        grid: number of patches along each dimension of S; other tokens come before them. None: found from the number of
            tokens, for square patches.
        resize: "linear" or "nearest", to S; None: one value per patch.

    Returns:
        [B, *S], one value per pixel, or [B, *grid]; float32 for half types.

    Raises:
        TypeError, ValueError: a bad argument. ModelError: training mode, no known attention.
    """
    check_resize(resize)

    def tokens(leaf: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
        with torch.set_grad_enabled(create_graph):
            maps = attention_maps(model, leaf)
        if layer is not None and layer not in maps:
            raise ValueError(f"layer: got {layer!r}, expected one of {', '.join(maps)}")
        weights = maps[layer] if layer is not None else list(maps.values())[-1]
        return weights.to(torch.promote_types(weights.dtype, torch.float32)).mean(dim=1)

    return _of_patches(model, x, target, create_graph, tokens, query, grid, resize)


def rollout(
    model: nn.Module,
    x: torch.Tensor,
    target: Target = None,
    create_graph: bool = False,
    *,
    residual: float = 0.5,
    heads: str = "mean",
    query: str | None = None,
    grid: Sequence[int] | None = None,
    resize: str | None = "linear",
) -> torch.Tensor:
    """Attention rolled out over all layers (`robattr_fast.nn.rollout`), from the class token to the patches.

    It explains no class. Arguments and result as of `attention`; residual, heads: see `robattr_fast.nn.rollout`.
    """
    check_resize(resize)

    def tokens(leaf: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
        with torch.set_grad_enabled(create_graph):
            return roll(attention_maps(model, leaf), residual=residual, heads=heads)

    return _of_patches(model, x, target, create_graph, tokens, query, grid, resize)


def gradient_rollout(
    model: nn.Module,
    x: torch.Tensor,
    target: Target = None,
    create_graph: bool = False,
    *,
    query: str | None = None,
    grid: Sequence[int] | None = None,
    resize: str | None = "linear",
) -> torch.Tensor:
    """Attention that speaks for a class, over all layers (`robattr_fast.nn.gradient_rollout`, Chefer et al. 2021).

    Arguments and result as of `attention`; here the model returns logits, and ``target`` is explained.
    """
    check_resize(resize)

    def tokens(leaf: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
        def score(logits: torch.Tensor) -> torch.Tensor:
            return _model.selected_logits(_model.checked_logits(logits, leaf), classes)

        return roll_gradients(*maps_and_gradients(model, leaf, score, create_graph=create_graph))

    return _of_patches(model, x, target, create_graph, tokens, query, grid, resize)


def _of_patches(
    model: nn.Module,
    x: torch.Tensor,
    target: Target,
    create_graph: bool,
    tokens: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    query: str | None,
    grid: Sequence[int] | None,
    resize: str | None,
) -> torch.Tensor:
    """Maps of x from what ``tokens`` says of every pair of tokens, [B, N, N]."""
    if query not in _QUERIES:
        raise ValueError(f"query: got {query!r}, expected 'class', 'mean' or None")

    def rows(leaf: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
        size = leaf.shape[2:]
        if not 1 <= len(size) <= 3:
            raise ValueError(f"x: got shape {tuple(leaf.shape)}, expected images [B, C, *S]")
        pairs = tokens(leaf, classes)
        if pairs.shape[0] != leaf.shape[0] or pairs.shape[1] != pairs.shape[2]:
            raise ModelError(f"model: its attention has shape {tuple(pairs.shape)}, expected [{len(leaf)}, N, N]")
        patches, others = _patches(pairs.shape[-1], size, grid)
        if query == "class" and not others:
            raise ValueError("query: got 'class', but all tokens are patches: expected 'mean' or None")
        of_class = query == "class" or (query is None and others > 0)
        row = pairs[:, 0] if of_class else pairs[:, others:].mean(dim=1)
        return resized(row[:, others:].unflatten(1, patches), size, resize)

    return mapped(model, x, target, create_graph, rows)


def _patches(tokens: int, size: Sequence[int], grid: Sequence[int] | None) -> tuple[tuple[int, ...], int]:
    """(patches along each dimension, tokens before them)."""
    if grid is not None:
        if len(grid) != len(size) or math.prod(grid) > tokens:
            raise ValueError(f"grid: got {tuple(grid)}, expected {len(size)} numbers whose product is at most {tokens}")
        return tuple(grid), tokens - math.prod(grid)
    sides = [side for side in range(1, min(size) + 1) if all(length % side == 0 for length in size)]
    grids = [tuple(length // side for length in size) for side in sides]
    for others in range(min(_MOST_OTHER_TOKENS, tokens)):
        for found in grids:
            if math.prod(found) == tokens - others:
                return found, others
    raise ValueError(
        f"grid: got None, but {tokens} tokens are no square patches of {tuple(size)} and at most "
        f"{_MOST_OTHER_TOKENS - 1} others: expected the number of patches along each dimension"
    )

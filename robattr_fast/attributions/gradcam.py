"""Class activation maps weighted by gradients: Grad-CAM, Grad-CAM++ and LayerCAM, of one layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from robattr_fast import model as _model
from robattr_fast.attributions.contract import Target, gradient_of, mapped
from robattr_fast.attributions.resize import check_resize, resized
from robattr_fast.errors import ModelError

KINDS = ("grad-cam", "grad-cam++", "layer-cam")


def grad_cam(
    model: nn.Module,
    x: torch.Tensor,
    target: Target = None,
    create_graph: bool = False,
    *,
    layer: str,
    layer_input: bool = False,
    kind: str = "grad-cam",
    relu: bool = True,
    resize: str | None = "linear",
) -> torch.Tensor:
    """sum over channels of weight * activation, of the output a [B, K, *s] of a layer, g = d f_c / d a its gradient.

    The weight is, for "grad-cam" (Selvaraju et al. 2017), the mean of g over positions: captum.attr.LayerGradCam. For
    "grad-cam++" (Chattopadhay et al. 2018) the sum over positions of relu(g) g^2 / (2 g^2 + g^3 sum of a): that of an
    exponential output, whose factor exp(f_c) of the whole map is left out. For "layer-cam" (Jiang et al. 2021) relu(g),
    position by position. Of a network that ends in an average and one linear layer, Grad-CAM of what is averaged is CAM
    (Zhou et al. 2016) but for a factor.

    Args:
        model, x, target, create_graph: see `gradient`; x is [B, C, *S] of one to three spatial dimensions.
        layer: name of the submodule, as in ``model.named_modules()``; it runs once per forward pass.
        layer_input: take what goes into the layer in place of its output, as of the average before the last one.
        kind: one of `KINDS`.
        relu: keep what speaks for the class alone, as published; False: signed, as Captum by default.
        resize: "linear" (bilinear for photographs, corners not aligned) or "nearest", to S; None: the layer's own size.

    Returns:
        [B, *S], one value per pixel, or [B, *s]; float32 for half types.

    Raises:
        TypeError, ValueError: a bad argument. ModelError: training mode, a layer that does not run once, or gives no
        maps.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    check_resize(resize)

    def rows(leaf: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
        with _recorded(model, layer, layer_input) as activations:
            logits = _model.forward(model, leaf)
        activation = _single(activations, layer)
        space = activation.dim() - 2
        if space != leaf.dim() - 2 or not 1 <= space <= 3:
            raise ModelError(
                f"layer: {layer!r} gives shape {tuple(activation.shape)} for x of shape {tuple(leaf.shape)}, "
                "expected [B, K, *s] with as many spatial dimensions, one to three"
            )
        score = _model.selected_logits(logits, classes)
        (slope,) = gradient_of(score, [activation], create_graph, f"the layer {layer!r}")
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        maps = (_weights(kind, activation.to(dtype), slope.to(dtype)) * activation.to(dtype)).sum(dim=1)
        return resized(F.relu(maps) if relu else maps, leaf.shape[2:], resize)

    return mapped(model, x, target, create_graph, rows)


def _weights(kind: str, activation: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Broadcastable to the activation [B, K, *s]."""
    positions = list(range(2, slope.dim()))
    if kind == "grad-cam":
        return slope.mean(dim=positions, keepdim=True)
    if kind == "layer-cam":
        return F.relu(slope)
    # g^2 / (2 g^2 + g^3 S) = 1 / (2 + g S): squares of small gradients would vanish.
    scale = 2 + slope * activation.sum(dim=positions, keepdim=True)
    used = (slope > 0) & (scale != 0)
    return torch.where(used, slope / torch.where(used, scale, 1), 0).sum(dim=positions, keepdim=True)


@contextmanager
def _recorded(model: nn.Module, layer: str, layer_input: bool) -> Iterator[list[torch.Tensor]]:
    """What a submodule returns, or gets, as it is then: what follows may write into a copy."""
    modules = dict(model.named_modules())
    if layer not in modules:
        near = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)][-3:]
        example = f", as {', '.join(map(repr, near))}" if near else ""
        raise ValueError(f"layer: got {layer!r}, expected the name of a submodule{example}")
    activations: list[torch.Tensor] = []

    def record(activation: object) -> torch.Tensor:
        if not isinstance(activation, torch.Tensor):
            raise ModelError(f"layer: {layer!r} has {type(activation).__name__}, expected one tensor")
        activations.append(activation)
        return activation.clone()

    def before(module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        return record(args[0] if args else None), *args[1:]

    def after(module: nn.Module, args: object, output: object) -> torch.Tensor:
        return record(output)

    found = modules[layer]
    handle = found.register_forward_pre_hook(before) if layer_input else found.register_forward_hook(after)
    try:
        yield activations
    finally:
        handle.remove()


def _single(activations: list[torch.Tensor], layer: str) -> torch.Tensor:
    if len(activations) != 1:
        raise ModelError(f"layer: {layer!r} ran {len(activations)} times in one forward pass, expected once")
    return activations[0]

"""`maps_and_gradients`: attention weights of every layer, and the gradient of a score with respect to them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from robattr_fast.errors import ModelError
from robattr_fast.nn.attention import (
    KernelAttention,
    KernelSelfAttention,
    is_timm_attention,
    projected,
    timm_projections,
)
from robattr_fast.nn.maps import extra_keys, recorded_maps

# What changes no element: torch.nn.MultiheadAttention returns its weights in another shape than it uses them in.
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "AliasBackward0")

_FORWARD = inspect.signature(nn.MultiheadAttention.forward)


def maps_and_gradients(
    model: nn.Module, x: torch.Tensor, score: Callable[[Any], torch.Tensor], *, create_graph: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of ``score(model(x))``: the attention weights A of every layer (`attention_maps`), and d sum(score) / d A.

    Where no weights are formed (fused and kernel attention), the gradient is that with respect to the A of the same
    output A V: (d score / d AV) V^T.

    Args:
        model: eval-mode module, as of `attention_maps`.
        x: what it is called with; it, or a parameter, requires gradients.
        score: what the model returns -> scores of any shape.
        create_graph: let the gradients be differentiated in turn.

    Returns:
        Two dicts, name of the module -> [B, H, Nq, Nk].

    Raises:
        ModelError: as `attention_maps`, or a layer whose weights the score does not depend on.
    """
    products = {name: _Product() for name, _ in model.named_modules()}
    returned: list[Any] = []
    with ExitStack() as stack, torch.enable_grad():
        for name, module in model.named_modules():
            for handle in _product_hooks(module, products[name]):
                stack.callback(handle.remove)
        stack.callback(model.register_forward_hook(lambda module, args, output: returned.append(output)).remove)
        maps = recorded_maps(model, (x,), {}, through_weights=True)
        total = score(returned[-1]).sum()
        outs = {name: products[name].out for name in maps}
        places = [_place(name, weights, products[name]) for name, weights in maps.items()]
        found = torch.autograd.grad(total, places, create_graph=create_graph, allow_unused=True)
        gradients = {}
        for (name, weights), gradient in zip(maps.items(), found, strict=True):
            if gradient is None:
                raise ModelError(f"model: its output does not depend on the attention weights of {name!r}")
            if outs[name] is None:
                gradients[name] = gradient.view(weights.shape)
            else:
                # Heads lie side by side in the output.
                gradient = products[name].before_projection(gradient)
                heads = gradient.reshape(*products[name].value.shape[:1], -1, *products[name].value.shape[1::2])
                gradients[name] = heads.transpose(1, 2) @ products[name].value.mT
    return maps, gradients


class _Product:
    """Values V [B, H, Nk, D] and the output A V [B, Nq, H * D] of one attention, where nothing else leads to A."""

    value: torch.Tensor
    out: torch.Tensor | None = None
    projecting: nn.MultiheadAttention | None = None
    """Softmax attention of torch calls no module for its projection: `out` is what it returned."""

    def before_projection(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of A V from that of `out`."""
        if self.projecting is None:
            return gradient
        if gradient.dim() == 3 and not self.projecting.batch_first:
            gradient = gradient.transpose(0, 1)
        return gradient @ self.projecting.out_proj.weight


def _product_hooks(module: nn.Module, product: _Product) -> list[Any]:
    """The hooks that find both; none where the weights are part of the graph."""
    values: Callable[..., torch.Tensor]
    last: nn.Module | None
    if isinstance(module, KernelAttention):
        values, last = _values, module.out_proj
    elif isinstance(module, nn.MultiheadAttention):
        values, last, product.projecting = _values, None, module
    elif isinstance(module, KernelSelfAttention) or (
        type(module).__name__ == "Attention" and is_timm_attention(module)[0]
    ):
        children = dict(module.named_children())
        values, last = _timm_values, children.get("norm", None if "gate" in children else children["proj"])
        if last is None:
            raise ModelError(
                f"model: {type(module).__name__} has a gate and no norm before it: its output is not known"
            )
    else:
        return []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        product.value = values(module, *args, **kwargs)

    def after(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        product.out = args[0]

    def returned(module: nn.Module, args: Any, output: Any) -> None:
        product.out = output[0]

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(returned) if last is None else last.register_forward_pre_hook(after),
    ]


def _timm_values(module: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return timm_projections(module, x)[2]


def _values(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    call = _FORWARD.bind(module, *args, **kwargs).arguments
    inputs = [call[name] for name in ("query", "key", "value")]
    if inputs[0].dim() == 2:
        inputs = [one[None] for one in inputs]
    elif not module.batch_first:
        inputs = [one.transpose(0, 1) for one in inputs]
    value = projected(module, *inputs)[2]
    assert value is not None
    return torch.cat([value, *extra_keys(module, module.bias_v, value)], dim=2)


def _place(name: str, weights: torch.Tensor, product: _Product) -> GradientEdge:
    if product.projecting is not None and product.out is not None and product.out.requires_grad:
        return get_gradient_edge(product.out)
    return _origin(name, weights if product.out is None else product.out)


def _origin(name: str, tensor: torch.Tensor | None) -> GradientEdge:
    """Where the graph of an attention's weights or output begins, behind what only changes the shape."""
    if tensor is None or not tensor.requires_grad:
        raise ModelError(f"model: the attention {name!r} carries no graph to its input or parameters")
    edge = get_gradient_edge(tensor)
    while edge.node.name() in _VIEWS and len(edge.node.next_functions) == 1:
        node, output = edge.node.next_functions[0]
        if node is None:
            break
        edge = GradientEdge(node, output)
    return edge

"""`maps_and_gradients`: attention weights of every layer, and the gradient of a score with respect to them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from robattr_fast.errors import ModelError
from robattr_fast.nn.attention import KernelSelfAttention, is_timm_attention, projected, timm_projections
from robattr_fast.nn.maps import followed_maps
from robattr_fast.ops import _check


class _Product(NamedTuple):
    """One attention A V, of which the graph need not hold A: d score / d A = (d score / d A V) V^T."""

    values: torch.Tensor
    """V [B, H, Nk, D]."""
    place: torch.Tensor
    """What is computed of A V, on the way to the score."""
    heads: Callable[[torch.Tensor], torch.Tensor]
    """The gradient of ``place`` -> that of A V, [B, Nq, H, D]."""


def maps_and_gradients(
    model: nn.Module, x: torch.Tensor, score: Callable[[Any], torch.Tensor], *, create_graph: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of ``score(model(x))``: the attention weights A of every layer (`attention_maps`), and d sum(score) / d A.

    The gradient is that of the output A V for given values V. No attention needs to form its weights, or to be able to
    say how its output depends on them: fused and kernel attention have such gradients too.

    Args:
        model: eval-mode module, as of `attention_maps`.
        x: what it is called with; it, or a parameter, requires gradients.
        score: what the model returns -> scores of any shape.
        create_graph: let the gradients be differentiated in turn, where the attention has second derivatives.

    Returns:
        Two dicts, name of the module -> [B, H, Nq, Nk]; gradients in float32 or float64.

    Raises:
        ModelError: as `attention_maps`; a layer that the score does not depend on; keys that come from no token.
    """
    names = {module: name for name, module in model.named_modules()}
    products: dict[str, _Product] = {}
    returned: list[Any] = []

    def follow(module: nn.Module, values: torch.Tensor, out: torch.Tensor) -> None:
        products[names[module]] = _Product(values, out, lambda gradient: gradient)

    with ExitStack() as stack, torch.enable_grad():
        for module, name in names.items():
            for handle in _hooks(module, name, products):
                stack.callback(handle.remove)
        stack.callback(model.register_forward_hook(lambda module, args, output: returned.append(output)).remove)
        maps = followed_maps(model, (x,), {}, follow)
        total = score(returned[-1]).sum()
        for name in maps:
            if not products[name].place.requires_grad:
                raise ModelError(f"model: the attention {name!r} carries no graph to its input or parameters")
        places = [products[name].place for name in maps]
        found = torch.autograd.grad(total, places, create_graph=create_graph, allow_unused=True)
        gradients = {}
        for name, gradient in zip(maps, found, strict=True):
            if gradient is None:
                raise ModelError(f"model: its output does not depend on the attention {name!r}")
            values = products[name].values
            dtype = _check.comparable_dtype(values)  # under autocast they differ
            with torch.autocast(values.device.type, enabled=False):
                gradients[name] = products[name].heads(gradient.to(dtype)).transpose(1, 2) @ values.to(dtype).mT
    return maps, gradients


def _hooks(module: nn.Module, name: str, products: dict[str, _Product]) -> list[Any]:
    """Those that find the product of an attention that is a module; that of transformers is a function."""
    if isinstance(module, nn.MultiheadAttention):
        return _multihead_hooks(module, name, products)
    if isinstance(module, KernelSelfAttention) or (
        type(module).__name__ == "Attention" and is_timm_attention(module)[0]
    ):
        return _timm_hooks(module, name, products)
    return []


def _multihead_hooks(attention: nn.MultiheadAttention, name: str, products: dict[str, _Product]) -> list[Any]:
    """Of torch's, or of ours in its form: the output is ``out_proj`` of A V."""
    if attention.bias_k is not None or attention.add_zero_attn:
        raise ModelError(f"model: the attention {name!r} adds keys that come from no token")
    found: list[torch.Tensor] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        found.append(_multihead_values(attention, *args, **kwargs))

    def after(module: Any, args: Any, output: tuple[torch.Tensor, Any]) -> None:
        values = found.pop()

        def heads(gradient: torch.Tensor) -> torch.Tensor:
            batched = gradient[None] if gradient.dim() == 2 else gradient
            first = batched if attention.batch_first or gradient.dim() == 2 else batched.transpose(0, 1)
            return (first @ attention.out_proj.weight.to(gradient.dtype)).unflatten(-1, (values.shape[1], -1))

        products[name] = _Product(values, output[0], heads)

    return [
        attention.register_forward_pre_hook(before, with_kwargs=True),
        attention.register_forward_hook(after),
    ]


def _multihead_values(
    attention: nn.MultiheadAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    inputs = [query, key, value]
    if query.dim() == 2:
        inputs = [one[None] for one in inputs]
    elif not attention.batch_first:
        inputs = [one.transpose(0, 1) for one in inputs]
    values = projected(attention, *inputs)[2]
    assert values is not None
    return values


def _timm_hooks(attention: nn.Module, name: str, products: dict[str, _Product]) -> list[Any]:
    """Of timm's, or of ours in its form: A V goes into ``norm``, or into ``proj`` where there is none."""
    children = dict(attention.named_children())
    last = children.get("norm", None if "gate" in children else children["proj"])
    if last is None:
        raise ModelError(f"model: the attention {name!r} has a gate and no norm before it; expected both")
    found: list[torch.Tensor] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["x"]
        found.append(timm_projections(module, x)[2])

    def after(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        values = found.pop()
        products[name] = _Product(values, args[0], lambda gradient: gradient.unflatten(-1, (values.shape[1], -1)))

    return [
        attention.register_forward_pre_hook(before, with_kwargs=True),
        last.register_forward_pre_hook(after),
    ]

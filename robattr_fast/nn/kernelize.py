"""`kernelize`: kernel attention in place of a model's softmax attention, the projections kept."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import nn

from robattr_fast.errors import ModelError
from robattr_fast.nn import interface
from robattr_fast.nn.attention import KernelAttention, KernelSelfAttention, is_timm_attention
from robattr_fast.nn.functional import check_kernel


class Swapped(NamedTuple):
    """One attention that `kernelize` replaced."""

    name: str
    """The module's name in the model; for transformers that of the model whose interface was set."""
    was: str
    now: str


def kernelize(
    model: nn.Module, *, kernel: str = "elu", normalize: bool = True, skip: Collection[str] = ()
) -> list[Swapped]:
    """Replace the softmax attention inside a model by kernel attention, in place; weights stay what and where they are.

    Known are torch.nn.MultiheadAttention (also inside torch's encoder layers, whose fused paths are turned off), timm's
    Attention, and models of transformers, which are switched by their attention interface. Nothing is changed unless
    all of it can be. The function that a trained model computes does change: train it again, or fine-tune it.

    A call of scaled_dot_product_attention in a module that does not call itself an attention cannot be seen.

    Args:
        model: the model.
        kernel, normalize: see `kernel_attention`.
        skip: names of modules that keep their attention.

    Returns:
        What was replaced, in the order of the model's modules.

    Raises:
        ModelError: there is no known attention, or an attention that is not known; the message names it.
        ValueError: no such kernel, or a name in ``skip`` that no module has.
    """
    check_kernel(kernel)
    modules = dict(model.named_modules())
    unknown = sorted(set(skip) - set(modules))
    if unknown:
        raise ValueError(f"skip: the model has no module {unknown[0]!r}")
    models = {n: m for n, m in interface.interface_models(model).items() if n not in skip}
    swaps = {}
    for name, module in modules.items():
        if name in skip:
            continue
        swap = _replacement(name, module)
        if swap is not None:
            swaps[name] = swap
    for name, module in modules.items():
        if not _is_inside(name, (*skip, *models)) and _is_unknown_attention(name, module, swaps):
            _, reason = is_timm_attention(module)
            raise ModelError(f"model: {name!r} is an attention that is not known ({reason}); skip={[name]} leaves it")
    if not swaps and not models:
        raise ModelError(
            "model: no softmax attention found in it; known are torch.nn.MultiheadAttention, timm's Attention and "
            "models of transformers"
        )
    new = {name: kind.from_softmax(modules[name], kernel=kernel, normalize=normalize) for name, kind in swaps.items()}
    chosen = interface.register(kernel=kernel, normalize=normalize) if models else ""
    # Whether a model of transformers can be switched shows only when it is.
    with interface.undone_on_failure(models.values()):
        for module in models.values():
            interface.set_implementation(module, chosen)
    done = []
    for name, module in modules.items():
        if name in models:
            done.append(Swapped(name, type(module).__name__, chosen))
        elif name in new:
            _replace(model, module, new[name])
            done.append(Swapped(name, type(module).__name__, type(new[name]).__name__))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return done


def _replacement(name: str, module: nn.Module) -> type[KernelAttention] | type[KernelSelfAttention] | None:
    """The class that stands in for a softmax attention, None for all other modules."""
    if isinstance(module, nn.MultiheadAttention) and not isinstance(module, KernelAttention):
        if type(module) is not nn.MultiheadAttention:
            reason = f"{type(module).__name__} may do otherwise than its base class torch.nn.MultiheadAttention"
        elif module.bias_k is not None or module.add_zero_attn:
            reason = "it has add_bias_kv or add_zero_attn, and kernel attention takes no extra keys"
        else:
            reason = _not_replaceable(name, module)
        new: type[KernelAttention] | type[KernelSelfAttention] = KernelAttention
    elif type(module).__name__ == "Attention" and is_timm_attention(module)[0]:
        reason, new = _not_replaceable(name, module), KernelSelfAttention
    else:
        return None
    if reason:
        raise ModelError(f"model: the attention {name!r} cannot be replaced: {reason}; skip={[name]} leaves it")
    return new


def _not_replaceable(name: str, module: nn.Module) -> str:
    if not name:
        return "it is the model itself; take its class from robattr_fast.nn and call from_softmax"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks):
        return "it has hooks, which would be lost"
    return ""


def _is_inside(name: str, outer: Collection[str]) -> bool:
    return any(o in ("", name) or name.startswith(o + ".") for o in outer)


def _is_unknown_attention(name: str, module: nn.Module, swaps: Collection[str]) -> bool:
    """Whether a module calls itself an attention and neither is nor holds nor belongs to one that is known."""
    if "attention" not in type(module).__name__.lower() or not any(True for _ in module.parameters()):
        return False
    known = {n for n in swaps if _is_inside(n, (name,)) or _is_inside(name, (n,))}
    ours = any(isinstance(m, KernelAttention | KernelSelfAttention) for m in module.modules())
    return not known and not ours


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Everywhere in the model: a module may stand in several places."""
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if child is old:
                setattr(parent, key, new)

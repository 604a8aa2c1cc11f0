"""Which models `mlp_smoothgrad` computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from robattr_fast import backends
from robattr_fast.errors import BackendError
from robattr_fast.ops.mlp_smoothgrad import MAX_INPUTS, MAX_LAYERS, MAX_WIDTH, Layers

_SKIPPED = (nn.Identity, nn.Dropout)
_ACTIVATIONS = (nn.ReLU(), nn.Tanh(), nn.GELU(), nn.SiLU(), nn.Softplus(), nn.ELU())
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _NotOneError(Exception):
    """Why a model is no such perceptron."""


def recognized(model: nn.Module, x: torch.Tensor) -> tuple[Layers | None, str]:
    """The layers of a private copy (`model.private_copy`) that is a small perceptron of x [B, *S], or why it is none.

    That is: nn.Sequential of nn.Flatten, one to three nn.Linear of at most 256 outputs, and one kind of activation
    between them, as torch.nn makes it by default, all float32. Modules that do nothing in eval mode may stand anywhere.
    """
    try:
        return _layers(model, x), ""
    except _NotOneError as reason:
        return None, str(reason)


def runs_fused(device: torch.device) -> bool:
    """Whether the backend in force has the fused kernel; elsewhere the model's own forward is the faster one."""
    try:
        return backends.choose("mlp_smoothgrad", device, torch.float32)[0] == "triton"
    except BackendError:
        return False


def _layers(model: nn.Module, x: torch.Tensor) -> Layers:
    n = x[0].numel()
    if x.dtype != torch.float32:
        raise _NotOneError(f"x is {x.dtype}, not float32")
    if n > MAX_INPUTS:
        raise _NotOneError(f"x has {n} elements, over {MAX_INPUTS}")
    weights: list[torch.Tensor] = []
    biases: list[torch.Tensor] = []
    activations: list[str] = []
    flat = x.dim() == 2
    for module in _modules(model):
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            flat = True
        elif type(module) is nn.Linear:
            weight, bias = module.weight, module.bias
            if len(weights) != len(activations):
                raise _NotOneError("two Linear have no activation between them")
            if not flat:
                raise _NotOneError("a Linear comes before Flatten")
            if weight.dtype != torch.float32:
                raise _NotOneError(f"a Linear is {weight.dtype}, not float32")
            if len(weight) > MAX_WIDTH:
                raise _NotOneError(f"a Linear has {len(weight)} outputs, over {MAX_WIDTH}")
            weights.append(weight.detach().contiguous())
            biases.append(weight.new_zeros(len(weight)) if bias is None else bias.detach().contiguous())
        else:
            activations.append(_activation(module))
            if len(activations) != len(weights):
                raise _NotOneError(f"{module} does not follow a Linear")
    if not 1 <= len(weights) <= MAX_LAYERS:
        raise _NotOneError(f"it has {len(weights)} Linear, not 1 to {MAX_LAYERS}")
    if len(activations) == len(weights):
        raise _NotOneError("it ends with an activation")
    if len(set(activations)) > 1:
        raise _NotOneError(f"its activations differ: {', '.join(activations)}")
    return Layers(weights, biases, (activations or ["relu"])[0])


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules in the order in which they run, without those that do nothing."""
    if "forward" in vars(model) or any(getattr(model, hooks) for hooks in _HOOKS):
        raise _NotOneError(f"{type(model).__name__} has hooks or a forward of its own")
    if type(model) is nn.Sequential:
        for module in model:
            yield from _modules(module)
    elif type(model) not in _SKIPPED:
        yield model


def _activation(module: nn.Module) -> str:
    for known in _ACTIVATIONS:
        if type(module) is type(known) and _options(module) == _options(known):
            return type(known).__name__.lower()
    raise _NotOneError(f"it has {module}")


def _options(module: nn.Module) -> dict[str, object]:
    """What a parameterless module was made with; where it writes its result changes nothing."""
    return {
        name: value for name, value in vars(module).items() if name[0] != "_" and name not in ("training", "inplace")
    }

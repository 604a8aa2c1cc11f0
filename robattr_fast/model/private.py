"""The user's model made safe to explain: checked, copied, frozen. The user's own is never touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from robattr_fast.errors import ModelError
from robattr_fast.model import exported
from robattr_fast.model.hooks import quieten

_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def check_mode(model: nn.Module) -> None:
    """TypeError unless it is a Module, ModelError if it, or a part of it, is in training mode."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    graphs = exported.graphs(model)
    for name, graph in graphs.items():
        exported.check_mode(name, graph)
    for name, module in model.named_modules():
        # A frozen TorchScript module has no such flag: torch.jit.freeze takes modules in eval mode alone.
        if getattr(module, "training", False) and not exported.contains(graphs, name):
            where = f"its submodule {name!r} ({type(module).__name__}) is" if name else "it is"
            raise ModelError(f"model: {where} in training mode; call model.eval() before explaining it")


def unwrapped(module: nn.Module) -> nn.Module:
    """What is inside of a wrapper that changes how a module runs and not what it computes; else the module.

    DistributedDataParallel and DataParallel spread batches over devices; torch.compile rounds differently.
    """
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        elif type(module).__name__ == "OptimizedModule" and isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def private_copy(model: nn.Module, *, frozen: bool = True, quiet: bool = True) -> nn.Module:
    """A copy in eval mode that shares the parameters' memory, detached; buffers are its own.

    ``frozen=False`` leaves gradients to those of its parameters that have them in the user's model.

    Wrappers are left out (`unwrapped`). Tensors that an earlier call left in the model are copied without their graph.
    Hooks get copies of what they refer to (``quiet=False``: not), and what they collect is dropped. A module that
    torch.export made always says that it is in training mode: of such a one the graph is judged.

    Raises:
        TypeError: not a Module. ModelError: training mode, or a model that cannot be copied.
    """
    check_mode(model)
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _SHARDED:
                where = f"its submodule {name!r}" if name else "it"
                raise ModelError(
                    f"model: {where} is sharded by {kind.__name__}, so that no process holds its parameters; expected "
                    "the whole module: gather its state_dict and load that into a model of your own"
                )
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ModelError(f"model: its parameter {name!r} is not initialised; call it once on a batch before")
        memo[id(parameter)] = _shared(parameter, requires_grad=parameter.requires_grad and not frozen)
    try:
        with torch.inference_mode(False), _WithoutGraphs():
            for module in reversed(list(model.modules())):  # inner wrappers first
                if (inside := unwrapped(module)) is not module:
                    memo[id(module)] = copy.deepcopy(inside, memo)
            private = copy.deepcopy(unwrapped(model), memo)
            if quiet:
                quieten(private, memo)
            return private
    except Exception as error:
        raise ModelError(
            f"model: it cannot be copied ({type(error).__name__}: {error}); it is explained on a private copy"
        ) from error


def _shared(parameter: nn.Parameter, *, requires_grad: bool) -> torch.Tensor:
    """A parameter of the same class on the same memory."""
    plain = parameter.detach()
    if plain.is_inference():
        plain = plain.clone()  # autograd saves no tensor of inference mode
    if type(parameter) is nn.Parameter:
        return nn.Parameter(plain, requires_grad=requires_grad)
    if isinstance(parameter, nn.Parameter) and type(plain) is torch.Tensor:  # a subclass of Parameter
        plain = plain.as_subclass(type(parameter))
    shared: torch.Tensor = plain.requires_grad_(requires_grad)
    for name, value in vars(parameter).items():
        if name not in vars(shared):
            setattr(shared, name, value)
    return shared


class _WithoutGraphs(TorchFunctionMode):
    """deepcopy takes tensors that have a graph, as constants: torch refuses to copy these."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def batch_sizes(model: nn.Module) -> tuple[int, int | None]:
    """(least, most) rows that one forward takes, as far as the model tells; most is None where nothing bounds it."""
    ranges = [exported.batch_sizes(graph) for graph in exported.graphs(model).values()]
    most = [high for _, high in ranges if high is not None]
    return max((low for low, _ in ranges), default=1), min(most, default=None)

"""The user's model made safe to explain: checked, copied, frozen. The user's own is never touched."""

from __future__ import annotations

import copy

from torch import nn

from robattr_fast.errors import ModelError
from robattr_fast.model import exported


def check_mode(model: nn.Module) -> None:
    """TypeError unless it is a Module, ModelError if it, or a part of it, is in training mode."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")
    graphs = exported.graphs(model)
    for name, graph in graphs.items():
        exported.check_mode(name, graph)
    for name, module in model.named_modules():
        if module.training and not exported.contains(graphs, name):
            where = f"its submodule {name!r} ({type(module).__name__}) is" if name else "it is"
            raise ModelError(f"model: {where} in training mode; call model.eval() before explaining it")


def private_copy(model: nn.Module, *, frozen: bool = True) -> nn.Module:
    """A copy in eval mode that shares the parameters' memory, detached; buffers are its own.

    ``frozen=False`` leaves gradients to those of its parameters that have them in the user's model.

    A module that torch.export made always says that it is in training mode: of such a one the graph is judged.

    Raises:
        TypeError: not a Module. ModelError: training mode, or a model that cannot be copied.
    """
    check_mode(model)
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad and not frozen) for p in model.parameters()}
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        raise ModelError(f"model: it cannot be copied ({error}); it is explained on a private copy") from error


def batch_sizes(model: nn.Module) -> tuple[int, int | None]:
    """(least, most) rows that one forward takes, as far as the model tells; most is None where nothing bounds it."""
    ranges = [exported.batch_sizes(graph) for graph in exported.graphs(model).values()]
    most = [high for _, high in ranges if high is not None]
    return max((low for low, _ in ranges), default=1), min(most, default=None)

"""Modules that torch.export made. They always say training=True: mode and batch size are read from their graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from robattr_fast.errors import ModelError


def graphs(model: nn.Module) -> dict[str, fx.GraphModule]:
    """The exported modules in ``model`` (itself, or parts of it), by name; not the parts that these have."""
    found: dict[str, fx.GraphModule] = {}
    for name, module in model.named_modules():
        if not any(_within(name, outer) for outer in found) and _is_exported(module):
            found[name] = module
    return found


def contains(exported: dict[str, fx.GraphModule], name: str) -> bool:
    """Whether the submodule ``name`` is one of the `graphs`, or part of one: its training flag says nothing."""
    return any(name == outer or _within(name, outer) for outer in exported)


def check_mode(name: str, module: fx.GraphModule) -> None:
    """ModelError if the graph has active dropout, BatchNorm that learns, or another source of randomness."""
    where = f"its part {name!r}" if name else "it"
    for operator, arguments in _calls(module):
        training = arguments.get("training", arguments.get("train", False))
        # Without running statistics the flag is always True, as in instance normalisation, which is sound.
        if training is not False and ("running_mean" not in arguments or arguments["running_mean"] is not None):
            raise ModelError(
                f"model: {where} was exported in training mode ({operator} is active); "
                "call eval() on the module before torch.export.export"
            )
        switched_off = {"training", "train"} & arguments.keys() or arguments.get("dropout_p") == 0
        if torch.Tag.nondeterministic_seeded in operator.tags and not switched_off:
            raise ModelError(f"model: {where} is random ({operator}), takes a fixed function of its input")


def batch_sizes(module: fx.GraphModule) -> tuple[int, int | None]:
    """(least, most) rows of the first input that the graph takes; most is None where nothing bounds it."""
    value = _example(module)
    if value is None or value.dim() == 0:
        return 1, None
    rows = value.shape[0]
    if isinstance(rows, int):
        return rows, rows
    bounds = rows.node.shape_env.bound_sympy(rows.node.expr)
    return max(1, int(bounds.lower)), int(bounds.upper) if bounds.upper.is_Integer else None


def image_side(module: fx.GraphModule) -> int | None:
    """Side of the square images [N, C, side, side] that the graph takes; None if they may have several sizes."""
    value = _example(module)
    if value is None or value.dim() != 4:
        return None
    height, width = value.shape[2:]
    return height if isinstance(height, int) and isinstance(width, int) and height == width else None


def _example(module: fx.GraphModule) -> torch.Tensor | None:
    """The fake tensor that stands for the first input: its shape holds what the graph demands."""
    first = next((node for node in module.graph.nodes if node.op == "placeholder"), None)
    value = None if first is None else first.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def _within(name: str, outer: str) -> bool:
    return outer == "" or name.startswith(f"{outer}.")


def _is_exported(module: nn.Module) -> bool:
    """A graph of operators, in which no layer is left that could look at its training flag."""
    if not isinstance(module, fx.GraphModule):
        return False
    operators = any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)
    # The check of the input's shape is a module as well, but nothing uses what it returns.
    return operators and not any(node.op == "call_module" and node.users for node in module.graph.nodes)


def _calls(module: fx.GraphModule) -> Iterator[tuple[torch._ops.OpOverload, dict[str, Any]]]:
    """Operators with their arguments by name, defaults included; those in nested graphs (torch.no_grad) too."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            if isinstance(node.target, torch._ops.OpOverload):
                arguments = {argument.name: argument.default_value for argument in node.target._schema.arguments}
                arguments.update(zip(arguments, node.args, strict=False))
                yield node.target, arguments | dict(node.kwargs)

"""Hooks of a private copy: they do to its outputs what the user's do, and collect nothing."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module that hold its hooks."""

_CONTAINERS = (list, dict, set, deque, bytearray)


_collected: weakref.WeakKeyDictionary[nn.Module, list[tuple[Any, Any]]] = weakref.WeakKeyDictionary()
"""By private copy the containers that its hooks reach, with what they held when it was made."""


def has_hooks(model: nn.Module) -> bool:
    """Whether any part of it has hooks."""
    return any(getattr(module, name, None) for module in model.modules() for name in HOOKS)


def quieten(private: nn.Module, memo: dict[int, Any]) -> None:
    """Give the hooks of a copy their own copies of what they refer to, so that the user's own do not grow.

    ``memo``: of copy.deepcopy, with which the module was copied. What cannot be copied (a file, a socket) stays the
    user's.
    """
    found: list[Any] = []
    seen: set[int] = set()
    for module in private.modules():
        for name in HOOKS:
            held = getattr(module, name, None) or {}
            for key, hook in list(held.items()):
                held[key] = _copied(hook, memo)
                found += _containers(held[key], seen)
    if found:
        _collected[private] = [(container, copy.copy(container)) for container in found]


def settle(model: nn.Module) -> None:
    """Drop what the hooks of a private copy have collected: they hold graphs, and would differ from call to call."""
    for held, kept in _collected.get(model, ()):
        _restore(held, kept)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What the hooks of the user's ``model`` collect inside of this block is dropped."""
    seen: set[int] = set()
    found = [
        container
        for module in model.modules()
        for name in HOOKS
        for hook in (getattr(module, name, None) or {}).values()
        for container in _containers(hook, seen)
    ]
    before = [(container, copy.copy(container)) for container in found]
    try:
        yield
    finally:
        for held, kept in before:
            _restore(held, kept)


def _copied(function: Any, memo: dict[int, Any]) -> Any:
    """A function with copies of its closure, its defaults and the containers among its globals."""
    if isinstance(function, functools.partial):
        function_, args, keywords = function.func, function.args, function.keywords
        return functools.partial(
            _copied(function_, memo),
            *_deeply(args, memo),
            **{key: _deeply(value, memo) for key, value in keywords.items()},
        )
    if not isinstance(function, types.FunctionType):
        return _deeply(function, memo)
    if id(function) in memo:
        return memo[id(function)]
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    space = dict(function.__globals__)
    twin = types.FunctionType(function.__code__, space, function.__name__, None, cells or None)
    memo[id(function)] = twin
    twin.__kwdefaults__ = _deeply(function.__kwdefaults__, memo)
    twin.__defaults__ = _deeply(function.__defaults__, memo)
    twin.__dict__.update(function.__dict__)
    for cell, theirs in zip(cells, function.__closure__ or (), strict=True):
        try:
            value = theirs.cell_contents
        except ValueError:  # not filled yet
            continue
        cell.cell_contents = _referred(value, function, memo)
    for name in _names(function.__code__):
        if name in space:
            space[name] = _referred(space[name], function, memo)
    return twin


def _referred(value: Any, by: types.FunctionType, memo: dict[int, Any]) -> Any:
    if isinstance(value, types.FunctionType):
        return _copied(value, memo) if value.__module__ == by.__module__ else value
    if isinstance(value, types.ModuleType | type | types.BuiltinFunctionType):
        return value
    return _deeply(value, memo)


def _deeply(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever an object that cannot be copied raises
        return value


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _containers(value: Any, seen: set[int]) -> Iterator[Any]:
    """Those that a copied hook reaches: of its closure, globals and attributes, and in these."""
    if id(value) in seen or isinstance(value, nn.Module | type | types.ModuleType):
        return
    seen.add(id(value))
    inside: list[Any] = []
    if isinstance(value, _CONTAINERS):
        yield value
        inside = (
            list(value.values()) if isinstance(value, dict) else [] if isinstance(value, bytearray) else list(value)
        )
    elif isinstance(value, types.FunctionType):
        inside = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        inside += [value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__]
        inside += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), value.__dict__]
    elif isinstance(value, types.MethodType):
        inside = [value.__self__]
    elif isinstance(value, functools.partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, tuple):
        inside = list(value)
    elif hasattr(value, "__dict__") and not callable(getattr(value, "numpy", None)):
        inside = [vars(value)]
    for part in inside:
        yield from _containers(part, seen)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _restore(held: Any, kept: Any) -> None:
    if isinstance(held, list | bytearray):
        held[:] = kept
    elif isinstance(held, deque):
        held.clear()
        held.extend(kept)
    else:
        held.clear()
        held.update(kept)

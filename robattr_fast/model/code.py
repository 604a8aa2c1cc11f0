"""What the code of a function or of a class refers to and writes, and whether the user wrote it."""

from __future__ import annotations

import dis
import functools
import os
import sys
import sysconfig
import types
from collections.abc import Iterable
from typing import Any

from torch import nn

_MUTATORS = frozenset(
    (
        "append",
        "appendleft",
        "extend",
        "extendleft",
        "insert",
        "add",
        "update",
        "clear",
        "pop",
        "popleft",
        "popitem",
        "remove",
        "setdefault",
        "discard",
    )
)


def module_root(value: Any) -> str:
    return (getattr(value, "__module__", None) or "").partition(".")[0]


def is_standard(value: Any) -> bool:
    root = module_root(value)
    return root == "builtins" or (root in sys.stdlib_module_names and root != "__main__")


@functools.lru_cache(maxsize=1024)
def is_installed_root(root: str) -> bool:
    if root in ("builtins", "torch", "numpy", "robattr_fast") or root in sys.stdlib_module_names:
        return root != "__main__"
    file = getattr(sys.modules.get(root), "__file__", None)
    places = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")}
    return file is not None and any(os.path.abspath(file).startswith(place + os.sep) for place in places if place)


def is_installed(value: Any) -> bool:
    return is_installed_root(module_root(value))


def function_in(value: Any) -> types.FunctionType | None:
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    return value if isinstance(value, types.FunctionType) else None


def methods_of(kind: type) -> list[str]:
    return [name for base in kind.__mro__ for name, value in vars(base).items() if function_in(value) is not None]


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> frozenset[str]:
    """Names that the code looks up, in functions inside of it too."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(code.co_names).union(*inner)


@functools.lru_cache(maxsize=4096)
def globals_in(code: types.CodeType) -> frozenset[str]:
    """Names of globals that the code looks up, in functions inside of it too."""
    own = {str(step.argval) for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = (globals_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(own).union(*inner)


@functools.lru_cache(maxsize=4096)
def written_in(code: types.CodeType) -> frozenset[str]:
    """Names of attributes, globals and cells that the code assigns to, or changes in place."""
    found: set[str] = set()
    held = ""
    previous = ""
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "STORE_DEREF"):
            found.add(str(step.argval))
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in _MUTATORS and previous:
            found.add(previous)
        elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") and held:
            found.add(held)
        names = ("LOAD_ATTR", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME", "LOAD_METHOD", "LOAD_CLOSURE")
        previous = str(step.argval) if step.opname in names else previous if step.opname in ("PUSH_NULL",) else ""
        held = previous or held
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= written_in(constant)
    return frozenset(found)


def reached_in(kind: type) -> set[str]:
    """Names of the attributes of a class that its forward refers to, and of those that these refer to."""
    reached: set[str] = set()
    left = ["forward", "__call__", "__getattr__"]
    while left:
        name = left.pop()
        if name in reached:
            continue
        reached.add(name)
        for base in kind.__mro__:
            value = vars(base).get(name)
            functions: list[Any] = [value.fget] if isinstance(value, property) else [function_in(value)]
            for function in functions:
                if isinstance(function, types.FunctionType) and not is_installed(function):
                    left += [other for other in names_in(function.__code__) if other not in reached]
    return reached


def written_by(kind: type, starts: Iterable[str]) -> frozenset[str]:
    """Attributes that the code of a class writes when it is called: its history, not what it is."""
    names = reached_in(kind) if issubclass(kind, nn.Module) else set(starts)
    found: set[str] = set()
    for base in kind.__mro__:
        if is_installed(base):
            continue
        for name in names - {"__init__", "__new__", "__setstate__", "__post_init__"}:
            function = function_in(vars(base).get(name))
            if function is not None:
                found |= written_in(function.__code__)
    return frozenset(found)

"""A hash of everything that a model, or a callable, is made of: tensors, plain values, code, what the code refers to.

It is the same in every process and on every machine for one Python version: no addresses, no order of sets, no file
names or line numbers, no absolute paths. Bytecode differs between Python versions, so that the hash names its own.
What installed packages define is taken by name, what the user has written by its bytecode. Attributes that the forward
itself writes (a last activation, a counter) are a model's history, and left out.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import itertools
import os
import re
import sys
import sysconfig
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from robattr_fast.model.hooks import HOOKS
from robattr_fast.model.private import unwrapped

PREFIX = "2"
"""Of fingerprints made here; the first kind had none."""

_OF_MODULES = frozenset((*vars(nn.Module()), "_compiled_call_impl"))
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_MANGLED = re.compile(r"___torch_mangle_\d+\.")
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
_HISTORY_OF_PACKAGES = frozenset(("_name_or_path", "name_or_path", "transformers_version", "_commit_hash"))
_NOT_CODE = frozenset(
    (
        "__module__",
        "__doc__",
        "__dict__",
        "__weakref__",
        "__annotations__",
        "__qualname__",
        "__firstlineno__",
        "__static_attributes__",
        "__init__",
        "__new__",
        "__setstate__",
        "__getstate__",
        "__reduce__",
        "__reduce_ex__",
        "__slots__",
        "__abstractmethods__",
        "__parameters__",
        "__orig_bases__",
        "__annotate__",
        "__annotate_func__",
        "__dataclass_fields__",
        "__dataclass_params__",
        "__match_args__",
        "__repr__",
        "__str__",
        "extra_repr",
    )
)


def fingerprint(model: object) -> str:
    """2-<python>-<sha256>, of a model or of a callable."""
    python = f"{sys.implementation.name}{sys.version_info.major}{sys.version_info.minor}"
    return f"{PREFIX}-{python}-{_Walk().of(model).hex()}"


def comparable(first: str, second: str) -> bool:
    """Whether two fingerprints of this kind are equal if, and only if, model and code are."""
    return first.split("-")[:2] == second.split("-")[:2]


class _Walk:
    """Hashes of objects, each of its parts; kept, so that shared parts are looked at once."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, bytes]] = {}
        self.open: list[int] = []

    def of(self, value: Any) -> bytes:
        kind = type(value)
        if value is None or kind in (bool, int, float, complex, bytes, type(...)):
            return f"{kind.__name__} {value!r}".encode()
        if kind is str:
            return f"str {_without_place(value)!r}".encode()
        key = id(value)
        if key in self.known:
            return self.known[key][1]
        if key in self.open:
            return f"cycle {len(self.open) - self.open.index(key)}".encode()
        self.open.append(key)
        try:
            made = hashlib.sha256()
            for part in self.parts(value):
                part = part if isinstance(part, bytes) else str(part).encode()
                made.update(len(part).to_bytes(8, "little") + part)
            digest = made.digest()
        finally:
            self.open.pop()
        self.known[key] = (value, digest)
        return digest

    def parts(self, value: Any) -> Iterable[bytes | str]:
        if isinstance(value, torch.Tensor):
            return tensor_parts(value)
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                return ["objects", str(value.shape), *map(self.of, value.ravel().tolist())]
            return ["array", value.dtype.str, str(value.shape), np.ascontiguousarray(value).tobytes()]
        if isinstance(value, np.generic):
            return ["number", value.dtype.str, value.tobytes()]
        if isinstance(value, types.FunctionType):
            return self.function(value)
        if isinstance(value, types.MethodType):
            return ["method", self.of(value.__func__), self.of(value.__self__)]
        if isinstance(value, types.CodeType):
            return self.code(value)
        if isinstance(value, type):
            return self.of_class(value)
        if isinstance(value, functools.partial):
            return ["partial", self.of(value.func), self.of(value.args), self.of(value.keywords)]
        if isinstance(value, types.ModuleType):
            return ["package", value.__name__]
        if isinstance(value, enum.Enum):
            return ["enum", type(value).__name__, value.name]
        if isinstance(value, os.PathLike):
            return ["path", os.path.basename(os.fspath(value))]
        if isinstance(value, re.Pattern):
            return ["pattern", str(value.pattern), str(value.flags)]
        if isinstance(value, (torch.dtype, torch.device, torch.memory_format, torch.layout, range, slice)):
            return [type(value).__name__, str(value)]
        if isinstance(value, OrderedDict):
            return ["ordered", *itertools.chain.from_iterable((self.of(k), self.of(v)) for k, v in value.items())]
        if isinstance(value, Mapping):
            pairs = sorted((self.of(k), self.of(v)) for k, v in list(value.items()) if k not in _HISTORY_OF_PACKAGES)
            return [type(value).__name__, *itertools.chain.from_iterable(pairs)]
        if isinstance(value, Set):
            return [type(value).__name__, *sorted(map(self.of, value))]
        if isinstance(value, (list, tuple, deque)):
            return [type(value).__name__, *map(self.of, value)]
        if callable(value) and isinstance(getattr(value, "__wrapped__", None), types.FunctionType):
            return ["wrapped", self.of(value.__wrapped__)]
        if isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)):
            return ["builtin", value.__qualname__]
        return self.object(value)

    def object(self, value: Any) -> Iterable[bytes | str]:
        kind = type(value)
        yield f"object {kind.__name__}"
        if isinstance(value, torch.jit.ScriptFunction):
            yield _MANGLED.sub("", str(value.code))
        elif isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            yield str(value)
        elif isinstance(value, torch.ScriptObject):
            yield self.of(value.__getstate__()) if hasattr(value, "__getstate__") else ""
        elif isinstance(value, np.ufunc):
            yield value.__name__
        standard = _module_root(kind) in ("torch", "numpy") or _is_standard(kind)
        if standard and not isinstance(value, types.SimpleNamespace):
            return  # locks, loggers, generators, operators: by name
        yield self.of(kind)
        held = dict(getattr(value, "__dict__", {}))
        for base in kind.__mro__:
            slots = vars(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, name):
                    held[name] = getattr(value, name)
        written = _written_by(kind, ("__call__", *_methods(kind)))
        yield from self.attributes(held, written)

    def attributes(self, held: Mapping[str, Any], written: Set[str]) -> Iterable[bytes | str]:
        for name in sorted(map(str, held)):
            if name not in written and name not in _HISTORY_OF_PACKAGES and name in held:
                yield name
                yield self.of(held[name])

    def module(self, module: nn.Module) -> Iterable[bytes | str]:
        module = unwrapped(module)
        yield f"module {type(module).__name__}"
        if isinstance(module, fx.GraphModule):
            yield module.code
        if isinstance(module, torch.jit.ScriptModule):
            yield from self.script(module)
            return
        if not isinstance(module, fx.GraphModule):  # its class is made for it alone
            yield self.of(type(module))
        for name, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
            yield f"tensor {name}"
            yield self.of(tensor)
        written = _written_by(type(module), ("forward", "__call__"))
        held = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
        if isinstance(module, fx.GraphModule):
            held = {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}
        yield from self.attributes(held, written)
        for hooks in HOOKS:
            for hook in (getattr(module, hooks, None) or {}).values():
                yield hooks
                yield self.of(hook)
        yield from self.packed(module)
        for name, child in module._modules.items():
            yield f"child {name}"
            yield self.of(child)

    def packed(self, module: nn.Module) -> Iterable[bytes | str]:
        """Tensors that a module keeps in an object of C++, as quantized layers do."""
        if _module_root(type(module)) != "torch" or "quantized" not in type(module).__module__:
            return
        own: dict[str, Any] = {}
        module._save_to_state_dict(own, "", keep_vars=False)
        for name in sorted(own):
            yield name
            yield self.of(own[name])

    def script(self, module: torch.jit.ScriptModule) -> Iterable[bytes | str]:
        try:
            code, constants = module.code_with_constants
            yield _MANGLED.sub("", code)
            for name in sorted(constants.const_mapping):
                yield name
                yield self.of(constants.const_mapping[name])
        except RuntimeError:
            yield "no forward"
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            yield name
            yield self.of(tensor)
        for name, child in module.named_children():
            yield f"child {name}"
            yield self.of(child)

    def of_class(self, kind: type) -> Iterable[bytes | str]:
        yield f"class {kind.__name__}"
        for base in kind.__mro__:
            if _is_installed(base):
                yield f"{base.__module__}.{base.__name__}"
                continue
            reached = _reached(kind) if issubclass(kind, nn.Module) else None
            written = _written_by(kind, ("forward", "__call__"))
            for name, value in sorted(vars(base).items()):
                if name in _NOT_CODE or name in written or name.startswith("_abc"):
                    continue
                function = _function_in(value)
                if function is not None and reached is not None and name not in reached:
                    continue
                yield name
                if isinstance(value, property):
                    yield from map(self.of, (value.fget, value.fset))
                else:
                    yield self.of(function if function is not None else value)

    def function(self, function: types.FunctionType) -> Iterable[bytes | str]:
        if _is_installed(function):
            yield f"function {function.__module__}.{function.__qualname__}"
            for cell in function.__closure__ or ():
                yield self.cell(cell)
            return
        yield "function"
        yield self.of(function.__code__)
        yield self.of(function.__defaults__)
        yield self.of(function.__kwdefaults__)
        written = _writes(function.__code__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name not in written:
                yield name
                yield self.cell(cell)
        for name in sorted(_globals(function.__code__)):
            if name in function.__globals__ and name not in written:
                yield name
                yield self.of(function.__globals__[name])
        if (wrapped := getattr(function, "__wrapped__", None)) is not None:
            yield self.of(wrapped)

    def cell(self, cell: types.CellType) -> bytes:
        try:
            return self.of(cell.cell_contents)
        except ValueError:
            return b"empty"

    def code(self, code: types.CodeType) -> Iterable[bytes | str]:
        yield code.co_code
        yield str((code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_flags))
        yield str((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars))
        yield from map(self.of, code.co_consts)
        yield getattr(code, "co_exceptiontable", b"")


def tensor_parts(tensor: torch.Tensor) -> Iterable[bytes | str]:
    """Dtype, shape and bytes of a tensor of any layout."""
    tensor = tensor.detach()
    if tensor.device.type == "meta":
        return ["meta", str(tensor.dtype), str(tuple(tensor.shape))]
    if tensor.is_quantized:
        scale: list[bytes | str] = (
            [str((tensor.q_scale(), tensor.q_zero_point()))]
            if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)
            else [*tensor_parts(tensor.q_per_channel_scales()), *tensor_parts(tensor.q_per_channel_zero_points())]
        )
        return ["quantized", str(tensor.dtype), *scale, *tensor_parts(tensor.int_repr())]
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        inside: tuple[torch.Tensor, ...] = (tensor.indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        inside = (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        inside = (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:
        return ["tensor", str(tensor.dtype), str(tuple(tensor.shape)), tensor_bytes(tensor)]
    return [str(tensor.layout), str(tuple(tensor.shape)), *itertools.chain.from_iterable(map(tensor_parts, inside))]


def tensor_bytes(tensor: torch.Tensor) -> Any:
    """Of a dense tensor, in C order."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
    return memoryview(plain.view(torch.uint8).numpy()).cast("B").tobytes()


def _without_place(text: str) -> str:
    """A string, without the folder where it is an absolute path, and without addresses."""
    return os.path.basename(text) if os.path.isabs(text) else _ADDRESS.sub("", text)


def _module_root(value: Any) -> str:
    return (getattr(value, "__module__", None) or "").partition(".")[0]


def _is_standard(value: Any) -> bool:
    root = _module_root(value)
    return root == "builtins" or (root in sys.stdlib_module_names and root != "__main__")


@functools.lru_cache(maxsize=1024)
def _is_installed_root(root: str) -> bool:
    if root in ("builtins", "torch", "numpy", "robattr_fast") or root in sys.stdlib_module_names:
        return root != "__main__"
    file = getattr(sys.modules.get(root), "__file__", None)
    places = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")}
    return file is not None and any(os.path.abspath(file).startswith(place + os.sep) for place in places if place)


def _is_installed(value: Any) -> bool:
    return _is_installed_root(_module_root(value))


def _function_in(value: Any) -> types.FunctionType | None:
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    return value if isinstance(value, types.FunctionType) else None


def _methods(kind: type) -> list[str]:
    return [name for base in kind.__mro__ for name, value in vars(base).items() if _function_in(value) is not None]


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """Names that the code looks up, in functions inside of it too."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(code.co_names).union(*inner)


@functools.lru_cache(maxsize=4096)
def _globals(code: types.CodeType) -> frozenset[str]:
    """Names of globals that the code looks up, in functions inside of it too."""
    own = {str(step.argval) for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = (_globals(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(own).union(*inner)


@functools.lru_cache(maxsize=4096)
def _writes(code: types.CodeType) -> frozenset[str]:
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
            found |= _writes(constant)
    return frozenset(found)


def _reached(kind: type) -> set[str]:
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
            functions: list[Any] = [value.fget] if isinstance(value, property) else [_function_in(value)]
            for function in functions:
                if isinstance(function, types.FunctionType) and not _is_installed(function):
                    left += [other for other in _names(function.__code__) if other not in reached]
    return reached


def _written_by(kind: type, starts: Iterable[str]) -> frozenset[str]:
    """Attributes that the code of a class writes when it is called: its history, not what it is."""
    names = _reached(kind) if issubclass(kind, nn.Module) else set(starts)
    found: set[str] = set()
    for base in kind.__mro__:
        if _is_installed(base):
            continue
        for name in names - {"__init__", "__new__", "__setstate__", "__post_init__"}:
            function = _function_in(vars(base).get(name))
            if function is not None:
                found |= _writes(function.__code__)
    return frozenset(found)

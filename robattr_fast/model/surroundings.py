"""What a caller may have set for the process, kept out of a run and given back to the user's model."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import types
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch.utils._device import DeviceContext

_users: contextvars.ContextVar[tuple[torch.device | None, torch.dtype] | None] = contextvars.ContextVar(
    "users", default=None
)
_OWN = torch.float32
_T = TypeVar("_T")


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """Default device CPU, default dtype float32, no inference mode: a run makes its tensors as it means them.

    The user's model runs with the user's defaults (`users_defaults`). Whether gradients are recorded stays as it is.
    """
    records, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    device = _default_device()
    if _users.get() is not None:  # within another run: its user's are known
        with torch.inference_mode(False), torch.set_grad_enabled(records):
            yield
        return
    if device is None and dtype == _OWN:
        with torch.inference_mode(False), torch.set_grad_enabled(records):
            yield
        return
    token = _users.set((device, dtype))
    torch.set_default_dtype(_OWN)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(records), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
        _users.reset(token)


@contextlib.contextmanager
def _as_users(device: torch.device | None, dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        with contextlib.nullcontext() if device is None else device:
            yield
    finally:
        torch.set_default_dtype(_OWN)


def users_defaults() -> contextlib.AbstractContextManager:
    """Inside of `neutral`: the defaults that the user had set."""
    users = _users.get()
    return contextlib.nullcontext() if users is None else _as_users(*users)


def neutral_methods(cls: type[_T]) -> type[_T]:
    """The class with its public methods, properties and constructors in `neutral` surroundings."""
    for name in dir(cls):
        value = inspect.getattr_static(cls, name)
        if (name.startswith("_") and name not in ("__init__", "__getitem__")) or not _is_ours(cls, name):
            continue
        if isinstance(value, types.FunctionType):
            setattr(cls, name, neutral()(value))
        elif isinstance(value, classmethod):
            setattr(cls, name, classmethod(neutral()(value.__func__)))
        elif isinstance(value, property) and value.fget is not None:
            setattr(cls, name, property(neutral()(value.fget), doc=value.__doc__))
        elif isinstance(value, functools.cached_property):
            cached = functools.cached_property(neutral()(value.func))
            cached.__set_name__(cls, name)
            setattr(cls, name, cached)
    return cls


def _is_ours(cls: type, name: str) -> bool:
    return any(name in vars(base) for base in cls.__mro__ if base.__module__.startswith("robattr_fast."))


def _default_device() -> torch.device | None:
    """That of torch.set_default_device or of a ``with torch.device(...)``; None where nothing is set."""
    modes = torch.overrides._get_current_function_mode_stack()
    return next((mode.device for mode in reversed(modes) if isinstance(mode, DeviceContext)), None)

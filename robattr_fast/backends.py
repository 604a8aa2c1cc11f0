"""Which backend runs an operator: a preference per operator, and the exact reason for every backend passed over.

The environment variable ROBATTR_FAST_BACKEND sets the default preference of the process: a backend's name, or entries
``operator=name`` separated by commas (``noisy_samples=reference,sparsify=cpu``).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import torch

from robattr_fast.errors import BackendError

NAMES = ("reference", "cpu", "triton", "cuda")

# The default first; what a device's list does not name is used on request only.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

# Of two kernels for one device the simpler one is the default, until the other is known to be worth its length.
_NOT_THE_DEFAULT = {"cuda": "not the default: no record shows it 1.5 times as fast as triton (ask for it by name)"}

_logger = logging.getLogger("robattr_fast")

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Implementation:
    """One backend of one operator. ``can_run(device, dtype) -> (ok, reason)``: the reason says why not."""

    call: Callable
    can_run: Callable[[torch.device, torch.dtype], tuple[bool, str]]


@dataclass(frozen=True)
class Preference:
    """Preferred backend of all operators (``default``) or of one (``operators``); ``strict`` forbids the next best."""

    default: str | None = None
    operators: dict[str, str] = field(default_factory=dict)
    strict: bool = False

    def backend(self, operator: str) -> str | None:
        return self.operators.get(operator, self.default)


_registry: dict[str, dict[str, Implementation]] = {}
_preference: ContextVar[Preference | None] = ContextVar("robattr_fast_backend", default=None)
# The `use` objects that are entered here, innermost last, each with the preference to go back to.
_entered: ContextVar[tuple[tuple[use, Preference | None], ...]] = ContextVar("robattr_fast_entered", default=())


def register(operator: str, backend: str, call: Callable, can_run: Callable[..., tuple[bool, str]]) -> None:
    """Make ``call`` the ``backend`` implementation of ``operator``."""
    _registry.setdefault(operator, {})[backend] = Implementation(call, can_run)


def operators() -> tuple[str, ...]:
    """Names of all registered operators."""
    return tuple(sorted(_registry))


def _checked(name: str, argument: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{argument}: got {name!r}, takes one of {', '.join(NAMES)}")
    return name


def _known(operator: str, caller: str) -> str:
    if operator not in _registry:
        raise ValueError(f"{caller} got operator {operator!r}, takes one of {', '.join(sorted(_registry))}")
    return operator


@functools.lru_cache(maxsize=8)
def _parse(value: str) -> Preference:
    default, per_operator = None, {}
    for entry in filter(None, (part.strip() for part in value.split(","))):
        operator, equals, name = entry.partition("=")
        if equals:
            operator = _known(operator.strip(), "ROBATTR_FAST_BACKEND:")
            per_operator[operator] = _checked(name.strip(), f"ROBATTR_FAST_BACKEND ({operator})")
        else:
            default = _checked(entry, "ROBATTR_FAST_BACKEND")
    return Preference(default, per_operator)


def preference() -> Preference:
    """The preference in force here: the innermost `use`, else the environment variable."""
    return _preference.get() or _parse(os.environ.get("ROBATTR_FAST_BACKEND", ""))


class use:
    """Prefer a backend: ``with use("triton"): ...``, ``use("cpu", strict=True)``, ``use(noisy_samples="reference")``.

    Takes effect at once, like `torch.set_grad_enabled`; as a context manager it is undone at the end, as a decorator it
    holds while the function runs. One object may be entered again, also inside of itself. An operator that lacks the
    backend takes the next one and logs the reason once; with ``strict`` it raises `BackendError`. Named operators alone
    are added to the preference in force where it is entered, strictness included. Other threads are not concerned: a
    thread starts with the environment variable; backward functions prefer what their forward did.
    """

    def __init__(self, backend: str | None = None, *, strict: bool = False, **operators: str) -> None:
        if backend is not None:
            _checked(backend, "backend")
        for operator, name in operators.items():
            _checked(name, _known(operator, "use()"))
        self._backend, self._strict, self._operators = backend, strict, operators
        self._before = _preference.get()
        self._made: Preference | None = self._chosen()
        _preference.set(self._made)

    def _chosen(self) -> Preference:
        if self._backend is not None:
            return Preference(self._backend, self._operators, self._strict)
        outer = preference()
        return Preference(outer.default, outer.operators | self._operators, self._strict or outer.strict)

    def _taken_over(self) -> Preference | None:
        """What to go back to: where the call that made this object is still in force, what was before it."""
        before = _preference.get()
        if self._made is not None and before is self._made:
            before = self._before
            _preference.set(before)
        self._made = None
        return before

    def __enter__(self) -> use:
        before = self._taken_over()
        _entered.set((*_entered.get(), (self, before)))
        _preference.set(self._chosen())
        return self

    def __exit__(self, *_: object) -> None:
        entered = _entered.get()
        last = max(index for index, (owner, _before) in enumerate(entered) if owner is self)
        _entered.set(entered[:last])
        _preference.set(entered[last][1])

    def __call__(self, function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        self._taken_over()
        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            raise TypeError(f"{function.__name__}: it runs after its call returns; enter `use` inside of it")

        @functools.wraps(function)
        def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            with self:
                return function(*args, **kwargs)

        return run


@contextlib.contextmanager
def preferring(chosen: Preference) -> Iterator[None]:
    """``chosen`` in force. Autograd runs backward functions of CUDA tensors in threads that know of no `use`."""
    token = _preference.set(chosen)
    try:
        yield
    finally:
        _preference.reset(token)


@functools.cache
def _log_once(message: str) -> None:
    _logger.warning(message)


def _candidates(operator: str, device: torch.device, dtype: torch.dtype):
    """(backend, implementation or None, reason) in the order in which they are tried."""
    order = _ORDER.get(device.type, ("reference",))
    preferred = preference().backend(operator)
    for name in dict.fromkeys((preferred, *order) if preferred else order):
        implementation = _registry[operator].get(name)
        if implementation is None:
            yield name, None, f"{operator} has no {name} backend"
            continue
        ok, reason = implementation.can_run(device, dtype)
        yield name, implementation if ok else None, reason


def _is_strict(operator: str) -> bool:
    return preference().strict and preference().backend(operator) is not None


def choose(operator: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Callable]:
    """Name and function of the backend that runs ``operator`` on this device and dtype."""
    strict = _is_strict(operator)
    for name, implementation, reason in _candidates(operator, device, dtype):
        if implementation is not None:
            return name, implementation.call
        if strict:
            raise BackendError(f"{operator}: backend {name!r} was demanded (strict=True), but {reason}")
        # What was never written for this operator is no news, unless somebody asked for it.
        if name in _registry[operator] or name == preference().backend(operator):
            _log_once(f"{operator}: backend {name!r} passed over: {reason}")
    raise BackendError(f"{operator}: no backend runs on device {device} with dtype {dtype}")


def subject(args: Iterable[object]) -> torch.Tensor:
    """The tensor whose device and dtype choose the backend: the first floating-point one, else the first."""
    first = None
    for x in args:
        if isinstance(x, torch.Tensor):
            if x.is_floating_point():
                return x
            first = x if first is None else first
    assert first is not None, "no tensor among the arguments"
    return first


def call(operator: str, *args, **kwargs):
    """Run ``operator`` on the backend chosen for its `subject`."""
    tensor = subject(args)
    run = choose(operator, tensor.device, tensor.dtype)[1]
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device_of(tensor):
        return run(*args, **kwargs)


@dataclass(frozen=True)
class Explanation:
    """The backend that would run one operator on one device ("none": a call raises), and why others would not: those
    that were tried before it, and those that could run but are not the default."""

    operator: str
    device: str
    backend: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        reasons = "".join(f"; not {name}: {reason}" for name, reason in self.passed_over.items())
        return f"{self.operator} on {self.device}: {self.backend}{reasons}"


def explain(dtype: torch.dtype = torch.float32) -> list[Explanation]:
    """What runs where, for every operator and every device present, under the preference in force."""
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for operator in operators():
            passed_over = {}
            chosen = "none"
            for name, implementation, reason in _candidates(operator, torch.device(device), dtype):
                if chosen != "none":
                    if implementation is not None and name in _NOT_THE_DEFAULT:
                        passed_over[name] = _NOT_THE_DEFAULT[name]
                elif implementation is not None:
                    chosen = name
                else:
                    passed_over[name] = reason
                if _is_strict(operator):
                    break
            rows.append(Explanation(operator, device, chosen, passed_over))
    return rows

"""The same network with smooth corners, to find directions where the true one has none.

A ReLU network is linear piece by piece: the derivative of its input gradient is zero wherever it exists, and an ascent
on its maps stands still without a word. With softplus of sharpness beta in place of ReLU and the same weights it bends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from robattr_fast import model as _model
from robattr_fast.errors import ModelError
from robattr_fast.ops import _check

_SHARP = 1e6  # softplus is then ReLU but for 7e-7


@dataclass(frozen=True)
class Softplus:
    """softplus(x) = log(1 + exp(beta x)) / beta in place of every ReLU.

    Args:
        beta: sharpness, > 0; a pair grows from the first to the second, geometrically, over the steps of an attack
            (Dombrowski et al. 2019: 10 to 100).
    """

    beta: float | tuple[float, float] = (10.0, 100.0)

    def __post_init__(self) -> None:
        for value in self._ends:
            _check.positive("beta", value)

    @property
    def _ends(self) -> tuple[float, float]:
        return self.beta if isinstance(self.beta, tuple) else (self.beta, self.beta)

    def at(self, progress: float) -> float:
        """beta at ``progress`` in [0, 1]."""
        first, last = self._ends
        return first * (last / first) ** progress


class _Smooth(TorchFunctionMode):
    """Within it, functions with corners are their smooth twins; ``replaced`` counts them."""

    def __init__(self, beta: float | None) -> None:
        super().__init__()
        self.beta = beta
        self.replaced = 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        twin = _TWINS.get(func)
        if twin is None:
            return func(*args, **kwargs)
        smooth = twin(self.beta, *args, **kwargs)
        if smooth is None:  # a form of it that has no corner, or another
            return func(*args, **kwargs)
        self.replaced += 1
        if self.beta is None:
            return func(*args, **kwargs)
        return smooth


def _softplus(x: torch.Tensor, beta: float) -> torch.Tensor:
    return F.softplus(x, beta=beta)


def _clipped(x: torch.Tensor, low: float, high: float, beta: float) -> torch.Tensor:
    return low + _softplus(x - low, beta) - _softplus(x - high, beta)


def _leaky(x: torch.Tensor, slope: float | torch.Tensor, beta: float) -> torch.Tensor:
    return slope * x + (1 - slope) * _softplus(x, beta)


def _twin(smooth: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
    """(beta, *arguments of the function) -> smooth result; beta None: any tensor, to be counted alone."""

    def call(beta: float | None, x: Any, *args: Any, inplace: bool = False, **kwargs: Any) -> torch.Tensor | None:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return None
        found = smooth(x.clone() if inplace else x, *args, beta=1.0 if beta is None else beta, **kwargs)
        if found is None or beta is None or not inplace:
            return found
        return x.copy_(found)

    return call


def _in_place(call: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
    return lambda beta, x, *args, **kwargs: call(beta, x, *args, inplace=True, **kwargs)


def _relu(x: torch.Tensor, inplace: bool = False, *, beta: float) -> torch.Tensor:
    return _softplus(x, beta)


def _relu6(x: torch.Tensor, inplace: bool = False, *, beta: float) -> torch.Tensor:
    return _clipped(x, 0.0, 6.0, beta)


def _leaky_relu(x: torch.Tensor, negative_slope: float = 0.01, inplace: bool = False, *, beta: float) -> torch.Tensor:
    return _leaky(x, negative_slope, beta)


def _hardtanh(
    x: torch.Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False, *, beta: float
) -> torch.Tensor:
    return _clipped(x, min_val, max_val, beta)


def _hardsigmoid(x: torch.Tensor, inplace: bool = False, *, beta: float) -> torch.Tensor:
    return _clipped(x + 3, 0.0, 6.0, beta) / 6


def _prelu(x: torch.Tensor, weight: torch.Tensor, *, beta: float) -> torch.Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2)) if weight.numel() > 1 and x.dim() > 1 else (1,) * x.dim()
    return _leaky(x, weight.reshape(shape), beta)


def _clamp(x: torch.Tensor, min: Any = None, max: Any = None, *, beta: float) -> torch.Tensor | None:
    if isinstance(min, torch.Tensor) or isinstance(max, torch.Tensor) or min is None:
        return None
    return _softplus(x - min, beta) + min if max is None else _clipped(x, min, max, beta)


_aten = torch.ops.aten
_plain: dict[Callable[..., Any], tuple[Any, ...]] = {
    _relu: (F.relu, torch.relu, torch.Tensor.relu, _aten.relu.default),
    _relu6: (F.relu6, _aten.relu6.default),
    _leaky_relu: (F.leaky_relu, torch._C._nn.leaky_relu, _aten.leaky_relu.default),
    _hardtanh: (F.hardtanh, torch._C._nn.hardtanh, _aten.hardtanh.default),
    _hardsigmoid: (F.hardsigmoid, torch._C._nn.hardsigmoid, _aten.hardsigmoid.default),
    _prelu: (F.prelu, torch.prelu, _aten.prelu.default),
    _clamp: (torch.clamp, torch.Tensor.clamp, torch.clamp_min, torch.Tensor.clamp_min, _aten.clamp.default),
}
_writing: dict[Callable[..., Any], tuple[Any, ...]] = {
    _relu: (F.relu_, torch.relu_, torch.Tensor.relu_, _aten.relu_.default),
    _leaky_relu: (F.leaky_relu_, torch._C._nn.leaky_relu_, _aten.leaky_relu_.default),
    _hardtanh: (F.hardtanh_, torch._C._nn.hardtanh_, _aten.hardtanh_.default),
    _clamp: (torch.clamp_, torch.Tensor.clamp_, torch.clamp_min_, torch.Tensor.clamp_min_, _aten.clamp_.default),
}
_TWINS: dict[Any, Callable] = {
    function: _twin(smooth) for smooth, functions in _plain.items() for function in functions
}
_TWINS |= {name: _in_place(_twin(smooth)) for smooth, names in _writing.items() for name in names}


class Surrogate:
    """A private copy of a model, in which functions with corners are smooth; its weights are the model's own.

    Replaced are ReLU, ReLU6, LeakyReLU, PReLU, hardtanh, hardsigmoid and clamp, as modules, functions or methods, and
    in graphs of torch.export. Max-pooling keeps its corners, which move the map when a maximum changes places. What a
    scripted module computes is out of reach.

    Attributes:
        model: the copy.
        beta: the sharpness with which it computes.
    """

    def __init__(self, model: nn.Module, settings: Softplus) -> None:
        self.settings = settings
        copy = _model.private_copy(model)
        self._beta = _Beta(settings.at(0.0))
        self.model = _softened(copy, self._beta)

    @property
    def beta(self) -> float:
        return self._beta.value

    def sharpen(self, progress: float) -> nn.Module:
        """The model at ``progress`` in [0, 1] of an attack."""
        self._beta.value = self.settings.at(progress)
        return self.model

    def check(self, model: nn.Module, x: torch.Tensor) -> None:
        """ModelError unless with sharp corners it gives the logits of the model itself, for x [B, *S]."""
        with torch.no_grad():
            true = _model.forward(model, x.clone()).double()
            self._beta.value = _SHARP
            found = _model.forward(self.model, x.clone()).double()
        self._beta.value = self.settings.at(0.0)
        apart = float((true - found).norm())
        if not apart <= torch.finfo(x.dtype).eps ** 0.5 * (1 + float(true.norm())):
            raise ModelError(
                f"surrogate: with sharp corners its logits differ from the model's by {apart:.1e}: the model writes "
                "into its activations in a way that cannot be copied; pass surrogate=None, or a model of your own"
            )


def corners(model: nn.Module, x: torch.Tensor) -> int:
    """How many functions one forward pass of x [B, *S] calls that `Surrogate` makes smooth."""
    with torch.no_grad(), _Smooth(None) as mode:
        _model.forward(model, x.clone())
    return mode.replaced


class _Beta:
    """One number that all copies of a model share."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict) -> _Beta:
        return self


class _Wrapped(nn.Module):
    """For modules that make a class of their own when they are copied."""

    def __init__(self, model: nn.Module, beta: _Beta) -> None:
        super().__init__()
        self.model = model
        self.beta = beta

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Smooth(self.beta.value):
            return self.model(*args, **kwargs)


def _softened(copy: nn.Module, beta: _Beta) -> nn.Module:
    """The module itself with another class, so that names of layers, and what is copied from it, stay as they are."""
    kind = type(copy)
    if isinstance(copy, fx.GraphModule) or "forward" in vars(copy):
        return _Wrapped(copy, beta).eval()

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Smooth(beta.value):
            return kind.forward(self, *args, **kwargs)

    copy.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return copy

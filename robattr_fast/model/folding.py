"""BatchNorm folded into the convolution or linear layer before it: the same function in fewer passes over memory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from robattr_fast.model.gradient import input_gradient
from robattr_fast.model.private import private_copy

_logger = logging.getLogger("robattr_fast")

# Relative, of logits and gradient, compared in float64: there folding changes them by rounding only, while in float32 a
# ReLU near its kink can switch, which moves the gradient by 1e-3 though both models are right.
_TOLERANCE = 1e-6
_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Subclasses too: a convolution that pads by itself is still linear in its weight and bias.
        leaf = (*_LINEAR, nn.modules.batchnorm._BatchNorm)
        return isinstance(m, leaf) or super().is_leaf_module(m, module_qualified_name)


def _foldable(model: nn.Module) -> list[tuple[str, str]]:
    """(linear layer, BatchNorm) names where the layer's output goes to that BatchNorm and nowhere else."""
    calls = [node for node in _Tracer().trace(model).nodes if node.op == "call_module"]
    uses = Counter(node.target for node in calls)
    modules = dict(model.named_modules())
    pairs = []
    for node in calls:
        before = node.args[0] if node.args else None
        norm = modules[node.target]
        if (
            isinstance(norm, nn.modules.batchnorm._BatchNorm)
            and norm.track_running_stats
            and isinstance(before, fx.Node)
            and before.op == "call_module"
            and isinstance(modules[before.target], _LINEAR)
            and len(before.users) == 1
            and not is_parametrized(modules[before.target])
            and uses[before.target] == uses[node.target] == 1
        ):
            pairs.append((str(before.target), str(node.target)))
    return pairs


def fold_batchnorm(model: nn.Module, batch: torch.Tensor) -> tuple[nn.Module, bool]:
    """The private copy ``model`` with BatchNorm folded where a layer's output goes to it alone.

    Args:
        model: a private copy (`model.private_copy`).
        batch: noisy rows [N, *S], on which the model with and without folding must agree to 1e-6 (relative, L2 norm) in
            logits and in input gradient, both evaluated in float64.

    Returns:
        (folded model, True), or (model, False) with the reason logged.
    """
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return model, False
    try:
        pairs = _foldable(model)
    except Exception as error:  # tracing runs the model's own code on proxies: anything can be raised
        _logger.info("BatchNorm is not folded: the model cannot be traced (%s)", error)
        return model, False
    if not pairs:
        _logger.info("BatchNorm is not folded: none is the only consumer of a convolution or linear layer")
        return model, False
    try:
        exact = _fold(private_copy(model).double(), pairs)
        ours = input_gradient(exact, batch.double(), None)
        theirs = input_gradient(private_copy(model).double(), batch.double(), None)
    except Exception as error:  # whatever a layer that cannot be folded, or not in float64, raises
        _logger.info("BatchNorm is not folded: the models cannot be compared in float64 (%s)", error)
        return model, False
    difference = max(_difference(a, b) for a, b in zip(ours, theirs, strict=True))
    if not difference <= _TOLERANCE:
        _logger.warning("BatchNorm is not folded: it changes the result by %.1e, over %.0e", difference, _TOLERANCE)
        return model, False
    return _fold(private_copy(model), pairs), True


def _fold(model: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    """``model`` itself, with each pair of layers replaced by the layer that does the work of both."""
    for layer_name, norm_name in pairs:
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        fuse: Callable[..., nn.Module] = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        fused = fuse(layer, norm)
        model.set_submodule(layer_name, fused.requires_grad_(False))
        model.set_submodule(norm_name, nn.Identity().eval())
    return model


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    scale = float(b.double().norm())
    return float((a.double() - b.double()).norm()) / (scale or 1.0)

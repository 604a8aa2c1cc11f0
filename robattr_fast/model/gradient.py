"""The user's model made safe to explain: checked, copied, frozen. The user's own is never touched."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from robattr_fast import exported
from robattr_fast.errors import ModelError

# callable(model, batch [N, *S], target [N] or None) -> scores [N, *S]
Explanation = Callable[[nn.Module, torch.Tensor, "torch.Tensor | None"], torch.Tensor]

EXPLANATIONS = ("gradient", "input_x_gradient")

_CALLABLE = "callable:"


def explanation_name(explain: str | Explanation) -> str:
    """What a certificate records; a callable never has the name of a built-in method."""
    if isinstance(explain, str):
        return explain
    module = getattr(explain, "__module__", None) or "?"
    return f"{_CALLABLE}{module}.{getattr(explain, '__qualname__', f'<{type(explain).__name__}>')}"


def is_identified(explanation: str | None) -> bool:
    """Whether the name tells which method it was: lambdas, local functions and callable objects share theirs."""
    return explanation is None or not (explanation.startswith(_CALLABLE) and "<" in explanation)


def private_copy(model: nn.Module, *, frozen: bool = True) -> nn.Module:
    """A copy in eval mode that shares the parameters' memory, detached; buffers are its own.

    ``frozen=False`` leaves gradients to those of its parameters that have them in the user's model.

    A module that torch.export made always says that it is in training mode: of such a one the graph is judged.

    Raises:
        TypeError: not a Module. ModelError: training mode, or a model that cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")
    graphs = exported.graphs(model)
    for name, graph in graphs.items():
        exported.check_mode(name, graph)
    for name, module in model.named_modules():
        if module.training and not exported.contains(graphs, name):
            where = f"its submodule {name!r} ({type(module).__name__}) is" if name else "it is"
            raise ModelError(f"model: {where} in training mode; call model.eval() before explaining it")
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad and not frozen) for p in model.parameters()}
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        raise ModelError(f"model: it cannot be copied ({error}); it is explained on a private copy") from error


_OF_MODULES = vars(nn.Module()).keys()
"""Attributes of every module: containers that are looked into by name, hooks, mode."""


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(_is_plain(item) for item in value)
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the architecture as printed, and of what its modules hold: tensors, and plain Python values.

    Tensors by name, dtype, shape, bytes; numbers, strings and dtypes, also in lists, tuples and dicts, as printed.
    """
    digest = hashlib.sha256(repr(model).encode())
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, fx.GraphModule):  # printed, it names its parts and not what it does with them
            digest.update(module.code.encode())
        plain = {key: value for key, value in vars(module).items() if key not in _OF_MODULES and _is_plain(value)}
        digest.update(f"{name} {sorted(plain.items())}".encode())
        # Plain attributes too: torch.export keeps constants so.
        tensors |= {f"{name}.{key}": value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def input_hash(x: torch.Tensor) -> str:
    """SHA-256 of one image: dtype, shape, bytes."""
    digest = hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode())
    digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def batch_sizes(model: nn.Module) -> tuple[int, int | None]:
    """(least, most) rows that one forward takes, as far as the model tells; most is None where nothing bounds it."""
    ranges = [exported.batch_sizes(graph) for graph in exported.graphs(model).values()]
    most = [high for _, high in ranges if high is not None]
    return max((low for low, _ in ranges), default=1), min(most, default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of torch gave up. That of the CPU raises a plain RuntimeError."""
    words = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


AUTOCAST = ("bfloat16", "float16")
"""Dtypes of torch.autocast."""


def dtype_name(dtype: torch.dtype) -> str:
    """As a certificate records it: "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str | None) -> torch.dtype | None:
    """The inverse of `dtype_name`; None for None."""
    return None if name is None else getattr(torch, name)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """torch.autocast in ``dtype``; None: nothing is changed. No cast is cached: a captured graph would outlive it."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def forward(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Logits [N, classes] of a batch [N, *S]; ModelError says what is wrong with anything else."""
    try:
        logits = model(batch)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        shape = tuple(batch.shape)
        raise ModelError(f"model: its forward failed on a batch of shape {shape}, {batch.dtype}: {error}") from error
    if not isinstance(logits, torch.Tensor):
        raise ModelError(f"model: it returned {type(logits).__name__}, takes a model that returns one tensor of logits")
    if logits.dim() != 2 or logits.shape[0] != batch.shape[0]:
        raise ModelError(f"model: it returned shape {tuple(logits.shape)}, takes logits [{batch.shape[0]}, classes]")
    if not logits.is_floating_point():
        raise ModelError(f"model: it returned dtype {logits.dtype}, takes floating-point logits")
    return logits


def selected_logits(logits: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
    """f_c per sample [N]: c is ``target`` [N], or the largest logit of that very sample where target is None."""
    index = logits.detach().argmax(dim=1) if target is None else target
    return logits.gather(1, index[:, None])[:, 0]


def input_gradient(
    model: nn.Module, batch: torch.Tensor, target: torch.Tensor | None, *, create_graph: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d f_c / d batch [N, *S], logits [N, classes]).

    With ``create_graph`` both carry their graph, to a batch that requires gradients and to the model's parameters.
    """
    leaf = batch if create_graph else batch.detach().requires_grad_()
    with torch.enable_grad():
        logits = forward(model, leaf)
        if not logits.requires_grad:
            raise ModelError("model: its output does not depend on its input (no gradient flows back to it)")
        (gradient,) = torch.autograd.grad(
            selected_logits(logits, target).sum(), leaf, create_graph=create_graph, allow_unused=True
        )
    if gradient is None:
        raise ModelError("model: its output does not depend on its input (no gradient flows back to it)")
    return gradient, logits if create_graph else logits.detach()


def scores(
    model: nn.Module, batch: torch.Tensor, target: torch.Tensor | None, explain: str | Explanation
) -> tuple[torch.Tensor, torch.Tensor]:
    """(attribution scores [N, *S], signed as they come, logits [N, classes]) of a batch by the method ``explain``."""
    if explain == "gradient":
        return input_gradient(model, batch, target)
    if explain == "input_x_gradient":
        gradient, logits = input_gradient(model, batch, target)
        return gradient * batch, logits
    assert callable(explain)
    with torch.no_grad():
        logits = forward(model, batch.clone())  # a model may write into its input
    attribution = explain(model, batch, target if target is not None else logits.argmax(dim=1))
    if not isinstance(attribution, torch.Tensor) or attribution.shape != batch.shape:
        got = tuple(attribution.shape) if isinstance(attribution, torch.Tensor) else type(attribution).__name__
        raise ModelError(
            f"explain: the callable returned {got}, takes scores of the batch's shape {tuple(batch.shape)}"
        )
    return attribution.detach(), logits


def check_fixed(alone: torch.Tensor, mixed: torch.Tensor, half_digits: float) -> None:
    """ModelError unless a sample has the same logits in every row of a batch of its like and beside other samples.

    Logits [N, classes], of which ``alone`` has one sample in all rows, ``mixed`` that sample in the first.
    """
    rows = alone.double()
    allowed = half_digits * float(rows[0].norm())
    among = float((rows - rows[0]).norm(dim=1).max())
    if among > allowed:
        raise ModelError(
            f"model: equal rows of one batch get different logits (by {among:.1e}): it is random, as by dropout "
            "that is active in eval mode (torch.nn.functional.dropout without training=self.training)"
        )
    apart = float((mixed[0].double() - rows[0]).norm())
    if apart > allowed:
        raise ModelError(
            f"model: the logits of an input change (by {apart:.1e}) with the other rows of the batch, or from call to "
            "call: a normalisation by the statistics of the batch, or randomness; takes a fixed function of each row"
        )


def check_repeatable(once: torch.Tensor, again: torch.Tensor, half_digits: float) -> None:
    """ModelError unless a callable gives one sample the same scores twice; NaN is judged later."""
    difference = float((once.double() - again.double()).nan_to_num().norm())
    if difference > half_digits * float(once.double().nan_to_num().norm()):
        raise ModelError(
            f"explain: the callable gives one sample different scores from call to call (by {difference:.1e}); "
            "takes a fixed function of each row"
        )

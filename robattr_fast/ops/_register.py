"""`register`: one call makes an operator of a schema, its definition, its kernels and its derivatives.

What torch.library offers covers backward() and torch.compile. Its autograd kernels know nothing of forward mode: a
tangent would be lost there in silence; and under torch.func.grad they raise. The kernel made here covers all three: it
is one autograd node for plain tensors, and one for each level of torch.func.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from robattr_fast import _extension, backends
from robattr_fast.ops import _schema


def register(
    name: str,
    definition: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., None] | None = None,
    triton: Callable[..., None] | None = None,
    cuda: Callable[..., None] | None = None,
    prepare: Callable[..., tuple] | None = None,
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    jvp: Callable[..., Any] | None = None,
    vmap: Callable[..., tuple[Any, Any]] | None = None,
) -> Callable[..., Any]:
    """Implement the operator ``robattr_fast::name``, whose schema stands in `_schema`, on all devices.

    All functions take the arguments of the schema, in its order, under its names.

    Args:
        name: of the operator.
        definition: returns the results, in plain PyTorch: the reference backend.
        fake: empty results: a tensor or a tuple of tensors. Shapes under torch.compile, and the memory of every run.
        cpu, triton, cuda: kernels; each writes into ``out``, a keyword of its own, what `fake` has made.
        prepare: checks that read values, and what they make of the arguments; before kernels alone.
        setup: ``setup(ctx, inputs, output)``, as in torch.autograd.Function: calls ctx.save_for_backward.
        backward: ``backward(ctx, *grads)``: gradients of the first arguments; those of the others are None. Made of
            differentiable operations. The backends preferred in the forward are preferred in it, whatever its thread.
        jvp: ``jvp(ctx, *tangents)``, a tangent per argument (None: no tensor): one of each result, made as those of
            `backward`. None: where there are tangents the definition runs in place of a kernel.
        vmap: ``vmap(info, in_dims, *args)``, as in torch.library.register_vmap; see `_vmap`.

    Returns:
        The operator.
    """
    operator = getattr(torch.ops.robattr_fast, name).default
    schema = operator._schema.arguments

    def complete(args):
        # The dispatcher leaves out what equals its default.
        return (
            args if len(args) == len(schema) else (*args, *(argument.default_value for argument in schema[len(args) :]))
        )

    def run(*args):
        args = complete(args)
        if prepare is not None:
            args = prepare(*args)
        out = fake(*args)
        backends.call(name, *args, out=out)
        return out

    def defined(*args):
        return definition(**dict(zip((argument.name for argument in schema), complete(args), strict=True)))

    def define(*args, out):
        for result, value in zip(_as_tuple(out), _as_tuple(defined(*args)), strict=True):
            result.copy_(value)

    backends.register(name, "reference", define, _extension.can_run_anywhere)
    if cpu is not None:
        backends.register(name, "cpu", cpu, _extension.can_run_cpu)
    if triton is not None:
        backends.register(name, "triton", triton, _extension.can_run_triton)
    if cuda is not None:
        backends.register(name, "cuda", cuda, _extension.can_run_cuda(name))
    for device in ("CPU", "CUDA"):
        _schema.PUBLIC.impl(name, run, device)
    torch.library.register_fake(f"robattr_fast::{name}", lambda *args: fake(*complete(args)), lib=_schema.PUBLIC)
    if backward is not None:
        kernel = _autograd_kernel(operator, complete, defined, setup, backward, jvp)
        _schema.PUBLIC.impl(name, kernel, "Autograd", with_keyset=True)
    if vmap is not None:
        torch.library.register_vmap(
            f"robattr_fast::{name}", lambda info, dims, *args: vmap(info, dims, *args), lib=_schema.PUBLIC
        )
    return operator


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def _is_dual(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and torch._VF._unpack_dual(x, level=0)[1] is not None


def _forward_mode() -> bool:
    """Whether tensors may have tangents here: at a level of torch.func, or outside of all of them."""
    if not _C._is_fwd_grad_enabled():
        return False
    if not _C._are_functorch_transforms_active():
        return forward_ad._current_level >= 0
    return _C._functorch.peek_interpreter_stack().key() == _C._functorch.TransformType.Jvp


def _order(x: torch.Tensor) -> list[int]:
    """The dimensions of a dense tensor as they lie in memory, the innermost last."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda dim: strides[dim], reverse=True)


def _laid_out(tangent: torch.Tensor, order: list[int]) -> torch.Tensor:
    """As its primal is: torch asks for that where results are views, and copies elsewhere."""
    return tangent.permute(order).contiguous().permute(sorted(range(len(order)), key=order.__getitem__))


class _OfPrimals:
    """The context of a node, its saved tensors without their tangents."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors = tuple(x if x is None else torch._VF._unpack_dual(x, level=0)[0] for x in ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _autograd_kernel(operator, complete, defined, setup, backward, jvp):
    """What runs at the dispatch key Autograd: the operator below it, and a node where something is differentiated."""

    def below(keyset, args):
        with _C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & _C._after_autograd_keyset, *args)

    def save(ctx, args, output):
        ctx.preference = backends.preference()
        setup(ctx, complete(args), output)
        if forward_ad._current_level >= 0 or _C._are_functorch_transforms_active():
            ctx.save_for_forward(*(getattr(ctx, "to_save", None) or ()))
            ctx.orders = [_order(x) for x in _as_tuple(output)]

    def gradients(ctx, *grads):
        with backends.preferring(ctx.preference):
            found = _as_tuple(backward(ctx, *grads))
        # The first argument of a node is the dispatch keys.
        return None, *found, *(None,) * (len(ctx.needs_input_grad) - 1 - len(found))

    def tangents(ctx, _, *given):
        # torch turns forward mode off here, for the levels below this one too.
        with backends.preferring(ctx.preference), forward_ad._set_fwd_grad_enabled(True):
            found = jvp(_OfPrimals(ctx), *complete(given))
        laid_out = [_laid_out(x, order) for x, order in zip(_as_tuple(found), ctx.orders, strict=True)]
        return tuple(laid_out) if isinstance(found, tuple) else laid_out[0]

    def forward(ctx, keyset, *args):
        output = below(keyset, args)
        save(ctx, args, output)
        return output

    def forward_of_level(keyset, *args):
        # A node turns both modes off, and the levels below this one have nodes of their own.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return below(keyset, args)

    name = operator._opname
    derivatives = {"backward": staticmethod(gradients), "jvp": staticmethod(tangents)}
    node: Any = type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), **derivatives})
    level: Any = type(
        name,
        (_SingleLevelFunction,),
        {
            "forward": staticmethod(forward_of_level),
            "setup_context": staticmethod(lambda ctx, inputs, output: save(ctx, inputs[1:], output)),
            **derivatives,
        },
    )

    def kernel(keyset, *args):
        forward_mode = _forward_mode() and any(map(_is_dual, args))
        if forward_mode and jvp is None:
            return defined(*args)
        if not (forward_mode or (torch.is_grad_enabled() and _C._any_requires_grad(*args))):
            return below(keyset, args)
        if _C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return level.apply(keyset, *args)
        return node.apply(keyset, *args)

    return kernel

"""Sides and gates of attention.

Of a spec: batch, heads, positions, width, causal, dtype, order. A unit is one element of q, and a round the output with
its derivatives up to the order, by default the second.

This file is run beside any commit of the package: it takes public names alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import robattr_fast as rf

from .operator_sides import Side, Spec, device_of, timed

Attend = Callable[..., torch.Tensor]


def _attention_given(spec: Spec) -> list[torch.Tensor]:
    """q, k, v, the gradient of the output, the directions of the second derivatives, of one shape."""
    shape = spec["batch"], spec["heads"], spec["positions"], spec["width"]
    generator = torch.Generator().manual_seed(13)
    to = {"device": device_of(spec), "dtype": getattr(torch, spec.get("dtype", "float32"))}
    return [torch.randn(shape, generator=generator).to(**to) for _ in range(7)]


def attention_derivatives(
    attend: Attend, given: list[torch.Tensor], causal: bool, order: int = 2
) -> list[torch.Tensor]:
    """The output of ``attend``, its gradients in q, k and v, and the gradients of those in the gradient, q, k and v."""
    q, k, v, grad = (x.detach().requires_grad_(order > 0) for x in given[:4])
    out = attend(q, k, v, causal=causal)
    if order == 0:
        return [out]
    first = torch.autograd.grad(out, (q, k, v), grad, create_graph=order == 2)
    if order == 1:
        return [x.detach() for x in (out, *first)]
    second = torch.autograd.grad(first, (grad, q, k, v), given[4:])
    return [x.detach() for x in (out, *first, *second)]


def _attention(attend: Attend) -> Callable[[Spec], Side]:
    def make(spec: Spec) -> Side:
        given = _attention_given(spec)
        work = partial(attention_derivatives, attend, given, spec["causal"], spec.get("order", 2))
        work()
        return lambda: timed(work, given[0].numel(), given[0].device)

    return make


def _elu_features(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.elu(x) + 1


def attend_by_pairs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Kernel attention with its [positions, positions] weights, as two einsums."""
    weights = torch.einsum("bhid,bhjd->bhij", _elu_features(q), _elu_features(k))
    if causal:
        weights = weights.tril()
    return torch.einsum("bhij,bhjd->bhid", weights, v) / (weights.sum(-1, keepdim=True) + 1e-6)


def attend_by_sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Kernel attention in linear time, as one writes it in PyTorch."""
    if causal:
        raise NotImplementedError("running sums of matrices take more memory than the pairs")
    a, b = _elu_features(q), _elu_features(k)
    return (a @ (b.mT @ v)) / (a @ b.sum(2).unsqueeze(-1) + 1e-6)


def _attend_by_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Softmax attention, on the one path of PyTorch that has second derivatives."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _attend_by_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Softmax attention by PyTorch's fused kernels, which have no second derivatives."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _attend_by_fla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Causal linear attention of flash-linear-attention, which takes features of [B, N, H, D]."""
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError as error:
        raise NotImplementedError(f"flash-linear-attention does not import: {error}") from error
    a, b = (_elu_features(x).transpose(1, 2) for x in (q, k))
    return chunk_linear_attn(a, b, v.transpose(1, 2), scale=1.0, normalize=True)[0].transpose(1, 2)


def _gate_attention(spec: Spec) -> str:
    """At most twice the error of the definition under autograd in the same dtype, against float64."""
    given = _attention_given({**spec, "batch": 1, "heads": 2, "positions": min(spec["positions"], 200)})
    ours = attention_derivatives(rf.linear_attention, given, spec["causal"])
    plain = attention_derivatives(rf.reference.linear_attention, given, spec["causal"])
    exact = attention_derivatives(rf.reference.linear_attention, [x.double() for x in given], spec["causal"])
    names = ("output", "grad q", "grad k", "grad v", "second grad", "second q", "second k", "second v")
    for name, got, near, known in zip(names, ours, plain, exact, strict=True):
        error, allowed = ((x - known).norm().item() / known.norm().item() for x in (got, near))
        if not error <= 2 * allowed + torch.finfo(given[0].dtype).eps:
            return (
                f"linear_attention: {name} is {error:.1e} off the definition, relative; in plain PyTorch {allowed:.1e}"
            )
    return ""


SIDES: dict[str, Callable[[Spec], Side]] = {
    "attention.ours": _attention(lambda *x, causal: rf.linear_attention(*x, causal=causal)),
    "attention.pairs": _attention(attend_by_pairs),
    "attention.softmax": _attention(_attend_by_softmax),
    "attention.sums": _attention(attend_by_sums),
    "attention.flash": _attention(_attend_by_flash),
    "attention.fla": _attention(_attend_by_fla),
}

GATES: dict[str, Callable[[Spec], str]] = {
    "attention": _gate_attention,
}

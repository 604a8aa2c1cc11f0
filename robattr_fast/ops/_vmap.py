"""Rules of torch.vmap for operators: one call for the whole batch where the operator allows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

Rule = Callable[..., tuple[Any, Any]]


def _batched_first(results: Any) -> tuple[Any, Any]:
    return results, tree_map(lambda _: 0, results)


def rows(name: str) -> Rule:
    """For operators of rows, whose only tensor is the first argument, [..., n]: the batch is one more dimension."""

    def rule(info, in_dims, scores, *rest):
        return _batched_first(getattr(torch.ops.robattr_fast, name)(scores.movedim(in_dims[0], 0), *rest))

    return rule


def folded(name: str, prepare: Callable[..., tuple] | None = None) -> Rule:
    """For operators all of whose tensors, results included, begin with one dimension B of independent entries: the
    batch joins B. ``prepare(info, in_dims, *args)`` gives arguments and dimensions of which that is true."""

    def rule(info, in_dims, *args):
        if prepare is not None:
            args, in_dims = prepare(info, in_dims, *args)
        joined = [
            _joined(x, dim, info.batch_size) if isinstance(x, torch.Tensor) else x
            for x, dim in zip(args, in_dims, strict=True)
        ]
        results = getattr(torch.ops.robattr_fast, name)(*joined)
        return _batched_first(tree_map(lambda result: result.unflatten(0, (info.batch_size, -1)), results))

    return rule


def _joined(x: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def one_by_one(name: str) -> Rule:
    """A call for each entry of the batch."""

    def rule(info, in_dims, *args):
        operator = getattr(torch.ops.robattr_fast, name)
        calls = [
            operator(*(x if dim is None else x.select(dim, index) for x, dim in zip(args, in_dims, strict=True)))
            for index in range(info.batch_size)
        ]
        return _batched_first(torch.stack(calls))

    return rule


def refused(name: str) -> Rule:
    """For operators that write into an argument, which need not have the dimension of the batch."""

    def rule(info, in_dims, *args):
        raise NotImplementedError(
            f"{name}: got a batch of torch.vmap; it writes into its arguments: give it the batch as dimension B instead"
        )

    return rule

"""The size of a signed attribution."""

from __future__ import annotations

import torch
from torch import nn

from robattr_fast.attributions.contract import Target
from robattr_fast.model import Explanation


def magnitude(
    model: nn.Module, x: torch.Tensor, target: Target = None, create_graph: bool = False, *, explain: Explanation
) -> torch.Tensor:
    """|explain(model, x, target)|: what a certificate of a signed map selects from.

    `certify` takes sizes of its named methods, and a callable's scores as they come:
    ``explain=functools.partial(magnitude, explain=integrated_gradients)``.
    """
    settings = {"create_graph": True} if create_graph else {}
    return explain(model, x, target, **settings).abs()  # type: ignore[arg-type]

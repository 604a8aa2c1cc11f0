"""Quantus: an ``explain_func`` for its metrics.

    metric(model=model, x_batch=x, y_batch=y, explain_func=explain_func,
           explain_func_kwargs={"kind": "sparsified", "sigma": 0.2, "samples": 64})

Quantus itself is not needed to import this module.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from robattr_fast.attributions.smoothgrad import smoothgrad


def explain_func(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    *,
    sigma: float,
    samples: int,
    device: str | torch.device | None = None,
    **settings: Any,
) -> np.ndarray:
    """A SmoothGrad map per image, by the calling convention of Quantus.

    Args:
        model: eval-mode torch module that returns logits.
        inputs: [B, C, ...] array or tensor.
        targets: [B] class per image, or None for the largest logit of each noisy copy.
        sigma, samples, settings: see `robattr_fast.smoothgrad`.
        device: where to compute; None: where the model's parameters are.

    Returns:
        [B, C, ...] in the precision of the model.
    """
    parameter = next(model.parameters(), None)
    if device is None:
        device = parameter.device if parameter is not None else "cpu"
    dtype = parameter.dtype if parameter is not None else torch.float32
    x = torch.as_tensor(inputs).to(device=device, dtype=dtype)
    target = None if targets is None else torch.as_tensor(targets).to(device=device, dtype=torch.int64).reshape(-1)
    return smoothgrad(model, x, target=target, sigma=sigma, samples=samples, **settings).cpu().numpy()

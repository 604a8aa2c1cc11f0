"""SmoothGrad in the form that all attributions have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from robattr_fast.attributions.contract import Target, recording
from robattr_fast.attributions.smoothgrad import smoothgrad as _smoothgrad
from robattr_fast.ops import _check
from robattr_fast.sampling.arguments import check_images, check_target

SEED = 0x9E3779B97F4A7C15
"""Not that of `certify`: a map that knew the noise of the samples would void a certificate."""


def smoothgrad(
    model: nn.Module,
    x: torch.Tensor,
    target: Target = None,
    create_graph: bool = False,
    *,
    sigma: float,
    samples: int,
    batch_size: int | str | None = None,
    seed: int = SEED,
    **settings: Any,
) -> torch.Tensor:
    """`robattr_fast.smoothgrad` with the same noise for every image, so that a map is a function of its image alone.

    (There each image has noise of its own, by its index in the batch or its ``image_ids``.) As ``explain=`` of
    `robattr_fast.certify` it must be one, since the rows of a batch are noisy copies of one image; in an attack, images
    may leave the batch.

    Args:
        model, x, target: see `gradient`; with target=None the class is the largest logit of each noisy copy.
        create_graph: as ``differentiable`` there, with what it asks of ``kind`` and ``levels``.
        batch_size: rows of one forward pass; None: 64, without a trial.
        seed: of the noise, another than that of the certificate.
        sigma, samples, settings: as there: kind, tau, gamma, levels, temperature, first_sample, image_ids.

    Returns:
        [B, *S], float32 for half types.
    """
    check_images(x)
    samples = _check.integer("samples", samples, 1, 2**32 - 1)
    ids = settings.pop("image_ids", None)
    classes = check_target(target, x)
    with recording():
        return _smoothgrad(
            model,
            x if x.requires_grad else x.clone(),
            target=None if classes is None else classes.clone(),
            sigma=sigma,
            samples=samples,
            image_ids=[0] * len(x) if ids is None else ids,
            seed=seed,
            batch_size=min(64, samples * len(x)) if batch_size is None else batch_size,
            differentiable=create_graph,
            **settings,
        )

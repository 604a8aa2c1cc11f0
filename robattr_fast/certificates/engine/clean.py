"""What the model says of the images themselves, without noise: the class that noisy copies should have too."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.certificates.certificate.certificate import Certificate
from robattr_fast.errors import ModelError

PREDICTED = "predicted"
"""``target`` that stands for the class of each image itself."""

_Target = int | Sequence[int] | torch.Tensor | None

_logger = logging.getLogger("robattr_fast")

_ELEMENTS = 2**20  # of x, that pass the model at a time


def clean_prediction(
    model: nn.Module, x: torch.Tensor, autocast: torch.dtype | None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Class of each image of x [B, *S] and its softmax probability; -1 and 0 where the logits are not finite.

    Raises ModelError if the model cannot be explained, or one row does not fit into memory.
    """
    private = _model.private_copy(model, quiet=False)  # what its hooks collect is dropped below
    least, most = _model.batch_sizes(private)
    rows = max(least, min(len(x), _ELEMENTS // x[0].numel()), 1)
    rows = rows if most is None else min(rows, most)
    classes: list[int] = []
    scores: list[float] = []
    with torch.autocast(x.device.type, enabled=False), _model.unchanged(model):
        for part in x.detach().split(rows):
            padded = torch.cat([part, part[-1:].expand(max(least - len(part), 0), *part.shape[1:])])
            try:
                with torch.no_grad(), _model.autocast(x.device, autocast):
                    logits = _model.forward(private, padded)[: len(part)].double()
            except Exception as error:
                if not _model.is_out_of_memory(error):
                    raise
                raise ModelError(f"model: it runs out of memory with {rows} rows per batch ({error})") from error
            shares, largest = logits.softmax(1).max(1)
            finite = logits.amax(1).isfinite()  # a class may be masked by -inf
            classes += torch.where(finite, largest, -1).tolist()
            scores += torch.where(finite, shares.clamp(0, 1), 0.0).tolist()
    return tuple(classes), tuple(scores)


def named_target(target: _Target | str) -> _Target:
    """The target as it was given, None for `PREDICTED`. ValueError for another name."""
    if not isinstance(target, str):
        return target
    if target != PREDICTED:
        raise ValueError(f"target: got {target!r}, expected a class, one per image, {PREDICTED!r} or None")
    return None


def as_target(classes: tuple[int, ...]) -> tuple[int, ...]:
    """The classes as targets; ModelError where an image has none."""
    if -1 in classes:
        raise ModelError(
            f"target: got {PREDICTED!r}, but the model gives image {classes.index(-1)} logits that are not finite"
        )
    return classes


def warn_of_disagreement(cert: Certificate) -> None:
    """Log where most noisy copies of an image get another class than the image itself."""
    found = [line for line in cert.disagreements() if line]
    if found:
        rest = f" (and {len(found) - 1} more of {len(cert)} images)" if len(found) > 1 else ""
        _logger.warning("%s%s", found[0], rest)

"""From the user's model to a sampler that may be run."""

from __future__ import annotations

import logging

import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.sampling.map import Map, Stream
from robattr_fast.sampling.sampler import Sampler

_logger = logging.getLogger("robattr_fast")


def prepared(
    model: nn.Module, x: torch.Tensor, map: Map, stream: Stream, *, counted: tuple[int, int] = (0, 0)
) -> Sampler:
    """The sampler of the user's model, on a private copy; ModelError if that cannot be explained.

    x: [B, *S]. ``counted``: as in `Sampler`. Set the batch size before `Sampler.run`.
    """

    def of(private: nn.Module) -> Sampler:
        return Sampler(
            private,
            x,
            sigma=map.sigma,
            target=None if map.target is None else torch.tensor(map.target, device=x.device),
            explain=map.explain,
            seed=stream.seed,
            image_ids=torch.tensor(stream.image_ids, device=x.device),
            autocast=map.autocast,
            counted=counted,
        )

    sampler = of(_model.private_copy(model))
    if _model.has_hooks(model) and not _alike(sampler, of(_model.private_copy(model, quiet=False)), model):
        _logger.info("hooks of the model run as they are: its forward depends on what they collect")
        sampler = of(_model.private_copy(model, quiet=False))
    sampler.prepare()
    return sampler


def _alike(quiet: Sampler, plain: Sampler, model: nn.Module) -> bool:
    """Whether a copy whose hooks collect nothing computes what one with the user's own hooks does."""
    try:
        with _model.unchanged(model):
            _, theirs = plain._logits_of_one_row()
    except Exception:  # of the user's model: the quiet copy says what is wrong
        return True
    try:
        _, ours = quiet._logits_of_one_row()
    except Exception:  # a hook or forward that misses what it shares with others
        return False
    among = torch.ones_like(ours[0], dtype=torch.bool)
    return ours.shape == theirs.shape and _model.apart(ours, theirs, among, quiet._eps(ours))[0] <= quiet._half_digits(
        ours
    )

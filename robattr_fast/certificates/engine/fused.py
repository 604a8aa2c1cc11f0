"""Samples of a small perceptron taken by one operator, `mlp_smoothgrad`, in place of noise, model and counting."""

from __future__ import annotations

import logging

import torch

from robattr_fast.certificates.settings import Settings
from robattr_fast.model import perceptron
from robattr_fast.ops.mlp_smoothgrad import Layers, Noise, add
from robattr_fast.sampling.batch import Segment
from robattr_fast.sampling.sampler import Sampler

LARGEST_BATCH = 8192
"""Samples per call where the batch size is chosen: programs enough to fill any device, 4 n bytes of scores each."""

_logger = logging.getLogger("robattr_fast")


class Fused:
    """Makes, scores and counts samples of the images of a sampler, whose model has these layers."""

    def __init__(self, layers: Layers, settings: Settings, sampler: Sampler) -> None:
        self.layers = layers
        self.settings = settings
        self.sampler = sampler
        self.x = sampler.x.flatten(1)

    def __call__(self, segment: Segment, counts: torch.Tensor, packed: torch.Tensor | None) -> torch.Tensor:
        """Add to counts int32 [1, n, L], fill packed uint8 [1, count, row_bytes].

        Returns the class of each sample, int64 [count], -1 where it is invalid.
        """
        sampler, tau, gamma = self.sampler, self.settings.tau, self.settings.gamma
        assert tau is not None
        one = slice(segment.image, segment.image + 1)
        noise = Noise(sampler.sigma, segment.count, sampler.seed, segment.first_sample, sampler.image_ids[one])
        target = None if sampler.target is None else sampler.target[one]
        return add(counts, self.x[one], self.layers, noise, target, tau, tau if gamma is None else gamma, packed)[0]


def fused_sampling(settings: Settings, sampler: Sampler) -> Fused | None:
    """None unless the sampler's model is a small perceptron and the device has a kernel for it; logged where it is."""
    if settings.explain != "gradient" or settings.channel_sum or settings.autocast or settings.levels is None:
        return None
    layers, reason = perceptron.recognized(sampler.model, sampler.x)
    if layers is None:
        _logger.debug("the model is not a small perceptron: %s", reason)
        return None
    if not perceptron.runs_fused(sampler.x.device):
        return None
    sizes = "-".join(str(size) for size in (sampler.x[0].numel(), *map(len, layers.weights)))
    _logger.info("samples are taken by mlp_smoothgrad: the model is a perceptron %s, %s", sizes, layers.activation)
    return Fused(layers, settings, sampler)

"""`certify`: the loop that turns noisy samples into integer counts, and the counts into a `Certificate`."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import nn

from robattr_fast import backends
from robattr_fast import model as _model
from robattr_fast.certify.certificate import Certificate
from robattr_fast.certify.settings import Settings
from robattr_fast.errors import CertifyInterrupted, NonFiniteError
from robattr_fast.ops import _check, count_sparsified_, sparsify
from robattr_fast.reference.noisy_samples import STREAM_VERSION
from robattr_fast.sampling import Sampler, Scored, Segment, check_image_ids, check_images, check_target

_logger = logging.getLogger("robattr_fast")

_REPORT_SECONDS = 0.5
_FIRST_LOOK, _LOOK_GROWTH = 64, 1.1  # looks grow geometrically, so that they cost a fixed small share of the run


@dataclass(frozen=True)
class StopWhen:
    """End an image's sampling once ``overlap`` (share of the top-k) is certified at ``radius``."""

    k: int
    radius: float
    overlap: float

    def __post_init__(self) -> None:
        _check.positive("radius", self.radius)
        if not 0 < self.overlap <= 1:
            raise ValueError(f"overlap: got {self.overlap}, takes a share in (0, 1]")


@dataclass(frozen=True)
class Progress:
    """What a ``progress`` callable is told: ``samples`` of ``total`` are done for ``image`` of ``images``.

    ``certificate()`` is the certificate so far; asking for it costs time.
    """

    image: int
    images: int
    samples: int
    total: int
    certificate: Callable[[], Certificate]


class _Counts:
    """Integer state of the run, one row per image; equal for any order in which the samples come."""

    def __init__(self, settings: Settings, images: int, classes: int, device: torch.device) -> None:
        self.settings = settings
        shape = (images, settings.n)
        self.counts = self.sums = None
        if settings.levels is None:
            self.sums = torch.zeros(shape, dtype=torch.float64, device=device)
        else:
            self.counts = torch.zeros((*shape, settings.levels), dtype=torch.int32, device=device)
        self.invalid = torch.zeros(images, dtype=torch.int32, device=device)
        self.classes = torch.zeros((images, classes), dtype=torch.int32, device=device)

    def add(self, scored: Scored) -> None:
        """Count the samples of one segment."""
        tau, gamma = self.settings.tau, self.settings.gamma
        assert tau is not None
        image = scored.segment.image
        scores = scored.scores.abs() if self.settings.explain in _model.EXPLANATIONS else scored.scores
        if self.settings.channel_sum:
            scores = scores.sum(dim=1)
        scores = scores.flatten(1)
        bad_logits = ~torch.isfinite(scored.logits).all(dim=1)
        if bool(bad_logits.any()):
            scores = scores.masked_fill(bad_logits[:, None], torch.nan)
        if self.counts is not None:
            invalid = count_sparsified_(self.counts[image : image + 1], scores[None], tau, gamma)
        else:
            assert self.sums is not None
            h = sparsify(scores, tau, gamma, levels=None)
            invalid = h.isnan().any(dim=1).sum(dtype=torch.int32)[None]
            self.sums[image] += h.nan_to_num(nan=0.0).sum(dim=0, dtype=torch.float64)
        votes = scored.logits.argmax(dim=1)
        if int(invalid):
            valid = torch.isfinite(scores).all(dim=1)
            if self.settings.on_nonfinite == "raise":
                sample = scored.segment.first_sample + int((~valid).to(torch.int8).argmax())
                raise NonFiniteError(
                    f"model: sample {sample} of image {image} gave NaN or infinite scores "
                    "(on_nonfinite='zero' or 'abstain' certify such a map, the default 'raise' does not)"
                )
            votes = votes[valid]
            self.invalid[image] += invalid[0]
        self.classes[image] += torch.bincount(votes, minlength=self.classes.shape[1]).to(torch.int32)

    def certificate(self, settings: Settings) -> Certificate:
        """Everything counted so far."""
        assert settings.intervals is not None
        samples = [sum(end - first for first, end in image) for image in settings.intervals]
        return Certificate(
            counts=_copy(self.counts),
            sums=_copy(self.sums),
            samples=torch.tensor(samples, dtype=torch.int64),
            invalid=_copy(self.invalid),
            class_counts=_copy(self.classes),
            settings=settings,
        )

    def restore(self, certificate: Certificate) -> None:
        """Go on from a checkpoint."""
        for name, source in (
            ("counts", certificate.counts),
            ("sums", certificate.sums),
            ("invalid", certificate.invalid),
            ("classes", certificate.class_counts),
        ):
            target = getattr(self, name)
            if target is not None:
                target.copy_(source)


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().cpu().clone()


class _Run:
    """One call of `certify`: which samples are done, when to look, when to save, when to report."""

    def __init__(self, sampler: Sampler, counts: _Counts, settings: Settings, first_sample: int, samples: int) -> None:
        self.sampler, self.counts, self.settings = sampler, counts, settings
        self.first_sample, self.samples = first_sample, samples
        images = sampler.x.shape[0]
        self.done = [0] * images
        self.stopped = [False] * images
        self.next_look = [_FIRST_LOOK] * images

    def certificate(self) -> Certificate:
        intervals = tuple(
            ((self.first_sample, self.first_sample + done),) if done else () for done in self.done
        )
        return self.counts.certificate(self.settings.sampled(intervals, self.sampler.batch_size))

    def work(self) -> Iterator[Segment]:
        """What is left to do, one batch at a time, so that a stop takes effect."""
        for image, done in enumerate(self.done):
            for start in range(done, self.samples, self.sampler.batch_size):
                if self.stopped[image]:
                    break
                count = min(self.sampler.batch_size, self.samples - start)
                yield Segment(image, self.first_sample + start, count)

    def look(self, image: int, stop: StopWhen) -> None:
        """Stop the image if what is wanted is certified; betting bounds hold at any such time."""
        if self.stopped[image] or self.done[image] < self.next_look[image]:
            return
        while self.next_look[image] <= self.done[image]:
            self.next_look[image] = int(self.next_look[image] * _LOOK_GROWTH) + 1
        share = self.certificate()[image].overlap(stop.k, stop.radius).share
        self.stopped[image] = float(share) >= stop.overlap

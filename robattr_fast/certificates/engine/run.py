"""The loop of a run: what is sampled next, when to look, when to save, when to report."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from robattr_fast.certificates.certificate.certificate import Certificate
from robattr_fast.certificates.engine.counting import Counting
from robattr_fast.certificates.engine.interrupt import DeferredInterrupt
from robattr_fast.certificates.engine.plan import FIRST_LOOK, Plan
from robattr_fast.certificates.engine.state import State
from robattr_fast.errors import CertifyInterrupted
from robattr_fast.sampling.batch import Segment, next_batch
from robattr_fast.sampling.sampler import Sampler

_logger = logging.getLogger("robattr_fast")

REPORT_SECONDS, CHECKPOINT_SECONDS = 0.5, 60.0
"""Between two reports of progress, and between two writings of the checkpoint."""


@dataclass(frozen=True)
class Progress:
    """What a ``progress`` callable is told: ``samples`` of ``total`` are done for ``image`` of ``images``.

    ``certificate()`` is that image's certificate so far; asking for it costs time, and is for the callable alone: once
    it has returned, sampling goes on.
    """

    image: int
    images: int
    samples: int
    total: int
    certificate: Callable[[], Certificate]


@dataclass
class Run:
    """One call of `certify`; `finish` takes all samples that are left."""

    sampler: Sampler
    state: State
    counting: Counting
    plan: Plan
    checkpoint: Path | None
    progress: Callable[[Progress], None] | None
    batch_size: int | None
    """Of all samples so far; None if they differ."""
    witness: tuple[torch.Tensor, torch.Tensor] | None = None
    """`Sampler.witness` when the run began: at its end the model must still do the same."""

    def __post_init__(self) -> None:
        self.wanted = [self.plan.next_look(done) for done in self.state.done]
        self._front = 0  # images before this one have all that is wanted of them
        for image in range(len(self.wanted)):
            self._look(image)
        self.last_report = self.last_save = time.monotonic()

    @property
    def recorded_batch_size(self) -> int | None:
        """None where samples were not all taken in batches of one size, or not each in the row of its index."""
        size = self.batch_size
        if size is None or size != self.sampler.batch_size:
            return None
        # A look ends the batch of a single image early.
        return None if self.plan.stop is not None and len(self.wanted) == 1 and FIRST_LOOK % size else size

    def certificate(self, image: int | None = None, *, moments: bool = True) -> Certificate:
        """Of the samples so far, of one image or of all."""
        return self.state.certificate(self.recorded_batch_size, image, moments=moments)

    def finish(self) -> Certificate:
        """Take all samples that are left; CertifyInterrupted after Ctrl-C or SIGTERM."""
        with DeferredInterrupt() as interrupt:
            while segments := self._next_batch():
                for image in self._take(segments):
                    self._look(image)
                self._report(segments[-1].image)
                self._save()
                if interrupt.requested:
                    break
            certificate = self.certificate()
            if any(self.state.done) and self.witness is not None:
                self.sampler.check_witness(self.witness, "when the run began")
            self._save(final=True)
        if interrupt.requested:
            raise CertifyInterrupted(certificate)
        return certificate

    def _next_batch(self) -> list[Segment]:
        done = self.state.done
        while self._front < len(done) and done[self._front] == self.wanted[self._front]:
            self._front += 1
        return next_batch(done, self.wanted, self.plan.first_sample, self.sampler.batch_size, start=self._front)

    def _take(self, segments: Sequence[Segment]) -> Iterator[int]:
        """Sample the segments, as far as memory allows; the image of each once it is counted."""
        first = not any(self.state.done[: self._front + 1])
        for segment in self.counting(segments):
            if first and segment.count <= self.sampler.batch_size:  # more: of several sizes, as memory ended
                self.batch_size = self.sampler.batch_size
            first = False
            yield segment.image

    def _look(self, image: int) -> None:
        """At a scheduled look, stop the image if what is wanted is certified: betting bounds hold at any time."""
        done, stop = self.state.done[image], self.plan.stop
        if stop is None or done not in self.plan.looks or done == self.plan.samples:
            return
        certificate = self.certificate(image, moments=done in self.plan.moment_looks)
        share = certificate.overlap(stop.k, stop.radius).share
        self.wanted[image] = done if float(share) >= stop.overlap else self.plan.next_look(done)

    def _report(self, image: int) -> None:
        done = self.state.done[image]
        now = time.monotonic()
        over = done == self.wanted[image]
        if self.progress is not None and (over or now - self.last_report >= REPORT_SECONDS):
            self.last_report = now
            images, samples = len(self.state.done), self.plan.samples
            self.progress(Progress(image, images, done, samples, lambda: self.certificate(image, moments=False)))

    def _save(self, *, final: bool = False) -> None:
        """Write the checkpoint if it is due. A disk that is full costs the checkpoint, not the run."""
        if self.checkpoint is None or not (final or time.monotonic() - self.last_save >= CHECKPOINT_SECONDS):
            return
        try:
            self.state.save(self.checkpoint, self.recorded_batch_size, final=final)
        except OSError as error:
            _logger.warning("checkpoint: %s cannot be written (%s); the run goes on", self.checkpoint, error)
        self.last_save = time.monotonic()


def print_progress(event: Progress) -> None:
    """One line to stderr."""
    line = f"image {event.image + 1}/{event.images}: {event.samples}/{event.total} samples"
    print(line, file=sys.stderr, flush=True)

"""The integer state of a run: what is kept of the samples, equal for any order in which they come."""

from __future__ import annotations

import dataclasses

import torch

from robattr_fast import model as _model
from robattr_fast.certify.certificate import Certificate
from robattr_fast.certify.settings import Settings
from robattr_fast.errors import NonFiniteError
from robattr_fast.ops.count_sparsified import count_sparsified_
from robattr_fast.ops.sparsify import sparsify
from robattr_fast.sampling import Scored


class State:
    """Counts (or sums, where levels is None), invalid samples and votes of B images, and which samples they hold."""

    def __init__(self, settings: Settings, images: int, classes: int, device: torch.device) -> None:
        self.settings = settings
        self.counts = self.sums = None
        if settings.levels is None:
            self.sums = torch.zeros((images, settings.n), dtype=torch.float64, device=device)
        else:
            self.counts = torch.zeros((images, settings.n, settings.levels), dtype=torch.int32, device=device)
        self.invalid = torch.zeros(images, dtype=torch.int32, device=device)
        self.class_counts = torch.zeros((images, classes), dtype=torch.int32, device=device)
        self.done = [0] * images

    def add(self, scored: Scored, first_sample: int) -> None:
        """Count the samples of one segment, which follow those that its image has."""
        segment = scored.segment
        assert segment.first_sample == first_sample + self.done[segment.image]
        scores = self.scores(scored)
        invalid = self._count(segment.image, scores)
        votes = scored.logits.argmax(dim=1)
        if invalid:
            valid = torch.isfinite(scores).all(dim=1)
            if self.settings.on_nonfinite == "raise":
                sample = segment.first_sample + int((~valid).to(torch.int8).argmax())
                raise NonFiniteError(
                    f"model: sample {sample} of image {segment.image} gave NaN or infinite scores "
                    "(on_nonfinite='zero' or 'abstain' certify such a map, the default 'raise' does not)"
                )
            votes = votes[valid]
            self.invalid[segment.image] += invalid
        self.class_counts[segment.image] += torch.bincount(votes, minlength=self.class_counts.shape[1]).to(torch.int32)
        self.done[segment.image] += segment.count

    def scores(self, scored: Scored) -> torch.Tensor:
        """What is selected from, [count, n]: sizes of gradients, a callable's scores as they are; NaN if no class."""
        scores = scored.scores.abs() if self.settings.explain in _model.EXPLANATIONS else scored.scores
        if self.settings.channel_sum:
            scores = scores.sum(dim=1)
        scores = scores.flatten(1)
        classless = ~torch.isfinite(scored.logits).all(dim=1)
        return scores.masked_fill(classless[:, None], torch.nan) if bool(classless.any()) else scores

    def _count(self, image: int, scores: torch.Tensor) -> int:
        """Add the maps of all rows; the number of invalid ones."""
        tau, gamma = self.settings.tau, self.settings.gamma
        assert tau is not None
        if self.counts is not None:
            return int(count_sparsified_(self.counts[image : image + 1], scores[None], tau, gamma))
        assert self.sums is not None
        h = sparsify(scores, tau, gamma, levels=None)
        self.sums[image] += h.nan_to_num(nan=0.0).sum(dim=0, dtype=torch.float64)
        return int(h.isnan().any(dim=1).sum())

    def certificate(self, first_sample: int, batch_size: int, image: int | None = None) -> Certificate:
        """The certificate of all samples so far, of one image or of all."""
        chosen = slice(None) if image is None else slice(image, image + 1)
        settings = self.settings if image is None else self.settings.select([image])
        done = self.done[chosen]
        intervals = tuple(((first_sample, first_sample + count),) if count else () for count in done)

        def copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[chosen].detach().to("cpu", copy=True)

        return Certificate(
            counts=copied(self.counts),
            sums=copied(self.sums),
            samples=torch.tensor(done, dtype=torch.int64),
            invalid=copied(self.invalid),
            class_counts=copied(self.class_counts),
            settings=dataclasses.replace(settings, intervals=intervals, batch_size=batch_size),
        )

    def restore(self, certificate: Certificate) -> None:
        """Go on from a certificate of the same run."""
        for name in ("counts", "sums", "invalid", "class_counts"):
            mine = getattr(self, name)
            if mine is not None:
                mine.copy_(getattr(certificate, name))
        self.done = certificate.samples.tolist()

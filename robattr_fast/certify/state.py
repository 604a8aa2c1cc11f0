"""The state of a run: what is kept of the samples. Integers, but for sums where levels is None."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import torch

from robattr_fast import model as _model
from robattr_fast.certify import files
from robattr_fast.certify.certificate import Certificate
from robattr_fast.certify.moments import no_summary, summary_row
from robattr_fast.certify.settings import Settings
from robattr_fast.errors import NonFiniteError
from robattr_fast.ops.count_sparsified import count_sparsified_
from robattr_fast.ops.sparsify import sparsify
from robattr_fast.reference._pack_levels import packed_row_bytes
from robattr_fast.sampling import Scored


class State:
    """Counts (or sums, where levels is None), invalid samples and votes of B images, and which samples they hold."""

    def __init__(
        self, settings: Settings, images: int, classes: int, device: torch.device, *, keep_samples: bool = False
    ) -> None:
        self.settings = settings
        self.keep_samples = keep_samples
        self.counts = self.sums = None
        if settings.levels is None:
            self.sums = torch.zeros((images, settings.n), dtype=torch.float64, device=device)
        else:
            self.counts = torch.zeros((images, settings.n, settings.levels), dtype=torch.int32, device=device)
        self.invalid = torch.zeros(images, dtype=torch.int32, device=device)
        self.class_counts = torch.zeros((images, classes), dtype=torch.int32, device=device)
        self.done = [0] * images
        self._sizes = torch.empty(0)
        keeps = settings.retain > 0 and settings.levels is not None
        assert settings.planned_samples is not None
        self.retained = (
            [Retained(settings, planned, device, keep=keep_samples) for planned in settings.planned_samples]
            if keeps
            else []
        )

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
        """What is selected from, [count, n]: sizes of gradients, a callable's scores as they are; NaN if no class.

        Valid until the next call.
        """
        scores = scored.scores
        if self.settings.explain in _model.EXPLANATIONS:
            # One pass for the sizes and for the order of elements, into memory that the next segment uses again.
            if self._sizes.shape != scores.shape or self._sizes.dtype != scores.dtype:
                self._sizes = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
            scores = torch.abs(scores, out=self._sizes)
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
            counts, invalid = self.counts[image : image + 1], 0
            kept = min(len(scores), self.retained[image].missing) if self.retained else 0
            if kept:
                packed = self.retained[image].next_rows(kept)
                invalid = int(count_sparsified_(counts, scores[None, :kept], tau, gamma, packed=packed[None]))
                self.retained[image].written(kept, invalid)
            if kept < len(scores):
                invalid += int(count_sparsified_(counts, scores[None, kept:], tau, gamma))
            return invalid
        assert self.sums is not None
        h = sparsify(scores, tau, gamma, levels=None)
        self.sums[image] += h.nan_to_num(nan=0.0).sum(dim=0, dtype=torch.float64)
        return int(h.isnan().any(dim=1).sum())

    def certificate(
        self, first_sample: int, batch_size: int, image: int | None = None, *, moments: bool = True
    ) -> Certificate:
        """The certificate of all samples so far, of one image or of all; without second moments it is faster made."""
        chosen = slice(None) if image is None else slice(image, image + 1)
        images = range(len(self.done))[chosen]
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
            gram_summary=self._summaries(images) if moments and self.retained else None,
            packed=self._packed(images) if moments and self.retained and self.keep_samples else None,
            settings=dataclasses.replace(settings, intervals=intervals, batch_size=batch_size),
        )

    def _summaries(self, images: Sequence[int]) -> torch.Tensor:
        return torch.stack([self.retained[image].summary() for image in images])

    def _packed(self, images: Sequence[int]) -> torch.Tensor:
        rows = [self.retained[image] for image in images]
        assert self.settings.levels is not None
        row_bytes = packed_row_bytes(self.settings.n, self.settings.levels)
        packed = torch.zeros((len(rows), max(one.filled for one in rows), row_bytes), dtype=torch.uint8)
        for image, one in enumerate(rows):
            if one.packed is not None:
                packed[image, : one.filled] = one.packed[: one.filled]
        return packed

    def save(self, path: str | os.PathLike, first_sample: int, batch_size: int, *, final: bool = False) -> None:
        """Write the certificate so far and, where the retained rows are not complete yet, the rows.

        Second moments of incomplete rows cost time: they are written at the end only.
        """
        certificate = self.certificate(first_sample, batch_size, moments=False)
        tensors = dict(certificate.tensors)
        if self.retained:
            complete = [rows.summary() if final or rows.complete else no_summary(1)[0] for rows in self.retained]
            tensors["gram_summary"] = torch.stack(complete)
            tensors[f"{files.CHECKPOINT}invalid"] = torch.tensor([rows.invalid for rows in self.retained])
            for image, rows in enumerate(self.retained):
                if rows.packed is not None:
                    tensors[f"{files.CHECKPOINT}rows.{image}"] = rows.packed[: rows.filled].cpu()
        files.save(path, tensors, certificate.settings.to_json())

    def restore(self, path: str | os.PathLike) -> None:
        """Go on from what `save` wrote."""
        tensors, _ = files.load(path)
        for name in ("counts", "sums", "invalid", "class_counts"):
            mine = getattr(self, name)
            if mine is not None:
                mine.copy_(tensors[name])
        self.done = tensors["samples"].tolist()
        for image, rows in enumerate(self.retained):
            rows.restore(
                self.done[image],
                int(tensors[f"{files.CHECKPOINT}invalid"][image]),
                tensors["gram_summary"][image],
                tensors.get(f"{files.CHECKPOINT}rows.{image}"),
            )


class Retained:
    """The packed levels of an image's first samples, until there are as many as planned; then their summary alone.

    ``keep``: then the rows too.
    """

    def __init__(self, settings: Settings, planned: int, device: torch.device, *, keep: bool) -> None:
        self.settings = settings
        self.keep = keep
        self.device = device
        self.capacity = min(settings.retain, planned)
        self.filled = self.invalid = 0
        self.packed: torch.Tensor | None = None
        self._summary: torch.Tensor | None = None

    @property
    def missing(self) -> int:
        """How many samples are still to be retained."""
        return self.capacity - self.filled

    @property
    def complete(self) -> bool:
        return self.missing == 0

    def next_rows(self, count: int) -> torch.Tensor:
        """Where the packed levels of the next ``count`` samples go, uint8 [count, row_bytes]; then call `written`."""
        if self.packed is None:
            assert self.settings.levels is not None
            row_bytes = packed_row_bytes(self.settings.n, self.settings.levels)
            self.packed = torch.empty((self.capacity, row_bytes), dtype=torch.uint8, device=self.device)
        return self.packed[self.filled : self.filled + count]

    def written(self, count: int, invalid: int) -> None:
        """The next ``count`` rows are there, ``invalid`` of them of invalid samples."""
        self.filled += count
        self.invalid += invalid
        self._summary = None
        if self.complete:
            self.summary()
            if not self.keep:
                self.packed = None

    def summary(self) -> torch.Tensor:
        """``gram_summary`` float64 [8] of the rows so far."""
        if self._summary is None:
            if self.packed is None:
                return no_summary(1)[0]
            assert self.settings.levels is not None
            self._summary = summary_row(self.packed[: self.filled].cpu(), self.settings.levels, self.invalid)
        return self._summary

    def restore(self, done: int, invalid: int, summary: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Go on from a checkpoint."""
        self.filled, self.invalid = min(done, self.capacity), invalid
        if self.complete:
            self._summary = summary
        elif rows is None and self.filled:
            raise ValueError("checkpoint: it lacks the rows of its samples")
        if self.keep and self.filled and rows is None:
            raise ValueError(
                "checkpoint: it was written without keep_samples; takes a new path, or the arguments of that run"
            )
        if rows is not None and (self.keep or not self.complete):
            self.packed = torch.empty((self.capacity, rows.shape[1]), dtype=torch.uint8, device=self.device)
            self.packed[: self.filled] = rows

"""The state of a run: what is kept of the samples. Integers, but for sums where levels is None."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import torch

from robattr_fast.certificates.certificate import files
from robattr_fast.certificates.certificate.certificate import Certificate
from robattr_fast.certificates.engine.fused import Fused
from robattr_fast.certificates.engine.tally import NONE_INVALID, Sizes, Tally, add_maps, valid_rows
from robattr_fast.certificates.moments.concentration import block_rows, rows_in_blocks
from robattr_fast.certificates.moments.summary import FEWEST_ROWS, Summary, grow_gram, no_summary, summary_of
from robattr_fast.certificates.settings import Settings
from robattr_fast.errors import NonFiniteError
from robattr_fast.reference._pack_levels import packed_row_bytes
from robattr_fast.sampling.sampler import Sampler, Scored, Segment


def _waits(tensor: torch.Tensor) -> bool:
    """Whether to look at a value costs more than the look: the host would wait for the device."""
    return tensor.device.type != "cpu"


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
        self.first_invalid = torch.full((images,), NONE_INVALID, dtype=torch.int64, device=device)
        self.done = [0] * images
        self.sizes = Sizes(settings)
        self._tally: Tally | None = None
        self._tallied = 0  # the image that the tally is of
        keeps = settings.retain > 0 and settings.levels is not None
        assert settings.planned_samples is not None
        self.retained = (
            [Retained(settings, planned, device, keep=keep_samples) for planned in settings.planned_samples]
            if keeps
            else []
        )

    @property
    def maps(self) -> torch.Tensor:
        """Counts, or sums where levels is None."""
        maps = self.sums if self.counts is None else self.counts
        assert maps is not None
        return maps

    def add(self, scored: Scored, first_sample: int) -> None:
        """Count the samples of one segment, which follow those that its image has."""
        segment = scored.segment
        assert segment.first_sample == first_sample + self.done[segment.image]
        scores = self.sizes(scored.scores, scored.logits)
        invalid = self._count(segment.image, scores)
        valid = valid_rows(scores) if _waits(invalid) or bool(invalid) else None
        self._vote(segment, scored.logits.argmax(dim=1), invalid, valid)

    def add_captured(self, segment: Segment, sampler: Sampler, first_sample: int) -> bool:
        """Count samples of one segment by one replay of a step that ends in a `Tally`; False where nothing captures it.

        Those that memory or the batch has no room for are left out.
        """
        assert segment.first_sample == first_sample + self.done[segment.image]
        if self._tallied != segment.image:
            self._settle()
            self._tallied = segment.image

        taken = sampler.replay_through(segment, self._new_tally)
        if taken is None:
            self._settle()
            self._tally = None  # its memory is wanted
            return False
        segment, (invalid,) = taken
        assert self._tally is not None
        row = 0
        while row < segment.count:
            rows, packed = self._next_rows(segment.image, segment.count - row)
            if packed is not None:
                assert self._tally.packed is not None
                packed.copy_(self._tally.packed[row : row + rows])
                self.retained[segment.image].written(rows, invalid[row : row + rows].sum(dtype=torch.int32))
            row += rows
        self.done[segment.image] += segment.count
        return True

    def _new_tally(self, rows: int) -> Tally:
        self._settle()
        self._tally = Tally(self.settings, self.class_counts.shape[1], rows, self.invalid.device)
        return self._tally

    def _settle(self) -> None:
        """Take over what the tally has. Nothing is allocated: memory may just have ended, and this may run again."""
        if self._tally is None:
            return
        one = slice(self._tallied, self._tallied + 1)
        self._tally.move_into(self.maps[one], self.invalid[one], self.class_counts[one], self.first_invalid[one])

    def add_fused(self, segment: Segment, fused: Fused, first_sample: int) -> None:
        """Make, score and count the samples of one segment, which follow those that its image has."""
        image, end = segment.image, segment.first_sample + segment.count
        assert self.counts is not None
        counts = self.counts[image : image + 1]
        while (start := first_sample + self.done[image]) < end:

            def attempt(start: int = start) -> tuple[torch.Tensor, torch.Tensor | None]:
                rows, packed = self._next_rows(image, min(end - start, fused.sampler.batch_size))
                return fused(Segment(image, start, rows), counts, None if packed is None else packed[None]), packed

            classes, packed = fused.sampler.sparing(attempt)
            valid = classes >= 0
            invalid = (~valid).sum(dtype=torch.int32)
            if packed is not None:
                self.retained[image].written(len(classes), invalid)
            self._vote(Segment(image, start, len(classes)), classes.clamp(min=0), invalid, valid)

    def _vote(self, segment: Segment, classes: torch.Tensor, invalid: torch.Tensor, valid: torch.Tensor | None) -> None:
        """The samples of a segment are counted: ``invalid`` (int32 []) of them are not ``valid`` (None: all are)."""
        if valid is None:
            valid = torch.ones(segment.count, dtype=torch.bool, device=classes.device)
        else:
            self.invalid[segment.image] += invalid
            samples = torch.arange(segment.first_sample, segment.first_sample + segment.count, device=valid.device)
            first = torch.where(valid, NONE_INVALID, samples).amin()
            self.first_invalid[segment.image] = torch.minimum(self.first_invalid[segment.image], first)
            if not _waits(invalid):
                self.check()
        self.class_counts[segment.image].index_add_(0, classes, valid.to(torch.int32))
        self.done[segment.image] += segment.count

    def check(self) -> None:
        """NonFiniteError for an invalid sample, unless the settings allow such. Waits for the device."""
        if self.settings.on_nonfinite != "raise":
            return
        self._settle()
        for image, sample in enumerate(self.first_invalid.tolist()):
            if sample != NONE_INVALID:
                raise NonFiniteError(
                    f"model: sample {sample} of image {image} gave NaN or infinite scores "
                    "(on_nonfinite='zero' or 'abstain' certify such a map, the default 'raise' does not)"
                )

    def _count(self, image: int, scores: torch.Tensor) -> torch.Tensor:
        """Add the maps of all rows; the number of invalid ones, int32 [] on the device."""
        invalid = self.invalid.new_zeros(())
        while len(scores):
            rows, packed = self._next_rows(image, len(scores))
            found = add_maps(self.settings, self.maps[image], scores[:rows], packed)
            if packed is not None:
                self.retained[image].written(rows, found)
            invalid, scores = invalid + found, scores[rows:]
        return invalid

    def _next_rows(self, image: int, most: int) -> tuple[int, torch.Tensor | None]:
        """How many samples to count next, and where their packed levels go, uint8 [rows, row_bytes]; None: nowhere.

        Those that are retained are counted together, the others apart from them.
        """
        kept = min(most, self.retained[image].missing) if self.retained else 0
        return (kept, self.retained[image].next_rows(kept)) if kept else (most, None)

    def certificate(
        self, first_sample: int, batch_size: int | None, image: int | None = None, *, moments: bool = True
    ) -> Certificate:
        """The certificate of all samples so far, of one image or of all; without second moments it is faster made."""
        self._settle()
        self.check()
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
            **(self._summaries(images) if moments and self.retained else {}),
            packed=self._packed(images) if moments and self.retained and self.keep_samples else None,
            settings=dataclasses.replace(settings, intervals=intervals, batch_size=batch_size),
        )

    def _summaries(self, images: Sequence[int]) -> dict[str, torch.Tensor]:
        rows, directions = zip(*(self.retained[image].summary().to_tensors() for image in images), strict=True)
        return {"gram_summary": torch.stack(rows), "directions": torch.stack(directions)}

    def _packed(self, images: Sequence[int]) -> torch.Tensor:
        kept = [self.retained[image].rows() for image in images]
        assert self.settings.levels is not None
        row_bytes = packed_row_bytes(self.settings.n, self.settings.levels)
        packed = torch.zeros((len(kept), max(map(len, kept)), row_bytes), dtype=torch.uint8)
        for image, rows in enumerate(kept):
            packed[image, : len(rows)] = rows
        return packed

    def save(self, path: str | os.PathLike, first_sample: int, batch_size: int | None, *, final: bool = False) -> None:
        """Write the certificate so far and the rows of the blocks that are not complete, or are kept.

        Second moments of incomplete blocks cost time: they are written at the end only.
        """
        certificate = self.certificate(first_sample, batch_size, moments=False)
        tensors = dict(certificate.tensors)
        if self.retained:
            if final:
                tensors |= self._summaries(range(len(self.retained)))
            else:
                tensors["gram_summary"] = no_summary(len(self.retained))
            blocks = [rows.finished.to_tensors() for rows in self.retained]
            tensors[f"{files.CHECKPOINT}gram_summary"] = torch.stack([row for row, _ in blocks])
            tensors[f"{files.CHECKPOINT}directions"] = torch.stack([directions for _, directions in blocks])
            tensors[f"{files.CHECKPOINT}invalid"] = torch.tensor([int(rows.invalid) for rows in self.retained])
            for image, rows in enumerate(self.retained):
                if rows.packed is not None:
                    tensors[f"{files.CHECKPOINT}rows.{image}"] = rows.rows().cpu()
        files.save(path, tensors, certificate.settings.to_json())

    def restore(self, path: str | os.PathLike) -> None:
        """Go on from what `save` wrote."""
        tensors, _ = files.load(path)
        if self.retained and f"{files.CHECKPOINT}invalid" not in tensors:
            raise ValueError(f"checkpoint: {path} is a certificate, from which no run can go on; takes a new path")
        for name in ("counts", "sums", "invalid", "class_counts"):
            mine = getattr(self, name)
            if mine is not None:
                mine.copy_(tensors[name])
        self.done = tensors["samples"].tolist()
        for image, rows in enumerate(self.retained):
            rows.restore(
                self.done[image],
                int(tensors[f"{files.CHECKPOINT}invalid"][image]),
                tensors[f"{files.CHECKPOINT}gram_summary"][image],
                tensors[f"{files.CHECKPOINT}directions"][image],
                tensors.get(f"{files.CHECKPOINT}rows.{image}"),
            )


class Retained:
    """The packed levels of one block of an image's samples; of the blocks before it, the summary alone.

    ``keep``: then the rows of all blocks too.
    """

    def __init__(self, settings: Settings, planned: int, device: torch.device, *, keep: bool) -> None:
        self.settings = settings
        self.keep = keep
        self.device = device
        self.block = block_rows(planned, settings.retain)
        self.total = rows_in_blocks(planned, planned, settings.retain) if self.block >= FEWEST_ROWS else 0
        self.packed: torch.Tensor | None = None
        self.finished = summary_of(settings, planned)
        # Of the block that is not complete. Its Gram matrix is that of the rows at the last look; it is not saved.
        self.filled = 0
        self.invalid = torch.zeros((), dtype=torch.int32, device=device)
        self._gram: torch.Tensor | None = None
        self._summary: Summary | None = None

    @property
    def missing(self) -> int:
        """How many samples are still to be retained before the block is complete; 0 if all blocks are."""
        return 0 if self.finished.rows == self.total else self.block - self.filled

    @property
    def _first(self) -> int:
        """Where the block starts in ``packed``."""
        return self.finished.rows if self.keep else 0

    def next_rows(self, count: int) -> torch.Tensor:
        """Where the packed levels of the next ``count`` samples go, uint8 [count, row_bytes]; then call `written`."""
        if self.packed is None:
            self.packed = self._allocate(self._row_bytes)
        return self.packed[self._first + self.filled : self._first + self.filled + count]

    @property
    def _row_bytes(self) -> int:
        assert self.settings.levels is not None
        return packed_row_bytes(self.settings.n, self.settings.levels)

    def _allocate(self, row_bytes: int) -> torch.Tensor:
        return torch.empty((self.total if self.keep else self.block, row_bytes), dtype=torch.uint8, device=self.device)

    def written(self, count: int, invalid: torch.Tensor) -> None:
        """The next ``count`` rows are there, ``invalid`` (int32 []) of them of invalid samples."""
        self.filled += count
        self.invalid = self.invalid + invalid
        self._summary = None
        if self.missing == 0:
            self.finished = self.summary()
            self.filled = 0
            self.invalid = torch.zeros_like(self.invalid)
            self._gram = self._summary = None
            if not self.keep and self.missing == 0:
                self.packed = None

    def rows(self) -> torch.Tensor:
        """The packed rows that are there, uint8 [rows, row_bytes]."""
        if self.packed is None:
            return torch.empty((0, self._row_bytes), dtype=torch.uint8)
        return self.packed[: self._first + self.filled]

    def summary(self) -> Summary:
        """Of the complete blocks; of the first one also while it is not."""
        if self.packed is None or not self.filled or (self.finished.rows and self.missing):
            return self.finished
        if self._summary is None:
            assert self.settings.levels is not None
            rows = self.rows()[self._first :]
            self._gram = grow_gram(self._gram, rows, self.settings.levels)
            self._summary = self.finished.with_block(rows, self._gram, int(self.invalid))
        return self._summary

    def restore(
        self, done: int, invalid: int, summary: torch.Tensor, directions: torch.Tensor, rows: torch.Tensor | None
    ) -> None:
        """Go on from a checkpoint."""
        self.finished = self.finished.restored(summary, directions)
        self.filled = min(done, self.total) - self.finished.rows
        self.invalid.fill_(invalid)
        held = self._first + self.filled
        if self.filled and rows is None:
            raise ValueError("checkpoint: it lacks the rows of its samples")
        if self.keep and held and (rows is None or len(rows) != held):
            raise ValueError(
                "checkpoint: it was written without keep_samples; takes a new path, or the arguments of that run"
            )
        if rows is not None and held:
            self.packed = self._allocate(rows.shape[1])
            self.packed[:held] = rows[-held:]

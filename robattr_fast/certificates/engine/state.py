"""The state of a run: what is kept of the samples. Integers, but for sums where levels is None."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

import torch

from robattr_fast.certificates.certificate import files
from robattr_fast.certificates.certificate.certificate import Certificate
from robattr_fast.certificates.engine.retained import Retained
from robattr_fast.certificates.engine.tally import NONE_INVALID, Sizes, add_maps, valid_rows
from robattr_fast.certificates.moments.summary import no_summary
from robattr_fast.certificates.settings import Settings
from robattr_fast.errors import NonFiniteError
from robattr_fast.reference._pack_levels import packed_row_bytes
from robattr_fast.sampling.batch import Scored, Segment
from robattr_fast.sampling.sampler import Sampler

_NAMED_ROWS = 64  # images whose rows have a tensor each in a checkpoint


def _waits(tensor: torch.Tensor) -> bool:
    """Whether to look at a value costs more than the look: the host would wait for the device."""
    return tensor.device.type != "cpu"


def _nothing() -> None:
    """Nothing is pending."""


_WITNESS = ("witness_scores", "witness_logits")


class State:
    """Counts (or sums, where levels is None), invalid samples and votes of B images, and which samples they hold.

    Image i holds the samples [first_sample, first_sample + done[i]). Whoever counts elsewhere for a while (`Captured`)
    sets ``settle``, which brings what it has into this state; it is called before anything is read.
    """

    def __init__(
        self,
        settings: Settings,
        images: int,
        classes: int,
        device: torch.device,
        *,
        first_sample: int = 0,
        keep_samples: bool = False,
    ) -> None:
        self.settings = settings
        self.first_sample = first_sample
        self.keep_samples = keep_samples
        self.settle: Callable[[], None] = _nothing
        self.counts = self.sums = None
        if settings.levels is None:
            self.sums = torch.zeros((images, settings.n), dtype=torch.float64, device=device)
        else:
            self.counts = torch.zeros((images, settings.n, settings.levels), dtype=torch.int32, device=device)
        self.invalid = torch.zeros(images, dtype=torch.int32, device=device)
        self.class_counts = torch.zeros((images, classes), dtype=torch.int32, device=device)
        self.first_invalid = torch.full((images,), NONE_INVALID, dtype=torch.int64, device=device)
        self.done = [0] * images
        self.witness: tuple[torch.Tensor, torch.Tensor] | None = None
        self.sizes = Sizes(settings)
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

    def next_sample(self, image: int) -> int:
        """The index of the sample that follows those that the image has."""
        return self.first_sample + self.done[image]

    def add(self, scored: Scored) -> None:
        """Count the samples of one segment, which follow those that its image has."""
        segment = scored.segment
        assert segment.first_sample == self.next_sample(segment.image)
        scores = self.sizes(scored.scores, scored.logits)
        invalid = self._count(segment.image, scores)
        valid = valid_rows(scores) if _waits(invalid) or bool(invalid) else None
        self.vote(segment, scored.logits.argmax(dim=1), invalid, valid)

    def vote(self, segment: Segment, classes: torch.Tensor, invalid: torch.Tensor, valid: torch.Tensor | None) -> None:
        """The maps of a segment are counted: ``invalid`` (int32 []) of them are not ``valid`` (None: all are)."""
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
        self.settle()
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
            rows, packed = self.next_rows(image, len(scores))
            found = add_maps(self.settings, self.maps[image], scores[:rows], packed)
            if packed is not None:
                self.retained[image].written(rows, found)
            invalid, scores = invalid + found, scores[rows:]
        return invalid

    def next_rows(self, image: int, most: int) -> tuple[int, torch.Tensor | None]:
        """How many samples to count next, and where their packed levels go, uint8 [rows, row_bytes]; None: nowhere.

        Those that are retained are counted together, the others apart from them.
        """
        kept = min(most, self.retained[image].missing) if self.retained else 0
        return (kept, self.retained[image].next_rows(kept)) if kept else (most, None)

    def certificate(self, batch_size: int | None, image: int | None = None, *, moments: bool = True) -> Certificate:
        """The certificate of all samples so far, of one image or of all; without second moments it is faster made."""
        self.settle()
        self.check()
        chosen = slice(None) if image is None else slice(image, image + 1)
        images = range(len(self.done))[chosen]
        settings = self.settings if image is None else self.settings.select([image])
        done = self.done[chosen]
        first = self.first_sample
        intervals = tuple(((first, first + count),) if count else () for count in done)

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

    def save(self, path: str | os.PathLike, batch_size: int | None, *, final: bool = False) -> None:
        """Write the certificate so far and the rows of the blocks that are not complete, or are kept.

        Second moments of incomplete blocks cost time: they are written at the end only.
        """
        certificate = self.certificate(batch_size, moments=False)
        tensors = dict(certificate.tensors)
        if self.witness is not None:
            for name, tensor in zip(_WITNESS, self.witness, strict=True):
                tensors[f"{files.CHECKPOINT}{name}"] = tensor.cpu()
        if self.retained:
            if final:
                tensors |= self._summaries(range(len(self.retained)))
            else:
                tensors["gram_summary"] = no_summary(len(self.retained))
            blocks = [rows.finished.to_tensors() for rows in self.retained]
            tensors[f"{files.CHECKPOINT}gram_summary"] = torch.stack([row for row, _ in blocks])
            tensors[f"{files.CHECKPOINT}directions"] = torch.stack([directions for _, directions in blocks])
            tensors[f"{files.CHECKPOINT}invalid"] = torch.tensor([int(rows.invalid) for rows in self.retained])
            tensors |= self._unfinished_rows()
        files.save(path, tensors, certificate.settings.to_json())

    def _unfinished_rows(self) -> dict[str, torch.Tensor]:
        """Packed levels by image; of many images in one tensor, for each name takes room in the header of the file."""
        held = {image: rows.rows().cpu() for image, rows in enumerate(self.retained) if rows.packed is not None}
        if len(held) <= _NAMED_ROWS:
            return {f"{files.CHECKPOINT}rows.{image}": rows for image, rows in held.items()}
        counts = torch.zeros(len(self.retained), dtype=torch.int64)
        for image, rows in held.items():
            counts[image] = len(rows)
        return {f"{files.CHECKPOINT}rows": torch.cat(list(held.values())), f"{files.CHECKPOINT}row_counts": counts}

    def restore(self, path: str | os.PathLike, sampler: Sampler) -> None:
        """Go on from what `save` wrote, if the model still does what it did then."""
        tensors, _ = files.load(path)
        before = [tensors.get(f"{files.CHECKPOINT}{name}") for name in _WITNESS]
        if before[0] is not None and before[1] is not None:
            sampler.check_witness((before[0], before[1]), f"when the samples of {path} were taken")
        if self.retained and f"{files.CHECKPOINT}invalid" not in tensors:
            raise ValueError(f"checkpoint: {path} is a certificate, from which no run can go on; takes a new path")
        for name in ("counts", "sums", "invalid", "class_counts"):
            mine = getattr(self, name)
            if mine is not None:
                mine.copy_(tensors[name])
        self.done = tensors["samples"].tolist()
        together = tensors.get(f"{files.CHECKPOINT}rows")
        parts = () if together is None else together.split(tensors[f"{files.CHECKPOINT}row_counts"].tolist())
        for image, rows in enumerate(self.retained):
            rows.restore(
                self.done[image],
                int(tensors[f"{files.CHECKPOINT}invalid"][image]),
                tensors[f"{files.CHECKPOINT}gram_summary"][image],
                tensors[f"{files.CHECKPOINT}directions"][image],
                parts[image] if parts else tensors.get(f"{files.CHECKPOINT}rows.{image}"),
            )

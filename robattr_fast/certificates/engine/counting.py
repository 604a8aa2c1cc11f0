"""Samples taken and counted, batch by batch: eagerly, by a captured step, or by one operator that does it all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from robattr_fast.certificates.engine.fused import Fused
from robattr_fast.certificates.engine.state import State
from robattr_fast.certificates.engine.tally import Tally
from robattr_fast.sampling.batch import Segment
from robattr_fast.sampling.sampler import Sampler


class Counting(Protocol):
    """Takes the samples of one batch, which follow those that the state has, and counts them into it."""

    def __call__(self, segments: Sequence[Segment]) -> Iterator[Segment]:
        """Each segment once it is counted; those that memory has no room for are cut or left out."""


class Eager:
    """The sampler's batches, one operator after the other."""

    def __init__(self, sampler: Sampler, state: State) -> None:
        self.sampler = sampler
        self.state = state

    def __call__(self, segments: Sequence[Segment]) -> Iterator[Segment]:
        for scored in self.sampler.run(segments):
            self.state.add(scored)
            yield scored.segment


class Captured:
    """Batches of one image by a step that goes on to selection and counts (`Tally`), where the device captures such.

    Batches of several images, and what cannot be captured, are counted eagerly.
    """

    def __init__(self, sampler: Sampler, state: State) -> None:
        self.sampler = sampler
        self.state = state
        self._eager = Eager(sampler, state)
        self._tally: Tally | None = None
        self._image = 0  # that the tally is of
        state.settle = self._settle

    def __call__(self, segments: Sequence[Segment]) -> Iterator[Segment]:
        taken = self._replayed(segments[0]) if len(segments) == 1 else None
        if taken is None:
            yield from self._eager(segments)
        else:
            yield taken

    def _replayed(self, segment: Segment) -> Segment | None:
        """The part of the segment that one replay has counted; None where nothing captures it."""
        state = self.state
        assert segment.first_sample == state.next_sample(segment.image)
        if self._image != segment.image:
            self._settle()
            self._image = segment.image
        replayed = self.sampler.replay_through(segment, self._new_tally)
        if replayed is None:
            self._settle()
            self._tally = None  # its memory is wanted
            return None
        segment, (invalid,) = replayed
        assert self._tally is not None
        row = 0
        while row < segment.count:
            rows, packed = state.next_rows(segment.image, segment.count - row)
            if packed is not None:
                assert self._tally.packed is not None
                packed.copy_(self._tally.packed[row : row + rows])
                state.retained[segment.image].written(rows, invalid[row : row + rows].sum(dtype=torch.int32))
            row += rows
        state.done[segment.image] += segment.count
        return segment

    def _new_tally(self, rows: int) -> Tally:
        self._settle()
        state = self.state
        self._tally = Tally(state.settings, state.class_counts.shape[1], rows, state.invalid.device)
        return self._tally

    def _settle(self) -> None:
        """Take over what the tally has. Nothing is allocated: memory may just have ended, and this may run again."""
        if self._tally is None:
            return
        one, state = slice(self._image, self._image + 1), self.state
        self._tally.move_into(state.maps[one], state.invalid[one], state.class_counts[one], state.first_invalid[one])


class FusedCounting:
    """Samples made, scored and counted by one operator (`Fused`)."""

    def __init__(self, fused: Fused, state: State) -> None:
        self.fused = fused
        self.state = state

    def __call__(self, segments: Sequence[Segment]) -> Iterator[Segment]:
        for segment in segments:
            self._count(segment)
            yield segment

    def _count(self, segment: Segment) -> None:
        state, fused = self.state, self.fused
        image, end = segment.image, segment.first_sample + segment.count
        assert state.counts is not None
        counts = state.counts[image : image + 1]
        while (start := state.next_sample(image)) < end:

            def attempt(start: int = start) -> tuple[torch.Tensor, torch.Tensor | None]:
                rows, packed = state.next_rows(image, min(end - start, fused.sampler.batch_size))
                return fused(Segment(image, start, rows), counts, None if packed is None else packed[None]), packed

            classes, packed = fused.sampler.sparing(attempt)
            valid = classes >= 0
            invalid = (~valid).sum(dtype=torch.int32)
            if packed is not None:
                state.retained[image].written(len(classes), invalid)
            state.vote(Segment(image, start, len(classes)), classes.clamp(min=0), invalid, valid)

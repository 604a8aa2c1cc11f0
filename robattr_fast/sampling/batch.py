"""What a batch holds: rows of one image and then of the next, and which samples they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Segment:
    """Rows of a batch that belong to one image: samples [first_sample, first_sample + count)."""

    image: int
    first_sample: int
    count: int


@dataclass(frozen=True)
class Scored:
    """Scores and logits of one segment; the tensors are valid until the next batch."""

    segment: Segment
    scores: torch.Tensor  # [count, *S], signed
    logits: torch.Tensor  # [count, classes]


def next_batch(
    done: Sequence[int], wanted: Sequence[int], first_sample: int, batch_size: int, *, start: int = 0
) -> list[Segment]:
    """The next rows to score, where image i has ``done[i]`` of ``wanted[i]`` samples; empty when all are done.

    ``start``: an image before which all are done.
    """
    segments: list[Segment] = []
    room = batch_size
    for image in range(start, len(done)):
        if count := min(wanted[image] - done[image], room):
            segments.append(Segment(image, first_sample + done[image], count))
            room -= count
        if not room:
            break
    return segments


def by_segment(segments: Sequence[Segment], scores: torch.Tensor, logits: torch.Tensor) -> list[Scored]:
    row = 0
    scored = []
    for segment in segments:
        rows = slice(row, row + segment.count)
        scored.append(Scored(segment, scores[rows], logits[rows]))
        row += segment.count
    return scored


def first_rows(segments: Sequence[Segment], rows: int) -> list[Segment]:
    """The segments cut to ``rows`` rows in all."""
    kept = []
    for segment in segments:
        if count := min(segment.count, rows):
            kept.append(replace(segment, count=count))
            rows -= count
    return kept


def filled(segments: Sequence[Segment], rows: int) -> list[Segment]:
    """The segments with the last one continued to ``rows`` rows in all."""
    last = segments[-1]
    surplus = rows - sum(segment.count for segment in segments)
    return [*segments[:-1], replace(last, count=last.count + surplus)]

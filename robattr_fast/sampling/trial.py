"""The measured trial before a run: how many rows a batch has, and how it goes through the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from robattr_fast.model import dtype_name

_SHARE = 0.01  # of the run's expected time
_TIMINGS, _SHORT_SECONDS = 3, 0.02  # of a batch: so often, unless it has taken so long
_CLEARLY_SLOWER = 1.1  # a way that needs so many times the other's time is dropped

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
"""In which the model gets its batches."""


class Way(NamedTuple):
    """How a batch goes through the model: a name of `MEMORY_FORMATS`, and the dtype of torch.autocast or None."""

    memory_format: str
    autocast: torch.dtype | None

    def __str__(self) -> str:
        formatted = "channels-last" if self.memory_format == "channels_last" else self.memory_format
        return formatted if self.autocast is None else f"{formatted} in {dtype_name(self.autocast)}"


def fastest(
    seconds: Callable[[int, Way], float | None], ways: Sequence[Way], samples: int, *, least: int, largest: int
) -> tuple[int, Way]:
    """The fastest of ``least``, 2 ``least``, 4 ``least``, ... ``largest`` rows and of the ways, for so many samples.

    ``seconds`` of a batch of so many rows; None where it does not fit into memory. Stops once larger batches are worse,
    the trial costs too much, or memory ends. Another precision than that of the first way must be clearly faster: it
    makes another model, which chance should not choose.
    """
    first = ways[0]
    best, best_time, spent, worse = (least, first), float("inf"), 0.0, 0
    size, slower = least, dict.fromkeys(ways, 0)
    while size <= largest:
        timed = {
            way: measured * (1 if way.autocast == first.autocast else _CLEARLY_SLOWER)
            for way in ways
            if (measured := seconds(size, way)) is not None
        }
        if not timed:
            break
        spent += 2 * sum(timed.values())
        way = min(timed, key=lambda way: timed[way])
        shortest = timed[way]
        if shortest / size < 0.98 * best_time:
            best, best_time, worse = (size, way), shortest / size, 0
        else:
            worse += 1
        # Single rows are no measure of larger batches, and one measurement may have been interrupted.
        for way in timed:
            slower[way] += size > 1 and timed[way] >= _CLEARLY_SLOWER * shortest
        ways = [way for way in timed if slower[way] < 2]
        # The next trial costs about four of this one, for each way.
        cost = 4 * shortest * len(ways)
        if worse == 2 or (size >= 4 and spent + cost > _SHARE * samples * best_time):
            break
        size *= 2
    return best


def seconds_of(work: Callable[[], object]) -> float:
    """Of the shortest of a few calls: one interruption would decide the whole run."""
    best, spent = float("inf"), 0.0
    for _ in range(_TIMINGS):
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + seconds
        if spent > _SHORT_SECONDS:
            break
    return best

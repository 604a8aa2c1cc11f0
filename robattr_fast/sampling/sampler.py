"""The loop over samples that everything shares: noise -> model -> scores, in batches of one fixed size.

A batch is filled with rows of one image, and, where that image has too few left, with rows of the next. A ragged last
batch is padded to the fixed size and the surplus dropped: a model may round differently at another batch size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.errors import ModelError
from robattr_fast.model.folding import fold_batchnorm
from robattr_fast.ops import _check
from robattr_fast.ops.noisy_samples import fill
from robattr_fast.sampling.batch import Scored, Segment, by_segment, filled, first_rows
from robattr_fast.sampling.step import Following, Step, can_capture
from robattr_fast.sampling.trial import MEMORY_FORMATS, Way, fastest, seconds_of

_logger = logging.getLogger("robattr_fast")

_FIRST_ROWS = 2  # of the batch that a model is checked on
_LARGEST_BATCH = 1024
_PILOT = 2**32 - 2**20  # first of the samples that only checks and trials see

Follow = Callable[[int], Following]
"""What a captured step goes on to, of so many rows."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class SamplingProgress:
    """What a ``progress`` callable is told: ``samples`` of ``total`` are done for ``image`` of ``images``."""

    image: int
    images: int
    samples: int
    total: int


Work = Callable[[Sequence[Segment], torch.Tensor, "torch.Tensor | None"], _T]


class Sampler:
    """Scores of noisy copies of the images x [B, *S] under a model.

    Args:
        model: a private copy (`model.private_copy`).
        target: int64 [B], or None for the largest logit of each noisy sample.
        seed: 0 <= seed < 2^64.
        image_ids: int64 [B].
        autocast: dtype in which the model runs under torch.autocast; None: as its surroundings have it.
        counted: samples (first, end) of the run: checks and trials use others.

    Set the batch size (and with it the memory format, and autocast where that is to be chosen) before `run`.
    """

    def __init__(
        self,
        model: nn.Module,
        x: torch.Tensor,
        *,
        sigma: float,
        target: torch.Tensor | None,
        explain: str | _model.Explanation,
        seed: int,
        image_ids: torch.Tensor,
        autocast: torch.dtype | None = None,
        counted: tuple[int, int] = (0, 0),
    ) -> None:
        self.model = model
        self.x = x.detach().contiguous()
        self.sigma = sigma
        self.target = target
        self.explain = explain
        self.autocast = autocast
        self.seed = _check.seed(seed)
        self.image_ids = image_ids.to(x.device)
        self.least, self.most = _model.batch_sizes(model)
        self.pilot = _PILOT if counted[1] <= _PILOT else 0  # a run that reaches so far starts in the second half
        self.folded = False
        self.classes = 0
        self.batch_size = self._clamped(_FIRST_ROWS)
        self.memory_format = "contiguous"
        self._buffer = torch.empty(0)
        self._steps: dict[tuple[int, Follow | None], Step] = {}  # by number of images and what follows
        # A callable may do what no graph can repeat.
        self._captures = can_capture(x.device) and isinstance(explain, str)

    def prepare(self) -> int:
        """Fold BatchNorm where that is exact; a model that cannot be explained fails here. Gives ``classes``."""
        alone, first = self.sparing(self._alone_and_mixed)
        classes = alone[1].shape[1]
        if self.target is not None and not bool(((self.target >= 0) & (self.target < classes)).all()):
            raise ValueError(f"target: got {self.target.tolist()}, expected classes in [0, {classes})")
        half_digits = self._half_digits(alone[1])
        if callable(self.explain):
            # Scores are judged by themselves, and blamed on the callable.
            nothing = (alone[0].new_zeros(1, 1),) * 2
            _model.check_fixed((nothing[0], alone[1]), (nothing[1], first[1]), half_digits, self._eps(alone[1]))
            for again in alone[0]:
                _model.check_repeatable(first[0][0], again, self._half_digits(first[0]))
        else:
            _model.check_fixed(alone, first, half_digits, self._eps(alone[1]))
            # A callable may look at the model's layers: it gets them as they are.
            self.model, self.folded = fold_batchnorm(self.model, self._buffer)
        self.classes = classes
        return classes

    def _eps(self, result: torch.Tensor) -> float:
        """Of the coarsest dtype in which the model computes."""
        coarse = self.autocast or self.x.dtype
        return max(torch.finfo(dtype).eps for dtype in (coarse, result.dtype))

    def _half_digits(self, result: torch.Tensor) -> float:
        """Relative: kernels may round differently from call to call, randomness changes the first digit or two."""
        return self._eps(result) ** 0.5

    def _alone_and_mixed(self) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """(scores, logits) of a batch of one pilot sample in every row, and of that sample beside others."""
        return self._logits_of_one_row(), self._scored([self._pilot(self.batch_size)])

    def _logits_of_one_row(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores, logits) of the first pilot sample, in every row of a batch."""
        return self._scored([self._pilot(1)] * self.batch_size)

    def _scored(self, segments: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._run(segments, self.batch_size)
        return torch.cat([one.scores.clone() for one in found]), torch.cat([one.logits.clone() for one in found])

    def behaviour(self, autocast: torch.dtype | None) -> dict[str, Any]:
        """What the model does with a few fixed inputs under ``autocast``, see `model.behaviour`."""
        return self.sparing(
            lambda: _model.behaviour(self.model, self.x, self.explain, autocast, rows=self._clamped(self._few()))
        )

    def _few(self) -> int:
        return min(self.batch_size, _FIRST_ROWS)

    def witness(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores, logits) of a few pilot samples, as the run takes its own. Steps that were captured are dropped."""
        rows = self._clamped(self._few())
        (found,) = self._run([self._pilot(rows)], rows)
        return found.scores.clone(), found.logits.clone()

    def check_witness(self, before: tuple[torch.Tensor, torch.Tensor], since: str) -> None:
        """ModelError if the model now does something else with the pilot samples than `witness` gave."""
        scores, logits = self.sparing(self.witness)
        rows = min(len(scores), len(before[0]))  # memory may have ended in between
        known = before[0][:rows].to(scores.device), before[1][:rows].to(logits.device)
        far, _ = _model.apart(logits[:rows], known[1], _model.competing(known[1]), self._eps(logits))
        same = (logits[:rows].argmax(dim=1) == known[1].argmax(dim=1)).nonzero()[:, 0]
        turned = _model.gradients_apart(scores[:rows][same], known[0][same])
        half_digits = self._half_digits(logits)
        if far > half_digits or turned > max(_model.GRADIENT, 4 * half_digits):
            raise ModelError(
                f"model: it is not the function that it was {since} (logits differ by {far:.1e} of those that compete, "
                f"scores by {turned:.1e}): it changes while it is called, or was changed; expected a fixed function of "
                "each row"
            )

    def _pilot(self, count: int) -> Segment:
        """Samples of the first image that no run counts: what decides between maps must not see those of the map."""
        return Segment(0, self.pilot, count)

    def set_batch_size(
        self,
        batch_size: int | str,
        samples: int,
        memory_format: str | None = None,
        *,
        largest: int = _LARGEST_BATCH,
        autocasts: Sequence[torch.dtype | None] = (),
    ) -> None:
        """Rows per forward pass, and the memory format in which the model gets them.

        Args:
            batch_size: a number, or "auto" for the fastest by a measured trial before ``samples`` samples.
            memory_format: one of `MEMORY_FORMATS`; None: by the same trial, contiguous where the batch size is given.
            largest: batch that the trial considers.
            autocasts: of which ``autocast`` becomes the fastest, by the same trial; none: it stays what it is.
        """
        if memory_format is not None and memory_format not in MEMORY_FORMATS:
            takes = " or ".join(map(repr, MEMORY_FORMATS))
            raise ValueError(f"memory_format: got {memory_format!r}, takes {takes} or None")
        if memory_format == "channels_last" and self.x.dim() != 4:
            raise ValueError(
                f"memory_format: got 'channels_last' for x of shape {tuple(self.x.shape)}, takes [B,C,H,W]"
            )
        self._drop_buffer()  # and steps of another way
        formats = [memory_format] if memory_format else [*MEMORY_FORMATS] if batch_size == "auto" else ["contiguous"]
        ways = [Way(name, dtype) for dtype in autocasts or (self.autocast,) for name in formats]
        if batch_size == "auto":
            least, largest = self.least, self._clamped(min(largest, samples, _LARGEST_BATCH))
        elif isinstance(batch_size, str):
            raise ValueError(f"batch_size: got {batch_size!r}, takes an integer >= 1 or 'auto'")
        else:
            least = largest = _check.integer("batch_size", batch_size, 1, 2**20)
            if self._clamped(least) != least:
                takes = f"at least {self.least}" if self.most is None else f"{self.least} to {self.most}"
                raise ValueError(
                    f"batch_size: got {batch_size}, but the model was exported for batches of {takes} rows"
                )
        usable = self._usable(ways)
        best = (least, usable[0])
        if largest > least or len(usable) > 1:
            best = fastest(self._seconds, usable, samples, least=least, largest=largest)
        self.batch_size, (self.memory_format, self.autocast) = best
        if self.autocast != ways[0].autocast:
            _logger.info("the model runs in %s: that is faster", _model.dtype_name(self.autocast or self.x.dtype))

    def _clamped(self, rows: int) -> int:
        """The number of rows nearest to ``rows`` that the model takes."""
        rows = max(rows, self.least)
        return rows if self.most is None else min(rows, self.most)

    def _usable(self, ways: list[Way]) -> list[Way]:
        """The first way, and those in which the model computes the same but for rounding.

        Channels-last are images of several channels alone; a callable gets what it expects, contiguous rows.
        """
        if self.x.dim() != 4 or self.x.shape[1] == 1 or callable(self.explain):
            ways = [way for way in ways if way.memory_format == ways[0].memory_format]
        if len(ways) == 1:
            return ways
        before = Way(self.memory_format, self.autocast)
        usable: list[Way] = []
        known: tuple[torch.Tensor, torch.Tensor] | None = None
        for way in ways:
            self.memory_format, self.autocast = way
            try:
                alone, mixed = self._alone_and_mixed()
                coarser = way.autocast != ways[0].autocast
                eps, allowed = self._eps(mixed[1]), self._half_digits(mixed[1])
                if known is not None and coarser:
                    _model.check_fixed(alone, mixed, allowed, eps)
                reason = known and _model.other_map(mixed, known, eps=eps, allowed=allowed, coarser=coarser)
            except Exception as error:  # a model may take views that only one format allows, or dtypes
                if not usable:
                    raise
                _logger.info("batches are not %s: the model fails on them (%s)", way, error)
                continue
            finally:
                self.memory_format, self.autocast = before
            if reason is not None:
                _logger.warning("batches are not %s: the model gives other %s for them", way, reason)
                continue
            known = known or mixed
            usable.append(way)
        return usable

    def _seconds(self, size: int, way: Way) -> float | None:
        """Of one batch of this size; None where it does not fit into memory."""
        batch = [self._pilot(size)]
        self.memory_format, self.autocast = way

        def work() -> None:
            self._run(batch, size)
            self._wait()

        try:
            work()  # first touch of this size: allocation, kernel selection
            return seconds_of(work)
        except Exception as error:
            if not _model.is_out_of_memory(error):
                raise
        _logger.info("batches of %d rows do not fit into memory", size)
        return None

    def _wait(self) -> None:
        """Until the device has done what it was told; a CPU always has."""
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)

    def run(self, segments: Sequence[Segment]) -> list[Scored]:
        """Score one batch of at most ``batch_size`` rows; fewer than the segments have where memory ends (`apply`).

        Batches are replays of a CUDA graph where the device has such and the model can be captured.
        """
        replayed = self._replay(segments, None)
        if replayed is None:
            return self.apply(segments, self._score)
        taken, (scores, logits) = replayed
        return by_segment(taken, scores, logits)

    def replay_through(self, segment: Segment, follow: Follow) -> tuple[Segment, tuple[torch.Tensor, ...]] | None:
        """One batch of one image by a captured step that goes on to ``follow(batch_size)``, made once per step.

        The segment, cut to what one batch holds, and the results; None where nothing is captured.
        """
        replayed = self._replay([segment], follow)
        return None if replayed is None else (replayed[0][0], replayed[1])

    def _replay(
        self, segments: Sequence[Segment], follow: Follow | None
    ) -> tuple[list[Segment], tuple[torch.Tensor, ...]] | None:
        """The segments that one batch holds, and what its step gives; None where nothing is captured."""

        def attempt() -> tuple[list[Segment], tuple[torch.Tensor, ...]] | None:
            step = self._captured(1 if len(segments) == 1 else self.batch_size, follow)
            if step is None:
                return None
            taken = first_rows(segments, self.batch_size)
            return taken, step(self.x, self.image_ids, self.target, taken)

        return self.sparing(attempt) if self._captures else None

    def _captured(self, images: int, follow: Follow | None) -> Step | None:
        """The step of batches of so many images; None where the model cannot be captured."""
        self._prepare_buffer(self.batch_size)
        key = (images, follow)
        if key not in self._steps:
            try:
                self._steps[key] = Step(
                    self.model,
                    self._buffer,
                    images,
                    sigma=self.sigma,
                    explain=self.explain,
                    seed=self.seed,
                    targeted=self.target is not None,
                    autocast=self.autocast,
                    following=None if follow is None else follow(self.batch_size),
                    memory=next((step.memory for step in self._steps.values()), None),
                )
            except Exception as error:  # of the model's own code, or of the driver
                if _model.is_out_of_memory(error):
                    raise
                self._captures = False
                self._steps.clear()
                _logger.info("batches run eagerly: the model cannot be captured as a CUDA graph (%s)", error)
                return None
        return self._steps[key]

    def apply(self, segments: Sequence[Segment], work: Work[_T]) -> _T:
        """``work`` on one batch: the segments, their noisy rows [batch_size, *S] and the targets of these.

        The rows past those of the segments fill the batch up. Where memory ends, the batch size is halved from here on,
        and the segments are cut to as many rows as one such batch holds.
        """

        def attempt() -> _T:
            first = first_rows(segments, self.batch_size)
            return work(first, *self._noisy_rows(first, self.batch_size))

        return self.sparing(attempt)

    def sparing(self, work: Callable[[], _T]) -> _T:
        """``work()``, again with half the batch size as long as memory ends; ModelError if it cannot be halved."""
        while True:
            try:
                return work()
            except Exception as error:
                if not _model.is_out_of_memory(error):
                    raise
                if self.batch_size // 2 < self.least:
                    rows = "one row" if self.batch_size == 1 else f"{self.batch_size} rows"
                    raise ModelError(f"model: it runs out of memory with {rows} per batch ({error})") from error
            # Outside of the handler: the error holds on to the frames, and so to the memory, of what failed.
            self._drop_buffer()
            self.batch_size //= 2
            _logger.warning("out of memory: going on with batches of %d rows", self.batch_size)

    def _prepare_buffer(self, batch_size: int) -> None:
        """A buffer of as many rows, in the memory format chosen."""
        memory_format = MEMORY_FORMATS[self.memory_format]
        if self._buffer.shape[:1] != (batch_size,) or not self._buffer.is_contiguous(memory_format=memory_format):
            self._drop_buffer()  # before the new one comes
            shape = (batch_size, *self.x.shape[1:])
            self._buffer = torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=memory_format)

    def _drop_buffer(self) -> None:
        self._buffer = torch.empty(0)
        self._steps.clear()

    def _fill(self, segments: Sequence[Segment], batch_size: int) -> None:
        """Noisy rows, as many as the segments have, into a buffer of just as many."""
        self._prepare_buffer(batch_size)
        row = 0
        for segment in segments:
            i = segment.image
            fill(
                self._buffer[row : row + segment.count].unsqueeze(0),
                self.x[i : i + 1],
                self.sigma,
                seed=self.seed,
                first_sample=segment.first_sample,
                image_ids=self.image_ids[i : i + 1],
            )
            row += segment.count

    def _run(self, segments: Sequence[Segment], batch_size: int) -> list[Scored]:
        return self._score(segments, *self._noisy_rows(segments, batch_size))

    def _noisy_rows(self, segments: Sequence[Segment], batch_size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The segments' rows, the last segment continued to ``batch_size`` rows in all, and their targets."""
        padded = filled(segments, batch_size)
        self._fill(padded, batch_size)
        if self.target is None:
            return self._buffer, None
        # Indexing by a list would wait for the device.
        return self._buffer, torch.cat([self.target[s.image : s.image + 1].expand(s.count) for s in padded])

    def _score(self, segments: Sequence[Segment], batch: torch.Tensor, target: torch.Tensor | None) -> list[Scored]:
        with _model.autocast(self.x.device, self.autocast):
            return by_segment(segments, *_model.scores(self.model, batch, target, self.explain))

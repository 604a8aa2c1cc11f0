"""Noise, forward, explanation and what follows, captured once as a CUDA graph: one launch in place of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from robattr_fast import backends
from robattr_fast import model as _model
from robattr_fast.ops.noisy_samples import fill
from robattr_fast.sampling.batch import Segment

_WARM_UP = 2  # runs before the capture: kernels get compiled, workspaces allocated, algorithms chosen

Work = Callable[[], tuple[torch.Tensor, ...]]

Following = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
"""(scores [N, *S], logits [N, classes], first_sample int64 [1], rows int64 [1]) -> the results of a step of one image.

The first ``rows`` rows are samples from ``first_sample`` on, the others padding. It is called a few times with ``rows``
0, before the capture and in it, and adds nothing then.
"""


class Memory(NamedTuple):
    """Where a graph has its tensors: another one that never runs at the same time may have them there too."""

    pool: Any
    stream: Any
    """Of the capture: the allocator keeps what one stream has freed for that stream."""


def can_capture(device: torch.device) -> bool:
    """Whether work on this device can be captured at all: the reference of the noise reads its sample offset."""
    return device.type == "cuda" and backends.choose("noisy_samples", device, torch.float32)[0] != "reference"


def capture(work: Work, device: torch.device, memory: Memory | None = None) -> tuple[Work, Memory]:
    """``work`` recorded as a CUDA graph: a function that launches the same kernels on the same memory; and its memory.

    The tensors returned are the same each time, overwritten by the next call. What ``work`` does in Python happens now
    and never again. Whatever cannot be captured, as waiting for the device, raises. ``memory``: of another graph.
    """
    with torch.cuda.device(device):
        aside = torch.cuda.Stream() if memory is None else memory.stream
        before = torch.cuda.current_stream()
        aside.wait_stream(before)
        graph = torch.cuda.CUDAGraph()
        try:
            # Around the capture too: one that fails leaves its stream the current one.
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    work()
                _without_waiting(work)
                with torch.cuda.graph(graph, pool=None if memory is None else memory.pool, stream=aside):
                    results = work()
        finally:
            before.wait_stream(aside)

    def replay() -> tuple[torch.Tensor, ...]:
        graph.replay()
        return results

    return replay, Memory(graph.pool(), aside)


def _without_waiting(work: Work) -> None:
    """RuntimeError if work waits for the device: found before the capture, for torch cleans up badly after it."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class Step:
    """A batch of noisy copies, from their noise to scores and logits or on to what ``following`` makes of them.

    The batch is of one image, or each row of an image of its own. What differs between batches (images, their ids and
    classes, samples) is read by the kernels from tensors of this object, which a call writes before the graph is
    replayed.

    Args:
        batch: buffer [N, *S] for the noisy rows, on the device and in the memory format that the model gets.
        images: 1 or N.
        targeted: whether calls give classes; else each noisy sample explains its own largest logit.
        seed: in two's complement.
        autocast: as in `Sampler`.
        following: for 1 image; None: the results are scores [N, *S] and logits [N, classes].
        memory: as for `capture`.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: torch.Tensor,
        images: int,
        *,
        sigma: float,
        explain: str | _model.Explanation,
        seed: int,
        targeted: bool,
        autocast: torch.dtype | None = None,
        following: Following | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.model = model
        self.batch = batch
        self.sigma = sigma
        self.explain = explain
        self.seed = seed
        self.autocast = autocast
        self.following = following

        def integers(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int64, device=batch.device)

        self.images = torch.zeros((images, *batch.shape[1:]), dtype=batch.dtype, device=batch.device)
        self.image_ids = integers(images)
        self.first_sample = integers(images)
        self.rows = integers(1)
        self.target = integers(images) if targeted else None
        self._replay, self.memory = capture(self._work, batch.device, memory)

    def _work(self) -> tuple[torch.Tensor, ...]:
        images, of_each, n = len(self.images), len(self.batch) // len(self.images), self.batch[0].numel()
        shape, strides = (images, of_each, *self.batch.shape[1:]), (of_each * n, n, *self.batch.stride()[1:])
        fill(
            self.batch.as_strided(shape, strides),  # views choose other strides for one sample of each image
            self.images,
            self.sigma,
            seed=self.seed,
            first_sample=0,
            image_ids=self.image_ids,
            sample_offset=self.first_sample,
        )
        target = None if self.target is None else self.target.repeat_interleave(of_each)
        with _model.autocast(self.batch.device, self.autocast):
            scores, logits = _model.scores(self.model, self.batch, target, self.explain)
        if self.following is None:
            return scores, logits
        return self.following(scores, logits, self.first_sample, self.rows)

    def __call__(
        self,
        x: torch.Tensor,
        image_ids: torch.Tensor,
        target: torch.Tensor | None,
        segments: Sequence[Segment],
    ) -> tuple[torch.Tensor, ...]:
        """The results, valid until the next call.

        x [B, *S], image_ids int64 [B] and target int64 [B] lie on the device: nothing waits for it. Each segment fills
        the next rows; where the step has one image there is one segment, of which the first sample is told. Rows past
        the segments are samples of no meaning.
        """
        row = 0
        for segment in segments:
            rows, one = slice(row, row + segment.count), slice(segment.image, segment.image + 1)
            self.images[rows].copy_(x[one])
            self.image_ids[rows].copy_(image_ids[one])
            if self.target is not None:
                assert target is not None
                self.target[rows].copy_(target[one])
            samples = self.first_sample[rows]
            torch.arange(segment.first_sample, segment.first_sample + len(samples), out=samples)
            row += segment.count
        self.rows.fill_(row)
        return self._replay()

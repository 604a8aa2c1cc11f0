"""Noise, forward and explanation of a batch, captured once as a CUDA graph: one launch in place of hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.ops.noisy_samples import fill

_WARM_UP = 3  # runs before the capture: kernels get compiled, workspaces allocated, algorithms chosen

Work = Callable[[], tuple[torch.Tensor, ...]]


def can_capture(device: torch.device) -> bool:
    """Whether work on this device can be captured at all."""
    return device.type == "cuda"


def capture(work: Work, device: torch.device) -> Work:
    """``work`` recorded as a CUDA graph: a function that launches the same kernels on the same memory.

    The tensors returned are the same each time, overwritten by the next call. What ``work`` does in Python happens now
    and never again. Whatever cannot be captured, as waiting for the device, raises.
    """
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = work()

    def replay() -> tuple[torch.Tensor, ...]:
        graph.replay()
        return results

    return replay


class Step:
    """Scores and logits of a batch of noisy copies of one image.

    What differs between batches (the image, its id and class, the first sample) is read by the kernels from tensors of
    this object, which a call writes before the graph is replayed.

    Args:
        batch: buffer [N, *S] for the noisy rows, on the device and in the memory format that the model gets.
        targeted: whether calls give a class; else each noisy sample explains its own largest logit.
        seed: in two's complement.
        autocast: as in `Sampler`.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: torch.Tensor,
        *,
        sigma: float,
        explain: str | _model.Explanation,
        seed: int,
        targeted: bool,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.batch = batch
        self.sigma = sigma
        self.explain = explain
        self.seed = seed
        self.autocast = autocast
        self.image = torch.zeros((1, *batch.shape[1:]), dtype=batch.dtype, device=batch.device)
        self.image_id = torch.zeros(1, dtype=torch.int64, device=batch.device)
        self.first_sample = torch.zeros(1, dtype=torch.int64, device=batch.device)
        self.target = torch.zeros(1, dtype=torch.int64, device=batch.device) if targeted else None
        self._replay = capture(self._work, batch.device)

    def _work(self) -> tuple[torch.Tensor, ...]:
        fill(
            self.batch.unsqueeze(0),
            self.image,
            self.sigma,
            seed=self.seed,
            first_sample=0,
            image_ids=self.image_id,
            sample_offset=self.first_sample,
        )
        target = None if self.target is None else self.target.expand(len(self.batch))
        with _model.autocast(self.batch.device, self.autocast):
            return _model.scores(self.model, self.batch, target, self.explain)

    def __call__(
        self, image: torch.Tensor, image_id: torch.Tensor, first_sample: int, target: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """(scores [N, *S], logits [N, classes]), valid until the next call.

        image [1, *S], image_id int64 [1] and target int64 [1] lie on the device: nothing waits for it.
        """
        self.image.copy_(image)
        self.image_id.copy_(image_id)
        self.first_sample.fill_(first_sample)
        if self.target is not None and target is not None:
            self.target.copy_(target)
        return self._replay()

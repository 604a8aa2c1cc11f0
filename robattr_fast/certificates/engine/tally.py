"""Maps of samples added up: the sizes that are selected from, their counts or sums, their votes."""

from __future__ import annotations

import torch

from robattr_fast import model as _model
from robattr_fast.certificates.settings import Settings
from robattr_fast.errors import ModelError
from robattr_fast.ops.count_sparsified import count_sparsified_
from robattr_fast.ops.sparsify import sparsify
from robattr_fast.reference._pack_levels import packed_row_bytes

NONE_INVALID = 2**63 - 1
"""The first invalid sample where all are valid."""


class Sizes:
    """What is selected from: sizes of gradients, a callable's scores as they are. In memory that is used again."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._buffer = torch.empty(0)

    def __call__(self, scores: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """[count, n] of scores [count, *S] or one per pixel, in the order of elements; valid until the next call.

        NaN if no class.
        """
        if self._buffer.shape != scores.shape or self._buffer.dtype != scores.dtype:
            self._buffer = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
        is_named = self.settings.explain in _model.EXPLANATIONS
        sizes = torch.abs(scores, out=self._buffer) if is_named else self._buffer.copy_(scores)
        if sizes.shape[1:] != self.settings.shape:
            if not self.settings.channel_sum:
                raise ModelError(
                    f"explain: the callable returned one score per pixel, {tuple(scores.shape)}: set channel_sum=True"
                )
            sizes = sizes.sum(dim=1)
        sizes = sizes.flatten(1)
        # One NaN makes a row invalid. Classes masked by -inf leave a row its class, its gradient and its vote.
        sizes[:, 0].masked_fill_(~torch.isfinite(logits.amax(dim=1)), torch.nan)
        return sizes


def valid_rows(scores: torch.Tensor) -> torch.Tensor:
    """Which rows of [count, n] are finite, bool [count]."""
    least, most = torch.aminmax(scores, dim=1)  # NaN is both
    return torch.isfinite(least) & torch.isfinite(most)


def add_maps(
    settings: Settings, into: torch.Tensor, scores: torch.Tensor, packed: torch.Tensor | None = None
) -> torch.Tensor:
    """Add the maps of scores [count, n] to counts int32 [n, L], or to sums float64 [n] where levels is None.

    Levels go to ``packed`` uint8 [count, row_bytes]. Returns the number of invalid rows, int32 [] on the device.
    """
    tau, gamma = settings.tau, settings.gamma
    assert tau is not None
    if settings.levels is not None:
        return count_sparsified_(into[None], scores[None], tau, gamma, packed=None if packed is None else packed[None])[
            0
        ]
    h = sparsify(scores, tau, gamma, levels=None)
    into += h.nan_to_num(nan=0.0).sum(dim=0, dtype=torch.float64)
    return h.isnan().any(dim=1).sum(dtype=torch.int32)


class Tally:
    """What the captured step of a run adds up on its device, of samples of one image (`step.Following`).

    Whoever replays the step reads ``packed`` after each batch, and takes the rest with `State` before it turns to
    another image: sums of many batches cross the memory once.

    Attributes:
        maps: counts int32 [1, n, L], or sums float64 [1, n] where levels is None.
        invalid: int32 [1]. class_counts: int32 [1, classes]. first_invalid: int64 [1].
        packed: uint8 [rows, row_bytes], levels of the last batch; None unless samples are retained.
    """

    def __init__(self, settings: Settings, classes: int, rows: int, device: torch.device) -> None:
        self.settings = settings

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        n, levels = settings.n, settings.levels
        self.maps = zeros(1, n, dtype=torch.float64) if levels is None else zeros(1, n, levels)
        self.invalid = zeros(1)
        self.class_counts = zeros(1, classes)
        self.first_invalid = torch.full((1,), NONE_INVALID, dtype=torch.int64, device=device)
        self.packed: torch.Tensor | None = None
        if settings.retain and levels is not None:
            self.packed = zeros(rows, packed_row_bytes(n, levels), dtype=torch.uint8)
        self._row = torch.arange(rows, device=device)
        self._sizes = Sizes(settings)

    def __call__(
        self, scores: torch.Tensor, logits: torch.Tensor, first_sample: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Add a batch; (whether each row is a sample, and invalid, bool [N],)."""
        sizes = self._sizes(scores, logits)
        is_sample = self._row < rows
        sizes[:, 0].masked_fill_(~is_sample, torch.nan)
        add_maps(self.settings, self.maps[0], sizes, self.packed)
        valid = valid_rows(sizes)
        invalid = is_sample & ~valid
        self.invalid += invalid.sum(dtype=torch.int32)
        samples = torch.where(invalid, first_sample + self._row, NONE_INVALID)
        torch.minimum(self.first_invalid, samples.amin(), out=self.first_invalid)
        self.class_counts[0].index_add_(0, logits.argmax(dim=1), valid.to(torch.int32))
        return (invalid,)

    def move_into(
        self, maps: torch.Tensor, invalid: torch.Tensor, class_counts: torch.Tensor, first_invalid: torch.Tensor
    ) -> None:
        """Add everything to the tensors of an image, of the shapes above, and begin anew. Allocates nothing."""
        for into, mine in ((maps, self.maps), (invalid, self.invalid), (class_counts, self.class_counts)):
            into.add_(mine)
            mine.zero_()
        torch.minimum(first_invalid, self.first_invalid, out=first_invalid)
        self.first_invalid.fill_(NONE_INVALID)

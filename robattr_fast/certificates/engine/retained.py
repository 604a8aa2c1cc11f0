"""Packed levels of the samples of one image, kept block by block for second moments."""

from __future__ import annotations

import torch

from robattr_fast.certificates.moments.concentration import block_rows, rows_in_blocks
from robattr_fast.certificates.moments.summary import FEWEST_ROWS, Summary, grow_gram, summary_of
from robattr_fast.certificates.settings import Settings
from robattr_fast.reference._pack_levels import packed_row_bytes


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

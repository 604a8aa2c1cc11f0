"""How often each element of a sparsified map takes each level: the definition."""

from __future__ import annotations

import torch

from robattr_fast.reference.sparsify import sparsify_levels


def count_sparsified_(
    counts: torch.Tensor, scores: torch.Tensor, tau: float, gamma: float | None = None
) -> torch.Tensor:
    """counts int32 [B, n, L] += one per sample whose level at the element is l+1; returns invalid int32 [B].

    scores [B, q, n]; the level of an element in a sample is L times its `sparsify(levels=L)`. Level 0 is not counted:
    it is the number of valid samples less the sum over l. Samples with NaN or inf are invalid and change no count.
    """
    level, valid = sparsify_levels(scores, tau, gamma, counts.shape[2])
    for index in range(counts.shape[2]):
        counts[:, :, index] += ((level == index + 1) & valid).sum(dim=1)
    return (~valid).sum(dim=(1, 2), dtype=torch.int32)

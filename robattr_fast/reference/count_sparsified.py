"""How often each element of a sparsified map takes each level: the definition."""

from __future__ import annotations

import torch

from robattr_fast.reference._pack_levels import pack_levels
from robattr_fast.reference.sparsify import sparsify_levels


def count_sparsified_(
    counts: torch.Tensor,
    scores: torch.Tensor,
    tau: float,
    gamma: float | None = None,
    *,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """counts int32 [B, n, L] += one per sample whose level at the element is l+1; returns invalid int32 [B].

    scores [B, q, n]; the level of an element in a sample is L times its `sparsify(levels=L)`. Level 0 is not counted:
    it is the number of valid samples less the sum over l. Samples with NaN or inf are invalid and change no count.
    packed uint8 [B, q, row_bytes] becomes `pack_levels` of all levels, of invalid samples zeros.
    """
    num_levels = counts.shape[2]
    level, valid = sparsify_levels(scores, tau, gamma, num_levels)
    level = torch.where(valid, level, 0)
    for index in range(num_levels):
        counts[:, :, index] += (level == index + 1).sum(dim=1)
    if packed is not None:
        packed.copy_(pack_levels(level.to(torch.uint8), num_levels))
    return (~valid).sum(dim=(1, 2), dtype=torch.int32)

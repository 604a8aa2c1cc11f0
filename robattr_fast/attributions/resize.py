"""Maps of a layer or of tokens at the size of the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

RESIZES = ("linear", "nearest", None)
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}  # by number of spatial dimensions


def check_resize(resize: str | None) -> None:
    if resize not in RESIZES:
        raise ValueError(f"resize: got {resize!r}, expected 'linear', 'nearest' or None")


def resized(maps: torch.Tensor, size: Sequence[int], resize: str | None) -> torch.Tensor:
    """maps [B, *s] of one to three spatial dimensions at ``size``, corners not aligned; None: as they are."""
    if resize is None or maps.shape[1:] == torch.Size(size):
        return maps
    mode = "nearest" if resize == "nearest" else _LINEAR[len(size)]
    return F.interpolate(maps[:, None], tuple(size), mode=mode)[:, 0]

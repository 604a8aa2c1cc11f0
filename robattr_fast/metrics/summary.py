"""All metrics of pairs of maps at once, averaged over images."""

from __future__ import annotations

import math
from typing import NamedTuple

import scipy.special
import torch

from robattr_fast.metrics.arguments import check_pair
from robattr_fast.metrics.centre import centre_shift
from robattr_fast.metrics.overlap import overlap
from robattr_fast.metrics.rank import kendall, spearman
from robattr_fast.metrics.similarity import cosine, sensitivity, ssim

_WINDOW = 7
_CONFIDENCE = 0.95


class Statistic(NamedTuple):
    """A mean over images, of those that have a value."""

    mean: float
    """NaN where no image has a value."""
    interval: float
    """Half the width of Student's 95 % interval of the mean; NaN for fewer than two values."""
    images: int
    """Images with a value."""
    nan: int
    """Images without: a map was constant or not finite."""

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.interval:.3f} ({self.images} images{f', {self.nan} NaN' if self.nan else ''})"


def statistic(values: torch.Tensor) -> Statistic:
    """Of one value per image [B]; NaN is counted and left out of the mean."""
    known = values.detach().double().flatten()
    known = known[~known.isnan()]
    count = len(known)
    spread = math.nan
    if count > 1:
        quantile = float(scipy.special.stdtrit(count - 1, (1 + _CONFIDENCE) / 2))
        spread = quantile * float(known.std()) / math.sqrt(count)
    return Statistic(float(known.mean()) if count else math.nan, spread, count, values.numel() - count)


def summary(before: torch.Tensor, after: torch.Tensor, k: int) -> dict[str, Statistic]:
    """Overlap of the top-k, cosine, spearman, kendall, ssim, centre_shift and sensitivity of maps [B, *M].

    Maps are compared as they are: take absolute values, or sum over channels, before. ``ssim`` is left out for maps
    that are no images [B, H, W] or [B, C, H, W] of at least 7 x 7.

    Args:
        before, after: maps of the same images.
        k: number of elements in a top-k set.

    Returns:
        Name of the metric -> mean over images, its 95 % interval, and how many images have a value and how many none.
    """
    check_pair(before, after)
    values = {
        "overlap": overlap(before, after, k),
        "cosine": cosine(before, after),
        "spearman": spearman(before, after),
        "kendall": kendall(before, after),
        "centre_shift": centre_shift(before, after),
        "sensitivity": sensitivity(before, after),
    }
    if before.dim() in (3, 4) and min(before.shape[-2:]) >= _WINDOW:
        values["ssim"] = ssim(before, after, window=_WINDOW)
    return {name: statistic(value) for name, value in values.items()}

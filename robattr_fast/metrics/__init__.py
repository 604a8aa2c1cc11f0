"""How alike two maps are: batches [B, *M] in, one float64 per image out. A constant or non-finite map gives NaN."""

from robattr_fast.metrics.centre import centre, centre_shift
from robattr_fast.metrics.deletion import Deletion, deletion, top_masks
from robattr_fast.metrics.overlap import overlap
from robattr_fast.metrics.pixels import CertifiedShares, certified_shares, grid_regions, image_grid, localization
from robattr_fast.metrics.rank import average_ranks, kendall, spearman
from robattr_fast.metrics.similarity import cosine, sensitivity, ssim
from robattr_fast.metrics.summary import Statistic, statistic, summary

__all__ = [
    "CertifiedShares",
    "Deletion",
    "Statistic",
    "average_ranks",
    "centre",
    "centre_shift",
    "certified_shares",
    "cosine",
    "deletion",
    "grid_regions",
    "image_grid",
    "kendall",
    "localization",
    "overlap",
    "sensitivity",
    "spearman",
    "ssim",
    "statistic",
    "summary",
    "top_masks",
]

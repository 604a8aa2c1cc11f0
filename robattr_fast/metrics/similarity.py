"""How alike two maps are, by their values: cosine, structural similarity, relative distance."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from robattr_fast.metrics.arguments import both_vary, check_maps, check_pair, float64_rows, varies, where_known
from robattr_fast.ops import _check


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows [B, n] of norm 1; NaN for zeros."""
    # Scaled first: squares of small gradients vanish even in float64.
    rows = rows / rows.detach().abs().amax(dim=1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True)


def correlation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Pearson's, of float64 rows [B, n]."""
    x, y = (_unit(rows - rows.mean(dim=1, keepdim=True)) for rows in (x, y))
    return (x * y).sum(dim=1).clamp(-1, 1)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a . b / (|a| |b|) of maps [B, *M], float64 [B] in [-1, 1]: torch.nn.functional.cosine_similarity of flat maps.

    A similarity, where Quantus returns 1 minus it. Differentiable. NaN where a map is constant or not finite.
    """
    check_pair(a, b)
    known = both_vary(a, b)
    x, y = (_unit(float64_rows(maps, known).flatten(1)) for maps in (a, b))
    return where_known((x * y).sum(dim=1).clamp(-1, 1), known)


def ssim(a: torch.Tensor, b: torch.Tensor, *, window: int = 7, data_range: float | None = None) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of maps [B, H, W] or [B, C, H, W], float64 [B]; C is averaged.

    Equal to skimage.metrics.structural_similarity with its defaults (uniform window, K1 = .01, K2 = .03, sample
    covariance, windows that lie inside alone), and to Quantus, which calls it. Gaussian windows, as torchmetrics has
    them by default, give other numbers.

    Args:
        a, b: maps.
        window: side of the windows, odd, in 3..min(H, W).
        data_range: of the values that were possible; None: of each pair, from the least of both maps to the largest.

    Differentiable. NaN where a map is constant or not finite.
    """
    check_pair(a, b)
    if a.dim() not in (3, 4):
        raise ValueError(f"a, b: got shape {tuple(a.shape)}, expected [B, H, W] or [B, C, H, W]")
    window = _check.integer("window", window, 3, min(a.shape[-2:]))
    if window % 2 == 0:
        raise ValueError(f"window: got {window}, expected an odd number")
    known = both_vary(a, b)
    x, y = (float64_rows(maps, known).view(len(maps), -1, *maps.shape[-2:]) for maps in (a, b))
    least = torch.minimum(x.detach().flatten(1).amin(dim=1), y.detach().flatten(1).amin(dim=1))
    most = torch.maximum(x.detach().flatten(1).amax(dim=1), y.detach().flatten(1).amax(dim=1))
    span = most - least if data_range is None else torch.full_like(most, _check.positive("data_range", data_range))
    c1, c2 = ((k * span[:, None, None, None]).square() for k in (0.01, 0.03))
    unbiased = window**2 / (window**2 - 1)

    def mean(maps: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(maps, window, stride=1)

    mean_x, mean_y = mean(x), mean(y)
    var_x = unbiased * (mean(x * x) - mean_x * mean_x)
    var_y = unbiased * (mean(y * y) - mean_y * mean_y)
    covariance = unbiased * (mean(x * y) - mean_x * mean_y)
    value = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    value = value / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
    return where_known(value.flatten(1).mean(dim=1), known)


def sensitivity(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """max over S of |after - before| / |before|, float64 [B]: how far a map moves, relative to its own norm.

    captum.metrics.sensitivity_max, given the maps of its perturbed inputs; but a map of zeros is divided by 1 there,
    and its perturbations are random: the largest of a few random ones is far below what an adversary reaches.

    Args:
        before: maps [B, *M].
        after: maps of S perturbed inputs [S, B, *M], or of one, [B, *M].

    NaN where ``before`` is constant, or a map not finite.
    """
    check_maps("before", before)
    check_maps("after", after)
    several = after if after.dim() > before.dim() else after[None]
    if several.shape[1:] != before.shape:
        raise ValueError(f"after: got shape {tuple(after.shape)}, expected {tuple(before.shape)}, or S of these")
    finite = torch.isfinite(several.detach().flatten(2)).all(dim=2).all(dim=0)
    known = varies(before) & finite
    x = float64_rows(before, known).flatten(1)
    scale = x.detach().abs().amax(dim=1, keepdim=True)
    moved = torch.stack([float64_rows(maps, known).flatten(1) - x for maps in several])
    value = (moved / scale).norm(dim=2).amax(dim=0) / (x / scale).norm(dim=1)
    return where_known(value, known)

"""How much two maps agree on their largest elements."""

from __future__ import annotations

import numbers

import torch
from torch.nn import functional as F

from robattr_fast.metrics.arguments import both_vary, check_pair, where_known
from robattr_fast.ops import _check
from robattr_fast.reference._select import selected


def set_size(k: float, n: int, most: int, name: str = "k") -> int:
    """The number of elements in a top-k set of ``n``: an integer counts them, a float in (0, 1) is their share.

    So 1 is one element, and 1.0 is refused. A share is rounded down as tau is (`sparsify`), to one element at least.

    Raises:
        TypeError: no number, or a float of 1 or more. ValueError: a count outside of 1..most, a share outside of (0, 1)
        or of more than ``most`` elements.
    """
    if not isinstance(k, numbers.Real) or isinstance(k, (bool, numbers.Integral)):
        return _check.integer(name, k, 1, most)  # type: ignore[arg-type]
    if k >= 1:
        raise TypeError(f"{name}: got {k!r}, expected an integer (a number of elements) or a share in (0, 1)")
    if not 0 < k < 1:
        raise ValueError(f"{name}: got {k!r}, expected an integer (a number of elements) or a share in (0, 1)")
    if (size := selected(float(k), n)) > most:
        raise ValueError(f"{name}: got {k!r}, expected a share of at most {most} of {n} elements")
    return size


def top_k(values: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the k largest of the last dimension, bool [..., n]; ties go to the lowest index."""
    order = values.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, True)


def overlap(a: torch.Tensor, b: torch.Tensor, k: float, *, window: int = 0) -> torch.Tensor:
    """|top-k(a) & top-k(b)| / k of two batches of maps [B, *M], float64 [B]; ties go to the lowest index.

    The measure R(x, x~, K) of Levine et al. 2019, and what `Certificate.overlap` bounds from below (with window=0).

    Args:
        a, b: maps.
        k: size of a top-k set: a number of elements in 1..n, or a float in (0, 1), their share.
        window: count near misses too (Kamath et al. 2024): an element of the top-k of ``a`` is found again where one of
            ``b`` is at most so many rows and so many columns away. Rows and columns are the last two dimensions of
            [B, ..., H, W]; in maps [B, N] neighbours are counted along N. With window > 0, a and b are not symmetric.

    NaN where a map is constant or not finite.
    """
    check_pair(a, b)
    k = set_size(k, a[0].numel(), a[0].numel())
    window = _check.integer("window", window, 0, max(a.shape))
    mine, theirs = (top_k(maps.detach().flatten(1), k) for maps in (a, b))
    if window:
        theirs = _widened(theirs.view(b.shape), window).flatten(1)
    return where_known((mine & theirs).sum(dim=1).double() / k, both_vary(a, b))


def _widened(mask: torch.Tensor, window: int) -> torch.Tensor:
    """True within ``window`` rows and columns of a True of mask [B, N] or [B, ..., H, W]."""
    rows = mask.flatten(0, -3) if mask.dim() > 2 else mask[:, None]
    reach = (2 * window + 1, 2 * window + 1) if mask.dim() > 2 else (1, 2 * window + 1)
    found = F.max_pool2d(rows[:, None].float(), reach, stride=1, padding=tuple(side // 2 for side in reach))
    return found.view(mask.shape) > 0

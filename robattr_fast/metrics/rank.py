"""How alike two maps are, by the order of their elements: Spearman's rho and Kendall's tau-b."""

from __future__ import annotations

import torch

from robattr_fast.metrics.arguments import both_vary, check_pair, where_known
from robattr_fast.metrics.similarity import correlation


def average_ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks 1..n in the last dimension, float64 [..., n]; equal values share the mean of theirs. NaN is unspecified."""
    ordered, order = values.sort(dim=-1)
    place = torch.arange(1, values.shape[-1] + 1, device=values.device).expand_as(order)
    edge = ordered[..., 1:] != ordered[..., :-1]
    outside = torch.ones_like(edge[..., :1])
    # Of each run of equal values the first and the last place.
    first = place.where(torch.cat([outside, edge], dim=-1), 0).cummax(dim=-1).values
    last = place.where(torch.cat([edge, outside], dim=-1), values.shape[-1]).flip(-1).cummin(dim=-1).values.flip(-1)
    ranks = torch.empty(values.shape, dtype=torch.float64, device=values.device)
    return ranks.scatter_(-1, order, (first + last).double() / 2)


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of the average ranks of maps [B, *M], float64 [B]: scipy.stats.spearmanr of each pair.

    (OpenXAI takes dense ranks of absolute values instead, which differ where values are equal.) NaN where a map is
    constant or not finite.
    """
    check_pair(a, b)
    value = correlation(*(average_ranks(maps.detach().flatten(1)) for maps in (a, b)))
    return where_known(value, both_vary(a, b))


def kendall(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Kendall's tau-b of maps [B, *M], float64 [B]: scipy.stats.kendalltau of each pair, which computes it.

    Pairs that are equal in one of the maps count in neither direction and shorten the scale, as there are many where a
    map has zeros. O(n log n), on the CPU. NaN where a map is constant or not finite.
    """
    import scipy.stats  # takes as long to import as all of torch

    check_pair(a, b)
    value = torch.full((len(a),), torch.nan, dtype=torch.float64)
    for image in both_vary(a, b).nonzero().flatten().tolist():
        # Half types have no numpy counterpart, or no order of its own there.
        x, y = (maps[image].detach().flatten().double().cpu().numpy() for maps in (a, b))
        value[image] = scipy.stats.kendalltau(x, y).statistic
    return value.to(a.device)

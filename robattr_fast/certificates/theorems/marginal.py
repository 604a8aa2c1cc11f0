"""Overlap and pixel certificates from the marginals alone (T1 - T5), in closed form for all radii.

Phi^-1 of a Gaussian-smoothed value in [0, 1] moves by at most radius/sigma (T1). So a statement of the form
"Phi(Phi^-1(a) - 2 radius/sigma) > b" holds exactly below the radius

    gap(a, b) = sigma/2 (Phi^-1(a) - Phi^-1(b)),

and the certified overlap as a function of the radius is a staircase: `*_gaps` return the radii at which it falls.
Source: Levine, Singla, Feizi, Certifiably robust interpretation in deep learning, 2019, with the index corrected.
"""

import math

import torch
from torch.special import ndtri


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..{n} for a map of {n} elements, got {k}")


def _gaps(stays: torch.Tensor, enters: torch.Tensor, sigma: float) -> torch.Tensor:
    """gap(stays, enters), float64 [..., k], forced to fall along the last dimension.

    `enters` may be -inf: no such element exists, hence no radius is too large. Values of 0 and 1 do not move at all:
    Phi^-1 is infinite there, and equal infinities make the strict inequality false.
    """
    high, low = ndtri(stays), torch.where(enters == -math.inf, -math.inf, ndtri(enters.clamp_min(0)))
    gaps = (sigma / 2) * (high - low)
    gaps = torch.where((high == low) | (high == -math.inf), -math.inf, gaps)
    return torch.where(enters == -math.inf, math.inf, gaps).cummin(-1).values


def population_gaps(values: torch.Tensor, k: int, sigma: float) -> torch.Tensor:
    """T2. Radii below which the top-k sets of the smoothed map and any perturbed one share at least i = 1..k elements.

    values: the exact smoothed map, float64 [B, n]. Returns float64 [B, k], falling in i. The i-th of the map must
    stay above the (2k - i + 1)-th; given the marginals alone no larger radius is true.
    """
    _check_k(k, values.shape[1])
    ranked = values.double().sort(dim=1, descending=True).values
    beyond = torch.full((len(ranked), 2 * k), -math.inf, dtype=torch.float64, device=values.device)
    within = min(2 * k, ranked.shape[1])
    beyond[:, :within] = ranked[:, :within]
    return _gaps(ranked[:, :k], beyond[:, k:].flip(1), sigma)


def sampled_gaps(
    lower: torch.Tensor, upper: torch.Tensor, top: torch.Tensor, k: int, sigma: float, slack: int = 0
) -> torch.Tensor:
    """T3, T4. Radii below which the top-k set of every perturbed smoothed map holds i = 1..k elements of `top` or more.

    lower, upper: simultaneous bounds of the smoothed map, float64 [B, n], of which up to `slack` may be wrong.
    top: bool [B, n] with k elements per row. Returns float64 [B, k], falling in i; -inf where nothing is certified.
    """
    _check_k(k, lower.shape[1])
    stays = lower[top].view(len(lower), k).sort(dim=1, descending=True).values
    outside = upper[~top].view(len(upper), -1).sort(dim=1, descending=True).values[:, :k]
    enters = torch.full_like(stays, -math.inf)
    enters[:, : outside.shape[1]] = outside
    gaps = _gaps(stays, enters.flip(1), sigma)
    # Every wrong bound costs at most one element.
    shifted = torch.full_like(gaps, -math.inf)
    shifted[:, : max(0, k - slack)] = gaps[:, slack:]
    return shifted


def certified_count(gaps: torch.Tensor, radii: torch.Tensor, n: int) -> torch.Tensor:
    """Certified overlap in elements, int64 [R, B], at each radius. gaps: [B, k]; radii: float64 [R].

    Two sets of k among n elements share at least 2k - n, whatever happens.
    """
    k = gaps.shape[1]
    queries = radii.to(gaps).expand(len(gaps), -1).contiguous()
    failing = torch.searchsorted(gaps.flip(1).contiguous(), queries, right=True)
    return (k - failing).clamp_min(max(0, 2 * k - n)).T


def certified_radius(gaps: torch.Tensor, count: int, n: int) -> torch.Tensor:
    """The largest radius, float64 [B], at which `certified_count` is at least `count`; 0 where there is none.

    The inequality is strict, so this is the last float64 below the gap; inf if every radius will do.
    """
    if count <= max(0, 2 * gaps.shape[1] - n):
        return gaps.new_full((len(gaps),), math.inf)
    gap = gaps[:, count - 1].clamp_min(0)
    below = torch.nextafter(gap, torch.zeros_like(gap))
    return torch.where(gap == math.inf, math.inf, below)


def slack_candidates(k: int) -> tuple[int, ...]:
    """Values of the slack m to try for an overlap of k elements, 0 among them.

    With betting bounds all m hold together, so that the best may be picked after the fact (T4). Measured on two
    synthetic maps of 150528 elements, k = n/5, q = 512, 2048, 8192: the best m lies between k/32 and k/256; the best of
    these four certifies a share at most .004 below it (m = 0: .01 to .14 below).
    """
    return tuple(sorted({0, k // 512, k // 128, k // 32}))


def certified_pixels(lower: torch.Tensor, upper: torch.Tensor, radii: torch.Tensor, sigma: float) -> torch.Tensor:
    """T5. Which elements of a 0/1 map stay on their side of 1/2 at every point within a radius.

    lower, upper: simultaneous bounds, float64 [B, n]; radii: float64 [R]. Returns int8 [R, B, n]: 1 stays above 1/2,
    -1 stays below, 0 abstains. Source: Anani et al., Pixel-level certified explanations, ICML 2025.
    """
    radii = radii.to(lower)[:, None, None]
    return (radii < sigma * ndtri(lower)).to(torch.int8) - (radii < -sigma * ndtri(upper)).to(torch.int8)

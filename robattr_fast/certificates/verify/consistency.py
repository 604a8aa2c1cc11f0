"""Tests of a claimed population by a random part of it, drawn without replacement. All of them hold at any sample size.

The population are the q samples of a certificate, the claim its counts. A rejection says that the counts are not those
of the samples; no rejection says only that N of q samples did not reveal it.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import hypergeom

# Shares of the capital that are bet; small ones win on noisy values, large ones on values that hardly vary.
_STAKES = np.array([0.05, 0.1, 0.2, 0.4, 0.7, 0.95])
_ROUNDING = 1e-9


def implausible(claimed: np.ndarray, drawn: np.ndarray, population: int, sample: int, level: float) -> np.ndarray:
    """Which claimed counts do not fit the counts in a random part of the population, bool of their common shape.

    Under the claim each drawn count is hypergeometric. Each of the two tails of each of the counts gets the same part
    of ``level``, so that true claims are all accepted with probability 1 - level, however they depend on each other. A
    drawn count that the claim excludes (more hits, or more misses, than there are) has probability 0.

    Args:
        claimed: int [...], hits among the ``population``.
        drawn: int [...], hits among the ``sample`` of it.
    """
    pairs, index = np.unique(np.stack([claimed.ravel(), drawn.ravel()]), axis=1, return_inverse=True)
    hits, found = pairs
    # Outside of its support scipy's distribution has the tails 0 and 1, as it should.
    at_most = hypergeom.cdf(found, population, hits, sample)
    at_least = hypergeom.sf(found - 1, population, hits, sample)
    tail = np.minimum(at_most, at_least)
    return (tail < level / (2 * claimed.size))[index.ravel()].reshape(claimed.shape)


def mean_refuted(values: np.ndarray, total: float, population: int, level: float, *, margin: float = 0.0) -> bool:
    """Whether values in [0, 1], in the random order in which they were drawn, refute the claimed total of all.

    Two capitals bet that the mean is larger, or smaller. Before each draw the claim fixes the mean m of what is left;
    the bet multiplies by (1 - b) + b v/m, whose expectation is 1 if the claim is true. By Ville's inequality a capital
    ever reaches 2/level with probability at most level/2. Source: Waudby-Smith and Ramdas, Confidence sequences for
    sampling without replacement, NeurIPS 2020.

    Args:
        values: float [N], drawn without replacement.
        total: claimed sum over the population.
        margin: each value may be wrong by so much; the bets are placed as if it were, in favour of the claim.
    """
    sides = (
        (np.maximum(values - margin, 0.0), total),
        (np.maximum(1 - values - margin, 0.0), population - total),
    )
    return any(_refuted_from_below(side, claim, population, level / 2) for side, claim in sides)


def _refuted_from_below(values: np.ndarray, total: float, population: int, level: float) -> bool:
    capital = np.full(len(_STAKES), 1 / len(_STAKES))
    rest = total
    for drawn, value in enumerate(values):
        mean = rest / (population - drawn)
        if value > 0:
            if mean <= _ROUNDING / population:
                return True
            capital *= (1 - _STAKES) + _STAKES * (value / mean)
        else:
            capital *= 1 - _STAKES
        if capital.sum() * level >= 1:
            return True
        rest -= value
    return rest < -_ROUNDING * max(1.0, math.fabs(total))

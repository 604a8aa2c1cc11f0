"""T7 for the images of a certificate: from what it stores to `SecondMoments`, or to the reason why there are none."""

from __future__ import annotations

import numpy as np
import torch

from robattr_fast.certify.concentration import GramSummary, look_schedule, mean_map, summarize_gram
from robattr_fast.certify.second_moment import SecondMoments, TopKCost, second_moments
from robattr_fast.certify.settings import Settings
from robattr_fast.ops.packed_gram import packed_gram
from robattr_fast.reference._select import selected

SUMMARY_COLUMNS = 8
"""Of a ``gram_summary`` row: the seven numbers of `GramSummary`, and how many of its rows were invalid."""

_FEWEST_ROWS = 4


def no_summary(images: int) -> torch.Tensor:
    """``gram_summary`` float64 [B, 8] of images without retained samples."""
    return torch.zeros(images, SUMMARY_COLUMNS, dtype=torch.float64)


def summary_row(gram: torch.Tensor, num_levels: int, invalid: int) -> torch.Tensor:
    """``gram_summary`` float64 [8] from the Gram matrix int64 [m, m] of packed rows, ``invalid`` of them not finite.

    Zeros for fewer than 4 rows, from which nothing follows.
    """
    if len(gram) < _FEWEST_ROWS:
        return no_summary(1)[0]
    return torch.from_numpy(np.append(summarize_gram(gram, num_levels).to_array(), float(invalid)))


def grow_gram(gram: torch.Tensor | None, rows: torch.Tensor, num_levels: int) -> torch.Tensor:
    """The Gram matrix int64 [m, m] of packed rows uint8 [m, row_bytes], given that of the first few (or None).

    Only products with a new row are formed: to grow to m costs as much, in all, as one matrix of m rows.
    """
    if gram is None:
        return packed_gram(rows, num_levels)
    old, new = rows[: len(gram)], rows[len(gram) :]
    if len(new) == 0:
        return gram
    grown = gram.new_empty((len(rows), len(rows)))
    grown[: len(old), : len(old)] = gram
    grown[len(old) :, len(old) :] = packed_gram(new, num_levels)
    grown[len(old) :, : len(old)] = packed_gram(new, num_levels, old)
    grown[: len(old), len(old) :] = grown[len(old) :, : len(old)].T
    return grown


class Moments:
    """What T7 proves about one image of a certificate.

    Attributes:
        proved: `SecondMoments`, or None.
        reason: why `proved` is None; else None.
    """

    def __init__(
        self, settings: Settings, image: int, counts: torch.Tensor, samples: int, summary: torch.Tensor, invalid: int
    ) -> None:
        """counts int32 [n, L] and ``gram_summary`` [8] of one image."""
        self.reason = _why_not(settings, image, samples, summary)
        self.proved: SecondMoments | None = None
        self._costs: dict[int, TopKCost] = {}
        if self.reason is not None:
            return
        abstains = settings.on_nonfinite == "abstain"
        self.mean = mean_map(counts, samples)
        self.proved = second_moments(
            counts,
            samples,
            GramSummary.from_array(summary[:-1].numpy()),
            planned=_planned(settings, image, samples),
            retained=settings.retain,
            k_tau=settings.n if settings.tau is None else selected(settings.tau, settings.n),
            sigma=settings.sigma,
            alpha=settings.ledger.moment,
            invalid=invalid if abstains else 0,
            invalid_rows=int(summary[-1]) if abstains else 0,
        )

    def _cost(self, k: int) -> TopKCost:
        if k not in self._costs:
            self._costs[k] = TopKCost(self.mean, k)
        return self._costs[k]

    def overlap(self, k: int, radius: float) -> int:
        """How many of the displayed top-k stay; 0 where nothing is proved."""
        return 0 if self.proved is None else self._cost(k).overlap(self.proved.distance(radius))

    def radius(self, k: int, count: int) -> float:
        """The largest radius within which ``count`` of the displayed top-k stay."""
        return 0.0 if self.proved is None else self.proved.radius(self._cost(k).distance(count))


def _planned(settings: Settings, image: int, samples: int) -> int:
    return samples if settings.planned_samples is None else settings.planned_samples[image]


def _why_not(settings: Settings, image: int, samples: int, summary: torch.Tensor) -> str | None:
    if settings.levels is None:
        return "levels=None keeps sums, which have no second moments"
    if settings.ledger.moment == 0:
        return "no part of alpha was set aside for second moments (second_moment=False)"
    if int(summary[0]) == 0:
        return f"the maps of {_FEWEST_ROWS} samples at least must be retained, none are summed up here"
    planned = _planned(settings, image, samples)
    if planned < 2 or samples not in look_schedule(planned):
        looks = ", ".join(map(str, sorted(look_schedule(max(planned, 2)))))
        return f"it was planned to look at {looks} samples, and there are {samples}"
    if int(summary[0]) != min(settings.retain, samples):
        return f"{int(summary[0])} samples were retained, not the first {min(settings.retain, samples)}"
    return None

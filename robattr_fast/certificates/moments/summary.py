"""T7 for the images of a certificate: from what it stores to `SecondMoments`, or to the reason why there are none."""

from __future__ import annotations

import dataclasses

import torch

from robattr_fast.certificates.moments.concentration import (
    GramSummary,
    block_rows,
    look_schedule,
    mean_map,
    rows_in_blocks,
    summarize_gram,
)
from robattr_fast.certificates.moments.deflation import (
    DIRECTIONS,
    DeflatedSummary,
    Deflation,
    pilot_rows,
    summarize_deflated,
)
from robattr_fast.certificates.moments.least_moves import DeflatedCost
from robattr_fast.certificates.moments.scatter import Scatter
from robattr_fast.certificates.moments.second_moment import SecondMoments, TopKCost, second_moments
from robattr_fast.certificates.settings import Settings
from robattr_fast.ops.packed_gram import packed_gram
from robattr_fast.reference._select import selected

FEWEST_ROWS = 4
"""Of a block: from fewer, nothing follows."""

_GRAM = len(dataclasses.fields(GramSummary))
_DEFLATED = len(dataclasses.fields(DeflatedSummary))

SUMMARY_COLUMNS = _GRAM + _DEFLATED + DIRECTIONS + 1
"""Of a ``gram_summary`` row: the numbers of `GramSummary`, of `DeflatedSummary`, the squares of the `Deflation` (0
where there is none), and how many of the rows of the first were invalid."""


def no_summary(images: int) -> torch.Tensor:
    """``gram_summary`` float64 [B, columns] of images without retained samples."""
    return torch.zeros(images, SUMMARY_COLUMNS, dtype=torch.float64)


def grow_gram(gram: torch.Tensor | None, rows: torch.Tensor, num_levels: int) -> torch.Tensor:
    """The Gram matrix int64 [m, m] of packed rows uint8 [m, row_bytes], given that of the first few (or None).

    Only products with a new row are formed: to grow to m costs as much, in all, as one matrix of m rows. They are
    formed where the rows are; the matrix is on the CPU.
    """
    if gram is None:
        return packed_gram(rows, num_levels).cpu()
    old, new = rows[: len(gram)], rows[len(gram) :]
    if len(new) == 0:
        return gram
    grown = gram.new_empty((len(rows), len(rows)))
    grown[: len(old), : len(old)] = gram
    grown[len(old) :, len(old) :] = packed_gram(new, num_levels)
    grown[len(old) :, : len(old)] = packed_gram(new, num_levels, old)
    grown[: len(old), len(old) :] = grown[len(old) :, : len(old)].T
    return grown


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the retained samples of one image prove, block by block: `with_block` adds one.

    planned: samples of the run; retain: the most rows of a block. pilots: how many of the first samples chose the
    deflation; they are in the Gram matrices of ``gram``, not in those of ``deflated``.
    """

    planned: int
    retain: int
    num_levels: int
    n: int
    gram: GramSummary | None = None
    deflation: Deflation | None = None
    deflated: DeflatedSummary | None = None
    invalid: int = 0

    @property
    def rows(self) -> int:
        """Samples summed up so far."""
        return 0 if self.gram is None else self.gram.rows

    @property
    def pilots(self) -> int:
        """Of the first block, how many choose the directions."""
        return pilot_rows(self.planned, block_rows(self.planned, self.retain))

    @property
    def follows_pilots(self) -> bool:
        """Whether the deflated rows are those after the pilots, and divided into blocks as they must be."""
        if self.gram is None or self.deflated is None:
            return False
        rest = min(self.gram.block_rows, self.rows) - self.pilots
        first = rest if rest >= FEWEST_ROWS else 0
        blocks = self.gram.blocks - 1 + (first > 0)
        sizes = ([first] if first else []) + [self.gram.block_rows] * (self.gram.blocks - 1)
        return (self.deflated.rows, self.deflated.blocks) == (sum(sizes), blocks) and self.deflated.fewest == min(sizes)

    def with_block(self, rows: torch.Tensor, products: torch.Tensor, invalid: int = 0) -> Summary:
        """rows: uint8 [m, row_bytes], packed: the next block, ``invalid`` of them not finite.

        products: int64 [m, m], their Gram matrix. Fewer than 4 rows, from which nothing follows, change nothing.
        """
        if len(rows) < FEWEST_ROWS:
            return self
        half = len(rows) // 2
        halves = None
        if self._has_fewer_elements(rows):
            halves = self._scatter(rows[:half]), self._scatter(rows[half:])
        gram, deflation, first = summarize_gram(products, self.num_levels, halves), self.deflation, 0

        def scatter(part: torch.Tensor) -> Scatter | None:
            if halves is not None and len(part) == len(rows):
                return halves[0].joined(halves[1])
            return self._scatter(part) if self._has_fewer_elements(part) else None

        if self.gram is None:
            first = min(self.pilots, len(rows))
            if first == self.pilots:
                pilots, among = rows[:first], products[:first, :first]
                deflation = Deflation.from_pilots(pilots, among, self.num_levels, self.n, scatter(pilots))
        else:
            gram = self.gram.joined(gram)
        deflated, rest = self.deflated, rows[first:]
        if deflation is not None and len(rest) >= FEWEST_ROWS:
            coordinates, fewer = deflation.coordinates(rest, self.num_levels), scatter(rest)
            one = summarize_deflated(
                products[first:, first:],
                coordinates,
                deflation.squares,
                self.num_levels,
                None if fewer is None else deflation.shrunk_eigenvalue(fewer),
            )
            deflated = one if deflated is None else deflated.joined(one)
        return dataclasses.replace(
            self, gram=gram, deflation=deflation, deflated=deflated, invalid=self.invalid + invalid
        )

    def _has_fewer_elements(self, rows: torch.Tensor) -> bool:
        """Whether matrices of elements cost less than those of rows; ARPACK takes more elements than eigenvectors."""
        return DIRECTIONS + 1 < self.n <= len(rows) // 2

    def _scatter(self, rows: torch.Tensor) -> Scatter:
        return Scatter.of_rows(rows, self.num_levels, self.n)

    @classmethod
    def of_rows(cls, rows: torch.Tensor, planned: int, retain: int, num_levels: int, n: int, invalid: int) -> Summary:
        """The summary of the packed rows of all samples there are; those that fill no block are left out."""
        summary = cls(planned, retain, num_levels, n)
        size = block_rows(planned, retain)
        for part in rows[: rows_in_blocks(len(rows), planned, retain)].split(size):
            summary = summary.with_block(part, packed_gram(part, num_levels))
        return dataclasses.replace(summary, invalid=invalid)

    def to_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``gram_summary`` float64 [columns] and ``directions`` int8 [2, n]; zeros stand for what there is not."""
        row, directions = no_summary(1)[0], torch.zeros(DIRECTIONS, self.n, dtype=torch.int8)
        if self.gram is not None:
            row[:_GRAM] = torch.from_numpy(self.gram.to_array())
            row[-1] = self.invalid
        if self.deflated is not None:
            row[_GRAM : _GRAM + _DEFLATED] = torch.tensor(dataclasses.astuple(self.deflated), dtype=torch.float64)
        if self.deflation is not None:
            row[-1 - DIRECTIONS : -1] = torch.tensor(self.deflation.squares, dtype=torch.float64)
            directions = self.deflation.directions.cpu()
        return row, directions

    @staticmethod
    def tolerances() -> torch.Tensor:
        """Relative, of the columns of `to_tensors`: bounds on eigenvalues are tight to 1e-6, the rest is rounded."""
        proved = {"eigenvalue", "fourth", "half_eigenvalue"}
        names = [field.name for part in (GramSummary, DeflatedSummary) for field in dataclasses.fields(part)]
        columns = [2e-6 if name in proved else 1e-9 for name in names]
        return torch.tensor([*columns, *[2e-6] * DIRECTIONS, 0.0], dtype=torch.float64)

    def restored(self, row: torch.Tensor, directions: torch.Tensor) -> Summary:
        """The inverse of :meth:`to_tensors`. ValueError for numbers that no samples give."""
        numbers = row.numpy()
        if not int(numbers[0]):
            return self
        deflation = deflated = None
        if numbers[-1 - DIRECTIONS] > 0:
            deflation = Deflation(directions, tuple(map(float, numbers[-1 - DIRECTIONS : -1])))
        parts = numbers[_GRAM : _GRAM + _DEFLATED]
        if parts[0] > 0:
            deflated = DeflatedSummary(*(int(part) for part in parts[:3]), *(float(part) for part in parts[3:]))
        return dataclasses.replace(
            self,
            gram=GramSummary.from_array(numbers[:_GRAM]),
            deflation=deflation,
            deflated=deflated,
            invalid=int(numbers[-1]),
        )


def summary_of(settings: Settings, planned: int) -> Summary:
    """That of a run which has no samples yet."""
    assert settings.levels is not None
    return Summary(planned, settings.retain, settings.levels, settings.n)


class Moments:
    """What T7 proves about one image of a certificate.

    Attributes:
        proved: `SecondMoments`, or None.
        reason: why `proved` is None; else None.
    """

    def __init__(
        self,
        settings: Settings,
        image: int,
        counts: torch.Tensor,
        samples: int,
        summary: torch.Tensor,
        directions: torch.Tensor,
        invalid: int,
    ) -> None:
        """counts int32 [n, L], ``gram_summary`` [columns] and ``directions`` [2, n] of one image."""
        self.reason = _why_not(settings, image, samples, summary)
        self.proved: SecondMoments | None = None
        self._costs: dict[int, TopKCost] = {}
        self._deflated_costs: dict[int, DeflatedCost] = {}
        if self.reason is not None:
            return
        abstains = settings.on_nonfinite == "abstain"
        planned = _planned(settings, image, samples)
        known = summary_of(settings, planned).restored(summary, directions)
        assert known.gram is not None
        self.mean = mean_map(counts, samples)
        self._deflation = known.deflation
        self.proved = second_moments(
            counts,
            samples,
            known.gram,
            planned=planned,
            retained=settings.retain,
            k_tau=settings.n if settings.tau is None else selected(settings.tau, settings.n),
            sigma=settings.sigma,
            alpha=settings.ledger.moment,
            invalid=invalid if abstains else 0,
            invalid_rows=known.invalid if abstains else 0,
            deflated=known.deflated,
        )

    def _cost(self, k: int) -> TopKCost:
        if k not in self._costs:
            self._costs[k] = TopKCost(self.mean, k)
        return self._costs[k]

    def _deflated_cost(self, k: int) -> DeflatedCost:
        if k not in self._deflated_costs:
            assert self.proved is not None
            assert self._deflation is not None
            self._deflated_costs[k] = DeflatedCost(self.mean, k, self._deflation, self.proved.error)
        return self._deflated_costs[k]

    def overlap(self, k: int, radius: float) -> int:
        """How many of the displayed top-k stay; 0 where nothing is proved."""
        if self.proved is None:
            return 0
        kept = self._cost(k).overlap(self.proved.distance(radius))
        if self.proved.deflated is None:
            return kept
        return max(kept, self._deflated_cost(k).overlap(self.proved.deflated_distance(radius)))

    def radius(self, k: int, count: int) -> float:
        """The largest radius within which ``count`` of the displayed top-k stay."""
        if self.proved is None:
            return 0.0
        radius = self.proved.radius(self._cost(k).distance(count))
        if self.proved.deflated is None:
            return radius
        return max(radius, self.proved.deflated_radius(self._deflated_cost(k).distance(count)))


def _planned(settings: Settings, image: int, samples: int) -> int:
    return samples if settings.planned_samples is None else settings.planned_samples[image]


def _why_not(settings: Settings, image: int, samples: int, summary: torch.Tensor) -> str | None:
    if settings.levels is None:
        return "levels=None keeps sums, which have no second moments"
    if settings.ledger.moment == 0:
        return "no part of alpha was set aside for second moments (second_moment=False)"
    if int(summary[0]) == 0:
        return f"the maps of {FEWEST_ROWS} samples at least must be retained, none are summed up here"
    planned = _planned(settings, image, samples)
    if planned < 2 or samples not in look_schedule(planned):
        looks = ", ".join(map(str, sorted(look_schedule(max(planned, 2)))))
        return f"it was planned to look at {looks} samples, and there are {samples}"
    if int(summary[0]) != (rows := rows_in_blocks(samples, planned, settings.retain)):
        return f"{int(summary[0])} samples were retained, not the first {rows}"
    return None

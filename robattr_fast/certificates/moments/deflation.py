"""A norm in which no direction of the covariance stands out, chosen from pilot samples (T7; docs/second-moments.md).

A few directions v_1, .. hold the largest eigenvalues of Sigma. W = I - sum_j (1 - w_j) v_j v_j', w_j <= 1, shrinks
them, so that the largest eigenvalue of W Sigma W is far below that of Sigma, while a map that moves along v_j alone
changes few top-K sets. The directions come from the first samples, the eigenvalue from the others.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from robattr_fast.certificates.moments.eigenvalues import (
    centred_gram,
    largest_eigenvalue,
    largest_eigenvalue_of_squares_,
    rounding_of,
    top_eigenpairs,
)
from robattr_fast.certificates.moments.rounding import UP
from robattr_fast.certificates.moments.scatter import Scatter
from robattr_fast.ops.packed_gram import packed_gram
from robattr_fast.reference._pack_levels import bits_per_element, pack_levels, unpack_levels

DIRECTIONS = 2
"""Directions that are shrunk. The search over them grows exponentially with their number (`least_moves`)."""

_LARGEST = 127
_MOST = 0.95  # of w_j^2: where it is 1 there is nothing to shrink
_FEWEST_PILOTS = 8
_BYTES = 256  # of packed rows that are unpacked at a time: all at once would be 32 times their size


def pilot_rows(planned: int, block: int) -> int:
    """How many of the first samples choose the directions: the first of three blocks or more, else a quarter of all.

    The rest of a block would make a small one, whose eigenvalue is far above that of Sigma.
    """
    return block if planned >= 3 * block else planned // 4


@dataclasses.dataclass(frozen=True)
class Deflation:
    """The norm ||W d||: directions int8 ``[2, n]``, linearly independent, and the squares w_j^2 in (0, 1)."""

    directions: Tensor
    squares: tuple[float, ...]

    @classmethod
    def from_pilots(
        cls, rows: Tensor, gram: Tensor, num_levels: int, n: int, scatter: Scatter | None = None
    ) -> "Deflation | None":
        """The top eigenvectors of the empirical covariance of pilot samples; None if they show no such directions.

        rows: uint8 ``[m, row_bytes]``, packed. gram: int64 ``[m, m]``, their inner products. scatter: theirs,
        where that costs less. w_j^2 makes the variance along v_j that of the next eigenvalue below them. Any choice is
        valid.
        """
        if len(rows) < _FEWEST_PILOTS:
            return None
        centred = centred_gram(gram, 1) if scatter is None else scatter.centred() / scatter.rows
        if not centred.diagonal().max() > 0.5 / len(rows):
            return None
        values, vectors = top_eigenpairs(centred, DIRECTIONS + 1)
        vectors = vectors[:, :DIRECTIONS]
        if not values[-1] > 1e-9 * max(float(gram.diagonal().max()), 1.0):
            return None
        if scatter is not None:
            vectors = _along(rows, vectors, num_levels)
        exact = _combined(torch.from_numpy(vectors - vectors.mean(0)).T.to(torch.float32), rows, num_levels)[:, :n]
        largest = exact.gather(1, exact.abs().argmax(1, keepdim=True))
        found = cls(
            (exact * (_LARGEST / largest)).round().to(torch.int8),
            tuple(np.minimum(values[-1] / values[:-1], _MOST).tolist()),
        )
        return found if found.independent else None

    @property
    def products(self) -> np.ndarray:
        """Inner products of the directions, exact integers in float64 ``[2, 2]``."""
        wide = self.directions.to(torch.int64)
        return (wide[:, None] * wide[None]).sum(2).to(torch.float64).numpy()

    def shrunk_eigenvalue(self, scatter: Scatter) -> float:
        """An upper bound on the eigenvalues of the empirical covariance of the maps W h."""
        squares = torch.tensor(self.squares, dtype=torch.float64)
        return scatter.shrunk_eigenvalue(torch.from_numpy(self.basis), squares)

    @property
    def independent(self) -> bool:
        """Whether they span a plane, and far enough from a line that rounding does not count: else they define no W."""
        products = self.products
        return float(np.linalg.det(products)) > 0.01 * float(products.diagonal().prod()) > 0

    @property
    def basis(self) -> np.ndarray:
        """Orthonormal v_j, float64 ``[2, n]``, by Gram and Schmidt."""
        return np.linalg.solve(np.linalg.cholesky(self.products), self.directions.numpy().astype(np.float64))

    def coordinates(self, rows: Tensor, num_levels: int) -> Tensor:
        """v_j . h of packed rows uint8 ``[m, row_bytes]``: float64 ``[m, 2]``."""
        integers = _integer_products(rows, self.directions, num_levels).to(torch.float64).numpy() / num_levels
        return torch.from_numpy(np.linalg.solve(np.linalg.cholesky(self.products), integers.T).T.copy())


@dataclasses.dataclass(frozen=True)
class DeflatedSummary:
    """What T7 needs of the samples after the pilots, centred by blocks: as `GramSummary`, of the maps W h.

    rows: in ``blocks`` of at least ``fewest`` samples. eigenvalue, fourth: means over the rows.
    """

    rows: int
    blocks: int
    fewest: int
    eigenvalue: float
    fourth: float

    def joined(self, other: "DeflatedSummary") -> "DeflatedSummary":
        """The summary of the blocks of both."""
        rows = self.rows + other.rows

        def mean(name: str) -> float:
            return (self.rows * getattr(self, name) + other.rows * getattr(other, name)) / rows * UP

        return DeflatedSummary(
            rows, self.blocks + other.blocks, min(self.fewest, other.fewest), mean("eigenvalue"), mean("fourth")
        )


def summarize_deflated(
    gram: Tensor,
    coordinates: Tensor,
    squares: tuple[float, ...],
    levels: int,
    eigenvalue: float | None = None,
) -> DeflatedSummary:
    """One block: its Gram matrix int64 ``[m, m]``, the `Deflation.coordinates` of its rows, w_j^2, number of levels.

    eigenvalue: an upper bound on those of the empirical covariance of the W h, where there is one (`Scatter`).
    """
    rows = len(gram)
    # Coordinates are no longer than the maps, and off by less than 200 eps of that (docs/second-moments.md, Rounding).
    entry_error = 80 * rounding_of(gram, levels)
    about = coordinates - coordinates.mean(0)
    shrunk = about * torch.tensor([1 - square for square in squares], dtype=torch.float64)
    # Symmetric but for rounding, which the error of an entry contains.
    projected = centred_gram(gram, levels).addmm_(shrunk, about.T, alpha=-1)
    if eigenvalue is None:
        eigenvalue = largest_eigenvalue(projected) / rows + entry_error
    return DeflatedSummary(
        rows=rows,
        blocks=1,
        fewest=rows,
        eigenvalue=eigenvalue,
        fourth=largest_eigenvalue_of_squares_(projected, entry_error) / rows,
    )


def _along(rows: Tensor, vectors: np.ndarray, num_levels: int) -> np.ndarray:
    """Levels of packed rows times float64 ``[n, 2]``: ``[m, 2]``, to unit length; some rows at a time."""
    weights = torch.from_numpy(vectors).contiguous()
    levels = (unpack_levels(part, num_levels, len(vectors)) for part in rows.split(_BYTES))
    found = torch.cat([part.to("cpu", torch.float64) @ weights for part in levels])
    found -= found.mean(0)
    return (found / found.norm(dim=0)).numpy()


def _combined(weights: Tensor, rows: Tensor, num_levels: int) -> Tensor:
    """weights float32 ``[2, m]`` times packed rows: float32 ``[2, elements]``, one position of some bytes at a time."""
    bits, weights = bits_per_element(num_levels), weights.to(rows.device)
    # Small results between large temporaries would keep the heap from shrinking: they go where they belong at once.
    found = weights.new_empty(len(weights), rows.shape[1], 8 // bits)
    for first in range(0, rows.shape[1], _BYTES):
        part = rows[:, first : first + _BYTES]
        for plane in range(8 // bits):
            levels = ((part >> (plane * bits)) & (2**bits - 1)).to(torch.float32)
            for row, weight in zip(found, weights, strict=True):
                row[first : first + _BYTES, plane] = weight @ levels
    return found.flatten(1).cpu()


def _integer_products(rows: Tensor, directions: Tensor, num_levels: int) -> Tensor:
    """int64 ``[m, 2]``: the directions are cut into digits that fit a packed row, which `packed_gram` multiplies."""
    packing = 1 if num_levels == 1 else 15
    base = packing + 1
    digits = math.ceil(math.log(_LARGEST + 1, base))
    planes, values = [], []
    for sign in (1, -1):
        part = (directions.to(torch.int64) * sign).clamp(min=0)
        for digit in range(digits):
            planes.append((part // base**digit % base).to(torch.uint8))
            values.append(sign * base**digit)
    packed = pack_levels(torch.stack(planes), packing).flatten(0, 1)
    products = packed_gram(rows, packing, packed.to(rows.device)).unflatten(1, (len(planes), len(directions)))
    return (products * torch.tensor(values, device=rows.device)[:, None]).sum(1).cpu()

"""The scatter matrix of a block of samples: where elements are fewer than samples, it gives eigenvalues for less.

Of m samples as rows of H, less their mean, the centred Gram matrix D D' ``[m, m]`` and D'D ``[n, n]`` have the same
eigenvalues but for zeros. Levels are integers, and so is m D'D: nothing is rounded before an eigenvalue is proved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robattr_fast.certificates.moments.eigenvalues import largest_eigenvalue
from robattr_fast.certificates.moments.rounding import EPS
from robattr_fast.ops.packed_gram import packed_gram
from robattr_fast.reference._pack_levels import pack_levels, unpack_levels


@dataclass(frozen=True)
class Scatter:
    """Of ``rows`` samples, at most 2^13: sums of levels ``[n]``, of their products ``[n, n]``: integers in float64."""

    rows: int
    num_levels: int
    sums: Tensor
    products: Tensor

    @classmethod
    def of_rows(cls, rows: Tensor, num_levels: int, n: int) -> Scatter:
        """rows: uint8 ``[m, row_bytes]``, packed, of n elements."""
        levels = unpack_levels(rows, num_levels, n)
        elements = pack_levels(levels.T.contiguous(), num_levels)
        return cls(
            len(rows),
            num_levels,
            *(part.to("cpu", torch.float64) for part in (levels.sum(0), packed_gram(elements, num_levels))),
        )

    def joined(self, other: Scatter) -> Scatter:
        """Of the samples of both."""
        return Scatter(self.rows + other.rows, self.num_levels, self.sums + other.sums, self.products + other.products)

    @property
    def unit(self) -> int:
        """How many times the empirical covariance of the maps `centred` is."""
        return (self.rows * self.num_levels) ** 2

    @property
    def norm2(self) -> float:
        """||mean||^2 of the maps, from integers by one division."""
        return float(self.sums.square().sum()) / self.unit

    @property
    def eigenvalue(self) -> float:
        """An upper bound, tight to about 1e-6, on those of the empirical covariance of the maps."""
        return largest_eigenvalue(self.centred()) / self.unit * (1 + 4 * EPS)

    def shrunk_eigenvalue(self, basis: Tensor, squares: Tensor) -> float:
        """The same of the maps W h: W^2 = I - sum_j (1 - w_j^2) v_j v_j'.

        basis: orthonormal v_j, float64 ``[2, n]``. squares: w_j^2, float64 ``[2]``.
        """
        matrix = self.centred()
        # Of products of n terms, and of the basis, whose relative error is below 1000 eps (`Deflation.independent`).
        error = 32 * (len(matrix) + 256) * EPS * float(torch.linalg.matrix_norm(matrix))
        shrunk = (1 - squares.sqrt())[:, None] * basis
        along = basis @ matrix
        moved = shrunk.T @ (along - (along @ basis.T) @ shrunk / 2)
        matrix.sub_(moved).sub_(moved.T)
        return (largest_eigenvalue(matrix) + error) / self.unit * (1 + 4 * EPS)

    def mean_form(self, other: Scatter) -> float:
        """An upper bound, tight to about 1e-9, on the mean over the samples h of ``other`` of (h - a)' S (h - a).

        a and S are mean and empirical covariance of the samples of this one.
        """
        about = (other.products * self.rows**2).addr_(self.sums, self.sums, alpha=other.rows)
        about.addr_(self.sums, other.sums, alpha=-self.rows).addr_(other.sums, self.sums, alpha=-self.rows)
        terms = about.mul_(self.centred())
        # n sums of n terms each, in whatever order.
        rounding = 2 * (len(terms) + 2) * EPS * float(terms.abs().sum())
        units = self.unit * (self.rows * self.num_levels) ** 2 * other.rows
        return (float(terms.sum(1).sum()) + rounding) / units * (1 + 4 * EPS)

    def centred(self) -> Tensor:
        """m^2 L^2 times the empirical covariance, float64 ``[n, n]``: integers below 2^34, so that it is exact."""
        return torch.addr(self.products, self.sums, self.sums, beta=self.rows, alpha=-1)

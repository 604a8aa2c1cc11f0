"""Upper bounds on eigenvalues that hold in floating point (docs/second-moments.md, Rounding)."""

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.linalg.lapack import dpotrf
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from robattr_fast.certificates.moments.rounding import EPS

# Below, all eigenvalues cost less than a few of them.
_LANCZOS_SIZE = 512
_LANCZOS_STEPS = 100  # photographs take ten to thirty
_LANCZOS_RESIDUAL = 1e-7  # relative; the error of the eigenvalue is quadratic in it
_POWER_STEPS = 60
_PART = 2**20  # bytes of a matrix that pass all steps of a loop before they leave the cache


def centred_gram(gram: Tensor, num_levels: int) -> Tensor:
    """Inner products float64 ``[m, m]`` of the samples less their mean, from those int64 ``[m, m]`` of their levels."""
    centred = torch.empty_like(gram, dtype=torch.float64)
    to_mean = centred.new_empty(len(gram))
    for part, integers, mean in zip(*map(_parts, (centred, gram, to_mean)), strict=True):
        part.copy_(integers)
        torch.sum(part, 1, out=mean)  # of integers: exact
        if num_levels > 1:
            part.div_(num_levels**2)
    to_mean.div_(num_levels**2 * len(gram))
    about = to_mean - int(gram.sum()) / (num_levels * len(gram)) ** 2
    for part, mean in zip(*map(_parts, (centred, to_mean)), strict=True):
        part.sub_(mean[:, None]).sub_(about)
    return centred


def rounding_of(gram: Tensor, num_levels: int) -> float:
    """Rounding moves an entry of `centred_gram` by less than this, hence an eigenvalue by less than m times it."""
    return 16 * int(gram.diagonal().max()) / num_levels**2 * EPS


def top_eigenpairs(matrix: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Estimates, falling: float64 ``[count]`` and ``[m, count]``, of a symmetric float64 matrix ``[m, m]``."""
    # numpy would multiply by threads of its own, which wait for those of torch.
    product = LinearOperator(
        tuple(matrix.shape), matvec=lambda vector: (matrix @ torch.from_numpy(vector)).numpy(), dtype=np.float64
    )
    start = np.random.default_rng(0).standard_normal(len(matrix))
    values, vectors = eigsh(product, k=count, which="LA", v0=start, tol=1e-8)
    order = np.argsort(-values)
    return values[order], vectors[:, order]


def largest_eigenvalue(matrix: Tensor) -> float:
    """An upper bound, tight to about 1e-6, on the eigenvalues of a symmetric float64 matrix; not below 0.

    A Cholesky factor of mu I - matrix proves a candidate mu (Rump, Verification of positive definiteness, BIT 2006): if
    the factorisation runs through, no eigenvalue of its argument lies below -eps (m + 2) trace. A candidate that fails
    is raised until it passes. Where the matrix is large Lanczos finds it, and ARPACK where that takes too many steps.
    """
    size = matrix.shape[0]
    scale = float(matrix.diagonal().abs().max())
    rounding = 4 * (size + 2) * EPS
    if scale == 0:
        return max(float(torch.linalg.eigvalsh(matrix)[-1]), 0.0) * (1 + rounding)
    step = 1e-7
    if size < _LANCZOS_SIZE:
        top, step = float(torch.linalg.eigvalsh(matrix)[-1]), 1e-11
    else:
        start = torch.from_numpy(np.random.default_rng(0).standard_normal(size))
        top, _, converged = _top_ritz(matrix, start)
        if not converged:
            top = float(top_eigenpairs(matrix, 1)[0][0])
    while True:
        candidate = max(top, 1e-12 * scale) * (1 + step)
        shifted = -matrix
        shifted.diagonal().add_(candidate)
        # In place, and less than half of the time of torch's.
        if dpotrf(shifted.numpy().T, overwrite_a=True, clean=False)[1] == 0:
            return candidate + rounding * size * (candidate + scale)
        step *= 4


def largest_eigenvalue_of_squares_(matrix: Tensor, entry_error: float) -> float:
    """An upper bound, tight to about 1e-6, on the eigenvalues of the squares (|entry| + entry_error)^2, made in place.

    matrix: symmetric, float64. For A of positive entries and any v > 0 no eigenvalue exceeds the largest (A v)_i / v_i
    (Collatz and Wielandt): v from Lanczos and the power method makes it tight, where the largest two lie apart.
    """
    for part in _parts(matrix):
        part.abs_().add_(entry_error).square_()
    if entry_error <= 0 or len(matrix) < _LANCZOS_SIZE:
        return largest_eigenvalue(matrix)
    ones = matrix.new_ones(len(matrix))
    vector = _top_ritz(matrix, ones)[1]
    vector = vector if float(vector.amin()) > 0 else ones
    for _ in range(_POWER_STEPS):
        vector /= vector.amax()
        moved = matrix @ vector
        ratios = moved / vector
        if float(ratios.amin()) * (1 + 1e-6) >= (top := float(ratios.amax())):
            return top * (1 + 4 * (len(vector) + 2) * EPS)
        vector = moved
    return largest_eigenvalue(matrix)


def _top_ritz(matrix: Tensor, start: Tensor) -> tuple[float, Tensor, bool]:
    """Lanczos with full orthogonalisation from ``start`` [m]: top Ritz value, its vector of the sign of ``start``, and
    whether it has converged."""
    basis = start.new_empty(min(_LANCZOS_STEPS, len(start)), len(start))
    diagonal: list[float] = []
    beside: list[float] = []
    vector = start / start.norm()
    for step in range(len(basis)):
        basis[step] = vector
        held = basis[: step + 1]
        moved = matrix @ vector
        diagonal.append(float(vector @ moved))
        for _ in range(2):
            moved -= (held @ moved) @ held
        rest = float(moved.norm())
        values, weights = eigh_tridiagonal(diagonal, beside)
        converged = bool(rest * abs(weights[-1, -1]) <= _LANCZOS_RESIDUAL * abs(values[-1]))
        if converged:
            break
        beside.append(rest)
        vector = moved / rest
    top = torch.from_numpy(weights[:, -1] * (1 if weights[0, -1] >= 0 else -1))
    return float(values[-1]), top @ held, converged


def _parts(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of some rows of ``[m, m]`` or entries of ``[m]``: as many at a time as are `_PART` bytes of the former."""
    return matrix.split(max(1, _PART // (8 * len(matrix))))

"""Eigenvalues of retained samples against matrices whose spectrum is known exactly, on every branch of the proof.

Samples that repeat a few patterns have, but for zeros, the eigenvalues of a matrix of one row per pattern, weighted by
how often each occurs: rational entries, 40 digits. Hadamard matrices, difference sets and permutations need no solver.
"""

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from mpmath import mp, mpf

from robattr_fast.certificates.moments.concentration import GramSummary, summarize_gram
from robattr_fast.certificates.moments.deflation import DeflatedSummary, Deflation, summarize_deflated
from robattr_fast.certificates.moments.eigenvalues import largest_eigenvalue, largest_eigenvalue_of_squares_
from robattr_fast.certificates.moments.scatter import Scatter
from robattr_fast.reference import pack_levels, packed_gram

mp.dps = 40
TIGHT = mpf(10) ** -6 * mpf(1.001)


def number(value: Fraction) -> mpf:
    return mpf(value.numerator) / value.denominator


def summaries(levels: np.ndarray, num_levels: int) -> list[GramSummary]:
    """By rows, and by elements where the package would."""
    rows, n = levels.shape
    packed = pack_levels(torch.from_numpy(levels.astype(np.uint8)), num_levels)
    gram = packed_gram(packed, num_levels)
    halves = tuple(Scatter.of_rows(part, num_levels, n) for part in (packed[: rows // 2], packed[rows // 2 :]))
    by_rows = summarize_gram(gram.clone(), num_levels)
    return [by_rows, summarize_gram(gram, num_levels, halves)] if n <= rows // 2 else [by_rows]


def assert_bounds(found: float, truth, size: float = 1.0) -> None:
    """An upper bound, tight to 1e-6; ``size``: ||h||^2, whose rounding counts where the truth is near 0."""
    assert truth <= mpf(found) <= truth * (1 + TIGHT) + mpf(size) * mpf(10) ** -12


@functools.cache
def sylvester(order: int) -> np.ndarray:
    matrix = np.ones((1, 1), dtype=np.int64)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@pytest.mark.parametrize("order", [8, 256, 512, 1024])
def test_hadamard_rows(order: int) -> None:
    """All rows of (1 + S)/2: one eigenvalue, order - 1 times; the halves see each other along nothing at all."""
    (found,) = summaries((1 + sylvester(order)) // 2, 1)
    assert_bounds(found.eigenvalue, mpf(1) / 4)
    assert_bounds(found.fourth, mpf(order - 1) / 16)
    assert_bounds(found.half_eigenvalue, mpf(1) / 2)
    assert_bounds(found.norm2, 1 + mpf(order - 1) / 4)
    assert_bounds(found.half_norm2, 2 + mpf(order - 2) / 4)
    assert_bounds(found.half_mean, mpf(0), order)


@pytest.mark.parametrize("prime", [19, 503, 523])
def test_circulant_rows_of_a_difference_set(prime: int) -> None:
    """Shifts of the quadratic residues: any two share (p - 3)/4 elements, so that the Gram matrix is a I + b J."""
    residues = np.zeros(prime, dtype=np.int64)
    residues[np.arange(1, prime) ** 2 % prime] = 1
    (found,) = summaries(np.stack([np.roll(residues, shift) for shift in range(prime)]), 1)
    apart = mpf(prime + 1) / 4
    assert_bounds(found.eigenvalue, apart / prime)
    assert_bounds(found.fourth, apart**2 * (prime - 1) / prime**2)


@pytest.mark.parametrize(("num_levels", "level"), [(1, 1), (15, 4)])
@pytest.mark.parametrize(("n", "repeats"), [(5, 1), (5, 4), (40, 2), (260, 2), (600, 1)])
def test_permutations(n: int, repeats: int, num_levels: int, level: int) -> None:
    """One element at a time, each equally often."""
    size = mpf(level) / num_levels
    for found in summaries(np.tile(level * np.eye(n, dtype=np.int64), (repeats, 1)), num_levels):
        assert_bounds(found.eigenvalue, size**2 / n)
        assert_bounds(found.fourth, size**4 * (n - 1) / n**2)


# Patterns that repeat

KINDS = {
    "two": (2, 9, (0.3, 0.7)),
    "uneven": (6, 9, (0.5, 0.2, 0.15, 0.1, 0.04, 0.01)),
    "rare": (4, 540, (0.97, 0.01, 0.01, 0.01)),
    "alike": (7, 40, (1 / 7,) * 7),
}


def repeated(kind: str, rows: int, num_levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Patterns [c, n], and which of them each row is."""
    count, n, shares = KINDS[kind]
    rng = np.random.default_rng(rows + n)
    patterns = rng.integers(0, num_levels + 1, (count, n))
    if kind == "alike":
        patterns[1:] = patterns[:1]
        patterns[np.arange(count), np.arange(count)] += np.where(patterns[0, :count] == num_levels, -1, 1)
    which = rng.choice(count, rows, p=shares)
    which[:count] = np.arange(count)
    return patterns, which


def inner(a, b):
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def about(patterns: list[list[Fraction]], which: np.ndarray) -> tuple[list[list[Fraction]], list[Fraction], list[int]]:
    """Patterns less the mean of the rows, that mean, and how often each pattern occurs."""
    times = [int((which == c).sum()) for c in range(len(patterns))]
    mean = [
        sum(t * row[j] for t, row in zip(times, patterns, strict=True)) / len(which) for j in range(len(patterns[0]))
    ]
    return [[a - b for a, b in zip(row, mean, strict=True)] for row in patterns], mean, times


def top(products: list[list[Fraction]], times: list[int], power: int = 1):
    """The largest eigenvalue of the matrix of all rows, of entries to a power, over their number."""
    size = len(times)
    weighted = mp.matrix(size, size)
    for i in range(size):
        for j in range(size):
            weighted[i, j] = number(products[i][j] ** power) * mp.sqrt(times[i] * times[j])
    return max(0, *mp.eigsy(weighted, eigvals_only=True)) / sum(times)


@pytest.mark.parametrize("num_levels", [1, 15])
@pytest.mark.parametrize("rows", [13, 40, 520, 1101])
@pytest.mark.parametrize("kind", KINDS)
def test_patterns_that_repeat(kind: str, rows: int, num_levels: int) -> None:
    levels, which = repeated(kind, rows, num_levels)
    patterns = [[Fraction(int(v), num_levels) for v in row] for row in levels]
    centred, mean, times = about(patterns, which)
    products = [[inner(a, b) for b in centred] for a in centred]
    half = rows // 2
    first, start, early = about(patterns, which[:half])
    late = [int((which[half:] == c).sum()) for c in range(len(patterns))]
    crossed = [[inner(a, b) for b in first] for a in first]
    form = sum(
        (a * b * crossed[i][j] ** 2 for i, a in enumerate(late) for j, b in enumerate(early)), Fraction(0)
    ) / (half * (rows - half))  # fmt: skip
    size = float(max(inner(row, row) for row in patterns))
    for found in summaries(levels[which], num_levels):
        assert (found.rows, found.blocks) == (rows, 1)
        assert_bounds(found.eigenvalue, top(products, times), size)
        assert_bounds(found.fourth, top(products, times, 2), size**2)
        assert_bounds(found.half_eigenvalue, top(crossed, early), size)
        assert_bounds(found.norm2, number(inner(mean, mean)))
        assert_bounds(found.half_norm2, number(inner(start, start)))
        assert_bounds(found.half_mean, number(form), size**2)


SQUARES = (0.0625, 0.5)


@pytest.mark.parametrize("num_levels", [1, 15])
@pytest.mark.parametrize("rows", [13, 40, 520, 1101])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("near", [False, True], ids=["apart", "near each other"])
def test_shrunk_patterns(kind: str, rows: int, num_levels: int, near: bool) -> None:
    """W^2 = I - sum (1 - w_j^2) v_j v_j' has rational entries for directions of integers."""
    levels, which = repeated(kind, rows, num_levels)
    n = levels.shape[1]
    rng = np.random.default_rng(n)
    directions = rng.integers(-127, 128, (2, n))
    if near:
        directions[1] = np.clip(directions[0] + rng.integers(-16, 17, n), -127, 127)
    deflation = Deflation(torch.from_numpy(directions.astype(np.int8)), SQUARES)
    assert deflation.independent
    packed = pack_levels(torch.from_numpy(levels[which].astype(np.uint8)), num_levels)
    coordinates = deflation.coordinates(packed, num_levels)
    found = summarize_deflated(packed_gram(packed, num_levels), coordinates, SQUARES, num_levels)

    patterns = [[Fraction(int(v), num_levels) for v in row] for row in levels]
    centred, _, times = about(patterns, which)
    products = [[inner(a, b) for b in centred] for a in centred]
    one, two = ([Fraction(int(v)) for v in row] for row in directions)
    along = inner(one, two) / inner(one, one)
    for vector, square in zip((one, [b - along * a for a, b in zip(one, two, strict=True)]), SQUARES, strict=True):
        moved = [inner(vector, row) for row in centred]
        part = (1 - Fraction(square)) / inner(vector, vector)
        products = [
            [p - part * a * b for p, b in zip(row, moved, strict=True)] for row, a in zip(products, moved, strict=True)
        ]
    size = float(max(inner(row, row) for row in patterns))
    assert (found.rows, found.blocks, found.fewest) == (rows, 1, rows)
    assert_bounds(found.eigenvalue, top(products, times), size)
    assert_bounds(found.fourth, top(products, times, 2), size**2)
    if n <= rows // 2:
        scatter = Scatter.of_rows(packed, num_levels, n)
        assert_bounds(deflation.shrunk_eigenvalue(scatter), top(products, times), size)


def test_blocks_join_as_the_lemmas_say() -> None:
    """lambda^, kappa^ and w are means over all samples, ||a||, lambda_A and ||p^_b|| the largest."""
    parts = [GramSummary(20, 2, 3.0, 0.5, 0.25, 1.0, 2.0, 0.125), GramSummary(10, 1, 2.0, 2.0, 1.0, 3.0, 0.5, 0.5)]
    joined = parts[0].joined(parts[1])
    assert (joined.rows, joined.blocks, joined.norm2, joined.half_eigenvalue, joined.half_norm2) == (
        30,
        3,
        3.0,
        3.0,
        2.0,
    )
    means = {"eigenvalue": Fraction(1), "fourth": Fraction(1, 2), "half_mean": Fraction(1, 4)}
    for name, value in means.items():
        assert_bounds(getattr(joined, name), number(value))
    shrunk = DeflatedSummary(10, 1, 10, 1.0, 0.5).joined(DeflatedSummary(60, 2, 30, 0.125, 0.25))
    assert (shrunk.rows, shrunk.blocks, shrunk.fewest) == (70, 3, 10)
    assert_bounds(shrunk.eigenvalue, number(Fraction(10 + Fraction(60, 8), 70)))
    assert_bounds(shrunk.fourth, number(Fraction(5 + 15, 70)))


def test_an_eigenvector_that_lanczos_cannot_see() -> None:
    """It starts at right angles to the top one and converges to the second, which the factorisation refuses."""
    size = 600
    start = np.random.default_rng(0).standard_normal(size)
    hidden = np.random.default_rng(1).standard_normal(size)
    seen = start / np.linalg.norm(start)
    hidden -= seen * (seen @ hidden)
    hidden /= np.linalg.norm(hidden)
    matrix = torch.from_numpy(np.outer(seen, seen) + 2 * np.outer(hidden, hidden))
    assert 2 * (1 - 1e-12) <= largest_eigenvalue(matrix) <= 8


def test_squares_whose_power_method_stops_early() -> None:
    """Two classes of rows, one step of 1e-6 from the Perron vector: the largest quotient proves, not the smallest."""
    size, half = 600, 300
    for between in (0.9999995, 0.5, 1e-3, 1e-9):
        matrix = torch.full((size, size), math.sqrt(between), dtype=torch.float64)
        matrix[:half, :half], matrix[half:, half:] = 1.0, math.sqrt(1.0 - 3e-6)
        a, b, c = ((mpf(float(v)) + mpf(1e-12)) ** 2 for v in (1.0, matrix[0, -1], matrix[-1, -1]))
        truth = half * ((a + c) + mp.sqrt((a - c) ** 2 + 4 * b**2)) / 2
        found = largest_eigenvalue_of_squares_(matrix, 1e-12)
        assert truth <= mpf(found) <= truth * (1 + TIGHT)

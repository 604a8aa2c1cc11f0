"""Cases in which rounding alone would put a bound on the wrong side of the truth: each needs the term that pays for it.

They were searched for at random with that term left out. Truths are rational numbers, or have 40 digits.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from _lemmas import bounds_eigenvalues, cost
from mpmath import mp, mpf

from robattr_fast.certificates.moments.concentration import GramSummary, summarize_gram
from robattr_fast.certificates.moments.deflation import DeflatedSummary, Deflation, summarize_deflated
from robattr_fast.certificates.moments.eigenvalues import largest_eigenvalue, largest_eigenvalue_of_squares_
from robattr_fast.certificates.moments.least_moves import least_costs
from robattr_fast.certificates.moments.scatter import Scatter
from robattr_fast.certificates.moments.second_moment import SecondMoments, TopKCost

mp.dps = 40


def number(value: Fraction) -> mpf:
    return mpf(value.numerator) / value.denominator


def largest(matrix: list[list[Fraction]]) -> mpf:
    return max(mp.eigsy(mp.matrix([[number(x) for x in row] for row in matrix]), eigvals_only=True))


# Eigenvalues


@pytest.mark.parametrize(
    "matrix",
    [
        # The eigenvalue that counts is smaller, by nine digits, than the one that sets the size of the rounding.
        [[-80999999996, 27000000004], [27000000004, -8999999998]],
        [[-15999999998, 28000000001], [28000000001, -49000000000]],
        [[-8000000, -16000005], [-16000005, -31999999]],
        [[-999999996, -4999999997], [-4999999997, -24999999993]],
        [[-117000002, 117000004], [117000004, -116999996]],
        # A diagonal of zeros: nothing is factorised.
        [[0, -6, -2], [-6, 0, 6], [-2, 6, 0]],
        [[0, -3, -8, 5], [-3, 0, -7, 4], [-8, -7, 0, -2], [5, 4, -2, 0]],
        [[0, -6, -2, -1], [-6, 0, 9, -6], [-2, 9, 0, -4], [-1, -6, -4, 0]],
        [[0, 2, 2, 5], [2, 0, -1, -6], [2, -1, 0, -1], [5, -6, -1, 0]],
    ],
)
def test_largest_eigenvalue(matrix: list[list[int]]) -> None:
    assert bounds_eigenvalues(largest_eigenvalue(torch.tensor(matrix, dtype=torch.float64)), matrix)


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        (0.40847320541999865, 4.527519390244517e-11),
        (0.6523691115879877, 2.34510201669824e-10),
        (0.39240466433477816, 4.930230187317426e-10),
        (0.5555961169207234, 2.7145160453010154e-10),
    ],
)
def test_squares_of_equal_entries(entry: float, error: float) -> None:
    """All quotients are one sum of 512 rounded squares."""
    found = largest_eigenvalue_of_squares_(torch.full((512, 512), entry, dtype=torch.float64), error)
    truth = 512 * (Fraction(entry) + Fraction(error)) ** 2
    assert truth <= Fraction(found) <= truth * (1 + Fraction(1, 10**6))


def true_summary(gram: np.ndarray, num_levels: int) -> dict[str, mpf]:
    rows, half = len(gram), len(gram) // 2
    exact = [[Fraction(int(x), num_levels**2) for x in row] for row in gram]

    def about(first: int) -> tuple[list[list[Fraction]], Fraction]:
        sums = [sum(row[:first]) / first for row in exact]
        norm2 = sum(sums[:first]) / first
        return [[exact[i][j] - sums[i] - sums[j] + norm2 for j in range(first)] for i in range(rows)], norm2

    (centred, norm2), (crossed, half_norm2) = about(rows), about(half)
    return {
        "norm2": number(norm2),
        "eigenvalue": largest(centred) / rows,
        "fourth": largest([[x * x for x in row] for row in centred]) / rows,
        "half_eigenvalue": largest(crossed[:half]) / half,
        "half_norm2": number(half_norm2),
        "half_mean": number(sum(sum(x * x for x in row) for row in crossed[half:]) / (half * (rows - half))),
    }


@pytest.mark.parametrize("num_levels", [1, 3, 15])
@pytest.mark.parametrize("common", [0, 2096, 2000000098, 8000000014])
def test_samples_that_have_nearly_everything_in_common(common: int, num_levels: int) -> None:
    """Where the mean is long and the variation small, an entry of the centred matrix keeps few digits."""
    rng = np.random.default_rng(common + num_levels)
    for rows in (4, 6, 7, 8):
        apart = rng.integers(0, min(num_levels, 2) + 1, (rows, int(rng.integers(1, 5))))
        gram = apart @ apart.T + common
        found, truth = summarize_gram(torch.from_numpy(gram), num_levels), true_summary(gram, num_levels)
        for name, value in truth.items():
            assert mpf(getattr(found, name)) >= value, name


@pytest.mark.parametrize("num_levels", [1, 3, 15])
@pytest.mark.parametrize("common", [0, 2096, 2000000098, 8000000014])
def test_what_is_left_of_them_when_two_elements_are_shrunk(common: int, num_levels: int) -> None:
    rng = np.random.default_rng(common + num_levels)
    for rows in (4, 6, 7, 8):
        apart = rng.integers(0, min(num_levels, 2) + 1, (rows, 4))
        along = apart[:, :2] / num_levels
        found = summarize_deflated(
            torch.from_numpy(apart @ apart.T + common), torch.from_numpy(along), (0.25, 0.5), num_levels
        )
        centred = [[Fraction(int(x) * rows - int(s), num_levels * rows) for x, s in zip(row, apart.sum(0), strict=True)]
                   for row in apart]  # fmt: skip
        weights = (Fraction(1, 4), Fraction(1, 2), 1, 1)
        products = [[sum(w * x * y for w, x, y in zip(weights, a, b, strict=True)) for b in centred] for a in centred]
        assert mpf(found.eigenvalue) >= largest(products) / rows
        assert mpf(found.fourth) >= largest([[x * x for x in row] for row in products]) / rows


@pytest.mark.parametrize("seed", range(20))
def test_means_over_blocks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    (x, y), (a, b) = rng.random(2).tolist(), rng.integers(1, 9, 2).tolist()
    truth = (a * Fraction(x) + b * Fraction(y)) / (a + b)
    joined = GramSummary(8 * a, a, 1.0, x, x, 1.0, 1.0, x).joined(GramSummary(8 * b, b, 1.0, y, y, 1.0, 1.0, y))
    shrunk = DeflatedSummary(8 * a, a, 8, x, x).joined(DeflatedSummary(8 * b, b, 8, y, y))
    for found in (joined.eigenvalue, joined.fourth, joined.half_mean, shrunk.eigenvalue, shrunk.fourth):
        assert truth <= Fraction(found) <= truth * (1 + Fraction(1, 10**12))


def scatter(levels: np.ndarray) -> Scatter:
    held = torch.from_numpy(levels).to(torch.float64)
    return Scatter(len(levels), 15, held.sum(0), held.T @ held)


@pytest.mark.parametrize(
    ("rows", "along", "across", "base"),
    [
        (3884, [3, -1, -3, 1, -3], [3, 0, 2, 0, 1], [10, 7, 5, 4, 4]),
        (2094, [3, -2, -2, 1, -2, -2], [-3, -1, -3, 3, 1, 0], [11, 11, 8, 6, 4, 7]),
        (3524, [-1, 1, 2, -1, 0, 3], [-2, 1, 3, 0, 1, -3], [6, 7, 6, 11, 8, 4]),
        (3354, [0, 0, 1, 1, 0, -1], [1, -1, 0, 1, 0, 1], [10, 5, 5, 6, 4, 9]),
    ],
)
def test_mean_form_of_halves_at_right_angles(rows: int, along: list, across: list, base: list) -> None:
    """w of lemma 5 is 0, a difference of products near 2^60."""
    rng = np.random.default_rng(rows)
    signs = rng.choice([-1, 1], (rows, 1))
    signs[1::2] = -signs[::2]
    first = np.array(base) + signs * np.array(along)
    other = np.array(base) + rng.choice([-1, 1], (rows, 1)) * np.array(across)
    assert np.dot(along, across) == 0
    assert 0 <= scatter(first).mean_form(scatter(other)) < 1e-15


@pytest.mark.parametrize(
    ("rows", "directions", "base"),
    [
        (157, [[-2, 1, 0, 1], [-1, 1, -2, -2]], [6, 7, 9, 8]),
        (32, [[2, 2, 1, 1], [-2, 1, 2, -1]], [6, 8, 7, 7]),
        (32, [[-1, 1, 1, 0], [1, -2, 1, 2]], [8, 6, 9, 6]),
        (127, [[1, 2, 1, 0, -2], [-2, -1, -1, 2, -2]], [9, 7, 8, 8, 7]),
        (190, [[0, -1, -2, 0], [2, 1, 2, 0]], [6, 7, 8, 8]),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_all_of_the_variation_is_shrunk(rows: int, directions: list, base: list, seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = np.array(directions)
    levels = np.array(base) + rng.integers(-1, 2, (rows, 1)) * one + rng.integers(-1, 2, (rows, 1)) * two
    squares = (1e-8, 1e-8)
    deflation = Deflation(torch.from_numpy((50 * np.array(directions)).astype(np.int8)), squares)
    found = deflation.shrunk_eigenvalue(scatter(levels))
    about = mp.matrix((rows * levels - levels.sum(0)).tolist()) / (15 * rows)
    first, second = mp.matrix(one.tolist()), mp.matrix(two.tolist())
    second = second - (first.T * second)[0] / (first.T * first)[0] * first
    shrink = mp.eye(len(base))
    for vector, square in zip((first, second), squares, strict=True):
        shrink -= (1 - mp.sqrt(mpf(square))) * vector * vector.T / (vector.T * vector)[0]
    moved = about * shrink
    assert max(mp.eigsy(moved.T * moved, eigvals_only=True)) / rows <= mpf(found)


# Costs


@pytest.mark.parametrize(
    ("mean", "k"),
    [([0.5] * 8, 3), (np.array([7, 6, 0, 6, 6]) / 7, 4), (np.array([3, 8, 8, 8, 2, 0, 0]) / 7, 3)],
)
def test_least_cost_of_ties(mean: list, k: int) -> None:
    check_costs(np.array(mean), k)


@pytest.mark.parametrize("seed", range(30))
def test_least_costs(seed: int) -> None:
    """Counts over q, values that hardly differ, and values near 1."""
    rng = np.random.default_rng(seed)
    n, q = int(rng.integers(3, 12)), int(rng.choice([7, 100, 8192]))
    counts = rng.integers(0, q + 1, n) / q
    k = int(rng.integers(1, n))
    for mean in (counts, 0.5 + 1e-6 * counts, 1 - 10.0 ** -rng.integers(1, 9) * counts):
        check_costs(mean, k)
        order = np.sort(mean)[::-1]
        sizes = np.arange(1, min(k, n - k) + 1)
        out, into = order[k - len(sizes) : k][::-1].copy(), -order[k : k + len(sizes)]
        for s, bound in zip(sizes, least_costs(out, into, sizes), strict=True):
            truth = cost(out[:s], -into[:s])
            assert truth * (1 - Fraction(1, 10**5)) - Fraction(1, 10**14) <= Fraction(float(bound)) <= truth


def check_costs(mean: np.ndarray, k: int) -> None:
    order = np.sort(mean)[::-1]
    for s, bound in enumerate(TopKCost(torch.from_numpy(mean), k).costs, 1):
        truth = cost(order[k - s : k], order[k : k + s])
        assert Fraction(float(bound)) <= truth
        assert Fraction(float(bound)) >= truth * (1 - Fraction(1, 10**9)) - Fraction(1, 10**13)


@pytest.mark.parametrize(("seed", "size"), [(1017, 22), (1118, 25), (1317, 18), (2353, 19), (2423, 15)])
def test_least_costs_where_newton_stops_early(seed: int, size: int) -> None:
    """Its iteration ends at a relative 1e-6; what is left of the slope makes the value there a lower bound."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(12, 26))
    leaving = np.sort(rng.random(n) ** rng.integers(1, 9) * rng.choice([1, 10]))
    entering = np.sort(-(rng.random(n) ** rng.integers(1, 9)) * rng.choice([0.1, 0.5, 1, 2]))
    # All sizes at once, as they were found: the last to settle decides how often the others are refined.
    found = Fraction(float(least_costs(leaving, entering, np.arange(1, n + 1))[size - 1]))
    truth = cost(leaving[:size], -entering[:size])
    assert truth * (1 - Fraction(1, 10**5)) - Fraction(1, 10**14) <= found <= truth


# Statements


@pytest.mark.parametrize("seed", range(40))
def test_radius_and_cosine_are_rounded_inwards(seed: int) -> None:
    rng = np.random.default_rng(seed)
    error, spectral = 3 * rng.random(), 9 * rng.random()
    wanted = error + 5 * rng.random()
    moments = SecondMoments(float(rng.choice([0.2, 0.7])), 512, 100, 50.0, 0.0, error, spectral, 1.0, spectral)
    for radius in (moments.radius(wanted), moments.deflated_radius(wanted)):
        moved = mp.sqrt(mp.expm1((mpf(radius) / mpf(moments.sigma)) ** 2)) * mp.sqrt(mpf(spectral))
        assert mpf(error) + moved < wanted
    for distance in (rng.random(), 1 - 1e-3 * rng.random(), 1 - 1e-9 * rng.random(), math.nextafter(1, 0)):
        found = SecondMoments(1.0, 512, 100, 1.0, 0.0, distance, 0.0, 0.0).cosine(0.0)
        truth = mp.sqrt(1 - mpf(distance) ** 2)
        assert truth * (1 - mpf(10) ** -14) <= found <= truth


@pytest.mark.parametrize("seed", range(40))
def test_overlap_at_a_distance_whose_square_is_a_cost(seed: int) -> None:
    """cost(s) = M^2 claims nothing, however M^2 is rounded."""
    rng = np.random.default_rng(seed)
    costs = TopKCost(torch.from_numpy(rng.random(20)), 8)
    for s, value in enumerate(costs.costs, 1):
        distance = math.sqrt(value)
        while Fraction(distance) ** 2 < Fraction(float(value)):
            distance = math.nextafter(distance, math.inf)
        assert costs.overlap(distance) <= 8 - s
        nearest = costs.distance(8 - s + 1)
        assert Fraction(nearest) ** 2 < Fraction(float(value))
        assert costs.overlap(nearest) == 8 - s + 1

"""T7 from matrices of elements, where these are fewer than the samples: the numbers of the Gram matrix, proved too."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from _larger import larger

import robattr_fast as rf
from robattr_fast.certificates.moments.concentration import GramSummary, summarize_gram
from robattr_fast.certificates.moments.deflation import Deflation, summarize_deflated
from robattr_fast.certificates.moments.eigenvalues import largest_eigenvalue
from robattr_fast.certificates.moments.scatter import Scatter
from robattr_fast.certificates.moments.summary import Summary
from robattr_fast.certificates.verify.counts import sample_faults
from robattr_fast.reference import pack_levels, packed_gram

TIGHT = 2e-6
SHAPES = {
    "small": (40, 12),
    "odd rows": (41, 9),
    "n = m": (30, 30),
    "n = m - 1": (31, 30),
    "one element": (16, 1),
}
LARGE_SHAPES = {"large": (1500, 600), "n = m, large": (560, 560)}
KINDS = ("random", "ties", "equal rows", "zero rows", "few patterns")


def made(kind: str, rows: int, n: int, num_levels: int) -> np.ndarray:
    """uint8 levels [rows, n]."""
    rng = np.random.default_rng(rows + n + num_levels)
    levels = rng.integers(0, num_levels + 1, (rows, n))
    if kind == "random":
        moved = rng.uniform(-1, 1, (rows, 2)) @ rng.choice([-0.4, 0.4], (2, n)) + rng.beta(0.5, 2.0, n)
        levels = np.clip(np.floor(num_levels * moved + rng.random((rows, n))), 0, num_levels)
    if kind == "ties":
        levels = np.repeat(levels[: -(-rows // 3)], 3, axis=0)[:rows]
    if kind == "equal rows":
        levels = np.repeat(levels[:1], rows, axis=0)
    if kind == "zero rows":
        levels[rng.random(rows) < 0.7] = 0
    if kind == "few patterns":
        levels = levels[rng.integers(0, 3, rows)]
    return levels.astype(np.uint8)


def both(levels: np.ndarray, num_levels: int) -> tuple[torch.Tensor, Scatter, Scatter]:
    """Gram matrix, and the scatter of each half."""
    rows, n = levels.shape
    packed = pack_levels(torch.from_numpy(levels), num_levels)
    halves = (Scatter.of_rows(part, num_levels, n) for part in (packed[: rows // 2], packed[rows // 2 :]))
    return packed_gram(packed, num_levels), *halves


def covariance(maps: np.ndarray) -> np.ndarray:
    about = maps - maps.mean(0)
    return about.T @ about / len(maps)


@pytest.mark.parametrize("num_levels", [1, 15])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, *larger(*LARGE_SHAPES)])
def test_the_summary_is_that_of_the_gram_matrix(shape: str, kind: str, num_levels: int) -> None:
    levels = made(kind, *(SHAPES | LARGE_SHAPES)[shape], num_levels)
    gram, first, second = both(levels, num_levels)
    by_elements = summarize_gram(gram, num_levels, (first, second))
    by_rows = summarize_gram(gram, num_levels)
    # Of equal rows nothing is left but rounding, which a matrix of elements has not.
    noise = 1e-12 * max(float(gram.diagonal().max()), 1.0) ** 2
    for field in dataclasses.fields(GramSummary):
        found = getattr(by_elements, field.name)
        assert found == pytest.approx(getattr(by_rows, field.name), rel=TIGHT, abs=noise), field.name
    maps = levels / num_levels
    half = maps[: len(maps) // 2]
    about = maps[len(half) :] - half.mean(0)
    least = {
        "eigenvalue": np.linalg.eigvalsh(covariance(maps))[-1],
        "half_eigenvalue": np.linalg.eigvalsh(covariance(half))[-1],
        "half_mean": np.einsum("ti,ij,tj->t", about, covariance(half), about, optimize=True).mean(),
        "half_norm2": (half.mean(0) ** 2).sum(),
        "norm2": (maps.mean(0) ** 2).sum(),
    }
    for name, value in least.items():
        assert getattr(by_elements, name) >= value * (1 - 1e-12) - 1e-15, name


@pytest.mark.parametrize("num_levels", [1, 15])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["small", "n = m", *larger(*LARGE_SHAPES)])
def test_the_shrunk_eigenvalue_is_that_of_the_gram_matrix(shape: str, kind: str, num_levels: int) -> None:
    rows, n = (SHAPES | LARGE_SHAPES)[shape]
    levels = made(kind, rows, n, num_levels)
    gram, first, second = both(levels, num_levels)
    directions = np.random.default_rng(5).integers(-127, 128, (2, n)).astype(np.int8)
    deflation = Deflation(torch.from_numpy(directions), (0.3, 0.6))
    assert deflation.independent
    found = deflation.shrunk_eigenvalue(first.joined(second))
    coordinates = deflation.coordinates(pack_levels(torch.from_numpy(levels), num_levels), num_levels)
    by_rows = summarize_deflated(gram, coordinates, deflation.squares, num_levels)
    noise = 1e-12 * max(float(gram.diagonal().max()), 1.0)
    assert found == pytest.approx(by_rows.eigenvalue, rel=TIGHT, abs=noise)
    basis = deflation.basis
    shrink = np.eye(n) - basis.T @ np.diag(1 - np.sqrt(deflation.squares)) @ basis
    exact = np.linalg.eigvalsh(shrink @ covariance(levels / num_levels) @ shrink)[-1]
    assert found >= exact * (1 - 1e-12) - 1e-15
    given = summarize_deflated(gram, coordinates, deflation.squares, num_levels, found)
    assert given == dataclasses.replace(by_rows, eigenvalue=found)


def test_integers_of_the_largest_block_are_exact() -> None:
    """8192 samples of level 15 but one: m D'D is a difference of integers near 2^54 / m."""
    levels = np.full((8192, 3), 15, np.uint8)
    levels[0, 0] = 14
    _, first, second = both(levels, 15)
    expected = np.zeros((3, 3))
    expected[0, 0] = 8191
    assert np.array_equal(first.joined(second).centred().numpy(), expected)


@pytest.mark.parametrize("num_levels", [1, 15])
def test_pilots_choose_the_same_directions(num_levels: int) -> None:
    levels = made("random", 700, 300, num_levels)
    gram, first, second = both(levels, num_levels)
    packed = pack_levels(torch.from_numpy(levels), num_levels)
    by_rows = Deflation.from_pilots(packed, gram, num_levels, 300)
    by_elements = Deflation.from_pilots(packed, gram, num_levels, 300, first.joined(second))
    assert by_rows is not None
    assert by_elements is not None
    assert torch.equal(by_elements.directions, by_rows.directions)
    assert by_elements.squares == pytest.approx(by_rows.squares, rel=1e-9)
    equal = np.repeat(levels[:1], 700, axis=0)
    gram, first, second = both(equal, num_levels)
    packed = pack_levels(torch.from_numpy(equal), num_levels)
    assert Deflation.from_pilots(packed, gram, num_levels, 300, first.joined(second)) is None


@pytest.mark.parametrize(("n", "by_elements"), [(3, False), (4, True), (32, True), (33, False)])
def test_elements_are_taken_where_they_are_fewer(monkeypatch: pytest.MonkeyPatch, n: int, by_elements: bool) -> None:
    seen = []
    of_rows = Scatter.of_rows
    monkeypatch.setattr(Scatter, "of_rows", lambda *arguments: seen.append(1) or of_rows(*arguments))
    packed = pack_levels(torch.from_numpy(made("random", 192, n, 1)), 1)
    Summary.of_rows(packed, 192, 64, 1, n, 0)
    assert bool(seen) == by_elements


def by_gram_matrices(cert: rf.Certificate, monkeypatch: pytest.MonkeyPatch) -> rf.Certificate:
    """The certificate with the second moments that files had before elements were looked at."""
    monkeypatch.setattr(Summary, "_has_fewer_elements", lambda *_: False)
    (packed,), settings = cert.packed, cert.settings
    summary, directions = Summary.of_rows(
        packed, len(packed), settings.retain, settings.levels, settings.n, 0
    ).to_tensors()
    monkeypatch.undo()
    held = {**cert.tensors, "gram_summary": summary[None], "directions": directions[None]}
    return rf.Certificate(**held, settings=settings)


def test_files_of_gram_matrices_alone_still_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 20), torch.nn.Tanh(), torch.nn.Linear(20, 4))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.rand(1, 1, 8, 8)
    cert = rf.certify(model.eval(), x, sigma=0.3, samples=2048, retain=640, batch_size=64, keep_samples=True)
    earlier = by_gram_matrices(cert, monkeypatch)
    assert not torch.equal(earlier.gram_summary, cert.gram_summary)
    assert sample_faults(cert) == []
    assert sample_faults(earlier) == []
    for radius in (0.02, 0.1):
        assert cert.distance(radius).item() == pytest.approx(earlier.distance(radius).item(), rel=1e-6)
        assert cert.overlap(12, radius).share.item() == earlier.overlap(12, radius).share.item()
    earlier.gram_summary[0, 3] *= 1 - 1e-4
    assert len(sample_faults(earlier)) == 1


def test_eigenvalues_that_crowd_at_the_top_are_as_tight():
    """Lanczos does not separate them in its steps."""
    size = 600
    matrix = torch.diag(torch.full((size,), 2.0, dtype=torch.float64))
    beside = torch.full((size - 1,), -1.0, dtype=torch.float64)
    matrix += torch.diag(beside, 1) + torch.diag(beside, -1)
    exact = 2 - 2 * math.cos(math.pi * size / (size + 1))
    assert exact <= largest_eigenvalue(matrix) <= exact * (1 + 1e-6)

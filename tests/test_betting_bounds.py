"""Betting bounds on every backend against their definition in extended precision, and their coverage."""

import math

import numpy as np
import pytest
import torch
from _larger import larger
from _operators import INTERPRETED, at_isa, backend, needs_extension
from mpmath import mp, mpf
from scipy.stats import binom

from robattr_fast import backends, betting_bounds
from robattr_fast.certificates.theorems.bounds import marginal_bounds
from robattr_fast.reference.betting_bounds import betting_shares, log_wealth

__all__ = ["backend"]


def random_counts(rows: int, levels: int, samples: int, seed: int = 0) -> torch.Tensor:
    """int32 [1, rows, levels]: multinomial with all kinds of skew, the extreme rows among them."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(levels + 1, 0.3), size=rows)
    counts = np.stack([rng.multinomial(samples, share) for share in shares])
    counts[0], counts[1] = 0, 0
    counts[0, 0] = counts[1, levels] = samples
    return torch.tensor(counts[None, :, 1:], dtype=torch.int32)


def defined_log_wealth(counts: np.ndarray, samples: int, mean: np.longdouble) -> np.longdouble:
    """ln W of one element, literally: the mean over j of the product over all levels."""
    levels = len(counts)
    all_counts = [samples - counts.sum(), *counts]
    logs = []
    for share in betting_shares(torch.device("cpu")).tolist():
        b = np.longdouble(share)
        logs.append(sum(np.longdouble(c) * np.log((1 - b) + b * v / levels / mean) for v, c in enumerate(all_counts)))
    largest = max(logs)
    return largest + np.log(sum(np.exp(value - largest) for value in logs)) - np.log(np.longdouble(len(logs)))


@pytest.mark.parametrize("levels", [*larger(1, 3, when=INTERPRETED), 15])
@pytest.mark.parametrize(
    ("samples", "delta"), [(1, 0.4), *larger((64, 1e-2), (8192, 1e-7), when=INTERPRETED), (65536, 0.05 / 301056)]
)
def test_the_root_is_exact_and_rounded_outwards(backend, levels, samples, delta):
    counts = random_counts(40, levels, samples)
    lower, upper = betting_bounds(counts, samples, delta)
    mirrored = np.concatenate([samples - counts[0].sum(1, keepdim=True), counts[0]], 1)[:, ::-1][:, 1:]
    for element in range(counts.shape[1]):
        for values, bound, rounding in (
            (counts[0, element].numpy(), np.longdouble(lower[0, element].item()), 0),
            (mirrored[element], 1 - np.longdouble(upper[0, element].item()), 3e-16),
        ):
            if values.sum() == 0:
                assert bound == 0
                continue
            excess = defined_log_wealth(values, samples, bound) + np.log(np.longdouble(delta))
            # d ln W / d m is at most q / m in absolute value; 1 - m cannot be closer than one ulp of 1.
            assert 0 <= excess < 1e-8 + samples * rounding / float(bound)


def reaches(counts: list[int], samples: int, mean: mpf, delta: float) -> bool:
    """Whether W(mean) >= 1/delta, to 40 digits; counts of the levels 1..L."""
    unit = 1 / (len(counts) * mean)
    terms = [(level, count) for level, count in enumerate([samples - sum(counts), *counts]) if count]
    shares = [mpf(b) for b in betting_shares(torch.device("cpu")).tolist()]
    wealth = mp.fsum(mp.fprod((1 - b + b * level * unit) ** count for level, count in terms) for b in shares)
    return wealth * mpf(delta) >= len(shares)


@pytest.mark.parametrize(
    ("levels", "samples", "delta"),
    [(1, 30, 0.999), (1, 5000, 1e-7), (4, 1, 0.4), (4, 900, 1e-300), (15, 20, 1e-4), (15, 8192, 1e-7)],
)
def test_never_inside_the_exact_bounds(backend, levels, samples, delta):
    """W falls in the mean, and is 1/delta at the exact bound: above that at ours, below it 1e-9 further in."""
    counts = random_counts(20, levels, samples, seed=samples)
    lower, upper = betting_bounds(counts, samples, delta)
    mirrored = torch.cat([samples - counts.sum(2, keepdim=True), counts], 2).flip(2)[:, :, 1:]
    with mp.workdps(40):
        lower = [mpf(bound) for bound in lower[0].tolist()]
        complement = [1 - mpf(bound) for bound in upper[0].tolist()]
        for rows, bounds, rounding in ((counts, lower, mpf(0)), (mirrored, complement, mpf("3e-16"))):
            for row, found in zip(rows[0].tolist(), bounds, strict=True):
                if not any(row):
                    assert found == 0
                    continue
                assert found <= 0 or reaches(row, samples, found, delta)
                further = max(found * (1 + mpf("1e-9")) + rounding, mpf("1e-279"))
                assert not reaches(row, samples, further, delta)


def assert_agree(counts, samples, delta):
    needs_extension()
    found = {}
    for name in ("reference", "cpu"):
        with backends.use(name, strict=True):
            found[name] = betting_bounds(counts, samples, delta)
    (lower, upper), (expected_lower, expected_upper) = found["cpu"], found["reference"]
    torch.testing.assert_close(lower, expected_lower, rtol=1e-9, atol=1e-279)
    torch.testing.assert_close(1 - upper, 1 - expected_upper, rtol=1e-9, atol=3e-16)
    assert (lower <= upper).all()


@pytest.mark.parametrize("delta", [1e-300, 1e-7, 0.3, 0.999])
@pytest.mark.parametrize(("levels", "samples"), [(1, 700), (2, 1), (7, 100), (15, 15), (15, 8192), (15, 2**31 - 1)])
def test_kernel_agrees_with_the_definition(levels, samples, delta):
    assert_agree(random_counts(100, levels, samples, seed=levels), samples, delta)


@pytest.mark.parametrize("delta", [1e-300, 1e-4, 0.999])
def test_kernel_agrees_on_rows_at_the_edge(delta):
    """All samples at one level; one sample; one sample away from all others; each level once."""
    levels, samples = 15, 300
    all_at = torch.eye(levels, dtype=torch.int32) * samples
    one_at = torch.eye(levels, dtype=torch.int32)
    all_but_one = all_at - torch.eye(levels, dtype=torch.int32)
    one_at_the_top = all_but_one.clone()
    one_at_the_top[:-1, -1] += 1
    each = torch.ones(1, levels, dtype=torch.int32)
    rows = torch.cat([all_at, one_at, all_but_one, one_at_the_top, each, torch.zeros_like(each)])
    assert_agree(rows[None], samples, delta)
    single = torch.cat([one_at, torch.zeros_like(each)])
    assert_agree(single[None], 1, delta)


def test_equal_rows_and_any_strides(backend):
    counts = random_counts(40, 15, 500)
    repeated = counts.repeat(1, 3, 1)
    both = betting_bounds(counts, 500, 1e-5), betting_bounds(repeated, 500, 1e-5)
    for once, thrice in zip(*both, strict=True):
        torch.testing.assert_close(thrice, once.repeat(1, 3), rtol=1e-9, atol=0)
    strided = counts.transpose(1, 2).contiguous().transpose(1, 2)
    for once, again in zip(both[0], betting_bounds(strided, 500, 1e-5), strict=True):
        assert torch.equal(once, again)


def test_no_elements(backend):
    lower, upper = betting_bounds(torch.zeros(2, 0, 3, dtype=torch.int32), 5, 0.1)
    assert lower.shape == upper.shape == (2, 0)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_same_bits_at_every_instruction_set_and_number_of_threads(isa):
    cases = [(1, 900, 1e-6), (3, 40, 0.9), (15, 8192, 1e-7), (15, 50, 1e-300)]
    cases = [(random_counts(700, levels, samples), samples, delta) for levels, samples, delta in cases]
    before = torch.get_num_threads()
    for counts, samples, delta in cases:
        with at_isa("baseline"):
            expected = betting_bounds(counts, samples, delta)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                with at_isa(isa):
                    assert all(map(torch.equal, betting_bounds(counts, samples, delta), expected))
            finally:
                torch.set_num_threads(before)


def test_opcheck():
    arguments = random_counts(5, 3, 60), torch.tensor([60]), 0.01
    torch.library.opcheck(torch.ops.robattr_fast.betting_bounds.default, arguments)


def test_compile():
    counts = random_counts(50, 3, 60)
    compiled = torch.compile(lambda c: sum(betting_bounds(c * 2, 120, 0.01)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(counts), sum(betting_bounds(counts * 2, 120, 0.01)))


def test_certificates_use_the_operator(monkeypatch):
    used = []
    implementation = backends.choose("betting_bounds", torch.device("cpu"), torch.int32)[1]
    recorded = backends.Implementation(
        lambda *args, out: used.append(len(args)) or implementation(*args, out=out), lambda *_: (True, "")
    )
    monkeypatch.setitem(backends._registry["betting_bounds"], "cpu", recorded)
    with backends.use("cpu"):
        marginal_bounds("betting", 0.1, random_counts(3, 1, 9), torch.tensor([9]))
    assert used


def test_log_wealth_is_the_definition():
    counts = random_counts(20, 3, 500)
    mean = torch.rand(1, 20, dtype=torch.float64) * 0.9 + 0.05
    pairs = zip(counts[0].numpy(), mean[0].tolist(), strict=True)
    expected = np.array([defined_log_wealth(c, 500, np.longdouble(m)) for c, m in pairs], dtype=np.float64)
    np.testing.assert_allclose(log_wealth(counts, 500, mean)[0], expected, rtol=1e-12, atol=1e-11)


def test_images_have_their_own_number_of_samples(backend):
    counts = torch.cat([random_counts(30, 1, 50), random_counts(30, 1, 900, seed=1)])
    together = betting_bounds(counts, torch.tensor([50, 900]), 0.01)
    for image, samples in enumerate((50, 900)):
        alone = betting_bounds(counts[image : image + 1], samples, 0.01)
        assert all(torch.equal(a[image], b[0]) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("levels", [1, 4])
def test_chunks_and_tables_do_not_change_the_result(backend, levels):
    rows = 300 if INTERPRETED else 8000
    counts = random_counts(rows, levels, 300)
    lower, upper = betting_bounds(counts, 300, 1e-4)
    some = torch.tensor([0, 1, 7, rows // 2 - 1, rows - 1])
    few = betting_bounds(counts[:, some], 300, 1e-4)
    torch.testing.assert_close((lower[:, some], upper[:, some]), few, rtol=1e-9, atol=1e-15)


def test_two_levels_of_a_finer_scale_are_one_level(backend):
    coarse = random_counts(50, 1, 200)
    fine = torch.zeros(1, 50, 5, dtype=torch.int32)
    fine[:, :, 4] = coarse[:, :, 0]
    torch.testing.assert_close(betting_bounds(fine, 200, 0.01), betting_bounds(coarse, 200, 0.01), rtol=1e-9, atol=0)


@pytest.mark.parametrize("levels", [1, 3])
def test_monotone_in_the_counts(backend, levels):
    samples = 200
    counts = random_counts(100 if INTERPRETED else 500, levels, samples)
    with_zero = torch.cat([samples - counts.sum(2, keepdim=True), counts], 2)
    before = betting_bounds(counts, samples, 0.01)
    for level in range(levels):
        raised = with_zero.clone().int()
        moved = with_zero[:, :, level] > 0
        raised[:, :, level] -= moved.int()
        raised[:, :, level + 1] += moved.int()
        after = betting_bounds(raised[:, :, 1:].contiguous(), samples, 0.01)
        for low, high in zip(before, after, strict=True):
            assert (high[moved] > low[moved] - 1e-12).all()
            assert (high[moved] > low[moved]).any()


@pytest.mark.parametrize("levels", [1, 3])
def test_edges(backend, levels):
    zero, full = torch.zeros(1, 2, levels, dtype=torch.int32), torch.zeros(1, 2, levels, dtype=torch.int32)
    full[:, :, -1] = 700
    lower, upper = betting_bounds(zero, 700, 0.01)
    assert (lower == 0).all()
    # All samples at one end: W has a closed form in m, to be checked at the other bound's complement.
    at_full = betting_bounds(full, 700, 0.01)
    assert (at_full[1] == 1).all()
    torch.testing.assert_close(at_full[0], 1 - upper, rtol=1e-12, atol=0)
    assert (upper > 0).all()
    assert (upper < 0.02).all()
    lower, upper = betting_bounds(zero, 0, 0.01)
    assert (lower == 0).all()
    assert (upper == 1).all()
    extreme = betting_bounds(torch.ones(1, 1, levels, dtype=torch.int32), levels, 1e-300)
    assert 0 <= extreme[0].item() < 1e-60
    assert extreme[1].item() == 1


def test_nothing_but_rounding_lies_between_the_bounds_and_their_limits(backend):
    counts = torch.arange(0, 2001, dtype=torch.int32)[None, :, None]
    lower, upper = betting_bounds(counts, 2000, 0.05)
    mean = counts[0, :, 0].double() / 2000
    assert (lower[0] <= mean).all()
    assert (upper[0] >= mean).all()
    assert (lower[0, 1:] < mean[1:]).all()


@pytest.mark.parametrize("samples", [64, 1024, 16384, 65536])
@pytest.mark.parametrize("log_inverse_delta", [6.0, 16.4])
def test_cost_of_the_grid(backend, samples, log_inverse_delta):
    """q kl(mean, bound) exceeds ln(1/delta) by at most 3.7 nats, as the definition of the grid claims."""
    means = torch.tensor([1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 0.99, 0.999, 1.0])
    counts = (means.double() * samples).round().int()
    counts = counts[counts > 0][None, :, None]
    lower, _ = betting_bounds(counts, samples, math.exp(-log_inverse_delta))
    p, m = counts[0, :, 0].double() / samples, lower[0]
    nats = samples * (torch.xlogy(p, p / m) + torch.special.xlogy(1 - p, (1 - p) / (1 - m)))
    assert (nats - log_inverse_delta).max() < 3.75
    assert (nats > log_inverse_delta).all()


def stopped_when_wrong(bound: str, shares: tuple[float, ...], delta: float) -> tuple[int, int]:
    """Of 2000 runs, in how many the lower, and the upper, bound is wrong at any of 20 looks."""
    levels = len(shares) - 1
    mean = sum(level * share for level, share in enumerate(shares)) / levels
    rng = np.random.default_rng(1)
    counts = np.zeros((2000, levels + 1), dtype=np.int32)
    wrong = torch.zeros(2, 2000, dtype=torch.bool)
    for look in range(1, 21):
        counts += rng.multinomial(25, shares, size=2000).astype(np.int32)
        values = torch.from_numpy(counts[None, :, 1:].copy())
        lower, upper = marginal_bounds(bound, delta, values, torch.tensor([25 * look]))
        wrong |= torch.cat([lower > mean, upper < mean])
    low, high = wrong.sum(1).tolist()
    return low, high


@pytest.mark.parametrize("shares", [(0.97, 0.03), (0.5, 0.5), (0.1, 0.9), (0.8, 0.1, 0.1), (0.3, 0.1, 0.6)])
def test_coverage_at_adversarial_stopping_times(shares):
    assert max(stopped_when_wrong("betting", shares, 0.05)) <= binom.ppf(0.9999, 2000, 0.05)


def test_a_bound_for_fixed_sizes_does_not_survive_stopping():
    """The same simulation convicts Clopper-Pearson: it can tell a valid bound from one that is not."""
    assert min(stopped_when_wrong("clopper-pearson", (0.5, 0.5), 0.05)) > 2 * binom.ppf(0.9999, 2000, 0.05)


def test_wealth_is_a_martingale():
    """E W = 1 at the true mean, by summation over all outcomes."""
    samples, p = 60, 0.3
    counts = torch.arange(samples + 1, dtype=torch.int32)[None, :, None]
    wealth = log_wealth(counts, samples, torch.full((1, samples + 1), p, dtype=torch.float64)).exp()[0]
    probability = torch.from_numpy(binom.pmf(np.arange(samples + 1), samples, p))
    assert float(wealth @ probability) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("counts", "samples", "delta", "error", "words"),
    [
        (torch.tensor([[[3]]], dtype=torch.int32), 2, 0.1, ValueError, "more than samples"),
        (torch.tensor([[[1, 2]]], dtype=torch.int32), 2, 0.1, ValueError, "more than samples"),
        (torch.tensor([[[-1]]], dtype=torch.int32), 2, 0.1, ValueError, "negative"),
        (torch.tensor([[[1]]], dtype=torch.int32), -1, 0.1, ValueError, "samples"),
        (torch.tensor([[[1]]], dtype=torch.int32), 2**31, 0.1, ValueError, "at most 2147483647"),
        (torch.tensor([[[1]]], dtype=torch.int32), 2, 0.0, ValueError, "delta"),
        (torch.tensor([[[1]]], dtype=torch.int32), 2, 1.0, ValueError, "delta"),
        (torch.tensor([[[1]]], dtype=torch.int32), 2, math.nan, ValueError, "delta"),
        (torch.tensor([[1]], dtype=torch.int32), 2, 0.1, ValueError, "counts"),
        (torch.zeros(0, 3, 1, dtype=torch.int32), 2, 0.1, ValueError, "counts"),
        (torch.zeros(1, 3, 16, dtype=torch.int32), 2, 0.1, ValueError, r"takes an integer in \[1, 15\]"),
        ([[[1]]], 2, 0.1, TypeError, "int32"),
        (torch.tensor([[[1]]]), 2, 0.1, TypeError, "int32"),
        (torch.tensor([[[1]]], dtype=torch.int32), 2.0, 0.1, TypeError, "samples"),
        (torch.tensor([[[1]]], dtype=torch.int32), torch.tensor([2, 2]), 0.1, ValueError, "samples"),
        (torch.tensor([[[1]]], dtype=torch.int32), torch.tensor([2.0]), 0.1, TypeError, "samples"),
    ],
)
def test_refused(backend, counts, samples, delta, error, words):
    with pytest.raises(error, match=words):
        betting_bounds(counts, samples, delta)

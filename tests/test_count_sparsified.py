"""`count_sparsified_` on every backend: exact counts."""

import numpy as np
import pytest
import torch
from _larger import larger
from _operators import (
    FEWER_DTYPES,
    INTERPRETED,
    KINDS,
    LONG_KINDS,
    LONG_ROW,
    ON_GPU,
    ON_HOST,
    ROW,
    backend,
    examples,
    larger_interpreted,
    make_row,
    sorted_levels,
    takes_views,
)
from hypothesis import given
from hypothesis import strategies as st

import robattr_fast as rf
from robattr_fast.reference import pack_levels
from robattr_fast.reference._pack_levels import packed_row_bytes
from robattr_fast.reference._select import selected

pytestmark = pytest.mark.wheel

__all__ = ["backend"]


def count(scores, tau, gamma=None, levels=1):
    counts = torch.zeros(scores.shape[0], scores.shape[2], levels, dtype=torch.int32)
    return counts, rf.count_sparsified_(counts, scores, tau, gamma)


def pack(scores, tau, gamma=None, levels=1):
    counts = torch.zeros(scores.shape[0], scores.shape[2], levels, dtype=torch.int32)
    packed = torch.full(
        (*scores.shape[:2], packed_row_bytes(scores.shape[2], levels)), 255, dtype=torch.uint8
    )  # a byte that nobody writes stays 255
    invalid = rf.count_sparsified_(counts, scores, tau, gamma, packed=packed)
    return counts, invalid, packed


def expected_packed(scores, tau, gamma, levels):
    """Packed levels by sorting each row."""
    n = scores.shape[2]
    found = [sorted_levels(row, selected(tau, n), selected(gamma or tau, n), levels) for row in scores.reshape(-1, n)]
    level = np.stack([np.zeros(n) if row is None else row for row in found]).reshape(scores.shape)
    return pack_levels(torch.from_numpy(level).to(torch.uint8), levels)


def expected_counts(scores, tau, gamma, levels):
    """Counts and invalid by sorting each row."""
    batch, _, n = scores.shape
    counts, invalid = np.zeros((batch, n, levels), dtype=np.int32), np.zeros(batch, dtype=np.int32)
    for b in range(batch):
        for row in scores[b]:
            level = sorted_levels(row, selected(tau, n), selected(gamma or tau, n), levels)
            if level is None:
                invalid[b] += 1
            else:
                for step in range(levels):
                    counts[b, :, step] += level == step + 1
    return counts, invalid


@given(
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6),
    n=st.one_of(st.sampled_from([1, 2, 17, 784, 8192, 9000]), st.integers(1, 200)),
    batch=st.integers(1, 3),
    tau=st.floats(1e-3, 1),
    ratio=st.floats(0.05, 1),
    levels=st.integers(1, 15),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@examples(100)
def test_against_sort(backend, kinds, n, batch, tau, ratio, levels, dtype):
    rows = [[make_row(kind, n, dtype, seed=17 * b + j) for j, kind in enumerate(kinds)] for b in range(batch)]
    scores = np.array(rows)
    counts, invalid = count(torch.from_numpy(scores), tau, tau * ratio, levels)
    expected, expected_invalid = expected_counts(scores, tau, tau * ratio, levels)
    np.testing.assert_array_equal(counts.numpy(), expected)
    np.testing.assert_array_equal(invalid.numpy(), expected_invalid)


def samples_of_two_programs(backend):
    """As few samples of an image as are split: among programs of Triton's, and among the clusters of ON_HOST."""
    return 5 if backend == ON_HOST else 9


@pytest.mark.parametrize("levels", [1, 4, *larger(15, when=INTERPRETED)])
@pytest.mark.parametrize("dtype", FEWER_DTYPES)
def test_is_the_sum_of_sparsified_maps(backend, levels, dtype):
    scores = torch.randn(2, samples_of_two_programs(backend), 3 * ROW).to(dtype)
    scores[1, 3, 5] = torch.nan
    counts, invalid = count(scores, 0.2, 0.05, levels)
    level = torch.round(rf.sparsify(scores, 0.2, 0.05, levels=levels) * levels)
    expected = torch.stack([(level == step + 1).sum(1) for step in range(levels)], dim=-1)
    assert torch.equal(counts, expected.to(torch.int32))
    assert invalid.tolist() == [0, 1]


@given(
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6),
    n=st.one_of(st.sampled_from([1, 2, 17, 511, 512, 513, 8192, 9001]), st.integers(1, 200)),
    batch=st.integers(1, 3),
    tau=st.floats(1e-3, 1),
    ratio=st.floats(0.05, 1),
    levels=st.sampled_from([1, 2, 4, 15]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@examples(100)
@larger_interpreted
def test_packed_against_sort(backend, kinds, n, batch, tau, ratio, levels, dtype):
    rows = [[make_row(kind, n, dtype, seed=17 * b + j) for j, kind in enumerate(kinds)] for b in range(batch)]
    scores = np.array(rows)
    counts, invalid, packed = pack(torch.from_numpy(scores), tau, tau * ratio, levels)
    assert torch.equal(packed, expected_packed(scores, tau, tau * ratio, levels))
    unpacked_counts, unpacked_invalid = count(torch.from_numpy(scores), tau, tau * ratio, levels)
    assert torch.equal(counts, unpacked_counts)
    assert torch.equal(invalid, unpacked_invalid)


@pytest.mark.parametrize("levels", [*larger(1, when=INTERPRETED), *larger(2, 4), 15])
@pytest.mark.parametrize("dtype", FEWER_DTYPES)
@pytest.mark.parametrize("n", [1, *larger(3 * ROW), 3 * ROW + 1])
def test_packed_is_the_packed_sparsified_map(backend, n, levels, dtype):
    scores = torch.randn(2, samples_of_two_programs(backend), n).to(dtype)
    scores[1, 3, n // 2] = torch.nan
    rows = scores[..., : n - n // 8]  # farther apart than they are long
    views = (rows, scores, scores.transpose(0, 1), scores[:, ::2], scores[..., ::3], scores[:, :1].expand(2, 4, n))
    for view in views if takes_views(dtype) else views[:1]:
        h = rf.sparsify(view, 0.2, 0.05, levels=levels)
        level = torch.round(h.nan_to_num(nan=0.0) * levels).to(torch.uint8)
        _, invalid, packed = pack(view, 0.2, 0.05, levels)
        assert torch.equal(packed, pack_levels(level, levels))
        assert torch.equal(invalid, h.isnan().any(dim=2).sum(dim=1, dtype=torch.int32))


@pytest.mark.parametrize("levels", [1, 15])
@larger_interpreted
def test_packed_real_size(backend, levels):
    scores = torch.stack([torch.from_numpy(make_row(kind, LONG_ROW, seed=3)) for kind in LONG_KINDS])[None]
    assert torch.equal(pack(scores, 0.1, 0.02, levels)[2], expected_packed(scores.numpy(), 0.1, 0.02, levels))


def test_packed_into_part_of_a_buffer(backend):
    scores = torch.rand(1, 5, 700)
    buffer = torch.full((9, packed_row_bytes(700, 4)), 255, dtype=torch.uint8)
    rf.count_sparsified_(torch.zeros(1, 700, 4, dtype=torch.int32), scores, 0.3, 0.1, packed=buffer[2:7][None])
    assert torch.equal(buffer[2:7], pack(scores, 0.3, 0.1, 4)[2][0])
    assert buffer[:2].eq(255).all()
    assert buffer[7:].eq(255).all()


@pytest.mark.parametrize("levels", [*larger(1, when=INTERPRETED), 15])
def test_real_size(backend, levels):
    scores = torch.stack([torch.from_numpy(make_row(kind, LONG_ROW, seed=3)) for kind in LONG_KINDS])[None]
    counts, invalid = count(scores, 0.1, 0.02, levels)
    expected, expected_invalid = expected_counts(scores.numpy(), 0.1, 0.02, levels)
    np.testing.assert_array_equal(counts.numpy(), expected)
    np.testing.assert_array_equal(invalid.numpy(), expected_invalid)


def test_more_rows_than_one_wave(backend, monkeypatch):
    if backend.startswith("triton"):
        monkeypatch.setattr("robattr_fast.kernels.count_sparsified._IMAGES", 2)
    samples = 40 if INTERPRETED else 70 if backend == ON_HOST else 700
    scores = torch.rand(3, samples, 100)
    counts, _, packed = pack(scores, 1.0, 0.1, 3)
    level = torch.round(rf.sparsify(scores, 1.0, 0.1, levels=3) * 3).to(torch.uint8)
    assert torch.equal(packed, pack_levels(level, 3))
    assert counts.sum(dim=-1).eq(samples).all()
    split = torch.zeros_like(counts)
    for part in scores.split([1, 30, samples - 31], dim=1):
        rf.count_sparsified_(split, part, 1.0, 0.1)
    assert torch.equal(split, counts)


def test_adds_to_counts(backend):
    scores = torch.rand(2, 3, 50)
    counts, _ = count(scores, 0.3)
    more = counts + 5
    rf.count_sparsified_(more, scores, 0.3)
    assert torch.equal(more, 2 * counts + 5)


def test_views_of_scores(backend):
    scores = torch.randn(4, 6, ROW // 2)
    columns = 60 if backend == ON_HOST else ROW  # that become rows of 6
    for view in (
        scores.transpose(0, 1),
        scores[:, ::2],
        scores[..., 3::7],
        scores[..., :columns].transpose(1, 2),
        scores[:1].expand(5, -1, -1),
    ):
        assert torch.equal(count(view, 0.2)[0], count(view.contiguous(), 0.2)[0])


def test_counts_are_detached(backend):
    scores = torch.rand(1, 4, 30, requires_grad=True)
    counts, invalid = count(scores, 0.2)
    assert not counts.requires_grad
    assert not invalid.requires_grad


def test_overflow_is_an_error(backend):
    counts = torch.full((1, 10, 1), 2**31 - 3, dtype=torch.int32)
    rf.count_sparsified_(counts, torch.rand(1, 2, 10), 1.0)
    if backend in ON_GPU:  # nobody waits for the device to see it
        rf.count_sparsified_(counts, torch.rand(1, 1, 10), 1.0)
        assert int(counts.max()) < 0
        return
    with pytest.raises(ValueError, match="passes 2147483647"):
        rf.count_sparsified_(counts, torch.rand(1, 1, 10), 1.0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    scores = torch.randn(2, 40, 20_000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = pack(scores, 0.3, 0.1, 5)
    finally:
        torch.set_num_threads(before)
    with rf.backends.use("reference"):
        expected = pack(scores, 0.3, 0.1, 5)
    assert all(map(torch.equal, actual, expected))


def test_opcheck():
    scores = torch.rand(2, 3, 40)
    counts = torch.zeros(2, 40, 4, dtype=torch.int32)
    packed = torch.zeros(2, 3, packed_row_bytes(40, 4), dtype=torch.uint8)
    for written in (None, packed):
        torch.library.opcheck(torch.ops.robattr_fast.count_sparsified_.default, (counts, scores, 0.3, 0.1, written))


@pytest.mark.parametrize("compiler", ["aot_eager", *larger("inductor")])
def test_compile(compiler):
    scores = torch.rand(2, 3, 40)
    counts = torch.zeros(2, 40, 4, dtype=torch.int32)

    packed = torch.full((2, 3, packed_row_bytes(40, 4)), 255, dtype=torch.uint8)

    def step(counts, scores, packed=None):
        invalid = rf.count_sparsified_(counts, scores * 2, 0.3, 0.1, packed=packed)
        return invalid + 1

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    assert compiled(counts, scores).tolist() == [1, 1]
    expected, _, expected_rows = pack(scores, 0.3, 0.1, 4)
    assert torch.equal(counts, expected)
    assert compiled(counts, scores, packed).tolist() == [1, 1]
    assert torch.equal(counts, 2 * expected)
    assert torch.equal(packed, expected_rows)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"counts": torch.zeros(2, 9, 1, dtype=torch.int64)}, TypeError, "counts: got dtype torch.int64"),
        ({"counts": None}, TypeError, "counts: got NoneType"),
        ({"counts": torch.zeros(2, 9, dtype=torch.int32)}, ValueError, r"takes \[2, 9, L\]"),
        ({"counts": torch.zeros(3, 9, 1, dtype=torch.int32)}, ValueError, r"takes \[2, 9, L\]"),
        ({"counts": torch.zeros(2, 8, 1, dtype=torch.int32)}, ValueError, r"takes \[2, 9, L\]"),
        ({"counts": torch.zeros(2, 9, 0, dtype=torch.int32)}, ValueError, "got 0"),
        ({"counts": torch.zeros(2, 9, 16, dtype=torch.int32)}, ValueError, "got 16"),
        ({"counts": torch.zeros(2, 9, 4, dtype=torch.int32)[..., ::2]}, ValueError, "takes a contiguous tensor"),
        ({"counts": torch.zeros(2, 9, 1, dtype=torch.int32, device="meta")}, ValueError, "counts: got device meta"),
        ({"scores": torch.rand(2, 9)}, ValueError, r"takes \[B, q, n\]"),
        ({"scores": torch.rand(2, 0, 9)}, ValueError, "empty shape"),
        ({"scores": torch.ones(2, 3, 9, dtype=torch.int32)}, TypeError, "scores: got dtype torch.int32"),
        ({"packed": 3}, TypeError, "packed: got int"),
        ({"packed": torch.zeros(2, 3, 64)}, TypeError, "packed: got dtype torch.float32"),
        ({"packed": torch.zeros(2, 3, 2, dtype=torch.uint8)}, ValueError, r"packed: got shape .* takes \(2, 3, 64\)"),
        ({"packed": torch.zeros(3, 64, dtype=torch.uint8)}, ValueError, r"packed: got shape .* takes \(2, 3, 64\)"),
        ({"packed": torch.zeros(2, 2, 64, dtype=torch.uint8)}, ValueError, r"packed: got shape .* takes \(2, 3, 64\)"),
        ({"packed": torch.zeros(3, 2, 64, dtype=torch.uint8).transpose(0, 1)}, ValueError, "packed: got strides"),
        ({"packed": torch.zeros(2, 3, 64, dtype=torch.uint8, device="meta")}, ValueError, "packed: got device meta"),
        ({"tau": 0.0}, ValueError, "tau: got 0.0"),
        ({"gamma": 0.6}, ValueError, "gamma: got 0.6"),
    ],
)
def test_errors(arguments, error, message):
    valid = {"counts": torch.zeros(2, 9, 1, dtype=torch.int32), "scores": torch.rand(2, 3, 9), "tau": 0.5}
    with pytest.raises(error, match=message):
        rf.count_sparsified_(**(valid | arguments))

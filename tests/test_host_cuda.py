"""The CUDA kernels, executed on the host under sanitizers and four orders of threads."""

import host_cuda
import numpy as np
import pytest
import test_count_sparsified
import test_topk_threshold
import torch
from _larger import larger
from _operators import KINDS, make_row
from host_cuda import Device, HostMachine
from test_count_sparsified import expected_counts, expected_packed, pack
from test_topk_threshold import assert_same, by_sorting

import robattr_fast as rf
from robattr_fast import _extension, backends
from robattr_fast.reference._select import selected

# One process compiles the program: no other waits for it.
pytestmark = [pytest.mark.once, pytest.mark.xdist_group("host_cuda")]

# The cases of the CPU kernels.
test_topk_against_sort = test_topk_threshold.test_against_sort
test_every_k = test_topk_threshold.test_every_k
test_many_rows = test_topk_threshold.test_many_rows
test_adds_to_counts = test_count_sparsified.test_adds_to_counts
test_counts_are_detached = test_count_sparsified.test_counts_are_detached
test_packed_into_part_of_a_buffer = test_count_sparsified.test_packed_into_part_of_a_buffer


@pytest.mark.slow
class TestLonger:
    """Those that repeat a path at greater length, which takes minutes."""

    test_long_rows = staticmethod(test_topk_threshold.test_long_rows)
    test_dtypes_and_shapes = staticmethod(test_topk_threshold.test_dtypes_and_shapes)
    test_count_against_sort = staticmethod(test_count_sparsified.test_against_sort)
    test_packed_against_sort = staticmethod(test_count_sparsified.test_packed_against_sort)
    test_is_the_sum_of_sparsified_maps = staticmethod(test_count_sparsified.test_is_the_sum_of_sparsified_maps)
    test_packed_map = staticmethod(test_count_sparsified.test_packed_is_the_packed_sparsified_map)
    test_packed_real_size = staticmethod(test_count_sparsified.test_packed_real_size)
    test_real_size = staticmethod(test_count_sparsified.test_real_size)
    test_more_rows_than_one_wave = staticmethod(test_count_sparsified.test_more_rows_than_one_wave)
    test_views_of_scores = staticmethod(test_count_sparsified.test_views_of_scores)


# What a short row meets here, a long one meets on a GPU: parts of at most 1024 floats, in clusters and without.
CLUSTERS = Device(shared_per_block=7000, shared_for_two=0, clusters=True)
CLUSTERS_STAGED = Device(shared_per_block=7000, shared_for_two=22000, clusters=True)
STREAMED = Device(shared_per_block=20480, shared_for_two=20480, clusters=False)
H200 = Device(shared_per_block=231424, shared_for_two=115712, clusters=True)
DEVICES = {"clusters": CLUSTERS, "clusters-staged": CLUSTERS_STAGED, "streamed": STREAMED, "h200": H200}


@pytest.fixture(scope="module")
def machine():
    """The running kernels on a device, by device and number of clusters."""
    if reason := host_cuda.missing():
        pytest.skip(reason)
    program = host_cuda.compile_program(host_cuda.HERE / "server.cpp")
    machines = {}

    def on(device, clusters=2):
        running = machines.get((device, clusters))
        if running is None or running.ended:  # one that gave up has failed its test; the next one starts afresh
            machines[device, clusters] = HostMachine(program, device, clusters)
        return machines[device, clusters]

    yield on
    for running in machines.values():
        assert running.ended or running.close() == ""


@pytest.fixture(autouse=True)
def backend(machine, monkeypatch):
    """The operators run on one device after another, call by call."""
    calls, devices = iter(range(10**9)), list(DEVICES.values())

    def next_machine():
        return machine(devices[next(calls) % len(devices)])

    def topk_threshold(scores, k, *, out):
        next_machine().topk_threshold(out.view(-1), scores.reshape(-1, scores.shape[-1]), k)

    def count_sparsified_(counts, scores, tau, gamma, packed, *, out):
        n = scores.shape[-1]
        next_machine().count_sparsified_(counts, out, packed, scores, selected(tau, n), selected(gamma, n))

    for function in (topk_threshold, count_sparsified_):
        implementation = backends.Implementation(function, _extension.can_run_anywhere)
        monkeypatch.setitem(backends._registry[function.__name__], "cuda", implementation)
    with backends.use(topk_threshold="cuda", count_sparsified_="cuda", strict=True):
        yield "cuda"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_thresholds_of_every_kind(machine, kind):
    for device in DEVICES.values():
        for n in (1, 33, 1500):
            row = make_row(kind, n, seed=n)
            for k in {1, (n + 9) // 10, n}:
                out = torch.full((1,), torch.nan)
                machine(device).topk_threshold(out, torch.from_numpy(row)[None], k)
                assert_same(out[0], by_sorting(row, k))


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(("levels", "gamma"), [(15, 0.02), *larger((1, None), (4, None))])
def test_counts_and_packed_levels_of_every_kind(machine, kind, levels, gamma):
    scores = torch.from_numpy(np.stack([make_row(kind, 1500, seed=seed) for seed in range(3)])).view(1, 3, 1500)
    expected, expected_invalid = expected_counts(scores.numpy(), 0.1, gamma, levels)
    for _ in DEVICES:
        counts, invalid, packed = pack(scores, 0.1, gamma, levels)
        np.testing.assert_array_equal(counts.numpy(), expected)
        np.testing.assert_array_equal(invalid.numpy(), expected_invalid)
        assert torch.equal(packed, expected_packed(scores.numpy(), 0.1, gamma, levels))


@pytest.mark.parametrize("dtype", [torch.float32, *larger(torch.float64, torch.bfloat16, torch.float16)])
@pytest.mark.parametrize("levels", [1, *larger(5)])
def test_types_and_views(dtype, levels):
    scores = torch.randn(2, 3, 603).to(dtype)
    scores[1, 2, 5] = torch.nan
    for view in (scores, scores.transpose(0, 1), scores[..., 1:], scores[..., ::3], scores[:, :1].expand(2, 4, 603)):
        with backends.use("reference"):
            expected, threshold = pack(view, 0.2, 0.05, levels), rf.topk_threshold(view, 100)
        for _ in DEVICES:
            assert all(map(torch.equal, pack(view, 0.2, 0.05, levels), expected))
        if levels == 1:  # which a threshold has nothing to do with
            for _ in DEVICES:
                assert torch.equal(rf.topk_threshold(view, 100), threshold)


@pytest.mark.parametrize("bits", [torch.bfloat16, torch.float16])
def test_every_sixteen_bit_float(machine, bits):
    scores = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(bits)
    scores = scores[~scores.isnan()][None, 32:20000]
    for k in (1, 1000, 19968):
        out = torch.full((1,), torch.nan)
        machine(H200).topk_threshold(out, scores, k)
        assert_same(out, scores.float().sort(descending=True).values[:, k - 1].numpy())


def gpu_sampled_places(length: int, sampled: int) -> np.ndarray:
    """The elements of a part from which csrc/cuda/select.cuh guesses the threshold: where to mislead it."""
    j = np.arange(sampled, dtype=np.uint64)
    first, end = j * length // sampled, (j + 1) * length // sampled
    random = (j * 2654435761 + 40503) % 2**32 * 2246822519 % 2**32
    return (first + (random * (end - first) >> np.uint64(32))).astype(np.int64)


@pytest.mark.parametrize(("device", "cluster"), [(H200, 2), (STREAMED, 1)])
@pytest.mark.parametrize("up", [True, *larger(False)])
def test_sample_that_misleads(machine, device, cluster, up):
    row = make_row("half-normal", 17_024)
    part = row.size // cluster
    for rank in range(cluster):
        row[rank * part + gpu_sampled_places(part, 2048 // cluster)] += 10 if up else -10
    for k in (1, 900, 2047, 2048, 5000, 17_023):
        out = torch.full((1,), torch.nan)
        machine(device).topk_threshold(out, torch.from_numpy(row)[None], k)
        assert_same(out[0], by_sorting(row, k))
    assert machine(device).route.cluster == cluster
    assert machine(device).route.sampled == 2048 // cluster


@pytest.mark.parametrize(("device", "cluster"), [(H200, 2), (STREAMED, 1)])
@pytest.mark.parametrize("equal", [0.0, 3000.0])
def test_guess_that_ends_beside_the_threshold(machine, device, cluster, equal):
    """All sampled elements are equal: the guess holds them and no others, and the k-th largest lies at its edges."""
    row = 1000 + make_row("half-normal", 17_024)
    part = row.size // cluster
    for rank in range(cluster):
        row[rank * part + gpu_sampled_places(part, 2048 // cluster)] = equal
    for k in (2048, 2049, row.size - 2048, row.size - 2047):
        out = torch.full((1,), torch.nan)
        machine(device).topk_threshold(out, torch.from_numpy(row)[None], k)
        assert_same(out[0], by_sorting(row, k))


@pytest.mark.slow
def test_real_size_on_a_cluster_of_eight(machine):
    scores = torch.stack([torch.from_numpy(make_row(kind, 150_528, seed=3)) for kind in ("half-normal", "one ulp")])[
        None
    ]
    on = machine(H200, clusters=1)
    counts, invalid = torch.zeros(1, 150_528, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    on.count_sparsified_(counts, invalid, None, scores, 15_052, 15_052)
    assert (on.route.cluster, on.route.resident, on.route.staged) == (8, True, True)
    np.testing.assert_array_equal(counts.numpy(), expected_counts(scores.numpy(), 0.1, None, 1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [1, 3])
@pytest.mark.parametrize("levels", [1, 3])
def test_more_rows_than_a_byte_counts(machine, levels, clusters):
    scores = torch.rand(2, 260, 40)
    scores[..., :20] += 10  # an element takes the same level in every row: the lowest or the highest
    counts, invalid = torch.zeros(2, 40, levels, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    on = machine(H200, clusters)
    on.count_sparsified_(counts, invalid, None, scores, 40, 4)
    assert on.route.staged
    np.testing.assert_array_equal(counts.numpy(), expected_counts(scores.numpy(), 1.0, 0.1, levels)[0])


def test_routes(machine):
    """What the cases above are meant to go through, they do."""
    scores, out = torch.rand(1, 1, 5000), torch.empty(1)
    seen = {}
    for name, device in DEVICES.items():
        on = machine(device)
        on.topk_threshold(out, scores[0], 10)
        cluster = on.route.cluster, on.route.resident
        counts, invalid = torch.zeros(1, 5000, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        on.count_sparsified_(counts, invalid, None, scores, 10, 10)
        seen[name] = (*cluster, on.route.staged)
    assert seen == {
        "clusters": (8, True, False),
        "clusters-staged": (8, True, True),
        "streamed": (1, False, False),
        "h200": (1, True, True),
    }

"""The CUDA kernels, executed on the host under sanitizers and four orders of threads, by the cases of every backend."""

import functools

import host_cuda
import numpy as np
import pytest
import torch
from _operators import DTYPES, KINDS, make_row, sorted_levels
from host_cuda import Device, HostMachine

# The cases of the CPU kernels; those that differ by backend take the fixture below.
from test_count_sparsified import expected_counts, expected_packed, pack
from test_count_sparsified import test_adds_to_counts as test_count_adds_to_counts
from test_count_sparsified import test_against_sort as test_count_against_sort
from test_count_sparsified import test_counts_are_detached as test_count_is_detached
from test_count_sparsified import test_is_the_sum_of_sparsified_maps as test_count_is_the_sum_of_sparsified_maps
from test_count_sparsified import test_more_rows_than_one_wave as test_count_many_rows
from test_count_sparsified import test_packed_against_sort as test_count_packed_against_sort
from test_count_sparsified import test_packed_into_part_of_a_buffer as test_count_packed_into_part_of_a_buffer
from test_count_sparsified import test_packed_is_the_packed_sparsified_map as test_count_packed_map
from test_count_sparsified import test_views_of_scores as test_count_views_of_scores
from test_topk_threshold import assert_same, by_sorting
from test_topk_threshold import test_against_sort as test_topk_against_sort
from test_topk_threshold import test_dtypes_and_shapes as test_topk_dtypes_and_shapes
from test_topk_threshold import test_every_k as test_topk_every_k
from test_topk_threshold import test_many_rows as test_topk_many_rows

from robattr_fast import _extension, backends
from robattr_fast.reference._select import selected

# What a short row meets here, a long one meets on a GPU: parts of at most 1024 floats, in clusters and without.
CLUSTERS = Device(shared_per_block=7000, shared_for_two=7000, clusters=True)
CLUSTERS_COUNTING = Device(shared_per_block=16000, shared_for_two=16000, clusters=True)
STREAMED = Device(shared_per_block=20480, shared_for_two=20480, clusters=False)
H200 = Device(shared_per_block=231424, shared_for_two=115712, clusters=True)
A100 = Device(shared_per_block=166912, shared_for_two=82944, clusters=False)
DEVICES = (CLUSTERS, CLUSTERS_COUNTING, STREAMED, H200)


@pytest.fixture(scope="module")
def machine():
    """The running kernels on a device, by device and number of clusters."""
    if reason := host_cuda.missing():
        pytest.skip(reason)
    program = host_cuda.compile_program(host_cuda.HERE / "server.cpp")
    machines = {}

    def on(device, clusters=2):
        if (device, clusters) not in machines:
            machines[device, clusters] = HostMachine(program, device, clusters)
        return machines[device, clusters]

    yield on
    for running in machines.values():
        running.close()


def prefer(monkeypatch, choose):
    """Lets the operators run on the machine that choose() names at each call."""

    def topk_threshold(scores, out, k):
        choose().topk_threshold(out.view(-1), scores.reshape(-1, scores.shape[-1]), k)

    def count_sparsified_(scores, counts, invalid, packed, tau, gamma):
        n = scores.shape[-1]
        choose().count_sparsified_(counts, invalid, packed, scores, selected(tau, n), selected(gamma, n))

    for function in (topk_threshold, count_sparsified_):
        implementation = backends.Implementation(function, _extension.can_run_anywhere)
        monkeypatch.setitem(backends._registry[function.__name__], "cuda", implementation)
    return backends.use(topk_threshold="cuda", count_sparsified_="cuda", strict=True)


@pytest.fixture(autouse=True)
def backend(machine, monkeypatch):
    """The imported cases take one device after another, call by call."""
    calls = iter(range(10**9))
    with prefer(monkeypatch, lambda: machine(DEVICES[next(calls) % len(DEVICES)])):
        yield "cuda"

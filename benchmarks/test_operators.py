"""The registry's operator entries as pytest-benchmark suites: ``pytest benchmarks``; each side behind its gate."""

import pytest
import torch

from robattr_fast.bench.registry import ENTRIES
from robattr_fast.bench.worker import load_sides

SIDES, GATES = load_sides()
CASES = [(entry, side) for entry in ENTRIES if entry.sides and not entry.apart for side in entry.sides]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("entry", "side"), CASES, ids=[f"{entry.name}-{side.label}" for entry, side in CASES])
def test_operator(benchmark, entry, side):
    if entry.threads is not None:
        torch.set_num_threads(entry.threads)
    spec = entry.spec_of(side, quick=True)
    # The clock of pytest-benchmark would count the emptying of the cache: here it stays warm.
    spec |= {name: value for name, value in {"evicted_mib": 0, "calls": 1}.items() if name in spec}
    assert GATES[entry.gate](spec) == ""
    try:
        work = SIDES[side.side](spec)
    except NotImplementedError as error:
        if side.side not in ("noise.keyed", "attention.fla"):  # peers that some devices, or installations, have
            raise
        pytest.skip(f"{side.label}: {error}")
    benchmark.group = f"{entry.name}: {entry.title}"
    answer = benchmark.pedantic(work, rounds=entry.quick_rounds, warmup_rounds=1)
    assert answer["seconds"] > 0

"""What the operators' tests share: the backends to run on, rows that are hard to select from, a fixed hypothesis."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
import torch
from _larger import larger
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

from robattr_fast import _extension, backends

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def needs_extension() -> None:
    """Skip where the extension is not built."""
    built, reason = _extension.load()
    if not built:
        pytest.skip(reason)


every_isa = pytest.mark.parametrize("isa", _extension.CPU_ISAS)


@contextlib.contextmanager
def at_isa(isa: str):
    """The CPU kernels at one instruction set; skips where this CPU lacks it."""
    needs_extension()
    has = _extension.cpu_isas()
    if isa not in has:
        pytest.skip(f"this CPU lacks {isa}, it has {', '.join(has)}")
    before = _extension.cpu_isa()
    _extension.set_cpu_isa(isa)
    try:
        with backends.use("cpu", strict=True):
            yield
    finally:
        _extension.set_cpu_isa(before)


# Triton's interpreter patches the language for the whole process: its tests run in one of their own, on "triton" alone.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The backend under which tests/test_host_cuda.py takes these cases: CUDA kernels on a CPU, slower still.
ON_HOST = "cuda"
if INTERPRETED:
    import _interpreter

    _interpreter.hasten()


def larger_interpreted(test):
    """Leaves a test to `make test-all` in the interpreter, which takes seconds for it."""
    return pytest.mark.slow(test) if INTERPRETED else test


# For cases that take the interpreter seconds.
FEWER_DTYPES = [torch.float32, torch.bfloat16, *larger(torch.float64, torch.float16, when=INTERPRETED)]

# `fast_mode` of gradcheck: in place of every element, one direction.
FAST_MODES = [True, *([] if INTERPRETED else larger(False))]

# Where there is a GPU, its backends run the same cases: `moved` takes their tensors there.
ON_GPU = ("triton_on_gpu", "cuda_on_gpu") if torch.cuda.is_available() else ()


def backend_of(*names: str):
    """A fixture that runs the test on each of these backends, and on those of a GPU where there is one."""

    @pytest.fixture(params=["triton"] if INTERPRETED else [*names, *ON_GPU])
    def backend(request):
        yield from _in_turn(request)

    return backend


def _in_turn(request):
    if request.param == "cpu":
        needs_extension()
    name = request.param.removesuffix("_on_gpu")
    if name == request.param:
        with backends.use(name, strict=True):
            yield name
        return
    operator = request.module.__name__.removeprefix("test_")
    with pytest.MonkeyPatch.context() as patch:
        chosen = [own for own in backends.operators() if own.startswith(operator) and name in backends._registry[own]]
        if not chosen:
            pytest.skip(f"{operator} has no {name} kernel")
        for own in chosen:
            theirs = backends._registry[own][name]
            ok, reason = theirs.can_run(torch.device("cuda"), torch.float32)
            if not ok:
                pytest.skip(reason)
            there = backends.Implementation(moved(theirs.call, "cuda"), _extension.can_run_anywhere)
            patch.setitem(backends._registry[own], name, there)
        with backends.use(**dict.fromkeys(chosen, name), strict=True):
            yield request.param


backend = backend_of("reference", "cpu")


def moved(call, device):
    """``call`` of a backend for tensors of the CPU: their storages, with strides and all, go to the device and back."""

    def run(*args, **kwargs):
        storages = {}

        def there(value):
            if not isinstance(value, torch.Tensor):
                return value
            storage = value.untyped_storage()
            if storage.data_ptr() not in storages:
                here = torch.empty(0, dtype=torch.uint8).set_(storage)
                storages[storage.data_ptr()] = here, here.to(device, copy=True)
            twin = storages[storage.data_ptr()][1].untyped_storage()
            view = value.storage_offset(), value.shape, value.stride()
            return torch.empty(0, dtype=value.dtype, device=device).set_(twin, *view)

        results = call(*tree_map(there, args), **tree_map(there, kwargs))
        for here, twin in storages.values():
            here.copy_(twin)
        return tree_map(lambda value: value.cpu() if isinstance(value, torch.Tensor) else value, results)

    return run


# A row of real size; under the interpreter, a thousand times slower, one that kernels treat like it.
LONG_ROW = 17_000 if INTERPRETED else 150_528
ROW = 33 if INTERPRETED else 1000


def takes_views(dtype: torch.dtype) -> bool:
    """Triton kernels are handed rows: what makes them of any strides does not look at the dtype, one dtype shows it."""
    return dtype == torch.float32 or not INTERPRETED


def examples(count: int):
    """The same ``count`` examples in every run, an eighth of them under the interpreter."""
    # The backend fixture is set once for all examples, which is what is meant.
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=count // 8 if INTERPRETED else count, derandomize=True, deadline=None, suppress_health_check=checks
    )


def _with_specials(row, rng, values):
    places = rng.integers(0, row.size, size=max(1, row.size // 50))
    row[places] = rng.choice(np.array(values, dtype=row.dtype), size=places.size)
    return row


def _random_bits(n, dtype, rng):
    row = rng.integers(0, 256, size=n * dtype.itemsize, dtype=np.uint8).view(dtype)
    return np.where(np.isfinite(row), row, dtype.type(0))


def _sparse(n, dtype, rng):
    return np.where(rng.random(n) < 0.01, rng.random(n), 0).astype(dtype)


def _one_ulp(n, dtype, rng):
    low = dtype.type(1.5)
    return np.where(rng.random(n) < rng.random(), low, np.nextafter(low, dtype.type(2)))


def _one_large(n, dtype, rng):
    row = (1 + 1e-5 * rng.random(n)).astype(dtype)
    row[rng.integers(n)] = np.finfo(dtype).max
    return row


KINDS = {
    "half-normal": lambda n, dtype, rng: np.abs(rng.standard_normal(n)).astype(dtype),
    "signed": lambda n, dtype, rng: rng.standard_normal(n).astype(dtype),
    "negative": lambda n, dtype, rng: -np.abs(rng.standard_normal(n)).astype(dtype),
    "few values": lambda n, dtype, rng: rng.integers(-1, 6, size=n).astype(dtype),
    "constant": lambda n, dtype, rng: np.full(n, 0.3, dtype=dtype),
    "zero": lambda n, dtype, rng: np.where(rng.random(n) < 0.5, 0.0, -0.0).astype(dtype),
    "sparse": _sparse,
    "one ulp": _one_ulp,
    "one large": _one_large,
    "denormal": lambda n, dtype, rng: (rng.integers(-3, 50, size=n) * np.finfo(dtype).smallest_subnormal).astype(dtype),
    "all bits": _random_bits,
    "ascending": lambda n, dtype, rng: np.sort(rng.random(n)).astype(dtype),
    "descending": lambda n, dtype, rng: np.sort(rng.random(n))[::-1].astype(dtype),
    "infinite": lambda n, dtype, rng: _with_specials(rng.random(n).astype(dtype), rng, [np.inf, -np.inf]),
    "nan": lambda n, dtype, rng: _with_specials(rng.random(n).astype(dtype), rng, [np.nan, -np.nan, np.inf]),
}


def make_row(kind: str, n: int, dtype=np.float32, seed: int = 0) -> np.ndarray:
    """A row of n scores of one of KINDS."""
    return np.ascontiguousarray(KINDS[kind](n, np.dtype(dtype), np.random.default_rng(seed)))


LONG_KINDS = ("all bits", "few values", "nan") if INTERPRETED else tuple(sorted(KINDS))

# Around vector widths, around the length from which rows are sampled, and real sizes.
SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 100, 784, 1000, 3072, 8191, 8192, 8193, 20001)

rows = st.builds(
    make_row,
    st.sampled_from(sorted(KINDS)),
    st.one_of(st.sampled_from(SIZES), st.integers(1, 300)),
    st.sampled_from([np.float32, np.float64]),
    st.integers(0, 2**32 - 1),
)
short_rows = st.lists(
    st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, 2.0, 1e-45, np.inf, -np.inf, np.nan])),
    min_size=1,
    max_size=40,
).map(lambda values: np.array(values, dtype=np.float32))


def sampled_places(n: int) -> np.ndarray:
    """The elements from which csrc/cpu/select.h guesses the threshold of a row of n: where to mislead it."""
    places, state = [], 1
    for part in range(1024):
        first, end = part * n // 1024, (part + 1) * n // 1024
        state = (state * 1664525 + 1013904223) % 2**32
        places.append(first + (state * (end - first) >> 32))
    return np.array(places)


def strided(row: np.ndarray, step: int) -> torch.Tensor:
    """The row as a tensor whose elements are ``step`` apart; what lies between must not be read."""
    storage = torch.full((row.size * step,), 1e30, dtype=torch.from_numpy(row).dtype)
    storage[::step] = torch.from_numpy(row)
    return storage[::step]


def sorted_levels(row: np.ndarray, k_tau: int, k_gamma: int, levels: int) -> np.ndarray | None:
    """Level of each element by sorting, None for a row with NaN or inf: written independently of the package."""
    if not np.isfinite(row).all():
        return None
    descending = np.sort(row)[::-1]
    threshold, g = descending[k_tau - 1], max(descending[k_gamma - 1], row.dtype.type(0))
    kept = row >= threshold
    if kept.sum() > k_tau:
        kept = row > threshold
    edges = [g * (row.dtype.type(step) / row.dtype.type(levels)) for step in range(levels)]
    return np.where(kept & (row > 0), sum((row > edge).astype(np.int64) for edge in edges), 0)


def check_second_derivative_under_compile(function, scores):
    """Of a penalty on the gradient of sum(function^3), which torch.compile traces through."""

    def penalty(s):
        (first,) = torch.autograd.grad(function(s).pow(3).sum(), s, create_graph=True)
        return first.square().sum()

    (expected,) = torch.autograd.grad(penalty(scores), scores)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
        (actual,) = torch.autograd.grad(compiled(scores), scores)
    torch.testing.assert_close(actual, expected)

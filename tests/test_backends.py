"""Which backend runs, in which order, and what is said about those passed over."""

import asyncio
import contextlib
import logging
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

from robattr_fast import BackendError, _extension, backends, build

pytestmark = pytest.mark.wheel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def can_run(ok, reason=""):
    return lambda device, dtype: (ok, reason)


def implementation(name, ok=True, reason=""):
    return backends.Implementation(lambda tensor: name, can_run(ok, reason))


@pytest.fixture
def toy(monkeypatch):
    """An operator of four backends, each returning its name; no preference in force."""
    table = {name: implementation(name) for name in backends.NAMES}
    monkeypatch.setitem(backends._registry, "toy", table)
    monkeypatch.delenv("ROBATTR_FAST_BACKEND", raising=False)
    token = backends._preference.set(None)
    backends._log_once.cache_clear()
    yield table
    backends._preference.reset(token)


def chosen(device=CPU, operator="toy"):
    return backends.choose(operator, device, torch.float32)[0]


def test_order_of_preference(toy):
    assert chosen(CPU) == "cpu"
    assert chosen(CUDA) == "triton"
    assert chosen(torch.device("meta")) == "reference"
    with backends.use("cuda"):
        assert chosen(CUDA) == "cuda"
    toy["triton"] = implementation("triton", False, "no triton")
    assert chosen(CUDA) == "cuda"
    toy["cuda"] = implementation("cuda", False, "no kernel")
    assert chosen(CUDA) == "reference"


def test_call_runs_what_was_chosen(toy):
    assert backends.call("toy", torch.zeros(1)) == "cpu"
    with backends.use("reference"):
        assert backends.call("toy", torch.zeros(1)) == "reference"


def test_call_makes_the_device_of_its_tensor_the_current_one(toy, monkeypatch):
    current = []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    toy["cpu"] = backends.Implementation(lambda tensor: current[0] is tensor, can_run(True))
    assert backends.call("toy", torch.zeros(1))
    assert not current


def test_can_run_sees_device_and_dtype(toy):
    seen = []

    def only_float32(device, dtype):
        seen.append((device.type, dtype))
        return dtype == torch.float32, f"takes float32, got {dtype}"

    toy["cpu"] = backends.Implementation(toy["cpu"].call, only_float32)
    assert backends.choose("toy", CPU, torch.float32)[0] == "cpu"
    assert backends.choose("toy", CPU, torch.float64)[0] == "reference"
    assert seen == [("cpu", torch.float32), ("cpu", torch.float64)]


def test_use_as_context_manager(toy):
    with backends.use("reference"):
        assert chosen() == "reference"
        with backends.use("triton"):
            assert chosen() == "triton"
        assert chosen() == "reference"
    assert chosen() == "cpu"


def test_use_is_undone_after_an_exception(toy):
    with pytest.raises(KeyError), backends.use("reference"):
        raise KeyError
    assert chosen() == "cpu"


def test_use_as_function(toy):
    backends.use("reference")
    assert chosen() == "reference"
    backends.use("cpu")
    assert chosen() == "cpu"


def test_use_can_be_entered_again_and_inside_of_itself(toy):
    again = backends.use("reference")
    for _ in range(2):
        with again:
            assert chosen() == "reference"
            with backends.use("triton"), again:
                assert chosen() == "reference"
            with again:
                assert chosen() == "reference"
            assert chosen() == "reference"
        assert chosen() == "cpu"


def test_use_entered_later_goes_back_to_what_was_then(toy):
    early = backends.use("reference")
    backends.use("triton")
    with early:
        assert chosen() == "reference"
    assert chosen() == "triton"


def test_leaving_use_undoes_what_was_set_inside(toy):
    with backends.use("reference"):
        backends.use("triton")
        assert chosen() == "triton"
    assert chosen() == "cpu"


def test_named_operators_are_added_to_what_is_in_force_at_each_entry(toy, monkeypatch):
    monkeypatch.setitem(backends._registry, "other", dict(toy))
    named = backends.use(toy="reference")
    with named:
        pass
    with backends.use("triton"), named:
        assert (chosen(), chosen(operator="other")) == ("reference", "triton")


def test_use_as_decorator(toy):
    @backends.use("reference")
    def factorial(n):
        assert chosen() == "reference"
        return 1 if n == 0 else n * factorial(n - 1)

    assert factorial.__name__ == "factorial"
    assert chosen() == "cpu", "decorating alone chooses nothing"
    for _ in range(2):
        assert factorial(3) == 6
        assert chosen() == "cpu"

    @backends.use("triton")
    def fails():
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert chosen() == "cpu"
    for late in (lambda: (yield), _coroutine):
        with pytest.raises(TypeError, match="it runs after its call returns"):
            backends.use("triton")(late)
        assert chosen() == "cpu"


async def _coroutine():
    pass


def test_one_use_in_several_threads(toy):
    shared = backends.use("reference")
    barrier, found = threading.Barrier(2), []

    def work():
        assert chosen() == "cpu", "a thread starts from the environment variable"
        with shared:
            barrier.wait()
            found.append(chosen())
            barrier.wait()
        found.append(chosen())

    with shared:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert chosen() == "reference"
    assert chosen() == "cpu"
    assert sorted(found) == ["cpu", "cpu", "reference", "reference"]


def test_one_use_in_interleaved_tasks(toy):
    shared = backends.use("reference")

    async def work(first, second):
        with shared:
            first.set()
            await second.wait()
            return chosen()

    async def both():
        events = asyncio.Event(), asyncio.Event()
        found = await asyncio.gather(work(*events), work(*reversed(events)))
        return [*found, chosen()]

    with shared:
        pass
    assert asyncio.run(both()) == ["reference", "reference", "cpu"]


def test_use_per_operator(toy, monkeypatch):
    monkeypatch.setitem(backends._registry, "other", dict(toy))
    with backends.use(toy="reference"):
        assert chosen() == "reference"
        assert chosen(operator="other") == "cpu"
        with backends.use(other="triton"):
            assert (chosen(), chosen(operator="other")) == ("reference", "triton")
        with backends.use("triton"):
            assert chosen() == "triton"
    with backends.use("triton", toy="reference"):
        assert (chosen(), chosen(operator="other")) == ("reference", "triton")


def test_use_rejects_unknown_names(toy):
    with pytest.raises(ValueError, match="backend: got 'gpu', takes one of reference, cpu, triton, cuda"):
        backends.use("gpu")
    with pytest.raises(ValueError, match="toy: got 'gpu'"):
        backends.use(toy="gpu")
    with pytest.raises(ValueError, match=r"got operator 'toys', takes one of .*toy"):
        backends.use(toys="cpu")
    assert chosen() == "cpu"


def test_fallback_is_logged_once_with_the_reason(toy, caplog):
    toy["triton"] = implementation("triton", False, "it takes CUDA tensors")
    with caplog.at_level(logging.WARNING, "robattr_fast"), backends.use("triton"):
        assert [chosen() for _ in range(3)] == ["cpu"] * 3
    assert [record.message for record in caplog.records] == ["toy: backend 'triton' passed over: it takes CUDA tensors"]


def test_a_backend_that_nobody_wrote_is_passed_over_in_silence(toy, caplog):
    del toy["triton"]
    with caplog.at_level(logging.WARNING, "robattr_fast"):
        assert chosen(CUDA) == "cuda"
        assert not caplog.records
        with backends.use("triton"):
            assert chosen(CUDA) == "cuda"
    messages = [record.message for record in caplog.records]
    assert messages == ["toy: backend 'triton' passed over: toy has no triton backend"]


def test_strict_raises_the_reason(toy):
    toy["triton"] = implementation("triton", False, "it takes CUDA tensors")
    del toy["cuda"]
    with (
        backends.use("triton", strict=True),
        pytest.raises(BackendError, match=r"'triton' was demanded .* it takes CUDA"),
    ):
        chosen()
    with backends.use("cuda", strict=True), pytest.raises(BackendError, match="toy has no cuda backend"):
        chosen()


def test_strict_holds_for_what_is_named_only(toy, monkeypatch):
    monkeypatch.setitem(backends._registry, "other", {"reference": implementation("reference")})
    with backends.use(toy="triton", strict=True):
        assert chosen(operator="other") == "reference"
    with backends.use("triton", strict=True), backends.use(toy="cpu"):
        assert chosen() == "cpu"
        with pytest.raises(BackendError):
            chosen(operator="other")
    with backends.use("triton", strict=True), backends.use("triton"):
        assert chosen(operator="other") == "reference"


def test_nothing_runs(toy):
    for name in list(toy):
        toy[name] = implementation(name, False, "broken")
    with pytest.raises(BackendError, match=r"toy: no backend runs on device cpu with dtype torch\.float32"):
        chosen()


def test_environment_variable(toy, monkeypatch):
    monkeypatch.setitem(backends._registry, "other", dict(toy))
    monkeypatch.setenv("ROBATTR_FAST_BACKEND", "reference")
    assert chosen() == "reference"
    with backends.use("triton"):
        assert chosen() == "triton"
    monkeypatch.setenv("ROBATTR_FAST_BACKEND", " toy = reference , triton")
    assert (chosen(), chosen(operator="other")) == ("reference", "triton")
    for value, message in (("gpu", "ROBATTR_FAST_BACKEND: got 'gpu'"), ("toy=gpu", r"BACKEND \(toy\): got 'gpu'")):
        monkeypatch.setenv("ROBATTR_FAST_BACKEND", value)
        with pytest.raises(ValueError, match=message):
            chosen()
    monkeypatch.setenv("ROBATTR_FAST_BACKEND", "toys=cpu")
    with pytest.raises(ValueError, match="ROBATTR_FAST_BACKEND: got operator 'toys'"):
        chosen()


def explanation(operator="toy", device="cpu"):
    return next(row for row in backends.explain() if (row.operator, row.device) == (operator, device))


def test_explain(toy):
    toy["triton"] = implementation("triton", False, "it takes CUDA tensors")
    assert str(explanation()) == "toy on cpu: cpu"
    with backends.use("triton"):
        assert str(explanation()) == "toy on cpu: cpu; not triton: it takes CUDA tensors"
    with backends.use("triton", strict=True):
        assert explanation().backend == "none"
    assert {row.operator for row in backends.explain()} == set(backends.operators())


def test_explain_says_why_a_kernel_is_not_the_default(toy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(explanation(device="cuda")).startswith("toy on cuda: triton; not cuda: not the default: no record shows")
    with backends.use("cuda"):
        assert str(explanation(device="cuda")) == "toy on cuda: cuda"
    toy["cuda"] = implementation("cuda", False, "no kernel")
    assert str(explanation(device="cuda")) == "toy on cuda: triton"
    toy["triton"] = implementation("triton", False, "no triton")
    assert str(explanation(device="cuda")) == "toy on cuda: reference; not triton: no triton; not cuda: no kernel"


@pytest.mark.parametrize("operator", ["count_sparsified_", "topk_threshold"])
def test_what_has_both_kernels_runs_on_triton_by_default(operator, monkeypatch):
    monkeypatch.delenv("ROBATTR_FAST_BACKEND", raising=False)
    for backend in ("triton", "cuda"):
        registered = backends._registry[operator][backend]
        runs = backends.Implementation(registered.call, can_run(True))
        monkeypatch.setitem(backends._registry[operator], backend, runs)
    with backends.preferring(backends.Preference()):
        assert chosen(CUDA, operator) == "triton"
        with backends.use(**{operator: "cuda"}):
            assert chosen(CUDA, operator) == "cuda"


def test_every_operator_has_a_reference():
    for operator in backends.operators():
        assert "reference" in backends._registry[operator], operator


_PROGRAM = """
import torch, robattr_fast as rf
print(rf.noisy_samples(torch.zeros(1, 3), 1.0, 1).shape, {row.backend for row in rf.backends.explain()})
"""


def run(**environment):
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_without_the_extension():
    result = run(ROBATTR_FAST_DISABLE_EXT="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "torch.Size([1, 1, 3]) {'reference'}"
    assert result.stderr.count("disabled by ROBATTR_FAST_DISABLE_EXT=1") == 1


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("echo compute_80; echo compute_90; echo compute_100", None),
        ("echo compute_80; echo compute_90; echo compute_100a", "nvcc does not compile for sm_100 .nvcc 12.8"),
        ("echo no licence >&2; exit 1", "nvcc --list-gpu-arch fails: no licence"),
    ],
)
def test_cuda_sources_join_where_nvcc_knows_their_architectures(says, reason, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("ROBATTR_FAST_CUDA", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    assert not build.has_cuda()
    assert "nvcc was not found" in capsys.readouterr().err
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\n{says}\n")
    nvcc.chmod(0o755)
    assert build.has_cuda() == (reason is None)
    if reason is not None:
        assert re.search(reason, capsys.readouterr().err)
        monkeypatch.setenv("ROBATTR_FAST_CUDA", "1")
        with pytest.raises(RuntimeError, match=f"ROBATTR_FAST_CUDA=1, but .*{reason}"):
            build.has_cuda()


def test_a_required_extension_is_missing(monkeypatch, tmp_path):
    monkeypatch.delenv("ROBATTR_FAST_DISABLE_EXT", raising=False)
    monkeypatch.setattr(build, "installed_library", lambda: tmp_path / "absent")
    monkeypatch.setattr(build, "cached_library", lambda: tmp_path / "absent")
    load = _extension.load.__wrapped__
    monkeypatch.setenv("ROBATTR_FAST_REQUIRE_EXT", "0")
    assert load() == (False, "the extension is not built (python -m robattr_fast.build compiles it)")
    monkeypatch.setenv("ROBATTR_FAST_REQUIRE_EXT", "1")
    with pytest.raises(BackendError, match=r"ROBATTR_FAST_REQUIRE_EXT=1, but the extension is not built"):
        load()


def test_an_extension_that_does_not_load(monkeypatch, tmp_path):
    monkeypatch.delenv("ROBATTR_FAST_DISABLE_EXT", raising=False)
    monkeypatch.setenv("ROBATTR_FAST_REQUIRE_EXT", "0")
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setattr(build, "installed_library", lambda: tmp_path / "broken.so")
    monkeypatch.setattr(build, "cached_library", lambda: tmp_path / "absent")
    loaded, reason = _extension.load.__wrapped__()
    assert not loaded
    assert f"{tmp_path / 'broken.so'} does not load" in reason

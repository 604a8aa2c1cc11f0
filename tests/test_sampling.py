"""The loop over samples where memory ends, and the trial that chooses the batch size."""

import logging

import pytest
import torch
from models import Elementwise, small_cnn
from torch import nn

import robattr_fast as rf
from robattr_fast import sampling

X = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(3))
COMMON = {"sigma": 0.3, "tau": 0.2, "samples": 300}
EXPECTED = rf.certify(Elementwise(1, 12, 12).eval(), X, **COMMON, batch_size=16)


def allocate_too_much():
    torch.empty(2**50)


def cuda_gives_up():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def windows_gives_up():
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: 16 bytes")


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, fail):
        ctx.fail = fail
        return z.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.fail()
        return gradient, None


class Shared(list):
    """One list for a model and its private copies."""

    def __deepcopy__(self, memo):
        return self


class Limited(Elementwise):
    """Runs out of memory above ``limit(calls)`` rows, going forward or back; remembers its batch sizes."""

    def __init__(self, limit, fail=allocate_too_much, *, backward=False):
        super().__init__(1, 12, 12)
        self.limit, self.fail, self.backward, self.sizes = limit, fail, backward, Shared()
        self.eval()

    def forward(self, z):
        self.sizes.append(z.shape[0])
        if z.shape[0] <= self.limit(len(self.sizes)):
            return super().forward(z)
        if not self.backward or not z.requires_grad:
            self.fail()
        return super().forward(_FailsBackward.apply(z, self.fail))


@pytest.mark.parametrize("fail", [allocate_too_much, cuda_gives_up, windows_gives_up])
@pytest.mark.parametrize("backward", [False, True])
def test_the_batch_is_halved_and_the_run_goes_on(fail, backward, caplog):
    model = Limited(lambda calls: 64 if calls < 8 else 10, fail, backward=backward)
    with caplog.at_level(logging.WARNING, logger="robattr_fast"):
        certificate = rf.certify(model, X, **COMMON, batch_size=64)
    warnings = [record.getMessage() for record in caplog.records if record.name == "robattr_fast"]
    assert warnings == [f"out of memory: going on with batches of {rows} rows" for rows in (32, 16, 8)]
    assert certificate.settings.batch_size == 8
    assert model.sizes.count(64) == 6  # five that fit, the one that did not
    assert torch.equal(certificate.counts, EXPECTED.counts)
    assert torch.equal(certificate.class_counts, EXPECTED.class_counts)


def test_smoothgrad_goes_on_as_well():
    model = Limited(lambda calls: 8 if calls > 4 else 64)
    got = rf.smoothgrad(model, X, sigma=0.3, samples=300, batch_size=64)
    torch.testing.assert_close(got, rf.smoothgrad(Elementwise(1, 12, 12).eval(), X, sigma=0.3, samples=300))


def test_the_trial_ends_where_memory_does(monkeypatch, caplog):
    monkeypatch.setattr(sampling, "_TRIAL_SHARE", 1e9)  # time is no reason to end it
    model = Limited(lambda calls: 4)
    with caplog.at_level(logging.WARNING, logger="robattr_fast"):
        certificate = rf.certify(model, X, **COMMON)
    assert max(model.sizes) <= 8
    assert certificate.settings.batch_size <= 4
    assert not caplog.records
    assert torch.equal(certificate.counts, EXPECTED.counts)


@pytest.mark.parametrize("batch_size", ["auto", 1, 5])
def test_a_single_row_that_does_not_fit(batch_size):
    with pytest.raises(rf.ModelError, match="runs out of memory with one row per batch"):
        rf.certify(Limited(lambda calls: 0), X, **COMMON, batch_size=batch_size)
    late = Limited(lambda calls: 8 if calls < 20 else 0)
    with pytest.raises(rf.ModelError, match="runs out of memory with one row per batch"):
        rf.certify(late, X, **COMMON, batch_size=batch_size)
    assert min(late.sizes) == 1


def test_one_row_is_enough():
    certificate = rf.certify(Limited(lambda calls: 1), X, **COMMON)
    assert certificate.settings.batch_size == 1
    assert torch.equal(certificate.counts, EXPECTED.counts)


def test_a_resumed_run_keeps_the_size_that_fits(tmp_path):
    path = tmp_path / "run.safetensors"
    rf.certify(Limited(lambda calls: 8), X, **COMMON, batch_size=32, checkpoint=path)
    assert rf.Certificate.load(path).settings.batch_size == 8


def test_other_errors_are_not_taken_for_memory():
    def fail():
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(rf.ModelError, match=r"its forward failed on a batch of shape .*cannot be multiplied"):
        rf.certify(Limited(lambda calls: 0, fail), X, **COMMON)


def test_folding_needs_no_memory_to_be_optional(monkeypatch):
    """The comparison in float64 takes more than the run itself."""

    class Large(nn.SiLU):
        def forward(self, z):
            return super().forward(z) if z.dtype == torch.float32 else torch.empty(2**50)

    model = small_cnn()
    model[2] = Large().eval()
    assert rf.certify(model, X, **COMMON, batch_size=8).samples.tolist() == [300, 300]

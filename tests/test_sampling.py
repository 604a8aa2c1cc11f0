"""The loop over samples where memory ends, and the trial that chooses the batch size."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import Elementwise, small_cnn
from torch import nn

import robattr_fast as rf
from robattr_fast.certificates import Overlap
from robattr_fast.certificates.engine import certify as engine
from robattr_fast.certificates.verify.replay import replay
from robattr_fast.sampling import sampler as sampling
from robattr_fast.sampling import trial

X = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(3))
COMMON = {"sigma": 0.3, "tau": 0.2, "samples": 300}
EXPECTED = rf.certify(Elementwise(1, 12, 12).eval(), X, **COMMON, batch_size=16)


NOTHING = Overlap(torch.zeros(1), np.array(["marginal"]))


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
    model = Limited(lambda calls: 64 if calls < 12 else 10, fail, backward=backward)
    with caplog.at_level(logging.WARNING, logger="robattr_fast"):
        certificate = rf.certify(model, X, **COMMON, batch_size=64)
    warnings = [record.getMessage() for record in caplog.records if record.name == "robattr_fast"]
    assert warnings == [f"out of memory: going on with batches of {rows} rows" for rows in (32, 16, 8)]
    assert certificate.settings.batch_size is None  # samples were taken at 64 and at 8
    assert model.sizes.count(64) == 6  # five that fit, the one that did not
    assert torch.equal(certificate.counts, EXPECTED.counts)
    assert torch.equal(certificate.class_counts, EXPECTED.class_counts)


def test_halved_before_the_first_sample():
    model = Limited(lambda calls: 10)
    assert rf.certify(model, X, **COMMON, batch_size=64).settings.batch_size == 8


@pytest.mark.parametrize(("batch_size", "recorded"), [(16, 16), (24, None)])
def test_batches_that_looks_cut_are_not_recorded(batch_size, recorded):
    """A replay puts each sample into the row that its index gives."""
    stop = rf.StopWhen(k=20, radius=0.3, overlap=1.0)
    arguments = {"sigma": 0.3, "samples": 300, "second_moment": False, "batch_size": batch_size}
    model = Elementwise(1, 12, 12).eval()
    assert rf.certify(model, X[:1], **arguments, stop=stop).settings.batch_size == recorded
    assert rf.certify(model, X[:1], **arguments).settings.batch_size == batch_size


def test_the_last_look_is_left_to_who_asks(monkeypatch):
    looked = []
    monkeypatch.setattr(rf.Certificate, "overlap", lambda self, k, radius: looked.append(int(self.samples)) or NOTHING)
    stop = rf.StopWhen(k=20, radius=0.1, overlap=0.5)
    rf.certify(Elementwise(1, 12, 12).eval(), X[:1], sigma=0.3, samples=200, second_moment=False, stop=stop)
    assert looked
    assert max(looked) < 200


@pytest.mark.parametrize("run", [rf.smoothgrad, rf.certify])
def test_the_trial_counts_the_samples_of_all_images(monkeypatch, run):
    monkeypatch.setattr(trial, "_SHARE", 1e9)
    monkeypatch.setattr(sampling.Sampler, "_seconds", lambda self, size, way: 5.0 + size)
    sizes = []
    original = sampling.Sampler.set_batch_size

    def watched(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        sizes.append(self.batch_size)

    monkeypatch.setattr(sampling.Sampler, "set_batch_size", watched)
    run(Elementwise(1, 12, 12).eval(), X[:1].repeat(16, 1, 1, 1), sigma=0.3, samples=8)
    assert sizes == [128]


def test_pilot_batches_hold_one_image(monkeypatch):
    monkeypatch.setattr(trial, "_SHARE", 1e9)
    monkeypatch.setattr(sampling.Sampler, "_seconds", lambda self, size, way: 5.0 + size)
    model = Limited(lambda calls: 1000)
    rf.suggest(model, X[:1].repeat(4, 1, 1, 1), 10, 0.1, sigma=0.3, samples=64, pilot=16, taus=[0.2], levels=[1])
    assert max(model.sizes) == 16


def test_smoothgrad_goes_on_as_well():
    model = Limited(lambda calls: 8 if calls > 4 else 64)
    got = rf.smoothgrad(model, X, sigma=0.3, samples=300, batch_size=64)
    torch.testing.assert_close(got, rf.smoothgrad(Elementwise(1, 12, 12).eval(), X, sigma=0.3, samples=300))


def test_the_trial_ends_where_memory_does(monkeypatch, caplog):
    monkeypatch.setattr(trial, "_SHARE", 1e9)  # time is no reason to end it
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


class Pictures(nn.Module):
    """Three channels to two classes; remembers the memory formats of its batches."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)
        self.channels_last = Shared()
        self.eval()

    def forward(self, z):
        self.channels_last.append(z.is_contiguous(memory_format=torch.channels_last) and not z.is_contiguous())
        return self.head(self.convolution(z).relu().mean((2, 3)))


class NeedsViews(Pictures):
    def forward(self, z):
        return super().forward(z.view(z.shape[0], -1).view(z.shape))


class Peeks(Pictures):
    """Not a function of its input alone."""

    def forward(self, z):
        return super().forward(z) + z.stride(1)


COLOURED = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(4))
PICTURES = {"sigma": 0.3, "tau": 0.2, "samples": 64}


def channels_last_is(monkeypatch, factor):
    """Pretend that batches in channels-last take ``factor`` times as long as the others."""

    def seconds(self, size, way):
        return size * (factor if way.memory_format == "channels_last" else 1.0)

    monkeypatch.setattr(sampling.Sampler, "_seconds", seconds)


@pytest.mark.parametrize(("factor", "expected"), [(0.5, "channels_last"), (2.0, "contiguous")])
def test_the_faster_memory_format_is_taken_and_recorded(monkeypatch, tmp_path, factor, expected):
    channels_last_is(monkeypatch, factor)
    model = Pictures()
    certificate = rf.certify(model, COLOURED, **PICTURES, second_moment=False)
    assert certificate.settings.memory_format == expected
    assert model.channels_last[-1] == (expected == "channels_last")
    certificate.save(tmp_path / "c.safetensors")
    loaded = rf.Certificate.load(tmp_path / "c.safetensors")
    assert loaded.settings.memory_format == expected
    before = len(model.channels_last)
    assert not replay(loaded, model, COLOURED[0], samples=None).faults
    assert model.channels_last[-1] == (expected == "channels_last")
    assert len(model.channels_last) > before


def test_both_formats_sample_the_same_noise():
    model = Pictures()
    one, other = (
        rf.certify(model, COLOURED, **PICTURES, batch_size=16, memory_format=name) for name in trial.MEMORY_FORMATS
    )
    flips = (one.counts - other.counts).abs().sum() / one.counts.sum()
    assert flips < 0.01  # rounding only
    assert torch.equal(one.class_counts, other.class_counts)


@pytest.mark.parametrize(("model", "reason"), [(NeedsViews(), "the model fails on them"), (Peeks(), "other logits")])
def test_models_that_mind_the_format_get_contiguous_rows(monkeypatch, caplog, model, reason):
    channels_last_is(monkeypatch, 0.5)
    with caplog.at_level(logging.INFO, logger="robattr_fast"):
        certificate = rf.certify(model, COLOURED, **PICTURES)
    assert certificate.settings.memory_format == "contiguous"
    assert reason in caplog.text


def test_a_callable_gets_contiguous_rows(monkeypatch):
    channels_last_is(monkeypatch, 0.5)
    contiguous = []

    def explain(model, batch, target):
        contiguous.append(batch.is_contiguous())
        return batch

    rf.certify(Pictures(), COLOURED, **PICTURES, explain=explain)
    assert all(contiguous)


def test_a_given_batch_size_leaves_nothing_to_measure(monkeypatch):
    channels_last_is(monkeypatch, 0.5)
    assert rf.certify(Pictures(), COLOURED, **PICTURES, batch_size=8).settings.memory_format == "contiguous"


@pytest.mark.parametrize(("x", "wrong"), [(COLOURED, "nhwc"), (COLOURED.flatten(1), "channels_last")])
def test_wrong_memory_formats_are_refused(x, wrong):
    model = Pictures() if x.dim() == 4 else nn.Linear(432, 2).eval()
    with pytest.raises(ValueError, match=f"memory_format: got '{wrong}'"):
        rf.certify(model, x, **PICTURES, memory_format=wrong)


@pytest.mark.parametrize("samples", [256, 8192])
def test_the_trial_is_a_small_part_of_the_run(monkeypatch, samples):
    """Batches take a fixed time and a time per row, which channels-last shortens: trials cost what they would."""
    spent = []

    def seconds(self, size, way):
        time = 5 + size * (1.0 if way.memory_format == "contiguous" else 0.7)
        spent.append(2 * time)
        return time

    monkeypatch.setattr(sampling.Sampler, "_seconds", seconds)
    sampler = sampling.Sampler(
        Pictures(), COLOURED, sigma=0.3, target=None, explain="gradient", seed=0, image_ids=torch.tensor([0])
    )
    sampler.prepare()
    sampler.set_batch_size("auto", samples)
    assert sampler.memory_format == "channels_last"
    if samples >= 4096:
        rate = (5 + 0.7 * sampler.batch_size) / sampler.batch_size
        assert sum(spent) <= 0.01 * samples * rate * 1.5


def test_one_interrupted_measurement_decides_nothing(monkeypatch):
    def seconds(self, size, way):
        if (size, way.memory_format) == (2, "channels_last"):
            return 100.0
        return 5 + size * (1.0 if way.memory_format == "contiguous" else 0.7)

    monkeypatch.setattr(sampling.Sampler, "_seconds", seconds)
    sampler = sampling.Sampler(
        Pictures(), COLOURED, sigma=0.3, target=None, explain="gradient", seed=0, image_ids=torch.tensor([0])
    )
    sampler.prepare()
    sampler.set_batch_size("auto", 8192)
    assert sampler.memory_format == "channels_last"


def test_a_stop_rule_keeps_batches_within_its_first_look(monkeypatch):
    """A larger one would be padding: images are looked at after 64 samples each."""
    monkeypatch.setattr(trial, "_SHARE", 1e9)  # time is no reason to end it
    monkeypatch.setattr(sampling.Sampler, "_seconds", lambda self, size, way: 5.0 + size)
    settings = {"sigma": 0.3, "samples": 8192, "second_moment": False}
    monkeypatch.setattr(engine, "Run", lambda sampler, *rest: SimpleNamespace(finish=lambda: sampler.batch_size))
    monkeypatch.setattr(engine, "warn_of_disagreement", lambda batch_size: None)
    stop = rf.StopWhen(k=20, radius=0.1, overlap=0.5)
    assert rf.certify(Pictures(), COLOURED[:1], **settings, stop=stop) == 64
    assert rf.certify(Pictures(), COLOURED[:1].repeat(2, 1, 1, 1), **settings, stop=stop) == 128
    assert rf.certify(Pictures(), COLOURED[:1], **settings) > 128

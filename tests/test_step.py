"""The captured batch step, and counting that never waits for the device: what a GPU would do, imitated on a CPU."""

import contextlib
import logging
from types import SimpleNamespace

import pytest
import torch
from models import Elementwise

import robattr_fast as rf
from robattr_fast import sampling, step
from robattr_fast.certify import state

X = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(3))
COMMON = {"sigma": 0.3, "tau": 0.2, "samples": 130, "batch_size": 32}


class Recorder:
    """In place of `step.capture`: like a graph, every replay reads and overwrites the memory of the capture."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, work, device):
        self.captures += 1
        results = work()

        def replay():
            self.replays += 1
            for result, again in zip(results, work(), strict=True):
                result.copy_(again)
            return results

        return replay


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(step, "capture", recorder)
    monkeypatch.setattr(sampling, "can_capture", lambda device: True)
    return recorder


def model():
    return Elementwise(1, 12, 12).eval()


@pytest.mark.parametrize("target", [None, [1, 0]])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_replays_give_what_eager_batches_give(recorder, target, memory_format):
    arguments = COMMON | {"target": target, "memory_format": memory_format, "first_sample": 7, "image_ids": [5, 9]}
    certificate = rf.certify(model(), X, **arguments)
    # 4 full batches of each image; 2 rows left over of the first share a batch with the second.
    assert (recorder.captures, recorder.replays) == (1, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "can_capture", lambda device: False)
        eager = rf.certify(model(), X, **arguments)
    assert recorder.replays == 8
    for name in ("counts", "class_counts", "samples", "invalid", "gram_summary"):
        assert torch.equal(getattr(certificate, name), getattr(eager, name))


def test_smoothgrad_replays_too(recorder):
    got = rf.smoothgrad(model(), X, sigma=0.3, samples=64, batch_size=16)
    assert recorder.replays == 8
    recorder.replays = 0
    with rf.backends.use("reference"):
        torch.testing.assert_close(got, rf.smoothgrad(model(), X, sigma=0.3, samples=64, batch_size=16))


def test_callables_are_not_captured(recorder):
    rf.certify(model(), X, **COMMON, explain=lambda model, batch, target: batch.abs())
    assert recorder.captures == 0


def test_a_model_that_cannot_be_captured_runs_eagerly(recorder, monkeypatch, caplog):
    def fail(work, device):
        recorder.captures += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    expected = rf.certify(model(), X, **COMMON)
    recorder.captures = 0
    monkeypatch.setattr(step, "capture", fail)
    with caplog.at_level(logging.INFO, logger="robattr_fast"):
        certificate = rf.certify(model(), X, **COMMON)
    assert recorder.captures == 1
    assert [r.getMessage() for r in caplog.records if "eagerly" in r.getMessage()] == [
        "batches run eagerly: the model cannot be captured as a CUDA graph "
        "(operation not permitted when stream is capturing)"
    ]
    assert torch.equal(certificate.counts, expected.counts)


def test_a_capture_that_runs_out_of_memory_halves_the_batch(recorder, monkeypatch):
    expected = rf.certify(model(), X, **COMMON)

    def sparing(work, device):
        if len(work()[0]) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return recorder(work, device)

    monkeypatch.setattr(step, "capture", sparing)
    certificate = rf.certify(model(), X, **COMMON)
    assert certificate.settings.batch_size == 16
    assert torch.equal(certificate.counts, expected.counts)


def test_capture_warms_up_aside_and_replays(monkeypatch):
    """The calls to torch.cuda in their order; what they do can be seen on a GPU only."""
    log = []

    def context(name):
        @contextlib.contextmanager
        def manager(*_):
            log.append(f"+{name}")
            yield
            log.append(f"-{name}")

        return manager

    class Stream:
        def wait_stream(self, other):
            log.append("wait")

    for name, fake in {
        "device": context("device"),
        "stream": context("stream"),
        "graph": context("graph"),
        "Stream": Stream,
        "current_stream": Stream,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: log.append("replay")),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    results = (torch.zeros(1),)
    replay = step.capture(lambda: log.append("work") or results, torch.device("cuda"))
    warm_up = ["+stream", "work", "work", "work", "-stream"]
    assert log == ["+device", "wait", *warm_up, "wait", "+graph", "work", "-graph", "-device"]
    log.clear()
    assert replay() is results
    assert log == ["replay"]


class NotFinite(Elementwise):
    """NaN gradients where the first element of a row is above ``limit``."""

    def __init__(self, limit):
        super().__init__(1, 12, 12)
        self.limit = limit
        self.eval()

    def forward(self, z):
        factor = torch.where(z[:, :1, :1, :1] > self.limit, torch.nan, 1.0)
        return super().forward(z * factor.detach())


@pytest.mark.parametrize("levels", [1, 3, None])
@pytest.mark.parametrize("on_nonfinite", ["zero", "abstain"])
def test_counting_without_a_look_gives_the_same(monkeypatch, on_nonfinite, levels):
    arguments = COMMON | {"on_nonfinite": on_nonfinite, "levels": levels}
    expected = rf.certify(NotFinite(0.9), X, **arguments)
    assert 0 < int(expected.invalid.sum()) < 260
    monkeypatch.setattr(state, "_waits", lambda tensor: True)
    certificate = rf.certify(NotFinite(0.9), X, **arguments)
    for name in ("class_counts", "samples", "invalid", *(["sums"] if levels is None else ["counts", "gram_summary"])):
        assert torch.equal(getattr(certificate, name), getattr(expected, name))
    assert torch.equal(certificate.class_counts.sum(1) + certificate.invalid, torch.full((2,), 130))


@pytest.mark.parametrize("waits", [False, True])
def test_the_first_invalid_sample_is_named(monkeypatch, waits):
    z = rf.noisy_samples(X, 0.3, 130)[1, :, 0, 0, 0]
    limit = max(float(rf.noisy_samples(X, 0.3, 130)[0, :, 0, 0, 0].max()), float(z[:40].max()))
    first = int((z > limit).to(torch.int8).argmax())
    assert first >= 40
    monkeypatch.setattr(state, "_waits", lambda tensor: waits)
    with pytest.raises(rf.NonFiniteError, match=f"sample {first} of image 1 gave NaN"):
        rf.certify(NotFinite(limit), X, **COMMON)

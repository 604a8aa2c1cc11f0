"""The captured batch step, and counting that never waits for the device: what a GPU would do, imitated on a CPU."""

import contextlib
import gc
import logging
import signal
import weakref
from types import SimpleNamespace

import pytest
import torch
from _tape import CASES, COMMON, recording
from models import Elementwise, small_cnn

import robattr_fast as rf
from robattr_fast.certificates.engine import run, state, tally
from robattr_fast.sampling import sampler as sampling
from robattr_fast.sampling import step

X = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def recorder(monkeypatch):
    return recording(monkeypatch)


def model():
    return Elementwise(3, 12, 12).eval()


@pytest.mark.parametrize("target", [None, [1, 0]])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_replays_give_what_eager_batches_give(recorder, target, memory_format):
    arguments = COMMON | {"target": target, "memory_format": memory_format, "first_sample": 7, "image_ids": [5, 9]}
    certificate = rf.certify(model(), X, **arguments)
    # Of each image 4 batches of its own; 2 rows left over of the first share a batch with the second.
    assert (recorder.captures, recorder.replays) == (2, 9)
    assert recorder.memories[0] is recorder.memories[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "can_capture", lambda device: False)
        eager = rf.certify(model(), X, **arguments)
    assert recorder.replays == 9
    assert_same(certificate, eager)


def assert_same(certificate, eager):
    names = {"counts", "sums", "class_counts", "samples", "invalid", "gram_summary", "directions", "packed"}
    assert names >= certificate.tensors.keys() == eager.tensors.keys()
    for name, tensor in eager.tensors.items():
        assert torch.equal(certificate.tensors[name], tensor), name


@pytest.mark.parametrize("arguments", CASES, ids="-".join)
@pytest.mark.parametrize("images", [1, 2])
def test_everything_counted_is_what_eager_batches_count(recorder, monkeypatch, images, arguments):
    arguments = COMMON | arguments
    eager_maps = []
    monkeypatch.setattr(state, "add_maps", lambda *of: eager_maps.append(of) or tally.add_maps(*of))
    certificate = rf.certify(model(), X[:images], **arguments)
    assert recorder.replays
    # Of one image the step goes on to selection and counts.
    assert bool(eager_maps) == (images == 2)
    monkeypatch.setattr(sampling, "can_capture", lambda device: False)
    assert_same(certificate, rf.certify(model(), X[:images], **arguments))


@pytest.mark.parametrize("target", [None, [1, 0, 1, 1, 0, 0, 1]])
def test_batches_of_many_images(recorder, monkeypatch, target):
    x = torch.rand(7, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    arguments = COMMON | {"samples": 5, "batch_size": 16, "target": target, "first_sample": 3}
    certificate = rf.certify(model(), x, **arguments)
    assert (recorder.captures, recorder.replays) == (2, 3)
    monkeypatch.setattr(sampling, "can_capture", lambda device: False)
    assert_same(certificate, rf.certify(model(), x, **arguments))


@pytest.mark.parametrize("on_nonfinite", ["zero", "abstain"])
def test_invalid_samples_of_a_captured_step(recorder, monkeypatch, on_nonfinite):
    arguments = COMMON | {"on_nonfinite": on_nonfinite, "retain": 44}
    certificate = rf.certify(NotFinite(0.9), X, **arguments)
    assert ((certificate.invalid > 0) & (certificate.invalid < 130)).all()
    monkeypatch.setattr(sampling, "can_capture", lambda device: False)
    assert_same(certificate, rf.certify(NotFinite(0.9), X, **arguments))


def test_a_captured_run_that_is_interrupted_goes_on(recorder, tmp_path):
    arguments = COMMON | {"retain": 44}
    expected = rf.certify(model(), X, **arguments)
    path = tmp_path / "checkpoint.safetensors"

    def interrupt(event):
        if event.image == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "REPORT_SECONDS", 0)
        with pytest.raises(rf.CertifyInterrupted):
            rf.certify(model(), X, **arguments, checkpoint=path, progress=interrupt)
    assert 130 < int(rf.Certificate.load(path).samples.sum()) < 260
    assert_same(rf.certify(model(), X, **arguments, checkpoint=path), expected)


class Reading(Elementwise):
    """Decides by a value of its input."""

    def forward(self, z):
        return super().forward(z) * (2 if bool(z.sum() > 1e9) else 1)


def test_a_model_that_reads_a_value_runs_eagerly(recorder, caplog):
    with caplog.at_level(logging.INFO, logger="robattr_fast"):
        certificate = rf.certify(Reading(3, 12, 12).eval(), X, **COMMON)
    assert "batches run eagerly" in caplog.text
    assert "not permitted when stream is capturing" in caplog.text
    assert (recorder.captures, recorder.replays) == (1, 0)
    assert_same(certificate, rf.certify(model(), X, **COMMON))


def test_smoothgrad_replays_too(recorder):
    got = rf.smoothgrad(model(), X, sigma=0.3, samples=64, batch_size=16)
    assert recorder.replays == 8
    recorder.replays = 0
    assert recorder.captures == 1
    with rf.backends.use("reference"):
        torch.testing.assert_close(got, rf.smoothgrad(model(), X, sigma=0.3, samples=64, batch_size=16))


def test_callables_are_not_captured(recorder):
    rf.certify(model(), X, **COMMON, explain=lambda model, batch, target: batch.abs())
    assert recorder.captures == 0


def test_a_model_that_cannot_be_captured_runs_eagerly(recorder, monkeypatch, caplog):
    def fail(work, device, memory=None):
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

    def sparing(work, device, memory=None):
        if len(work()[0]) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return recorder(work, device, memory)

    monkeypatch.setattr(step, "capture", sparing)
    certificate = rf.certify(model(), X, **COMMON)
    assert certificate.settings.batch_size == 16
    assert torch.equal(certificate.counts, expected.counts)


def test_memory_that_ends_in_the_middle_costs_no_sample(recorder, monkeypatch):
    arguments = COMMON | {"retain": 44, "samples": 150}
    expected = rf.certify(model(), X, **arguments)
    recorder.captures = recorder.replays = 0
    failures = []

    def fails_for_several_images(work, device, memory=None):
        if recorder.replays == 4 and len(failures) < 2:
            failures.append(device)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return recorder(work, device, memory)

    monkeypatch.setattr(step, "capture", fails_for_several_images)
    certificate = rf.certify(model(), X, **arguments)
    # 22 samples of the first image are left for batches of 8 rows, and 150 of the second.
    assert recorder.replays == 4 + 22
    assert recorder.captures == 3, "a step of larger batches, whose memory is gone, is replayed"
    assert certificate.settings.batch_size is None
    for name in ("counts", "class_counts", "samples", "invalid", "gram_summary"):
        assert torch.equal(getattr(certificate, name), getattr(expected, name))


class Cuda:
    """The calls to torch.cuda in their order; what they do can be seen on a GPU only."""

    def __init__(self, monkeypatch):
        self.log = []
        fakes = {
            "device": lambda device: self.within("device"),
            "stream": lambda stream: self.within(stream.name),
            "graph": lambda graph, *, pool, stream: self.within(f"graph in {pool} on {stream.name}"),
            "Stream": lambda: self.stream("aside"),
            "current_stream": lambda: self.stream("main"),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay"), pool=lambda: "pool"),
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": lambda mode: self.log.append(f"waiting is {mode}"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextlib.contextmanager
    def within(self, name):
        self.log.append(f"+{name}")
        try:
            yield
        finally:
            self.log.append(f"-{name}")

    def stream(self, name):
        return SimpleNamespace(name=name, wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"))


def test_capture_warms_up_aside_and_replays(monkeypatch):
    cuda, results = Cuda(monkeypatch), (torch.zeros(1),)

    def work():
        cuda.log.append("work")
        return results

    replay, memory = step.capture(work, torch.device("cuda"))
    warm_up = ["work", "work", "waiting is error", "work", "waiting is 0"]
    captured = ["+graph in None on aside", "work", "-graph in None on aside"]
    there, back = ["+device", "aside waits for main", "+aside"], ["-aside", "main waits for aside", "-device"]
    assert cuda.log == [*there, *warm_up, *captured, *back]
    cuda.log.clear()
    assert replay() is results
    assert cuda.log == ["replay"]
    cuda.log.clear()
    assert (memory.pool, memory.stream.name) == ("pool", "aside")
    other = memory._replace(stream=cuda.stream("of the other"))
    assert step.capture(work, torch.device("cuda"), other)[1].stream is other.stream
    assert "+graph in pool on of the other" in cuda.log


def test_a_second_step_that_cannot_be_captured_costs_no_sample(recorder, monkeypatch):
    steps, left = [], []

    def several_fail(work, device, memory=None):
        if recorder.captures == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return recorder(work, device, memory)

    class Watched(step.Step):
        def __init__(self, *arguments, **options):
            steps.append(weakref.ref(self))
            super().__init__(*arguments, **options)

    def look(event):
        if event.image == 1:
            gc.collect()
            left.append([one() for one in steps if one() is not None])

    expected = rf.certify(model(), X, **COMMON)
    recorder.captures = recorder.replays = 0
    monkeypatch.setattr(step, "capture", several_fail)
    monkeypatch.setattr(sampling, "Step", Watched)
    monkeypatch.setattr(run, "REPORT_SECONDS", 0)
    assert_same(rf.certify(model(), X, **COMMON, progress=look), expected)
    assert (recorder.captures, recorder.replays, len(steps)) == (1, 4, 2)
    assert left[-1] == [], "the memory of steps is held beside eager batches"


def test_steps_of_one_sampler(recorder):
    """By what follows, and by the way in which batches go through the model."""
    settings = {"sigma": 0.3, "target": None, "explain": "gradient", "seed": 0}
    sampler = sampling.Sampler(small_cnn(3), X, image_ids=torch.arange(2), **settings)
    sampler.prepare()
    sampler.set_batch_size(4, 8)
    one = step.Segment(0, 0, 4)
    _, (rows,) = sampler.replay_through(one, lambda rows: lambda scores, logits, first, count: (first + count,))
    assert rows.tolist() == [4]
    assert sampler.run([one])[0].logits.dtype == torch.float32
    sampler.autocast = torch.bfloat16
    sampler.set_batch_size(4, 8)
    assert sampler.run([one])[0].logits.dtype == torch.bfloat16
    assert recorder.captures == 3


@pytest.mark.parametrize("failing", range(1, 5))
def test_a_capture_that_fails_leaves_no_stream_behind(monkeypatch, failing):
    cuda, calls = Cuda(monkeypatch), []

    def work():
        calls.append(len(calls) + 1)
        if calls[-1] == failing:
            raise RuntimeError("called a synchronizing CUDA operation")
        return ()

    with pytest.raises(RuntimeError, match="synchronizing"):
        step.capture(work, torch.device("cuda"))
    assert cuda.log[-3:] == ["-aside", "main waits for aside", "-device"]
    assert [one for one in cuda.log if "waiting" in one][-1:] in ([], ["waiting is 0"])


def test_what_cannot_be_captured_is_not_tried():
    assert not step.can_capture(torch.device("cpu"))
    with rf.backends.use("reference"):
        assert not step.can_capture(torch.device("cuda"))


class NotFinite(Elementwise):
    """NaN gradients where the first element of a row is above ``limit``."""

    def __init__(self, limit):
        super().__init__(3, 12, 12)
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


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_the_first_invalid_sample_is_named(monkeypatch, waits, captured):
    if captured:
        recording(monkeypatch)
    x = X.clone()
    x[:, 0, 0, 0] = torch.tensor([0.2, 0.6])
    valid, z = rf.noisy_samples(x, 0.3, 130)[:, :, 0, 0, 0]
    limit = max(float(valid.max()), float(z[:40].max()))
    first = int((z > limit).to(torch.int8).argmax())
    assert first >= 40
    monkeypatch.setattr(state, "_waits", lambda tensor: waits)
    with pytest.raises(rf.NonFiniteError, match=f"sample {first} of image 1 gave NaN"):
        rf.certify(NotFinite(limit), x, **COMMON)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_is_valid_if_all_of_it_is_finite(value):
    scores = torch.randn(4, 9)
    scores[1, 8] = scores[3, 0] = value
    assert tally.valid_rows(scores).tolist() == [True, False, True, False]

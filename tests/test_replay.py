"""Samples of a certificate taken again: true ones pass, tampered ones do not, and in place means in place."""

import dataclasses

import numpy as np
import pytest
import torch
from models import small_cnn

from robattr_fast.certificates import Certificate, certify
from robattr_fast.certificates.verify import replay as module
from robattr_fast.certificates.verify.replay import FALSE_ALARM, replay
from robattr_fast.sampling.sampler import Sampler

SAMPLES, BATCH = 300, 13  # rows of a batch of 13 round differently: samples must go back to their own


@pytest.fixture(scope="module")
def model():
    return small_cnn(3, 12, 5)


@pytest.fixture(scope="module")
def x():
    return torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=[1, 3, None], ids=lambda levels: f"levels={levels}")
def cert(request, model, x):
    return certify(model, x[None], sigma=0.2, levels=request.param, samples=SAMPLES, batch_size=BATCH, retain=64)


@pytest.fixture(scope="module")
def plain(model, x):
    return certify(model, x[None], sigma=0.2, samples=SAMPLES, batch_size=BATCH, retain=64)


def changed(cert, **settings):
    return Certificate(**cert.tensors, settings=dataclasses.replace(cert.settings, **settings))


def with_tensor(cert, name, tensor):
    return Certificate(**{**cert.tensors, name: tensor}, settings=cert.settings)


@pytest.mark.parametrize("samples", [None, SAMPLES, 40, 1])
def test_a_true_certificate_passes(cert, model, x, samples):
    result = replay(cert, model, x, samples=samples)
    assert result.faults == ()
    assert result.differences == ()
    assert (result.samples, result.total) == (samples or SAMPLES, SAMPLES)


def test_false_alarms_are_rare(plain, model, x):
    assert FALSE_ALARM <= 1e-3
    assert not any(replay(plain, model, x, samples=25, seed=seed).faults for seed in range(40))


def test_one_count_off_by_one_fails_a_full_replay(plain, model, x):
    counts = plain.counts.clone()
    counts[0, int(counts[0, :, 0].argmax()), 0] -= 1
    (fault,) = replay(with_tensor(plain, "counts", counts), model, x, samples=None).faults
    assert fault.startswith("counts: 1 of 432 entries")


def test_second_moments_are_repeated_by_a_full_replay(plain, model, x):
    summary = plain.gram_summary.clone()
    summary[0, 3] *= 1.01
    (fault,) = replay(with_tensor(plain, "gram_summary", summary), model, x, samples=None).faults
    assert fault.startswith("gram_summary")


def test_certainty_that_was_made_up_is_found(plain, model, x):
    """An element said to be selected by every sample is refuted by one sample that does not select it."""
    counts = plain.counts.clone()
    middle = int((counts[0, :, 0] - SAMPLES // 2).abs().argmin())
    for claim in (0, SAMPLES):
        counts[0, middle, 0] = claim
        faults = replay(with_tensor(plain, "counts", counts), model, x, samples=12).faults
        assert faults[0].startswith("counts: 1 of 432 elements")


def test_a_map_that_was_sharpened_is_found(plain, model, x):
    """A fifth of the misses inside the displayed top set become hits: no element is made certain."""
    counts = plain.counts.clone()
    top = plain.map.flatten(1)[0].topk(86).indices
    counts[0, top, 0] += ((SAMPLES - counts[0, top, 0]) // 5).to(torch.int32)
    faults = replay(with_tensor(plain, "counts", counts), model, x, samples=120, k=86).faults
    assert any("total over the top 86" in fault for fault in faults)


def test_votes_that_were_made_up_are_found(plain, model, x):
    votes = plain.class_counts.roll(1, dims=1)
    (fault,) = replay(with_tensor(plain, "class_counts", votes), model, x, samples=30).faults
    assert fault.startswith("class_counts")
    (fault,) = replay(with_tensor(plain, "class_counts", votes), model, x, samples=None).faults
    assert fault.startswith("class_counts")


def test_another_model_or_image_is_found_before_anything_is_sampled(plain, model, x, monkeypatch):
    monkeypatch.setattr(module, "Sampler", None)
    other = small_cnn(3, 12, 5)
    with torch.no_grad():
        other[0].bias[0] += 1e-3
    result = replay(plain, other, x + 1e-3)
    assert [fault.split(":")[0] for fault in result.faults] == ["the model is another one", "the image is another one"]
    assert result.samples == 0


def test_another_environment_is_named_and_forgiven_a_little(plain, model, x):
    elsewhere = changed(plain, device="cuda:0", batch_size=None)
    for samples in (None, 50):
        result = replay(elsewhere, model, x, samples=samples)
        assert result.faults == ()
        assert result.differences == ("device cuda:0, here cpu", "batch size unknown")
    counts = elsewhere.counts.clone()
    often = int(counts[0, :, 0].argmax())
    counts[0, often, 0] -= 3  # one in a hundred
    assert replay(with_tensor(elsewhere, "counts", counts), model, x, samples=None).faults == ()
    counts[0, often, 0] -= 1
    assert replay(with_tensor(elsewhere, "counts", counts), model, x, samples=None).faults


@pytest.mark.parametrize("elsewhere", [False, True])
def test_samples_are_put_where_they_were_if_that_can_repeat_their_bits(plain, model, x, monkeypatch, elsewhere):
    in_their_rows, scored = set(), Sampler.run

    def run(self, segments):
        in_their_rows.update(s.first_sample for row, s in enumerate(segments) if s.first_sample % BATCH == row)
        return scored(self, segments)

    monkeypatch.setattr(Sampler, "run", run)
    cert = changed(plain, device="cuda:0") if elsewhere else plain
    assert replay(cert, model, x, samples=40).faults == ()
    assert (len(in_their_rows) == 40) is not elsewhere


def test_merged_intervals(model, x):
    first, second = (
        certify(model, x[None], sigma=0.2, samples=65, batch_size=BATCH, first_sample=start, retain=64)
        for start in (0, 1000)
    )
    both = first.merge(second)
    for samples in (None, 20):
        assert replay(both, model, x, samples=samples).faults == ()


@pytest.mark.parametrize("batch_size", [4, 7])
def test_every_sample_gets_its_row(batch_size):
    intervals = ((5, 20), (40, 47))
    chosen = np.array([0, 16, 14, 3, 21, 4, 8])
    batches = module._batches(chosen, intervals, batch_size, in_place=True)
    placed = {
        position: (sample, row)
        for batch in batches
        for row, (sample, position) in enumerate(batch)
        if position is not None
    }
    assert all(len(batch) == batch_size for batch in batches)
    expected = [(5, 0), (41, 1), (19, 14), (8, 3), (46, 6), (9, 4), (13, 8)]
    assert [placed[i] for i in range(7)] == [(sample, offset % batch_size) for sample, offset in expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": None}, "its seed is unknown"),
        ({"explain": "my_scores"}, "callable 'my_scores'"),
        ({"stream_version": 99}, "stream version 99"),
    ],
)
def test_what_cannot_be_replayed(plain, model, x, settings, message):
    with pytest.raises(ValueError, match=message):
        replay(changed(plain, **settings), model, x)


@pytest.mark.parametrize("samples", [0, SAMPLES + 1])
def test_samples_out_of_range(plain, model, x, samples):
    with pytest.raises(ValueError, match="samples"):
        replay(plain, model, x, samples=samples)

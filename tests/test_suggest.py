"""`suggest`: what it expects against what `certify` then finds; samples that no certificate uses; what it refuses."""

import dataclasses

import numpy as np
import pytest
import torch
from _larger import larger
from models import Elementwise, small_cnn

import robattr_fast as rf
from robattr_fast.certificates.engine import expected as extrapolation
from robattr_fast.certificates.engine import suggest as module
from robattr_fast.certificates.moments.concentration import GramSummary, summarize_gram, trace_estimate

MODEL = small_cnn(3, 16, 5)
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
N = IMAGES[0].numel()
K = N // 5
MANY = {"taus": (0.05, 0.2, 0.4), "gammas": (None, 0.03), "levels": (1, 5)}


@pytest.mark.parametrize(("sigma", "radius", "samples"), [(0.2, 0.05, 1024), *larger((0.3, 0.15, 1024))])
def test_the_choice_is_nearly_the_best(sigma, radius, samples):
    suggestion = rf.suggest(MODEL, IMAGES, K, radius, sigma=sigma, samples=samples, batch_size=128, **MANY)
    assert len(suggestion.candidates) == 6
    found = {}
    for candidate in suggestion.candidates:
        chosen = {name: getattr(candidate, name) for name in ("tau", "gamma", "levels")}
        cert = rf.certify(MODEL, IMAGES, **(suggestion.settings | chosen))
        found[tuple(chosen.values())] = float(cert.overlap(K, radius).share.mean())
        assert candidate.score[0] == pytest.approx(found[tuple(chosen.values())], abs=0.1)
    settings = suggestion.settings
    assert found[settings["tau"], settings["gamma"], settings["levels"]] >= max(found.values()) - 0.05
    assert max(found.values()) - min(found.values()) > 0.15  # a choice at random would not do
    assert suggestion.overlap == suggestion.candidates[0].score[0]


def rank_one(samples: int, seed: int, n: int = 400) -> torch.Tensor:
    """uint8 [samples, n], 0/1: independent elements of unequal means, moved together by one shared variable."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.linspace(0.02, 0.6, n)
    shared = 0.12 * torch.randn(samples, 1, generator=generator) * torch.linspace(-1, 1, n)
    return (torch.rand(samples, n, generator=generator) < means + shared).to(torch.uint8)


def test_expected_moments_are_those_of_more_samples():
    """On average over pilots: one of them has a spectrum of its own."""
    pilots = []
    for seed in range(6):
        rows = rank_one(128, seed, n=2000).float()
        seen = summarize_gram((rows @ rows.T).long(), 1)
        expected = extrapolation._expected_summary(seen, trace_estimate(rows.sum(0).int()[:, None], 128), 1024, 1)
        pilots.append((seen.to_array(), expected.to_array()))
    seen, expected = np.mean(pilots, axis=0)
    rows = rank_one(1024, 7, n=2000).float()
    found = summarize_gram((rows @ rows.T).long(), 1).to_array()
    fourth = [field.name for field in dataclasses.fields(GramSummary)].index("fourth")
    assert np.delete(expected, fourth) == pytest.approx(np.delete(found, fourth), rel=0.2)
    assert np.delete(seen, fourth)[2:].tolist() != pytest.approx(np.delete(found, fourth)[2:].tolist(), rel=0.2)
    # Its largest diagonal entries count as well: what is expected errs on the large side, by less than a pilot does.
    assert found[fourth] < expected[fourth] < 2.5 * found[fourth] < seen[fourth]


def test_expected_counts_scatter_as_those_of_more_samples():
    few, many = (rank_one(samples, seed).sum(0, dtype=torch.int32)[:, None] for samples, seed in ((64, 0), (4096, 1)))
    expected = extrapolation._expected_counts(few, 64, 4096, trace_estimate(few, 64))
    assert expected.dtype == torch.int32
    assert int(expected.min()) >= 0
    assert int(expected.max()) <= 4096
    scatter = [
        float((counts.double() / samples).std()) for counts, samples in ((few, 64), (expected, 4096), (many, 4096))
    ]
    assert scatter[1] == pytest.approx(scatter[2], rel=0.03)
    assert scatter[0] > 1.04 * scatter[2]
    assert float(expected.double().mean()) == pytest.approx(64 * float(few.double().mean()), rel=0.01)


def test_expected_counts_of_levels_are_counts():
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 6, (40, 300), generator=generator)
    counts = torch.stack([(levels == level).sum(0, dtype=torch.int32) for level in range(1, 6)], dim=1)
    for samples in (20, 40, 4000):
        expected = extrapolation._expected_counts(counts, 40, samples, trace_estimate(counts, 40))
        assert (expected >= 0).all()
        assert (expected.sum(1) <= samples).all()


def test_pilot_samples_are_the_last_of_the_stream(monkeypatch):
    seen = []
    run = module.Sampler.run
    monkeypatch.setattr(module.Sampler, "run", lambda self, segments: seen.extend(segments) or run(self, segments))
    rf.suggest(MODEL, IMAGES, K, 0.1, sigma=0.2, samples=64, pilot=20, batch_size=16, taus=(0.1,), levels=(1,))
    for image in range(2):
        parts = [(part.first_sample, part.first_sample + part.count) for part in seen if part.image == image]
        assert parts == [(2**32 - 20, 2**32 - 4), (2**32 - 4, 2**32)]


def test_pilot_counts_are_those_of_certify():
    """All candidates share one pass, and still each has the samples that a run of its own has."""
    model = Elementwise(1, 12, 12).eval()
    x = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(3))
    own = rf.certify(
        model, x, sigma=0.3, tau=0.2, gamma=0.1, levels=5, samples=30, first_sample=2**32 - 30, image_ids=[4, 9]
    )
    seen = []
    expected = module.expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "expected", lambda one, settings: seen.append(one) or expected(one, settings))
        rf.suggest(
            model, x, 20, 0.1, sigma=0.3, pilot=30, taus=(0.3, 0.2), gammas=(0.1,), levels=(5,), image_ids=[4, 9]
        )
    for image in range(2):
        assert torch.equal(seen[2 * image + 1].counts[0], own.counts[image])
        assert torch.equal(seen[2 * image + 1].gram_summary[0], own.gram_summary[image])
        assert torch.equal(seen[2 * image + 1].directions[0], own.directions[image])


def test_settings_are_arguments_of_certify():
    told = {"alpha": 0.1, "target": 2, "channel_sum": True, "seed": 5, "second_moment": False, "samples": 40}
    suggestion = rf.suggest(MODEL, IMAGES, 20, 0.05, sigma=0.25, pilot=16, batch_size=8, taus=(0.2, 0.1), **told)
    assert suggestion.settings.items() >= told.items()
    cert = rf.certify(MODEL, IMAGES, **suggestion.settings)
    assert (cert.settings.sigma, cert.settings.target, cert.settings.shape) == (0.25, (2, 2), (16, 16))
    assert (cert.settings.alpha, cert.settings.second_moment) == (0.1, False)


def test_repr_is_a_table_best_first():
    suggestion = rf.suggest(MODEL, IMAGES, K, 0.05, sigma=0.2, samples=512, pilot=32, batch_size=32, taus=(0.1, 0.3))
    lines = repr(suggestion).splitlines()
    assert len(lines) == 2 + len(suggestion.candidates)
    scores = [candidate.score for candidate in suggestion.candidates]
    assert scores == sorted(scores, reverse=True)
    assert lines[2].split()[0] == f"{suggestion.settings['tau']:g}"
    assert max(map(len, lines[1:])) <= 80


def test_combinations_are_the_different_maps():
    assert module._combinations((0.1, 0.02), (None, 0.02, 0.05), (1, 15)) == [
        (0.1, None, 1),
        (0.02, None, 1),
        (0.1, 0.02, 15),
        (0.1, 0.05, 15),
    ]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"k": 0}, ValueError, "k:"),
        ({"k": N // 2 + 1}, ValueError, "k:"),
        ({"radius": 0.0}, ValueError, "radius"),
        ({"pilot": 7}, ValueError, "pilot"),
        ({"samples": 1}, ValueError, "samples"),
        ({"taus": ()}, ValueError, "leave no candidate"),
        ({"taus": (0.1,), "gammas": (0.2,), "levels": (15,)}, ValueError, "leave no candidate"),
        ({"taus": (1.5,)}, ValueError, "tau"),
        ({"gammas": (0.0,)}, ValueError, "gamma"),
        ({"levels": (16,)}, ValueError, "levels"),
        ({"levels": (None,)}, TypeError, "levels"),
        ({"bound": "clopper-pearson"}, ValueError, "clopper-pearson"),
        ({"explain": "guess"}, ValueError, "explain"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite"),
        ({"alpha": 1.0}, ValueError, "alpha"),
        ({"target": 9}, ValueError, "target"),
    ],
)
def test_bad_arguments(changed, error, message):
    arguments = {"k": K, "radius": 0.1, "sigma": 0.2, "batch_size": 8} | changed
    with pytest.raises(error, match=message):
        rf.suggest(MODEL, IMAGES, **arguments)

"""Numbers that come out of numpy, from a grid of settings or the size of an array, are numbers."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import robattr_fast as rf

pytestmark = pytest.mark.once

N = np.int64
X = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
COUNTS = torch.tensor([[[1], [3], [0]]], dtype=torch.int32)
PACKED = torch.arange(128, dtype=torch.uint8).view(2, 64)

# The same call with Python's numbers and with numpy's.
CALLS = {
    "noisy_samples": lambda i, f: rf.noisy_samples(X, f(0.25), i(3), seed=i(7), first_sample=i(2)),
    "topk_threshold": lambda i, f: rf.topk_threshold(X, i(3)),
    "sparsify": lambda i, f: rf.sparsify(X, f(0.5), f(0.25), levels=i(3)),
    "soft_topk": lambda i, f: rf.soft_topk(X, i(3), f(0.25)),
    "betting_bounds": lambda i, f: torch.cat(rf.betting_bounds(COUNTS, i(4), f(0.125))),
    "packed_gram": lambda i, f: rf.packed_gram(PACKED, i(3)),
    "linear_attention": lambda i, f: rf.linear_attention(*[X[None, None]] * 3, eps=f(0.125)),
    "overlap": lambda i, f: rf.overlap(X, X.flip(0), i(3)),
    "smoothgrad": lambda i, f: rf.smoothgrad(
        model(), X, sigma=f(0.25), samples=i(4), seed=i(3), first_sample=i(1), batch_size=i(2), target=i(1)
    ),
}


def model():
    torch.manual_seed(0)
    return nn.Linear(12, 3).eval()


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("name", CALLS)
def test_integers_and_floats(name, integer):
    expected = CALLS[name](int, float)
    assert torch.equal(CALLS[name](integer, np.float32), expected)
    assert torch.equal(CALLS[name](integer, np.float64), expected)


def test_a_certificate_and_its_file(tmp_path):
    settings = {"tau": 0.5, "levels": 3, "samples": 32, "batch_size": 8, "seed": 5, "first_sample": 4, "retain": 8}
    of_numpy = {name: (np.float64 if name == "tau" else N)(value) for name, value in settings.items()}
    stop = rf.StopWhen(N(3), radius=np.float32(0.25), overlap=np.float64(0.5))
    plain = rf.StopWhen(3, radius=0.25, overlap=0.5)
    expected = rf.certify(model(), X, sigma=0.25, stop=plain, **settings)
    found = rf.certify(model(), X, sigma=np.float32(0.25), stop=stop, **of_numpy)
    assert torch.equal(found.counts, expected.counts)
    found.save(tmp_path / "a.safetensors")
    assert rf.Certificate.load(tmp_path / "a.safetensors").settings == expected.settings
    json.dumps(found.settings.seed)
    for name, call in {
        "overlap": lambda k: found.overlap(k, 0.01).share,
        "radius": lambda k: found.radius(k, 0.5),
        "membership": lambda k: rf.Certificate.from_counts(COUNTS, k, sigma=0.5).lower,
    }.items():
        assert torch.equal(call(N(3 if name != "membership" else 4)), call(3 if name != "membership" else 4)), name


@pytest.mark.parametrize("value", [np.float64(3.0), np.bool_(True), "3", True])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(TypeError, match="k: got"):
        rf.topk_threshold(X, value)

"""SmoothGrad kinds against plain loops over the same noise."""

import sys

import pytest
import torch
from models import Elementwise, small_cnn

import robattr_fast as rf

SIGMA, SAMPLES = 0.3, 37


def gradients(model, x, target=None):
    """Input gradients of all noisy samples, float64 [B, q, *S]."""
    noisy = rf.reference.noisy_samples(x, SIGMA, SAMPLES, seed=5)
    result = torch.zeros_like(noisy, dtype=torch.float64)
    for b in range(x.shape[0]):
        for j in range(SAMPLES):
            z = noisy[b, j].clone().requires_grad_()
            logits = model(z[None])[0]
            (gradient,) = torch.autograd.grad(logits.max() if target is None else logits[target], z)
            result[b, j] = gradient
    return result


def min_max(g):
    size = g.abs().flatten(2)
    low, high = size.amin(-1, keepdim=True), size.amax(-1, keepdim=True)
    return ((size - low) / (high - low)).view_as(g)


EXPECTED = {
    "plain": lambda g: g.mean(1),
    "absolute": lambda g: g.abs().mean(1),
    "squared": lambda g: (g**2).mean(1),
    "vargrad": lambda g: ((g - g.mean(1, keepdim=True)) ** 2).mean(1),
    "scaled": lambda g: min_max(g).mean(1),
    "sparsified": lambda g: (
        rf.reference.sparsify(g.abs().float().flatten(2), 0.2, 0.1, levels=4).mean(1).view_as(g[:, 0])
    ),
    "soft_topk": lambda g: rf.reference.soft_topk(g.abs().float().flatten(2), 10, 0.1)[0].mean(1).view_as(g[:, 0]),
}


@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("kind", EXPECTED)
def test_kinds_match_a_plain_loop(kind, target):
    model = Elementwise(2, 5, 5).eval()
    x = torch.rand(2, 2, 5, 5)
    got = rf.smoothgrad(
        model,
        x,
        kind=kind,
        sigma=SIGMA,
        samples=SAMPLES,
        target=target,
        seed=5,
        tau=0.2,
        gamma=0.1,
        levels=4,
        temperature=0.1 if kind == "soft_topk" else None,
        batch_size=8,
    )
    assert got.shape == x.shape
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, EXPECTED[kind](gradients(model, x, target)).float(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("kind", EXPECTED)
def test_batches_and_images_are_independent(kind):
    model = Elementwise(2, 5, 5).eval()
    x = torch.rand(3, 2, 5, 5)
    settings = {"kind": kind, "sigma": SIGMA, "samples": SAMPLES}
    if kind == "soft_topk":
        settings["temperature"] = 0.1
    whole = rf.smoothgrad(model, x, **settings, batch_size=10)
    for batch_size in (1, 64, "auto"):
        torch.testing.assert_close(
            rf.smoothgrad(model, x, **settings, batch_size=batch_size), whole, rtol=1e-6, atol=1e-7
        )
    single = rf.smoothgrad(model, x[2:], **settings, image_ids=[2], batch_size=10)
    torch.testing.assert_close(single[0], whole[2], rtol=1e-6, atol=1e-7)


def test_constant_gradient_is_scaled_to_zero():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 1)).eval()
    with torch.no_grad():
        model[1].weight.fill_(0.5)
    assert rf.smoothgrad(model, torch.rand(1, 4), kind="scaled", sigma=0.1, samples=3).abs().max() == 0


def test_vargrad_does_not_cancel():
    """A huge mean gradient with a small spread: the naive E g^2 - (E g)^2 would lose it in float32, and here too."""

    class Offset(torch.nn.Module):
        def forward(self, z):
            return (1e6 * z + 0.5 * z**2).sum(dim=1, keepdim=True).expand(-1, 2)

    got = rf.smoothgrad(
        Offset().double().eval(), torch.zeros(1, 50, dtype=torch.float64), kind="vargrad", sigma=0.3, samples=400
    )
    assert abs(float(got.mean()) - 0.09) < 5 * 0.09 * (2 / (400 * 50)) ** 0.5


def test_half_models_give_float32_maps():
    model = small_cnn().to(torch.bfloat16)
    x = torch.rand(1, 1, 12, 12).to(torch.bfloat16)
    assert rf.smoothgrad(model, x, sigma=0.2, samples=4).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "smooth"}, "kind: got 'smooth'"),
        ({"sigma": 0}, "sigma"),
        ({"samples": 0}, "samples"),
        ({"tau": 2}, "tau"),
        ({"kind": "soft_topk"}, "temperature: got None"),
        ({"kind": "soft_topk", "temperature": 0.0}, "temperature: got 0.0"),
        (
            {"kind": "soft_topk", "temperature": 1.0, "tau": 1.0},
            "tau: got 1.0, takes for kind='soft_topk' less than all",
        ),
        ({"kind": "vargrad", "temperature": 1.0}, "temperature: got 1.0, takes None for kind='vargrad'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        rf.smoothgrad(small_cnn(), torch.rand(1, 1, 12, 12), **({"sigma": 0.1, "samples": 3} | arguments))


def test_a_nan_gradient_is_an_error():
    class Root(torch.nn.Module):
        def forward(self, z):
            return z.sqrt().sum(dim=1, keepdim=True).expand(-1, 2)

    with pytest.raises(rf.NonFiniteError, match="of image 0 has a NaN or infinite gradient"):
        rf.smoothgrad(Root().eval(), torch.ones(1, 4), sigma=5.0, samples=40)


def test_progress(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["robattr_fast.attributions.smoothgrad"], "_REPORT_SECONDS", 0.0)
    events = []
    rf.smoothgrad(small_cnn(), torch.rand(2, 1, 12, 12), sigma=0.1, samples=6, batch_size=4, progress=events.append)
    assert [(e.image, e.images, e.samples, e.total) for e in events] == [
        (0, 2, 4, 6),
        (0, 2, 6, 6),
        (1, 2, 2, 6),
        (1, 2, 6, 6),
    ]
    rf.smoothgrad(small_cnn(), torch.rand(1, 1, 12, 12), sigma=0.1, samples=6, batch_size=6, progress=True)
    assert capsys.readouterr().err == "image 1/1: 6/6 samples\n"

"""Captum: parity with its own NoiseTunnel on the same noise, and what ours adds."""

import functools

import pytest
import torch
from models import Elementwise, small_cnn
from torch import nn

import robattr_fast as rf

attr = pytest.importorskip("captum.attr", reason="the integration with Captum needs captum")

from robattr_fast.integrations.captum import NoiseTunnel, SmoothGrad, attributed  # noqa: E402
from robattr_fast.model import is_identified  # noqa: E402

SIGMA, SAMPLES = 0.3, 11


@pytest.fixture
def shared_noise(monkeypatch):
    """Captum's NoiseTunnel draws what ours draws: sample after sample of the stream of this seed."""
    drawn = {"first": 0}

    def add_noise(x, stdev, count):
        noisy = rf.reference.noisy_samples(x, stdev, count, seed=3, first_sample=drawn["first"])
        drawn["first"] += count
        return noisy.flatten(0, 1)

    monkeypatch.setattr(attr.NoiseTunnel, "_add_noise_to_input", staticmethod(add_noise))


def images():
    return torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(1))


METHODS = {
    "saliency": (attr.Saliency, {}),
    "signed": (attr.Saliency, {"abs": False}),
    "input x gradient": (attr.InputXGradient, {}),
    "integrated gradients": (attr.IntegratedGradients, {"n_steps": 4, "baselines": torch.full((3, 1, 12, 12), 0.1)}),
}


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("nt_type", ["smoothgrad", "smoothgrad_sq", "vargrad"])
@pytest.mark.parametrize("method", METHODS)
def test_parity_with_captum_on_shared_noise(shared_noise, method, nt_type, chunk):
    make, settings = METHODS[method]
    attribution = make(small_cnn())
    arguments = {
        "nt_type": nt_type,
        "nt_samples": SAMPLES,
        "nt_samples_batch_size": chunk,
        "stdevs": SIGMA,
        "target": [0, 3, 1],
        **settings,
    }
    expected = attr.NoiseTunnel(attribution).attribute(images(), **arguments)
    got = NoiseTunnel(attribution, seed=3).attribute(images(), **arguments)
    assert got.dtype == torch.float32
    # Captum sums in float32, and its variance is a difference of such sums.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_smoothgrad_is_that_of_captum(shared_noise):
    model, x = small_cnn(), images()
    for kind, nt_type in (("plain", "smoothgrad"), ("squared", "smoothgrad_sq"), ("vargrad", "vargrad")):
        got = SmoothGrad(model).attribute(x, [0, 3, 1], sigma=SIGMA, samples=SAMPLES, seed=3, kind=kind)
        saliency = attr.Saliency(model)
        arguments = {"nt_type": nt_type, "nt_samples": SAMPLES, "stdevs": SIGMA, "abs": False}
        tunnel = NoiseTunnel(saliency, seed=3).attribute(x, target=torch.tensor([0, 3, 1]), **arguments)
        torch.testing.assert_close(got, tunnel, rtol=1e-4, atol=1e-6)


def test_it_is_an_attribution_of_captum():
    from captum.metrics import sensitivity_max

    explain = SmoothGrad(small_cnn())
    assert isinstance(explain, attr.GradientAttribution)

    value = sensitivity_max(
        explain.attribute, images(), perturb_radius=0.05, n_perturb_samples=2, target=1, sigma=SIGMA, samples=4
    )
    assert value.shape == (3,)
    assert bool((value > 0).all())
    with pytest.raises(ValueError, match="inputs: got 2 tensors, takes one"):
        explain.attribute((images(), images()), sigma=SIGMA, samples=4)


def test_chunks_and_batches_do_not_change_the_result():
    # A model whose gradients have the same bits at every batch size leaves nothing but our sums, and those are float64.
    tunnel = NoiseTunnel(attr.Saliency(Elementwise(1, 12, 12).eval()), seed=7)
    arguments = {"nt_type": "vargrad", "nt_samples": SAMPLES, "stdevs": SIGMA, "target": 1}
    whole = tunnel.attribute(images(), **arguments)
    for chunk in (1, 4, 64):
        torch.testing.assert_close(tunnel.attribute(images(), nt_samples_batch_size=chunk, **arguments), whole)
    one = NoiseTunnel(tunnel.attribution_method, seed=7, image_ids=[2]).attribute(images()[2:], **arguments)
    torch.testing.assert_close(one, whole[2:])
    assert not torch.equal(NoiseTunnel(tunnel.attribution_method, seed=8).attribute(images(), **arguments), whole)


def test_variance_does_not_cancel():
    """A huge mean gradient with a small spread: float32 sums of squares lose it."""

    class Offset(torch.nn.Module):
        def forward(self, z):
            return (1e4 * z + 0.5 * z**2).flatten(1).sum(dim=1, keepdim=True)

    got = NoiseTunnel(attr.Saliency(Offset().eval())).attribute(
        torch.zeros(1, 200), nt_type="vargrad", nt_samples=200, stdevs=SIGMA, target=0
    )
    assert abs(float(got.mean()) / SIGMA**2 - 1) < 5 * (2 / (200 * 200)) ** 0.5


def test_several_inputs_arguments_and_deltas():
    class Two(torch.nn.Module):
        def forward(self, a, b, scale):
            return torch.stack([(a * b * scale).sum(1), (a**2).sum(1)], dim=1)

    a, b, scale = torch.rand(2, 5), torch.rand(2, 5), torch.tensor([[1.0], [2.0]])
    tunnel = NoiseTunnel(attr.IntegratedGradients(Two()), seed=1)
    (of_a, of_b), delta = tunnel.attribute(
        (a, b),
        nt_samples=3,
        nt_samples_batch_size=2,
        stdevs=(0.1, 0.2),
        target=0,
        additional_forward_args=scale,
        return_convergence_delta=True,
    )
    assert of_a.shape == of_b.shape == (2, 5)
    assert delta.shape == (6,)
    assert tunnel.has_convergence_delta()
    noisy_a = rf.noisy_samples(a, 0.1, 3, seed=1)
    noisy_b = rf.noisy_samples(b, 0.2, 3, seed=2)
    # Integrated gradients of a product from zero: half of it to each factor.
    torch.testing.assert_close(of_a, (noisy_a * noisy_b * scale[:, None] / 2).mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nt_type", ["smoothgrad", "smoothgrad_sq", "vargrad"])
@pytest.mark.parametrize("samples", [1, 5])
def test_without_noise_it_is_the_method_itself(nt_type, samples):
    """Captum takes stdevs=0, to check a set-up."""
    saliency = attr.Saliency(small_cnn())
    arguments = {"nt_type": nt_type, "nt_samples": samples, "stdevs": 0.0, "target": [0, 3, 1]}
    expected = attr.NoiseTunnel(saliency).attribute(images(), **arguments)
    got = NoiseTunnel(saliency).attribute(images(), **arguments)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    if nt_type == "smoothgrad":
        torch.testing.assert_close(got, saliency.attribute(images(), target=[0, 3, 1]), rtol=1e-5, atol=1e-6)


def test_noise_on_one_of_several_inputs():
    class Two(torch.nn.Module):
        def forward(self, image, age):
            return image.sum(1, keepdim=True).sin() * age

    image, age = torch.rand(2, 4), torch.rand(2, 3)
    tunnel = NoiseTunnel(attr.Saliency(Two()), seed=2)
    of_image, of_age = tunnel.attribute((image, age), nt_samples=6, stdevs=(0.1, 0), target=1, abs=False)
    noisy = rf.noisy_samples(image, 0.1, 6, seed=2).sum(2)
    torch.testing.assert_close(of_age[:, 1], noisy.sin().mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_image[:, 0], age[:, 1] * noisy.cos().mean(1), rtol=1e-5, atol=1e-6)


def test_bfloat16_models_work():
    model = small_cnn().to(torch.bfloat16)
    got = NoiseTunnel(attr.Saliency(model)).attribute(images().bfloat16(), nt_samples=3, stdevs=SIGMA, target=0)
    assert got.dtype == torch.bfloat16
    assert bool(got.isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nt_type": "smooth"}, "nt_type: got 'smooth'"),
        ({"nt_samples": 0}, "nt_samples: got 0"),
        ({"nt_samples_batch_size": 0}, "nt_samples_batch_size: got 0"),
        ({"stdevs": -0.1}, "stdevs: got -0.1, takes a finite number >= 0"),
        ({"stdevs": (0.1, 0.2)}, "stdevs: got 2, takes one number"),
        ({"draw_baseline_from_distrib": True}, "draw_baseline_from_distrib: got True"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseTunnel(attr.Saliency(small_cnn())).attribute(images(), target=0, **arguments)


class Flattened(nn.Sequential):
    """Captum has no rule of relevance for nn.Flatten."""

    def forward(self, x):
        return super().forward(x).flatten(1)


def cnn_of_colours():
    torch.manual_seed(7)
    layers = nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)
    return Flattened(*layers).eval()


OCCLUSION = {"sliding_window_shapes": (3, 4, 4), "strides": (3, 2, 2)}
OF_THE_INPUT = {
    "saliency": (attr.Saliency, {}),
    "guided backpropagation": (attr.GuidedBackprop, {}),
    "input x gradient": (attr.InputXGradient, {}),
    "integrated gradients": (attr.IntegratedGradients, {"n_steps": 4}),
    "deep lift": (attr.DeepLift, {}),
    "relevance propagation": (attr.LRP, {}),
    "occlusion": (attr.Occlusion, OCCLUSION),
}
OF_A_LAYER = {
    "grad-cam": (attr.LayerGradCam, {"relu_attributions": True}),
    "activation x gradient": (attr.LayerGradientXActivation, {}),
}
COLOURS = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(2))
CERTIFY = {"sigma": 0.2, "tau": 0.2, "samples": 32, "batch_size": 8, "second_moment": False}


@pytest.mark.parametrize("name", [*OF_THE_INPUT, *OF_A_LAYER])
def test_methods_are_certified(name):
    method, settings = (OF_THE_INPUT | OF_A_LAYER)[name]
    layer = "3" if name in OF_A_LAYER else None
    model = cnn_of_colours()
    explain = functools.partial(attributed, method=method, layer=layer, **settings)
    certificate = rf.certify(model, COLOURS, explain=explain, target=[2, 0], channel_sum=True, **CERTIFY)
    # Element by element, on the same noise, by Captum alone.
    noisy = rf.noisy_samples(COLOURS, 0.2, 32)
    for image, target in enumerate([2, 0]):
        if layer is None:
            scores = method(model).attribute(noisy[image].clone(), target=target, **settings).abs().sum(dim=1)
        else:
            small = method(model, model[3]).attribute(noisy[image], target=target, **settings).sum(dim=1, keepdim=True)
            scores = attr.LayerAttribution.interpolate(small, (12, 12), "bilinear")[:, 0].abs()
        wanted = rf.reference.sparsify(scores.detach().flatten(1), 0.2).sum(dim=0)
        assert (certificate.counts[image, :, 0] - wanted).abs().sum() <= 0.01 * wanted.sum()
    assert is_identified(certificate.settings.explain)
    assert method.__name__ in certificate.settings.explain


def test_what_captum_offers_and_cannot_be_certified():
    explain = functools.partial(attributed, method=attr.GradientShap, baselines=torch.zeros(2, 3, 12, 12))
    with pytest.raises(rf.ModelError, match="from call to call"):
        rf.certify(cnn_of_colours(), COLOURS, explain=explain, **CERTIFY)
    with pytest.raises(ValueError, match="create_graph: got True"):
        attributed(cnn_of_colours(), COLOURS, create_graph=True, method=attr.Saliency)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(432, 4)).eval()
    with pytest.raises(ValueError, match="method: LayerGradCam returned shape"):
        attributed(flat, COLOURS, method=attr.LayerGradCam, layer="0")


def test_signed_maps_and_the_largest_logit():
    model = cnn_of_colours()
    signed = attributed(model, COLOURS, method=attr.InputXGradient, size=False)
    torch.testing.assert_close(signed, rf.attributions.input_x_gradient(model, COLOURS))
    assert not signed.requires_grad
    assert not COLOURS.requires_grad

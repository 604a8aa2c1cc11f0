"""Attributions: equal to Captum's, differentiable, and what they refuse."""

import functools

import pytest
import torch
from models import small_cnn
from torch import nn

import robattr_fast as rf
from robattr_fast import attributions
from robattr_fast.errors import ModelError
from robattr_fast.model import explanation_name, is_identified

attr = pytest.importorskip("captum.attr", reason="Captum is what the attributions are compared with")

TARGET = [0, 3, 1]
partial = functools.partial
SMOOTH = partial(attributions.smoothgrad, sigma=0.2, samples=3)
ALL = {
    "gradient": attributions.gradient,
    "input_x_gradient": attributions.input_x_gradient,
    "integrated_gradients": partial(attributions.integrated_gradients, steps=4, batch_size=7),
    "smoothgrad": SMOOTH,
    "smoothgrad absolute": partial(SMOOTH, kind="absolute"),
    "smoothgrad squared": partial(SMOOTH, kind="squared"),
    "smoothgrad vargrad": partial(SMOOTH, kind="vargrad"),
    "smoothgrad scaled": partial(SMOOTH, kind="scaled"),
    "smoothgrad sparsified": partial(SMOOTH, kind="sparsified", levels=None, tau=0.4, gamma=0.1),
    "smoothgrad soft_topk": partial(SMOOTH, kind="soft_topk", tau=0.3, temperature=0.1),
    "grad_cam": partial(attributions.grad_cam, layer="2"),
    "grad_cam of its own size": partial(attributions.grad_cam, layer="0", relu=False, resize=None),
    "grad_cam++": partial(attributions.grad_cam, layer="2", kind="grad-cam++"),
    "layer_cam": partial(attributions.grad_cam, layer="2", kind="layer-cam", resize="nearest"),
    "magnitude": partial(attributions.magnitude, explain=attributions.input_x_gradient),
}


def images(dtype=torch.float32):
    return torch.rand(3, 1, 12, 12, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (attributions.gradient, attr.Saliency, {"abs": False}),
        (partial(attributions.magnitude, explain=attributions.gradient), attr.Saliency, {}),
        (attributions.input_x_gradient, attr.InputXGradient, {}),
        (attributions.integrated_gradients, attr.IntegratedGradients, {}),
    ],
)
def test_equal_to_captum(ours, theirs, settings):
    model = small_cnn()
    expected = theirs(model).attribute(images().requires_grad_(), target=TARGET, **settings)
    torch.testing.assert_close(ours(model, images(), TARGET), expected.detach().float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", ["gausslegendre", "riemann_left", "riemann_middle", "riemann_right"])
@pytest.mark.parametrize("baseline", [0.3, torch.linspace(0, 1, 12)])
def test_integrated_gradients_are_those_of_captum(rule, baseline):
    model, x = small_cnn().double(), images(torch.float64)
    expected = attr.IntegratedGradients(model).attribute(
        x, torch.as_tensor(baseline, dtype=x.dtype).expand(x.shape), TARGET, n_steps=7, method=rule
    )
    got = attributions.integrated_gradients(model, x, TARGET, steps=7, baseline=baseline, rule=rule, batch_size=4)
    # Captum places the points of Riemann sums in float32.
    rtol = 1e-10 if rule == "gausslegendre" else 1e-4
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol / 10)


def test_integrated_gradients_sum_to_the_change_of_the_logit():
    model, x = small_cnn().double(), images(torch.float64)
    got = attributions.integrated_gradients(model, x, TARGET, steps=30, baseline=0.5)
    with torch.no_grad():
        change = (model(x) - model(torch.full_like(x, 0.5)))[range(3), TARGET]
    torch.testing.assert_close(got.flatten(1).sum(dim=1), change, rtol=1e-8, atol=1e-10)


def test_grad_cam_is_that_of_captum():
    model, x = small_cnn(), images()
    for layer in (0, 1, 2):
        theirs = attr.LayerGradCam(model, model[layer])
        for relu in (False, True):
            expected = theirs.attribute(x, TARGET, relu_attributions=relu).detach()
            settings = {"layer": str(layer), "relu": relu}
            got = attributions.grad_cam(model, x, TARGET, resize=None, **settings)
            torch.testing.assert_close(got, expected[:, 0], rtol=1e-5, atol=1e-8)
            got = attributions.grad_cam(
                model, x, TARGET, layer=str(layer + 1), layer_input=True, relu=relu, resize=None
            )
            torch.testing.assert_close(got, expected[:, 0], rtol=1e-5, atol=1e-8)
            for mode, name in (("bilinear", "linear"), ("nearest", "nearest")):
                larger = attr.LayerAttribution.interpolate(expected, (12, 12), mode)
                got = attributions.grad_cam(model, x, TARGET, resize=name, **settings)
                torch.testing.assert_close(got, larger[:, 0], rtol=1e-5, atol=1e-8)


def test_grad_cam_of_an_averaged_layer_is_the_class_activation_map():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).eval()
    x = images()
    weights = model[4].weight[TARGET].detach()
    expected = torch.einsum("bk,bkhw->bhw", weights, model[:2](x).detach()) / 100
    got = attributions.grad_cam(model, x, TARGET, layer="2", layer_input=True, relu=False, resize=None)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


def test_grad_cam_plus_plus_and_layer_cam_by_their_formulas():
    model, x = small_cnn().double(), images(torch.float64)
    activation = model[:3](x).detach().requires_grad_()
    logit = model[3:](activation)[range(3), TARGET]
    (g,) = torch.autograd.grad(logit.sum(), activation)
    a = activation.detach()
    alpha = g**2 / (2 * g**2 + g**3 * a.sum(dim=(2, 3), keepdim=True))
    weights = (alpha * g.relu()).sum(dim=(2, 3), keepdim=True)
    for kind, expected in (("grad-cam++", weights * a), ("layer-cam", g.relu() * a)):
        got = attributions.grad_cam(model, x, TARGET, layer="2", kind=kind, resize=None)
        torch.testing.assert_close(got, expected.sum(dim=1).relu(), rtol=1e-8, atol=1e-12)


def test_grad_cam_sees_a_layer_before_what_follows_writes_into_it():
    torch.manual_seed(2)
    layers = [nn.Conv2d(1, 5, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(500, 4)]
    model = nn.Sequential(*layers).eval()
    other = nn.Sequential(layers[0], nn.ReLU(), *layers[2:]).eval()
    settings = {"layer": "0", "relu": False}
    got, expected = (attributions.grad_cam(m, images(), TARGET, **settings) for m in (model, other))
    torch.testing.assert_close(got, expected)
    assert not model[0]._forward_hooks


def test_one_dimensional_images_have_class_activation_maps_too():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv1d(2, 5, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(4)).eval()
    x = torch.rand(2, 2, 21)
    model(x)
    assert attributions.grad_cam(model, x, layer="1").shape == (2, 21)


def test_grad_cam_refuses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.unused = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.part(self.part(x)).flatten(1)

    with pytest.raises(ValueError, match="layer: got 'last', expected the name of a submodule, as '0'"):
        attributions.grad_cam(small_cnn(), images(), layer="last")
    with pytest.raises(ModelError, match=r"layer: '4' gives shape \(3, 4\)"):
        attributions.grad_cam(small_cnn(), images(), layer="4")
    for layer, times in (("part", 2), ("unused", 0)):
        with pytest.raises(ModelError, match=f"layer: '{layer}' ran {times} times"):
            attributions.grad_cam(Twice().eval(), images(), layer=layer)
    with pytest.raises(ValueError, match="kind: got 'cam'"):
        attributions.grad_cam(small_cnn(), images(), layer="0", kind="cam")


@pytest.mark.parametrize("kind", ["plain", "absolute", "squared", "vargrad", "scaled", "sparsified", "soft_topk"])
def test_smoothgrad_has_the_same_noise_for_every_image(kind):
    model, x = small_cnn(), images()
    settings = {"kind": kind, "sigma": 0.2, "samples": 5, "temperature": 0.1 if kind == "soft_topk" else None}
    together = attributions.smoothgrad(model, x, TARGET, **settings)
    for image in range(3):
        alone = attributions.smoothgrad(model, x[image : image + 1], TARGET[image : image + 1], **settings)
        torch.testing.assert_close(alone[0], together[image], rtol=1e-4, atol=1e-6)
    ids = {"image_ids": [0, 0, 0], "seed": attributions.smoothed.SEED, "target": TARGET, "batch_size": 15}
    torch.testing.assert_close(together, rf.smoothgrad(model, x, **settings, **ids), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in ALL if "smooth" not in name])
def test_no_target_is_the_largest_logit(name):
    model = small_cnn()
    predicted = model(images()).argmax(dim=1)
    torch.testing.assert_close(ALL[name](model, images()), ALL[name](model, images(), predicted), rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_differentiable_to_x_and_parameters(name):
    model = small_cnn().double()
    x = images(torch.float64)[:2].requires_grad_()
    inputs = [x, *model.parameters()]
    directions = [torch.randn_like(tensor) for tensor in inputs]
    maps = ALL[name](model, x, [2, 0], create_graph=True)
    weights = torch.randn_like(maps)
    (weights * maps).sum().backward()
    found = sum(
        float((tensor.grad * v).sum()) for tensor, v in zip(inputs, directions, strict=True) if tensor.grad is not None
    )

    def value(step):
        with torch.no_grad():
            for tensor, v in zip(inputs, directions, strict=True):
                tensor.add_(step * v)
            return float((weights * ALL[name](model, x, [2, 0])).sum())

    step = 1e-8  # sizes have kinks near by
    expected = (value(step) - value(-2 * step)) / (2 * step)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_graph_reaches_parameters_where_x_needs_no_gradient(name):
    model, x = small_cnn(), images()
    ALL[name](model, x, TARGET, create_graph=True).square().sum().backward()
    assert x.grad is None
    assert model[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ALL)
def test_gradients_may_be_disabled_around_it(name, mode):
    model = small_cnn()
    expected = ALL[name](model, images(), TARGET)
    with mode():
        got = ALL[name](model, images(), torch.tensor(TARGET))
    assert not expected.requires_grad
    assert not got.requires_grad
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ALL)
def test_refusals(name):
    explain = ALL[name]
    with pytest.raises(ModelError, match="training mode"):
        explain(small_cnn().train(), images())
    with pytest.raises(ValueError, match=r"target: got \[0, 4, 1.*classes in \[0, 4\)"):
        explain(small_cnn(), images(), [0, 4, 1])
    with pytest.raises(ValueError, match="target: got 2 classes"):
        explain(small_cnn(), images(), [0, 1])
    with pytest.raises(ValueError, match="x: got NaN"):
        explain(small_cnn(), images() * torch.nan)
    with pytest.raises(TypeError, match="model: got function"):
        explain(lambda x: x, images())


CERTIFY = {"sigma": 0.2, "tau": 0.2, "samples": 64, "batch_size": 16, "second_moment": False}


@pytest.mark.parametrize("name", ["gradient", "input_x_gradient"])
def test_a_certificate_of_the_size_is_that_of_the_named_method(name):
    by_name = rf.certify(small_cnn(), images(), explain=name, **CERTIFY)
    explain = partial(attributions.magnitude, explain=getattr(attributions, name))
    found = rf.certify(small_cnn(), images(), explain=explain, **CERTIFY)
    assert (found.counts - by_name.counts).abs().sum() <= 0.01 * by_name.counts.sum()  # folded or not: rounding
    module = "robattr_fast.attributions"
    function = f"callable:{module}.magnitude.magnitude(explain=callable:{module}.gradient.{name})"
    assert found.settings.explain == function
    assert is_identified(function)


def test_maps_of_pixels_are_certified_where_channels_are_summed():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.SiLU(), nn.Flatten(), nn.LazyLinear(4)).eval()
    x = torch.rand(2, 3, 12, 12)
    model(x)
    explain = partial(attributions.grad_cam, layer="1")
    certificate = rf.certify(model, x, explain=explain, channel_sum=True, target=TARGET[:2], **CERTIFY)
    assert certificate.map.shape == (2, 12, 12)
    noisy = rf.reference.noisy_samples(x, 0.2, 64)
    for image in range(2):
        maps = explain(model, noisy[image], TARGET[image])
        counts = rf.reference.sparsify(maps.flatten(1), 0.2).sum(dim=0)
        assert (certificate.counts[image, :, 0] - counts).abs().sum() <= 0.01 * counts.sum()
    with pytest.raises(ModelError, match=r"one score per pixel, \(\d+, 12, 12\): set channel_sum=True"):
        rf.certify(model, x, explain=explain, **CERTIFY)


@pytest.mark.parametrize("name", [name for name in ALL if name != "grad_cam of its own size"])
def test_every_map_can_be_certified(name):
    certificate = rf.certify(small_cnn(), images()[:1], explain=ALL[name], channel_sum=True, **CERTIFY)
    assert 0 < certificate.counts.sum() <= 64 * 28


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gradient", "input_x_gradient", "integrated_gradients", "grad_cam", "grad_cam++"])
def test_half_types(name, dtype):
    model, x = small_cnn(), images()
    expected = ALL[name](model, x, TARGET)
    got = ALL[name](small_cnn().to(dtype), x.to(dtype), TARGET)
    assert got.dtype == (torch.float32 if name.startswith(("grad_", "integrated")) else dtype)
    apart = (got - expected).norm() / expected.norm()
    assert apart < 20 * torch.finfo(dtype).eps


def test_a_callable_whose_rows_differ_is_refused():
    def noisy_by_row(model, x, target):
        return rf.smoothgrad(model, x, target=target, sigma=0.3, samples=2, batch_size=4)

    with pytest.raises(ModelError, match="from row to row"):
        rf.certify(small_cnn(), images(), explain=noisy_by_row, **CERTIFY)


def test_names_of_partial_explanations():
    named = explanation_name(partial(attributions.grad_cam, layer="2", kind="layer-cam"))
    assert named == "callable:robattr_fast.attributions.gradcam.grad_cam(kind='layer-cam', layer='2')"
    assert is_identified(named)
    assert explanation_name(SMOOTH) != explanation_name(partial(SMOOTH, seed=5))
    for unknown in (partial(attributions.integrated_gradients, baseline=torch.zeros(1)), partial(lambda m, x, t: x)):
        assert not is_identified(explanation_name(unknown))

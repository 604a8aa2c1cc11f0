"""Attributions: equal to Captum's, differentiable, and what they refuse."""

import pytest
import torch
from models import small_cnn
from torch import nn

import robattr_fast as rf
from robattr_fast import attributions
from robattr_fast.errors import ModelError

attr = pytest.importorskip("captum.attr", reason="Captum is what the attributions are compared with")

TARGET = [0, 3, 1]
ALL = {"gradient": attributions.gradient, "input_x_gradient": attributions.input_x_gradient}


def images(dtype=torch.float32):
    return torch.rand(3, 1, 12, 12, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (attributions.gradient, attr.Saliency, {"abs": False}),
        (attributions.input_x_gradient, attr.InputXGradient, {}),
    ],
)
def test_equal_to_captum(ours, theirs, settings):
    model = small_cnn()
    expected = theirs(model).attribute(images().requires_grad_(), target=TARGET, **settings)
    torch.testing.assert_close(ours(model, images(), TARGET), expected.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_no_target_is_the_largest_logit(name):
    model = small_cnn()
    predicted = model(images()).argmax(dim=1)
    torch.testing.assert_close(ALL[name](model, images()), ALL[name](model, images(), predicted), rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_differentiable_to_x_and_parameters(name):
    model = small_cnn().double()
    parameters = dict(model.named_parameters())
    x = images(torch.float64)[:1].requires_grad_()

    def map_of(x, weight):
        def forward(batch):
            return torch.func.functional_call(model, parameters | {"4.weight": weight}, batch)

        return ALL[name](Wrapped(forward), x, [2], create_graph=True)

    weight = parameters["4.weight"].detach()[:, :].requires_grad_()
    torch.autograd.gradcheck(lambda x: map_of(x, weight), x, fast_mode=True)
    torch.autograd.gradcheck(lambda weight: map_of(x, weight), weight, fast_mode=True)


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, batch):
        return self.function(batch)


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
    with pytest.raises(ValueError, match=r"target: got \[0, 4, 1\], expected classes in \[0, 4\)"):
        explain(small_cnn(), images(), [0, 4, 1])
    with pytest.raises(ValueError, match="target: got 2 classes"):
        explain(small_cnn(), images(), [0, 1])
    with pytest.raises(ValueError, match="x: got NaN"):
        explain(small_cnn(), images() * torch.nan)
    with pytest.raises(TypeError, match="model: got function"):
        explain(lambda x: x, images())


def test_a_certificate_of_a_callable_is_that_of_the_named_method():
    settings = {"sigma": 0.2, "tau": 0.2, "samples": 64, "batch_size": 16, "second_moment": False}
    by_name = rf.certify(small_cnn(), images().abs(), explain="input_x_gradient", **settings)

    found = rf.certify(small_cnn(), images().abs(), explain=size_of_input_x_gradient, **settings)
    assert (found.counts - by_name.counts).abs().sum() <= 0.01 * by_name.counts.sum()  # folded or not: rounding


def size_of_input_x_gradient(model, x, target):
    return attributions.input_x_gradient(model, x, target).abs()

"""Attention rolled out over layers: by its definitions, as attributions, in every form of attention."""

import functools

import pytest
import torch
from _attention_models import TinyViT
from torch import nn
from torch.nn import functional as F

import robattr_fast as rf
from robattr_fast import attributions
from robattr_fast.errors import ModelError
from robattr_fast.nn import KernelAttention, attention_maps, gradient_rollout, kernelize, maps_and_gradients, rollout
from robattr_fast.nn import attention as kernel_modules
from robattr_fast.nn.functional import kernel_weights, softmax_weights

FORMS = ["torch", "timm", "torch elu", "timm elu", "timm gaussian"]
ALL = {
    "attention": attributions.attention,
    "rollout": attributions.rollout,
    "gradient_rollout": attributions.gradient_rollout,
}


def model_of(form):
    torch.manual_seed(3)
    form, _, kernel = form.partition(" ")
    model = TinyViT(form).double().eval()
    if kernel:
        kernelize(model, kernel=kernel)
    return model


def images():
    return torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def weights(layers=3, n=5):
    torch.manual_seed(4)
    return [torch.randn(2, 3, n, n, dtype=torch.float64).softmax(-1) for _ in range(layers)]


def test_rollout_by_its_definition():
    maps = weights()
    expected = torch.eye(5, dtype=torch.float64)
    for layer in maps:
        expected = (0.3 * torch.eye(5) + 0.7 * layer.mean(1)) @ expected
    got = rollout(dict(enumerate(maps)), residual=0.3)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    for heads in ("max", "min"):
        joined = getattr(torch, f"a{heads}")(maps[0], dim=1)
        joined = joined / joined.sum(-1, keepdim=True)
        torch.testing.assert_close(rollout(maps[:1], heads=heads), (torch.eye(5) + joined) / 2)


def test_rollout_of_rows_of_zeros_is_finite():
    maps = torch.zeros(1, 2, 3, 3)
    torch.testing.assert_close(rollout([maps]), torch.eye(3)[None] / 2)


def test_gradient_rollout_by_its_definition():
    maps, gradients = weights(), [torch.randn(2, 3, 5, 5, dtype=torch.float64) for _ in range(3)]
    expected = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    for layer, slope in zip(maps, gradients, strict=True):
        positive = torch.where(layer * slope > 0, layer * slope, 0).sum(1) / 3
        expected = expected + torch.einsum("bij,bjk->bik", positive, expected)
    torch.testing.assert_close(gradient_rollout(maps, gradients), expected)


def test_refusals():
    with pytest.raises(ValueError, match="maps: got none"):
        rollout([])
    with pytest.raises(ValueError, match=r"maps: got shapes \(2, 3, 5, 5\), \(2, 3, 4, 4\)"):
        rollout([weights()[0], weights(n=4)[0]])
    with pytest.raises(ValueError, match="residual: got 1"):
        rollout(weights(), residual=1)
    with pytest.raises(ValueError, match="heads: got 'sum'"):
        rollout(weights(), heads="sum")
    with pytest.raises(ValueError, match="gradients: got other shapes"):
        gradient_rollout(weights(), weights(layers=2))


class Disturbed:
    """In place of an attention: (weights + disturbance) V, one disturbance of zeros per call, which get gradients."""

    def __init__(self, weights):
        self.weights = weights
        self.disturbances = []

    def __call__(self, q, k, v, *args, **settings):
        weights = self.weights(q, k, **settings)
        self.disturbances.append(torch.zeros_like(weights, requires_grad=True))
        return (weights + self.disturbances[-1]) @ v


def softmax(q, k, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    return softmax_weights(q, k, scale=q.shape[-1] ** -0.5 if scale is None else scale)


def gradients_by_disturbance(monkeypatch, model, x, score):
    """d score / d A of each layer, through A V alone."""
    disturbed = Disturbed(softmax), Disturbed(kernel_weights)
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", disturbed[0])
        patched.setattr(kernel_modules, "kernel_attention", disturbed[1])
        total = score(model(x)).sum()
    return torch.autograd.grad(total, disturbed[0].disturbances + disturbed[1].disturbances)


def first_logit(logits):
    return logits[:, 0]


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_weights(form, monkeypatch):
    model, x = model_of(form), images().requires_grad_()
    maps, gradients = maps_and_gradients(model, x, first_logit)
    assert list(maps) == list(gradients) == list(attention_maps(model, x))
    expected = gradients_by_disturbance(monkeypatch, model, x, first_logit)
    for got, wanted in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)
        assert float(wanted.abs().max()) > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("settings", [{"gated": True}, {"qk_norm": True}])
def test_gradients_of_what_timm_offers(settings, monkeypatch):
    torch.manual_seed(3)
    model, x = TinyViT("timm", **settings).double().eval(), images().requires_grad_()
    _, gradients = maps_and_gradients(model, x, first_logit)
    for got, wanted in zip(
        gradients.values(), gradients_by_disturbance(monkeypatch, model, x, first_logit), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
def test_gradients_of_attention_in_both_layouts(batch_first, monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attention = KernelAttention(8, 2, batch_first=batch_first).double()

        def forward(self, x):
            out = self.attention(x, key=x, value=x, need_weights=False)[0]
            return (out if batch_first else out.transpose(0, 1)).square().sum(dim=2)

    model, x = Model().eval(), torch.rand(3, 4, 8, dtype=torch.float64).requires_grad_()
    _, gradients = maps_and_gradients(model, x, first_logit)
    (expected,) = gradients_by_disturbance(monkeypatch, model, x, first_logit)
    torch.testing.assert_close(gradients["attention"], expected, rtol=1e-8, atol=1e-12)


class OfTransformers(nn.Module):
    """A vision transformer of that library that returns logits."""

    def __init__(self, implementation):
        super().__init__()
        transformers = pytest.importorskip("transformers", reason="its models are explained")
        torch.manual_seed(3)
        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=3,
            attn_implementation=implementation,
        )
        self.inner = transformers.ViTForImageClassification(config).double()

    def forward(self, x):
        return self.inner(x).logits


def test_gradients_in_transformers(monkeypatch):
    x = images().requires_grad_()
    expected = gradients_by_disturbance(monkeypatch, OfTransformers("sdpa").eval(), x, first_logit)
    for implementation in ("eager", "sdpa"):
        _, gradients = maps_and_gradients(OfTransformers(implementation).eval(), x, first_logit)
        for got, wanted in zip(gradients.values(), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)


def test_gradients_under_autocast():
    model, x = model_of("torch").float(), images().float().requires_grad_()
    _, expected = maps_and_gradients(model, x, first_logit)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, found = maps_and_gradients(model, x, first_logit)
    for got, wanted in zip(found.values(), expected.values(), strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_keys_of_no_token_are_refused():
    attention = nn.MultiheadAttention(4, 1, batch_first=True, add_zero_attn=True).eval()
    with pytest.raises(ModelError, match="adds keys that come from no token"):
        maps_and_gradients(nn.Sequential(attention), torch.rand(1, 2, 4).requires_grad_(), first_logit)


def test_attention_that_the_score_does_not_depend_on():
    model = model_of("torch")
    with pytest.raises(ModelError, match="does not depend on the attention 'blocks"):
        maps_and_gradients(model, images().requires_grad_(), lambda logits: logits.detach() + model.head.bias)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="carries no graph"):
        maps_and_gradients(model, images(), first_logit)


# --- attributions


def test_attributions_are_rows_of_the_maps():
    model, x = OfTransformers("eager").eval(), images()
    maps = attention_maps(model, x)
    last = list(maps.values())[-1].detach()
    assert last.shape == (2, 2, 5, 5)  # a class token and 2 x 2 patches
    settings = {"resize": None}
    got = attributions.attention(model, x, **settings)
    torch.testing.assert_close(got, last.mean(1)[:, 0, 1:].view(2, 2, 2))
    got = attributions.attention(model, x, query="mean", layer=next(iter(maps)), **settings)
    first = next(iter(maps.values())).detach()
    torch.testing.assert_close(got, first.mean(1)[:, 1:].mean(1)[:, 1:].view(2, 2, 2))
    got = attributions.rollout(model, x, residual=0.2, **settings)
    torch.testing.assert_close(got, rollout(maps, residual=0.2).detach()[:, 0, 1:].view(2, 2, 2))
    got = attributions.gradient_rollout(model, x, [2, 1], **settings)
    leaf = x.clone().requires_grad_()
    expected = gradient_rollout(*maps_and_gradients(model, leaf, lambda logits: logits[range(2), [2, 1]]))
    torch.testing.assert_close(got, expected.detach()[:, 0, 1:].view(2, 2, 2))


@pytest.mark.parametrize("name", ALL)
def test_maps_have_the_size_of_the_image(name):
    model, x = model_of("torch"), images()
    small = ALL[name](model, x, resize=None)
    assert small.shape == (2, 2, 2)
    torch.testing.assert_close(ALL[name](model, x), F.interpolate(small[:, None], (8, 8), mode="bilinear")[:, 0])
    blocks = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(ALL[name](model, x, resize="nearest"), blocks)
    torch.testing.assert_close(ALL[name](model, x, grid=(1, 4), resize=None), small.view(2, 1, 4))


@pytest.mark.parametrize("form", ["torch", "timm", "timm elu"])
@pytest.mark.parametrize("name", ALL)
def test_differentiable_to_x_and_parameters(name, form):
    model = model_of(form)
    x = images().requires_grad_()
    inputs = [x, *model.parameters()]
    directions = [torch.randn_like(tensor) for tensor in inputs]
    maps = ALL[name](model, x, [2, 0], create_graph=True)
    weights = torch.randn_like(maps)
    (weights * maps).sum().backward()
    found = sum(float((t.grad * v).sum()) for t, v in zip(inputs, directions, strict=True) if t.grad is not None)

    def value(step):
        with torch.no_grad():
            for tensor, v in zip(inputs, directions, strict=True):
                tensor.add_(step * v)
            detached = ALL[name](model, x, [2, 0])
        assert not detached.requires_grad
        return float((weights * detached).sum())

    step = 1e-6
    assert found == pytest.approx((value(step) - value(-2 * step)) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_maps_of_attention_can_be_certified(name):
    settings = {"sigma": 0.1, "samples": 32, "tau": 0.25, "batch_size": 8, "second_moment": False}
    model, x = model_of("timm").float(), images().float()
    explain = functools.partial(ALL[name], resize="nearest")
    certificate = rf.certify(model, x, explain=explain, channel_sum=True, target=1, **settings)
    assert certificate.counts.sum(dim=1).tolist() == [[32 * 16], [32 * 16]]  # one patch of sixteen pixels each


def test_other_tokens_and_grids():
    found = attributions.attention(model_of("torch"), images(), query="mean")
    torch.testing.assert_close(found, attributions.attention(model_of("torch"), images()))
    with pytest.raises(ValueError, match="query: got 'class', but all tokens are patches"):
        attributions.attention(model_of("torch"), images(), query="class")
    with pytest.raises(ValueError, match=r"grid: got \(3, 2\), expected 2 numbers whose product is at most 4"):
        attributions.attention(model_of("torch"), images(), grid=(3, 2))
    with pytest.raises(ValueError, match="layer: got 'head', expected one of blocks"):
        attributions.attention(model_of("torch"), images(), layer="head")
    with pytest.raises(ValueError, match="query: got 'last'"):
        attributions.rollout(model_of("torch"), images(), query="last")
    with pytest.raises(ValueError, match="resize: got 'cubic'"):
        attributions.rollout(model_of("torch"), images(), resize="cubic")
    with pytest.raises(ModelError, match="training mode"):
        attributions.rollout(model_of("torch").train(), images())


class Tokens(nn.Module):
    """Attention among so many tokens, whatever the image."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = nn.Parameter(torch.rand(1, tokens, 4))
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x):
        tokens = self.tokens * x.flatten(1).mean(dim=1)[:, None, None]
        return self.attention(tokens, tokens, tokens)[0]


@pytest.mark.parametrize(
    ("tokens", "size", "expected", "others"),
    [
        (197, (224, 224), (14, 14), 1),
        (201, (224, 224), (14, 14), 5),
        (196, (224, 224), (14, 14), 0),
        (1 + 12 * 9, (192, 144), (12, 9), 1),
        (11, (40,), (10,), 1),
    ],
)
def test_square_patches_are_found(tokens, size, expected, others):
    model, x = Tokens(tokens).eval(), torch.rand(1, 3, *size)
    found = attributions.attention(model, x, resize=None)
    assert found.shape == (1, *expected)
    pairs = attention_maps(model, x)["attention"].detach().mean(1)
    row = pairs[:, 0] if others else pairs.mean(1)
    torch.testing.assert_close(found.flatten(1), row[:, others:])


def test_patches_that_are_not_square_are_to_be_told():
    model, x = Tokens(100).eval(), torch.rand(1, 3, 7, 11)
    with pytest.raises(ValueError, match="grid: got None, but 100 tokens"):
        attributions.attention(model, x)
    assert attributions.attention(model, x, grid=(9, 11)).shape == (1, 7, 11)

"""`smoothgrad(differentiable=True)` against autograd through the whole stack of noisy copies."""

import weakref

import pytest
import torch
from models import Elementwise, small_cnn
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import robattr_fast as rf

SIGMA, SAMPLES, SEED = 0.3, 7, 5
COMMON = {"sigma": SIGMA, "samples": SAMPLES, "seed": SEED}
KINDS = {
    "plain": {},
    "absolute": {},
    "squared": {},
    "vargrad": {},
    "scaled": {},
    "sparsified": {"levels": None, "tau": 0.3, "gamma": 0.1},
    "soft_topk": {"tau": 0.2, "temperature": 0.05},
}
ROW_MAPS = {
    "plain": lambda g: g,
    "absolute": torch.abs,
    "squared": torch.square,
    "scaled": lambda g: min_max(g.abs().flatten(1)).view_as(g),
    "sparsified": lambda g: rf.sparsify(g.abs().flatten(1), 0.3, 0.1, levels=None).view_as(g),
    "soft_topk": lambda g: rf.soft_topk(g.abs().flatten(1), 28, 0.05).view_as(g),  # of 144
}


def min_max(size):
    low, high = size.amin(1, keepdim=True), size.amax(1, keepdim=True)
    return (size - low) / (high - low)


def images(dtype=torch.float64, count=2):
    return torch.rand(count, 1, 12, 12, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


def trained_cnn(dtype=torch.float64):
    """BatchNorm with statistics and weights of its own: folding changes the layers."""
    model = small_cnn().to(dtype)
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    nn.init.normal_(model[1].weight)
    return model


def direct(model, x, kind, target=None):
    """The smoothed map with the graph of all samples at once."""
    noisy = rf.noisy_samples(x, SIGMA, SAMPLES, seed=SEED).flatten(0, 1)
    logits = model(noisy)
    index = logits.argmax(1) if target is None else torch.full((len(noisy),), target)
    (g,) = torch.autograd.grad(logits.gather(1, index[:, None]).sum(), noisy, create_graph=True)
    if kind == "vargrad":
        return g.view(x.shape[0], SAMPLES, *x.shape[1:]).var(1, correction=0)
    return ROW_MAPS[kind](g).view(x.shape[0], SAMPLES, *x.shape[1:]).mean(1)


def gradients(smoothed, weight, x, model):
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    # The bias of the last layer has no influence.
    return torch.autograd.grad((smoothed * weight).sum(), inputs, retain_graph=True, materialize_grads=True)


@pytest.mark.parametrize("batch_size", [3, 64])
@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_whole_stack(kind, target, batch_size):
    model, x = trained_cnn(), images()
    weight = torch.randn_like(x)
    smoothed = rf.smoothgrad(
        model, x, kind=kind, target=target, batch_size=batch_size, differentiable=True, **COMMON, **KINDS[kind]
    )
    expected = direct(model, x, kind, target)
    torch.testing.assert_close(smoothed, expected, rtol=1e-9, atol=1e-11)
    ours, theirs = gradients(smoothed, weight, x, model), gradients(expected, weight, x, model)
    assert len(ours) == 7
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)
    assert ours[0].count_nonzero() > 0
    assert all(g.count_nonzero() > 0 for g in ours[3:6])


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_value_is_the_same_to_the_bit(kind, batch_size):
    model, x = trained_cnn(torch.float32), images(torch.float32, 3)
    settings = COMMON | KINDS[kind] | {"kind": kind, "batch_size": batch_size}
    plain = rf.smoothgrad(model, x, **settings)
    smoothed = rf.smoothgrad(model, x, **settings, differentiable=True)
    assert torch.equal(plain, smoothed)
    assert smoothed.requires_grad
    assert not plain.requires_grad


class LiveTensors:
    """The most bytes that autograd holds at one time while this is entered."""

    def __init__(self):
        self.now = self.most = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved[0])

    class _Saved(list):
        pass

    def _pack(self, tensor):
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        saved = self._Saved([tensor])
        weakref.finalize(saved, self._drop, size)
        return saved

    def _drop(self, size):
        self.now -= size

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_samples(kind):
    def most(samples):
        model, x = trained_cnn(torch.float32), images(torch.float32)
        with LiveTensors() as live:
            smoothed = rf.smoothgrad(
                model,
                x,
                kind=kind,
                sigma=SIGMA,
                samples=samples,
                batch_size=4,
                differentiable=True,
                **KINDS[kind],
            )
            assert live.now <= sum(p.numel() * 4 for p in (x, *model.parameters()))  # x and the parameters themselves
            smoothed.square().sum().backward()
        return live.most

    assert 0 < most(8) == most(80)


def test_interpretation_regularisation_in_a_training_loop():
    """Cross-entropy + alignment with a target map + size of the map: every parameter gets the stack's gradient."""
    model, x = trained_cnn(), images()
    labels, wanted = torch.tensor([1, 3]), torch.rand(2, 144, dtype=torch.float64)

    def loss(smoothed):
        smoothed = smoothed.flatten(1)
        aligned = 1 - torch.cosine_similarity(smoothed, wanted).mean()
        return nn.functional.cross_entropy(model(x), labels) + aligned + 0.1 * smoothed.norm(dim=1).mean()

    loss(direct(model, x, "plain")).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    step = loss(rf.smoothgrad(model, x, differentiable=True, batch_size=5, **COMMON))
    model.train()  # the map's backward pass keeps eval mode
    step.backward()
    assert model.training
    for parameter, wanted_gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted_gradient, rtol=1e-7, atol=1e-10)


def test_only_what_requires_gradients_gets_them():
    model, x = trained_cnn(), images()
    model[0].requires_grad_(False)
    smoothed = rf.smoothgrad(model, x.detach(), differentiable=True, **COMMON)
    smoothed.square().sum().backward()
    assert model[0].weight.grad is None
    assert model[4].weight.grad.count_nonzero() > 0
    model.requires_grad_(False)
    assert not rf.smoothgrad(model, x.detach(), differentiable=True, **COMMON).requires_grad
    with torch.no_grad():
        assert not rf.smoothgrad(model, x, differentiable=True, **COMMON).requires_grad


def test_a_linear_model_has_zero_second_derivatives():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).double().eval(), images()
    weight = torch.randn_like(x)
    ours = gradients(
        rf.smoothgrad(model, x, target=1, differentiable=True, **COMMON), weight, x, model.requires_grad_()
    )
    assert ours[0].count_nonzero() == 0
    torch.testing.assert_close(ours[1][1], weight.sum(0).flatten())
    model.requires_grad_(False)
    smoothed = rf.smoothgrad(model, x, target=1, differentiable=True, **COMMON)
    assert torch.autograd.grad((smoothed * weight).sum(), x)[0].count_nonzero() == 0


def test_half_types():
    model, x = trained_cnn(torch.bfloat16), images(torch.bfloat16)
    smoothed = rf.smoothgrad(model, x, differentiable=True, **COMMON)
    assert smoothed.dtype == torch.float32
    smoothed.square().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.isfinite().all()


def test_small_gradients_survive_half_precision():
    """As of a mean over all elements of many images: weights that float16 does not have."""
    model, x = trained_cnn(torch.float16), images(torch.float16)
    with torch.no_grad():
        model[-1].weight *= 64
    smoothed = rf.smoothgrad(model, x, target=1, differentiable=True, kind="squared", **COMMON)
    assert smoothed.dtype == torch.float32
    usual, small = gradients(smoothed, 1.0, x, model), gradients(smoothed, 2.0**-18, x, model)
    for one, other in zip(usual, small, strict=True):
        torch.testing.assert_close(other.double() * 2**18, one.double(), rtol=0, atol=float(one.abs().max()) / 100)


def test_image_ids_and_first_sample_reach_the_backward_pass():
    model, x = trained_cnn(), images(count=3)
    settings = COMMON | {"differentiable": True, "kind": "squared", "batch_size": 4}
    whole = rf.smoothgrad(model, x, **settings)
    single = rf.smoothgrad(model, x[2:], **settings, image_ids=[2])
    expected, actual = (torch.autograd.grad(m[-1].sum(), x, retain_graph=True)[0][2] for m in (whole, single))
    torch.testing.assert_close(actual, expected)
    halves = [
        rf.smoothgrad(model, x, **(settings | {"samples": count}), first_sample=first) * count / SAMPLES
        for first, count in ((0, 3), (3, 4))
    ]
    expected, actual = (torch.autograd.grad(m.sum(), x)[0] for m in (whole, halves[0] + halves[1]))
    torch.testing.assert_close(actual, expected)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.qkv, self.head = nn.Linear(12, 36), nn.Linear(12, 3)

    def forward(self, z):
        q, k, v = self.qkv(z).chunk(3, dim=-1)  # [N, 1, 12, 12]: one head, rows as tokens
        return self.head(scaled_dot_product_attention(q, k, v)[:, 0].mean(1))


def test_fused_attention_is_refused_by_name_and_its_remedy_works():
    model, x = Attention().double().eval(), images()
    drawn = []
    with pytest.raises(rf.ModelError, match=r"_scaled_dot_product_flash_attention_for_cpu has no second .*sdpa_kernel"):
        rf.smoothgrad(model, x, differentiable=True, progress=drawn.append, **COMMON)
    assert not drawn
    with sdpa_kernel(SDPBackend.MATH):
        smoothed = rf.smoothgrad(model, x, target=1, differentiable=True, batch_size=5, **COMMON)
        expected = gradients(direct(model, x, "plain", 1), 1.0, x, model)
    for got, wanted in zip(gradients(smoothed, 1.0, x, model), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert torch.backends.cuda.flash_sdp_enabled()


def test_autocast_reaches_the_backward_pass():
    model, x = trained_cnn(torch.float32), images(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        once, twice = (rf.smoothgrad(model, x, differentiable=True, batch_size=4, **COMMON) for _ in range(2))
        inside = gradients(once, 1.0, x, model)
    outside = gradients(twice, 1.0, x, model)
    assert all(map(torch.equal, inside, outside))
    full = gradients(rf.smoothgrad(model, x, differentiable=True, batch_size=4, **COMMON), 1.0, x, model)
    assert not torch.equal(outside[0], full[0])


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_an_own_function_without_second_derivative_is_named(frozen, last):
    class Model(Elementwise):
        def forward(self, z):
            return _Opaque.apply(super().forward(z)) if last else super().forward(_Opaque.apply(z))

    model = Model(1, 12, 12).double().eval().requires_grad_(not frozen)
    assert rf.smoothgrad(model, images(), **COMMON).isfinite().all()
    with pytest.raises(rf.ModelError, match=r"of its own: _Opaque\) has no second derivative"):
        rf.smoothgrad(model, images(), differentiable=True, **COMMON)


def test_hooks_of_others_are_kept_and_collect_nothing():
    model, x = trained_cnn(), images()
    plain = gradients(rf.smoothgrad(model, x, differentiable=True, **COMMON), 1.0, x, model)
    calls = []
    handles = [
        model[2].register_forward_hook(lambda *_: calls.append("forward")),
        model[0].register_full_backward_hook(lambda *_: calls.append("backward")),
        model[4].weight.register_hook(lambda gradient: 2 * gradient),
    ]
    rf.smoothgrad(model, x, differentiable=True, **COMMON).sum().backward()
    assert not calls
    for parameter, wanted in zip(model.parameters(), plain[1:], strict=True):
        factor = 2 if parameter is model[4].weight else 1
        torch.testing.assert_close(parameter.grad, factor * wanted)
    assert all(len(hooks) == 1 for hooks in (model[2]._forward_hooks, model[0]._backward_hooks))
    for handle in handles:
        handle.remove()


def test_a_parameter_changed_before_the_backward_pass_is_an_error():
    model, x = trained_cnn(), images()
    smoothed = rf.smoothgrad(model, x, differentiable=True, **COMMON)
    with torch.no_grad():
        model[4].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        smoothed.sum().backward()


def test_it_is_differentiable_once():
    model, x = trained_cnn(), images()
    smoothed = rf.smoothgrad(model, x, differentiable=True, **COMMON)
    (first,) = torch.autograd.grad(smoothed.sum(), x, create_graph=True)
    for take in (lambda: torch.autograd.grad(first.sum(), x, retain_graph=True), lambda: first.sum().backward()):
        with pytest.raises(RuntimeError, match="can be differentiated once, not twice"):
            take()


def test_the_backward_pass_halves_its_batch_where_memory_ends():
    limit = [8]

    class Limited(Elementwise):
        def forward(self, z):
            if z.shape[0] > limit[0]:
                torch.empty(2**50)
            return super().forward(z)

    model, x = Limited(1, 12, 12).double().eval(), images()
    smoothed = rf.smoothgrad(model, x, kind="squared", differentiable=True, batch_size=8, **COMMON)
    limit[0] = 3
    ours = gradients(smoothed, 1.0, x, model)
    limit[0] = 64
    expected = gradients(direct(model, x, "squared"), 1.0, x, model)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_rounded_map_cannot_be_differentiated():
    with pytest.raises(ValueError, match="levels: got 1, takes None with differentiable=True"):
        rf.smoothgrad(small_cnn(), images(torch.float32), differentiable=True, kind="sparsified", **COMMON)


@pytest.mark.parametrize("part", ["", "1"])
def test_training_mode_is_refused(part):
    model = small_cnn()
    model.get_submodule(part).train()
    with pytest.raises(rf.ModelError, match=r"in training mode; call model.eval\(\)"):
        rf.smoothgrad(model, images(torch.float32), differentiable=True, **COMMON)

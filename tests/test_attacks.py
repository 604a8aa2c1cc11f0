"""Attacks on attributions and on classes: geometry, ascent, objectives, surrogate, what must not be touched."""

import functools
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import robattr_fast as rf
from robattr_fast import attacks, attributions
from robattr_fast.attacks.geometry import Ball
from robattr_fast.attacks.objectives import in_top_k
from robattr_fast.metrics.overlap import top_k

OBJECTIVES = {
    "topk": attacks.TopK(14),
    "topk of pixels": attacks.TopK(14, channels="sum"),
    "mass centre": attacks.MassCenter(),
    "region": attacks.Region(torch.eye(10).bool()[None]),
    "target map": attacks.TargetMap(torch.linspace(0, 1, 100).view(1, 10, 10)),
    "cosine": attacks.Cosine(),
    "distance": attacks.Distance(),
}


class Functional(nn.Module):
    """ReLU as a function, in place, as a method and as a clamp, and max-pooling."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3)
        self.third, self.last = nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x):
        z = F.max_pool2d(F.relu(self.first(x), inplace=True), 2)
        z = self.second(z).relu_().flatten(1)
        return self.last(self.third(z).clamp(min=0))


def relu_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 12), nn.ReLU(),
        nn.Linear(12, 4),
    ).eval()  # fmt: skip


def smooth_net(size: int = 10) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.SiLU(), nn.Flatten(), nn.Linear(6 * (size - 2) ** 2, 12), nn.Tanh(), nn.Linear(12, 4)
    ).eval()


def images(count: int = 3, size: int = 10) -> torch.Tensor:
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(3))


def attack(model: nn.Module, objective=OBJECTIVES["topk"], **changes) -> attacks.AttributionPGD:
    settings = {"eps": 0.5, "steps": 6, "restarts": 2} | changes
    explain = settings.pop("explain", "gradient")
    return attacks.AttributionPGD(model, explain, objective, **settings)


def moved(result: attacks.AttackResult, objective) -> torch.Tensor:
    """By how much the measure moved from what it says of the image's own map, in the direction that is wanted."""
    state = objective.prepare(result.before)
    sign = 1 if objective.rises else -1
    return sign * (result.value - objective.measure(result.before, state))


# --- where points may be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("radius", [1e-3, 0.03, 0.7])
def test_points_are_in_the_ball_and_in_the_box(norm, radius, dtype):
    x = torch.rand(4, 3, 40, 40).to(dtype)
    ball = Ball(norm, radius, (0.0, 1.0))
    delta = 10 * radius * torch.randn(x.shape, dtype=torch.promote_types(dtype, torch.float32))
    point = ball.point(x, delta)
    assert point.dtype == dtype
    assert (point >= 0).all()
    assert (point <= 1).all()
    order = 2 if norm == "l2" else math.inf
    size = torch.linalg.vector_norm((point.double() - x.double()).flatten(1), order, dim=1)
    assert (size <= radius * (1 + 1e-6)).all()
    if dtype in (torch.float32, torch.float64):  # and not much smaller, but for what the box cuts
        inside = (0.5 + ball.project(delta)).clamp(0, 1)
        grey = torch.full_like(x, 0.5)
        whole = torch.linalg.vector_norm((ball.point(grey, delta) - grey).double().flatten(1), order, dim=1)
        expected = torch.linalg.vector_norm((inside - 0.5).double().flatten(1), order, dim=1)
        assert whole == pytest.approx(expected, rel=5e-3)


def test_starts_fill_the_ball_and_the_sphere():
    normals = torch.randn(4000, 5)
    ball = Ball("l2", 2.0, None)
    sphere = ball.start("sphere", normals, torch.Size([3]))
    assert sphere.norm(dim=1) == pytest.approx(torch.full((4000,), 2.0), rel=1e-5)
    inside = ball.start("ball", normals, torch.Size([3])).norm(dim=1) / 2
    # Of a uniform point of a ball in three dimensions |x|^3 is uniform: standard error of the mean .0046.
    assert float((inside**3).mean()) == pytest.approx(0.5, abs=5 * 0.0046)
    cube = Ball("linf", 2.0, None)
    assert (cube.start("sphere", normals, torch.Size([3])).abs() == 2).all()
    uniform = cube.start("ball", normals, torch.Size([3])) / 2
    assert float(uniform.abs().max()) <= 1
    assert float(uniform.var()) == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize("k", [1, 3, 7, 10])
def test_the_top_without_a_sort_is_that_of_the_metric(k):
    values = torch.randint(0, 4, (200, 10)).float()
    assert torch.equal(in_top_k(values, k), top_k(values, k))


def test_images_outside_of_the_box_are_refused_with_the_value():
    x = images()
    x[1, 0, 2, 2] = 1.25
    with pytest.raises(ValueError, match=r"image 1 has the value 1\.25"):
        attack(smooth_net())(x)


# --- the ascent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_objective_moves_the_map_and_keeps_what_is_to_be_kept(objective, norm):
    model, x = relu_net(), images()
    eps = 0.5 if norm == "l2" else 0.06
    result = attack(model, objective, norm=norm, eps=eps).run(x)
    assert result.success.all()
    assert not result.label_changed.any()
    assert (moved(result, objective) > 0).all()
    assert (result.size <= eps * (1 + 1e-6)).all()
    assert (result.images >= 0).all()
    assert (result.images <= 1).all()
    torch.testing.assert_close(result.after, attributions.gradient(model, result.images, model(x).argmax(1)))
    torch.testing.assert_close(result.before, attributions.gradient(model, x))
    random = attack(model, objective, norm=norm, eps=eps, steps=0, start="sphere").run(x)
    assert (moved(result, objective) >= moved(random, objective)).all()


@pytest.mark.parametrize("start", ["sphere", "ball", "zero", "curved"])
def test_radius_0_gives_x(start):
    x = images()
    result = attack(smooth_net(), eps=0.0, start=start).run(x)
    assert torch.equal(result.images, x)
    assert (result.size == 0).all()
    assert not result.success.any()


def test_never_worse_than_its_start():
    model, x, objective = smooth_net(), images(6), attacks.Distance()
    start = (x + 0.03 * torch.randn_like(x)).clamp(0, 1)
    at_start = attack(model, objective, start=start, steps=0, keep=None).run(x)
    for steps in (1, 3):
        result = attack(model, objective, start=start, steps=steps, keep=None, restarts=1, step_size=5.0).run(x)
        assert (result.value >= at_start.value).all()


def test_more_restarts_and_larger_radii_never_find_less():
    model, x = relu_net(), images()
    few, many = (attack(model, restarts=restarts).run(x).value for restarts in (1, 4))
    assert (many <= few).all()
    swept = attack(model).sweep(x, [0.4, 0.1, 0.2])
    assert swept.radii == (0.1, 0.2, 0.4)
    assert all((large <= small).all() for small, large in pairwise(swept.value))
    assert (swept.value[-1] < swept.value[0]).any()


class Quadratic(nn.Module):
    """Logits x' A x / 2 and less than that: the map is A x, and it moves by A delta."""

    def __init__(self, a: torch.Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, x):
        form = ((x @ self.a) * x).sum(dim=1) / 2
        return torch.stack([form, form - 1e6], dim=1)


@pytest.mark.parametrize("start", ["sphere", "curved"])
def test_the_worst_direction_of_a_quadratic_model(start):
    basis = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    curvature = torch.cat([torch.tensor([-9.0, 4.0]), torch.linspace(-1, 1, 18)]).double()
    model = Quadratic(basis @ torch.diag(curvature) @ basis.T).eval()
    x = torch.randn(2, 20, dtype=torch.float64)
    steps = 60 if start == "sphere" else 0
    result = attack(model, attacks.Distance(), bounds=None, steps=steps, step_size=0.5, start=start).run(x)
    worst = 9 * 0.5 / (x @ model.a).norm(dim=1)
    assert result.value == pytest.approx(worst.detach(), rel=1e-4)
    along = ((result.images - x) @ basis[:, 0]).abs() / 0.5
    assert along == pytest.approx(torch.ones(2, dtype=torch.float64), rel=1e-4)


class Border(nn.Module):
    """The label changes where the first pixel passes .6; the map changes with all the others."""

    def forward(self, x):
        flat = x.flatten(1)
        score = (flat[:, 1:] ** 3).sum(dim=1) + flat[:, 0] ** 3
        return torch.stack([score, score + 50 * (flat[:, 0] - 0.6)], dim=1)


def test_steps_are_halved_where_the_label_would_change():
    x = torch.linspace(0.5, 0.4, 9).view(1, 1, 3, 3)
    free, kept = (
        attack(Border().eval(), attacks.Distance(), keep=keep, start=x + 0.01, steps=10).run(x)
        for keep in (None, "label")
    )
    assert free.label_changed.all()
    assert not kept.label_changed.any()
    assert 0.55 < float(kept.images[0, 0, 0, 0]) <= 0.6
    assert (kept.value < free.value).all()
    blocked = attack(Border().eval(), attacks.Distance(), start=x + 0.01, steps=10, halvings=0).run(x)
    assert int(blocked.steps) < int(kept.steps)


def test_outputs_can_be_kept():
    model, x = smooth_net(), images(4)

    def farthest(result):
        with torch.no_grad():
            return float((model(result.images).softmax(1) - model(x).softmax(1)).abs().max())

    loose, tight = (
        attack(model, eps=2.0, keep="output", tolerance=tolerance, steps=10).run(x) for tolerance in (1.0, 0.002)
    )
    assert farthest(loose) > 0.002
    assert farthest(tight) <= 0.002 + 1e-6
    assert tight.success.all()


@pytest.mark.parametrize("explain", ["gradient", "input_x_gradient", "ig", "smoothgrad"])
def test_an_image_gets_the_same_bits_in_every_batch(explain):
    options = {"sigma": 0.1, "samples": 6} if explain == "smoothgrad" else {"steps": 4} if explain == "ig" else {}
    model, x = relu_net(), images(9)
    one = attack(model, explain=explain, explain_options=options, steps=2, restarts=3)
    whole = one.run(x[:5] if explain == "smoothgrad" else x)
    for place in (0, 4):
        alone = one.run(x[place : place + 1])
        for name in ("images", "before", "after", "value", "size", "steps"):
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[place]), name
    turned = one.run(x[[2, 1, 0]])
    assert torch.equal(turned.images, whole.images[[2, 1, 0]])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_bits_of_an_elementwise_model_at_every_batch_size(batch_size):
    class Elementwise(nn.Module):
        def forward(self, x):
            cube = x.flatten(1).pow(3)
            return torch.stack([row.sum() for row in cube]).unsqueeze(1) * torch.tensor([1.0, -1.0])

    x = images(5)
    assert torch.equal(
        attack(Elementwise().eval(), batch_size=batch_size)(x), attack(Elementwise().eval(), batch_size=3)(x)
    )


# --- networks with corners -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [relu_net, lambda: Functional().eval()], ids=["modules", "functions"])
def test_the_surrogate_is_the_same_network_with_smooth_corners(make):
    model, x = make(), images()
    assert attacks.surrogate.corners(model, x) == (2 if isinstance(model, nn.Sequential) else 3)
    smooth = attacks.Surrogate(model, attacks.Softplus(5.0))
    smooth.check(model, x)
    assert smooth.beta == 5
    with torch.no_grad():
        smoothed = [attacks.Surrogate(model, attacks.Softplus(beta)).model(x) for beta in (5.0, 50.0, 5e4)]
        apart = [float((logits - model(x)).norm()) for logits in smoothed]
    assert apart[0] > apart[1] > apart[2]
    assert {p.data_ptr() for p in smooth.model.parameters()} == {p.data_ptr() for p in model.parameters()}
    z = x.clone().requires_grad_()
    size = attributions.gradient(smooth.model, z, 0, create_graph=True).abs().sum()
    assert torch.autograd.grad(size, z)[0].any()


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1), nn.PReLU(), nn.Hardtanh(-0.5, 0.5), nn.Hardsigmoid()]
)
def test_every_corner_has_a_smooth_twin(module):
    x = torch.linspace(-4, 8, 101)[None]
    model = nn.Sequential(module).eval()
    exact = attacks.Surrogate(model, attacks.Softplus(1e5)).model(x)
    assert exact == pytest.approx(model(x).detach(), abs=1e-4)
    z = x.clone().requires_grad_()
    smooth = attacks.Surrogate(model, attacks.Softplus(2.0)).model(z)
    (slope,) = torch.autograd.grad(smooth.sum(), z, create_graph=True)
    assert torch.autograd.grad(slope.sum(), z)[0].abs().max() > 0.05


def test_an_exported_graph_gets_a_surrogate(tmp_path):
    model, x = relu_net(), images()
    batch = torch.export.Dim("batch", min=1, max=64)
    graph = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    result = attack(graph).run(x)
    assert result.success.all()
    assert result.value == pytest.approx(attack(model).run(x).value, abs=0.08)


@pytest.mark.parametrize("explain", ["gradient", "smoothgrad"])
def test_a_map_without_derivative_is_an_error_that_names_the_surrogate(explain):
    options = {"sigma": 0.1, "samples": 4} if explain == "smoothgrad" else None
    with pytest.raises(rf.ModelError, match=r"exactly 0 .* surrogate=Softplus"):
        attack(relu_net(), explain=explain, explain_options=options, surrogate=None).run(images(2))
    with pytest.raises(rf.ModelError, match="no corner was found"):
        attack(nn.Sequential(nn.Flatten(), nn.MaxPool1d(2), nn.Linear(50, 3)).eval(), explain=explain,
               explain_options=options).run(images(2))  # fmt: skip


def test_a_stationary_start_is_no_error():
    result = attack(relu_net(), attacks.Cosine(), start="zero").run(images())
    assert result.success.all()


def test_a_random_walk_needs_no_derivative():
    result = attacks.random_sign(relu_net(), eps=0.06, steps=20, surrogate=None).run(images())
    assert result.success.all()
    assert (result.size <= 0.06 * (1 + 1e-6)).all()


class Transformer(nn.Module):
    def __init__(self, kernel: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.kernel, self.qkv, self.head = kernel, nn.Linear(10, 30), nn.Linear(100, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        attend = rf.linear_attention if self.kernel else F.scaled_dot_product_attention
        return self.head(attend(q, k, v).flatten(1))


class Patches(nn.Module):
    """A transformer of 25 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 2, stride=2)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x).flatten(2).mT).mean(dim=1))


@pytest.mark.parametrize("kernel", [False, True], ids=["sdpa", "linear_attention"])
def test_attention(kernel):
    result = attack(Transformer(kernel).eval(), attacks.Cosine()).run(images())
    assert result.success.all()


ATTRIBUTIONS = {
    "magnitude": functools.partial(attributions.magnitude, explain=attributions.integrated_gradients),
    "grad_cam": functools.partial(attributions.grad_cam, layer="0"),
    "layer_cam": functools.partial(attributions.grad_cam, layer="0", kind="layer-cam", resize=None),
    "noisy magnitude": functools.partial(
        attributions.magnitude, explain=functools.partial(attributions.smoothgrad, sigma=0.1, samples=8)
    ),
    "many samples": functools.partial(attributions.smoothgrad, sigma=0.1, samples=80, kind="squared"),
    "vargrad": functools.partial(attributions.smoothgrad, sigma=0.1, samples=8, kind="vargrad"),
}


@pytest.mark.parametrize("explain", ATTRIBUTIONS.values(), ids=ATTRIBUTIONS)
def test_other_attributions(explain):
    model, x = relu_net(), images(2)
    result = attack(model, attacks.Distance(), explain=explain, steps=3, restarts=1).run(x)
    assert result.success.all()
    expected = explain(model, result.images, model(x).argmax(1))
    torch.testing.assert_close(result.after, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["attention", "rollout", "gradient_rollout"])
def test_attributions_of_attention(kind):
    torch.manual_seed(6)
    explain = functools.partial(getattr(attributions, kind), resize=None)
    result = attack(Patches().eval(), attacks.Distance(), explain=explain, steps=3, restarts=1).run(images(2))
    assert result.success.all()
    assert result.after.shape == (2, 5, 5)


class NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


def test_an_operator_without_second_derivative_is_named_with_its_remedy():
    class Model(nn.Module):
        def forward(self, x):
            flat = NoSecondDerivative.apply(x).flatten(1).square()
            return torch.stack([flat.sum(dim=1), flat.square().sum(dim=1)], dim=1)

    with pytest.raises(rf.ModelError, match="second derivative"):
        attack(Model().eval()).run(images())


# --- odd images, models and surroundings -----------------------------------------------------------------------------


def test_zero_maps_are_left_alone():
    class Flat(nn.Module):
        def forward(self, x):
            bright = (x.flatten(1).mean(dim=1) > 0.5).to(x)[:, None, None, None]
            flat = (x * x * bright).flatten(1).cumsum(dim=1)
            return flat[:, [-1, 10]]

    x = torch.cat([torch.full((1, 1, 10, 10), 0.2), images(1) / 3 + 0.6])
    result = attack(Flat().eval()).run(x)
    assert result.value.isnan().tolist() == [True, False]
    assert torch.equal(result.images[0], x[0])
    assert result.success.tolist() == [False, True]
    assert result.steps.tolist()[0] == 0


def test_ties_go_to_the_lowest_index():
    class Ties(nn.Module):
        def forward(self, x):
            flat = x.flatten(1)
            return torch.stack([flat[:, :4].square().sum(dim=1), flat.sum(dim=1) - 1e3], dim=1)

    x = torch.full((1, 1, 3, 3), 0.5)
    result = attack(Ties().eval(), attacks.TopK(2), steps=0, start="zero", surrogate=None).run(x)
    assert float(result.value) == 1
    low = torch.tensor([0.0, 0, 1, 1, 0, 0, 0, 0, 0]).view(1, 1, 3, 3)
    assert torch.equal(attacks.TopK(2).prepare(result.before)["top"][0, :2], torch.tensor([True, True]))
    assert float(attacks.TopK(2).measure(low, attacks.TopK(2).prepare(result.before))) == 0


def test_misclassified_images_are_told():
    model, x = smooth_net(), images(4)
    predicted = model(x).argmax(1)
    labels = predicted.clone()
    labels[2] = (labels[2] + 1) % 4
    result = attack(model).run(x, labels)
    assert result.misclassified.tolist() == [False, False, True, False]
    assert torch.equal(model(result.images).argmax(1), predicted)
    torch.testing.assert_close(result.before, attributions.gradient(model, x, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    model, x = smooth_net().to(dtype), images().to(dtype)
    result = attack(model, attacks.Distance()).run(x)
    assert result.images.dtype == dtype
    assert result.after.dtype == torch.float32
    assert result.success.all()
    assert ((result.images.double() - x.double()).flatten(1).norm(dim=1) <= 0.5 * (1 + 1e-6)).all()


def test_nothing_of_the_users_is_touched():
    model, x = relu_net(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []
    handle = model[0].register_forward_hook(lambda *args: calls.append(1))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    x.requires_grad_()
    copy = x.detach().clone()
    attack(model).run(x)
    attacks.pgd(model, x, 0, eps=0.1, steps=2)
    assert x.grad is None
    assert torch.equal(x, copy)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(model[1]) is nn.ReLU
    calls.clear()
    model(x)
    assert len(calls) == 1
    handle.remove()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_mode(mode):
    model, x = relu_net(), images()
    expected = attack(model).run(x)
    with mode():
        found = attack(model).run(x.clone())
    assert torch.equal(found.images, expected.images)


def test_nan_names_the_image():
    class Broken(nn.Module):
        def forward(self, x):
            flat = x.flatten(1) ** 3
            return torch.stack([flat.sum(dim=1) + 0 * (1 - 2 * x[:, 0, 0, 0]).sqrt(), flat.mean(dim=1)], dim=1)

    x = images(12)
    x[:, 0, 0, 0] = 0.1
    x[10, 0, 0, 0] = 0.9
    with pytest.raises(rf.NonFiniteError, match="image 10"):
        attack(Broken().eval()).run(x, 0)
    with pytest.raises(rf.NonFiniteError, match="image 10"):
        attacks.pgd(Broken().eval(), x, 0, eps=0.1, steps=2, batch_size=4)


def test_bad_arguments():
    model, x = smooth_net(), images()
    for change, message in (
        ({"norm": "l1"}, "norm: got 'l1'"),
        ({"eps": -1.0}, "eps: got -1.0"),
        ({"start": "here"}, "start: got 'here'"),
        ({"keep": "all"}, "keep: got 'all'"),
        ({"surrogate": "relu"}, "surrogate: got 'relu'"),
        ({"explain": "saliency"}, "explain: got 'saliency'"),
        ({"explain": "smoothgrad"}, "without sigma and samples"),
        ({"eps": math.inf}, "step_size: got None"),
        ({"measure": "iou"}, "measure: got 'iou'"),
        ({"rule": "newton"}, "rule: got 'newton'"),
    ):
        with pytest.raises(ValueError, match=message):
            attack(model, **change)
    with pytest.raises(TypeError, match="objective: got str"):
        attack(model, "topk")
    with pytest.raises(ValueError, match="labels"):
        attack(model).run(x, 7)
    with pytest.raises(ValueError, match="k: got 101"):
        attack(model, attacks.TopK(101)).run(x)
    with pytest.raises(rf.ModelError, match="training mode"):
        attack(smooth_net().train()).run(x)
    with pytest.raises(rf.ModelError, match="probabilities"):
        attack(nn.Sequential(smooth_net(), nn.Softmax(1)).eval()).run(x)


# --- smoothed maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "plain"},
        {"kind": "squared"},
        {"kind": "sparsified"},
        {"kind": "sparsified", "levels": 4, "gamma": 0.05},
    ],
)
def test_smoothed_maps_move_more_than_by_their_noise(options):
    model, x = relu_net(), images(2)
    explain = functools.partial(attributions.smoothgrad, sigma=0.05, samples=48, **options)
    result = attack(model, attacks.TopK(20), explain=explain, eps=0.8, restarts=1, keep=None).run(x)
    assert torch.equal(result.after, explain(model, result.images, model(x).argmax(1)).float())
    assert (result.value < result.noise_floor).all()
    assert (result.value < 0.75).all()


def test_noise_is_common_within_a_step_and_fresh_between_steps():
    seen = []
    explained = attacks.maps.Explained(
        functools.partial(attributions.smoothgrad, sigma=0.1, samples=8, kind="absolute")
    )
    model, x = smooth_net(), images(1)
    for draw in (0, 1, 1, 2):
        seen.append(explained.maps(model, x, torch.tensor([0]), False, draw)[0])
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[3])
    assert torch.equal(seen[0], explained.explain(model, x, torch.tensor([0])).float())
    graph, _ = explained.maps(model, x.clone().requires_grad_(), torch.tensor([0]), True, 2)
    torch.testing.assert_close(graph.detach(), seen[3])


@pytest.mark.parametrize("kind", ["plain", "squared", "soft_topk", "sparsified"])
def test_a_pass_over_few_samples_is_the_attribution(kind):
    options = {"temperature": 0.01} if kind == "soft_topk" else {"levels": None, "gamma": 0.02}
    explain = functools.partial(
        attributions.smoothgrad, sigma=0.1, samples=20, kind=kind, **(options if kind != "plain" else {})
    )
    explained, model, target = attacks.maps.Explained(explain), smooth_net(), torch.tensor([1, 2])
    x, z = (images(2).requires_grad_() for _ in range(2))
    found, _ = explained.maps(model, x, target, True, 3)
    expected = functools.partial(explain, first_sample=60)(model, z, target, create_graph=True).float()
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((maps * weights).sum(), leaf)[0] for maps, leaf in ((found, x), (expected, z))]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * float(gradients[1].abs().max()))


# --- presets ---------------------------------------------------------------------------------------------------------


def test_presets_have_their_published_settings_and_run():
    model, x = relu_net(), images(2)
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask[:3, :3] = True
    fast = {"steps": 3}
    made = {
        "ghorbani topk": attacks.ghorbani(model, k=20, eps=0.1, step_size=0.05, **fast),
        "ghorbani centre": attacks.ghorbani(model, "mass_center", eps=0.1, step_size=0.05, **fast),
        "ghorbani target": attacks.ghorbani(model, "target", mask=mask, eps=0.1, step_size=0.05, **fast),
        "levine": attacks.levine_l2(model, 25, 0.5, **fast),
        "dombrowski": attacks.dombrowski(model, torch.eye(10), step_size=0.01, **fast),
        "rar": attacks.rar_topk(model, 20, step_size=0.1, **fast),
        "sphere": attacks.random_sphere(model, 0.5),
        "sign": attacks.random_sign(model, 0.1, steps=20, step_size=0.03),
    }
    for name, one in made.items():
        result = one.run(x)
        assert result.success.all(), name
        assert not result.label_changed.any(), name
    plan = attacks.ghorbani(model).plan
    assert (plan.steps, plan.step_size, plan.start, plan.restarts) == (300, 0.5 / 255, "zero", 1)
    levine = attacks.levine_l2(model, 25, 0.5)
    assert (levine.plan.steps, levine.plan.restarts, levine.plan.tries, levine.plan.halvings) == (20, 5, 100, 200)
    assert (levine.plan.scale, levine.plan.step_size, levine.ball.norm) == ("first", 0.5, "l2")
    assert attacks.rar_topk(model).explained.explain.keywords == {"steps": 100, "rule": "riemann_right"}
    assert attacks.dombrowski(model, torch.eye(10)).ball.radius == math.inf
    with pytest.raises(ValueError, match="mask: got None"):
        attacks.ghorbani(model, "target")


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.6), ("linf", 0.05)])
def test_pgd_is_that_of_foolbox(norm, eps):
    foolbox = pytest.importorskip("foolbox", reason="foolbox, of the extra 'attacks', is not installed")
    model, x = relu_net(), images(5)
    y = model(x).argmax(1)
    kind = foolbox.attacks.L2ProjectedGradientDescentAttack if norm == "l2" else foolbox.attacks.LinfPGD
    theirs, wrapped = kind(steps=25, abs_stepsize=eps / 8, random_start=False), foolbox.PyTorchModel(model, (0, 1))
    expected = theirs.run(wrapped, x, foolbox.criteria.Misclassification(y), epsilon=eps)
    found = attacks.pgd(model, x, y, norm=norm, eps=eps, steps=25, step_size=eps / 8, start="zero", last=True)
    assert float((expected - x).abs().max()) > 0.01
    assert float((found - expected).abs().max()) <= 1e-6
    best = attacks.pgd(model, x, y, norm=norm, eps=eps, steps=25, step_size=eps / 8, start="zero")
    assert (loss_of(model, best, y) >= loss_of(model, found, y) - 1e-6).all()


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def test_pgd_from_a_given_start_is_that_of_foolbox():
    foolbox = pytest.importorskip("foolbox", reason="foolbox, of the extra 'attacks', is not installed")
    model, x = relu_net(), images(5)
    y = model(x).argmax(1)
    start = (x + 0.05 * torch.randn_like(x).sign()).clamp(0, 1)
    theirs = foolbox.attacks.LinfPGD(steps=10, abs_stepsize=0.01, random_start=True)
    theirs.get_random_start = lambda x0, epsilon: foolbox.models.base.ep.astensor(start)
    wrapped = foolbox.PyTorchModel(model, (0, 1))
    expected = theirs.run(wrapped, x, foolbox.criteria.Misclassification(y), epsilon=0.05)
    found = attacks.pgd(model, x, y, eps=0.05, steps=10, step_size=0.01, start=start, last=True)
    assert float((found - expected).abs().max()) <= 1e-6


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_pgd_in_the_middle_of_training(loss):
    model, x = relu_net(), images(8)
    model.insert(0, nn.BatchNorm2d(1).eval())
    model.train()
    y = model.eval()(x).argmax(1)
    model.train()
    model[1].eval()
    found = attacks.pgd(model, x, y, norm="l2", eps=1.5, steps=10, restarts=2, loss=loss)
    assert [module.training for module in model] == [True, False, *[True] * 6]
    model.eval()
    assert (loss_of(model, found, y) > loss_of(model, x, y)).all()
    assert (model(found).argmax(1) != y).any()
    other = (y + 1) % 4
    aimed = attacks.pgd(model, x, other, norm="l2", eps=1.5, steps=10, targeted=True)
    assert (loss_of(model, aimed, other) < loss_of(model, x, other)).all()

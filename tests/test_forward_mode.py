"""Forward mode, torch.func and torch.vmap through the operators: against the same in plain PyTorch, in float64."""

import itertools

import pytest
import torch
from _larger import larger
from _operators import INTERPRETED, backend
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import robattr_fast as rf
from robattr_fast.nn import kernel_attention, kernelize

__all__ = ["backend"]

D = torch.float64
MASK = torch.tensor([[True, False, True, True], [True, True, True, False]])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    if INTERPRETED:
        for name, size in {"_ROWS": 16, "_COLUMNS": 16, "_SPAN": 32, "_CAUSAL_SPAN": 32}.items():
            monkeypatch.setattr(f"robattr_fast.kernels.linear_attention.{name}", size)


def plain_soft_topk(scores, k, temperature):
    """From the solution, two Newton steps that autograd sees: right in value and in three derivatives."""
    with torch.no_grad():
        h = rf.reference.soft_topk(scores.detach(), k, temperature)[0]
    nu = (scores - temperature * torch.logit(h)).mean(-1, keepdim=True).detach()
    for _ in range(2):
        h = torch.sigmoid((scores - nu) / temperature)
        nu = nu + temperature * (h.sum(-1, keepdim=True) - k) / (h * (1 - h)).sum(-1, keepdim=True)
    return torch.sigmoid((scores - nu) / temperature)


CAUSAL = {"causal": True, "normalize": False, "feature_map": "squared_relu"}


def _attention(attention, q, **settings):
    return attention(q, 0.5 + 2 * q, q.sin(), key_padding_mask=MASK, eps=0.1, **settings)


# The operator, the same in plain PyTorch, and the shape of its argument.
FUNCTIONS = {
    "noisy_samples": (
        lambda x: rf.noisy_samples(x, 0.1, 2),
        lambda x: x[:, None] + rf.reference.noisy_samples(torch.zeros(1, 6, dtype=D), 0.1, 2),
        (1, 6),
    ),
    "noisy_samples, channels last": (
        lambda x: rf.noisy_samples(x, 0.1, 2, channels_last=True),
        lambda x: x[:, None] + rf.reference.noisy_samples(torch.zeros(1, 2, 2, 3, dtype=D), 0.1, 2),
        (1, 2, 2, 3),
    ),
    "topk_threshold": (lambda x: rf.topk_threshold(x, 2), lambda x: rf.reference.topk_threshold(x, 2), (2, 6)),
    "sparsify": (
        lambda x: rf.sparsify(x, 0.7, 0.2, levels=None),
        lambda x: rf.reference.sparsify(x, 0.7, 0.2, levels=None),
        (2, 6),
    ),
    "soft_topk": (lambda x: rf.soft_topk(x, 2, 0.3), lambda x: plain_soft_topk(x, 2, 0.3), (2, 6)),
    "linear_attention": (
        lambda x: _attention(rf.linear_attention, x),
        lambda x: _attention(rf.reference.linear_attention, x),
        (2, 1, 4, 2),
    ),
    "causal linear_attention": (
        lambda x: _attention(rf.linear_attention, x, **CAUSAL),
        lambda x: _attention(rf.reference.linear_attention, x, **CAUSAL),
        (2, 1, 4, 2),
    ),
}

COMPILED = ["linear_attention", "topk_threshold"]


def point(shape):
    """Spaced numbers in random order and a direction: nothing ties, and no relu is near its kink."""
    n = torch.Size(shape).numel()
    x = (torch.randperm(n) + 1).to(D).view(shape) / n
    return x, torch.randn(shape, dtype=D)


def scalar(function):
    """A function of x that is curved whatever the operator is."""

    def total(x):
        out = function(x)
        weight = torch.linspace(0.5, 1.5, out.numel(), dtype=D).view(out.shape)
        return (weight * (out + x.sum()).sin()).sum()

    return total


def of_dual(function, x, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent


def dual_of_gradient(function, x, direction):
    """Forward over reverse, both of torch.autograd."""
    f = scalar(function)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), direction)
        (gradient,) = torch.autograd.grad(f(dual), dual)
        return forward_ad.unpack_dual(gradient).tangent


def gradient_of_dual(function, x, direction):
    """Reverse over forward, both of torch.autograd."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(of_dual(scalar(function), x, direction), x)[0]


def pushed(function, x, direction):
    return jvp(function, (x,), (direction,))[1]


def penalty(f):
    """The squared norm of the gradient."""
    return lambda x: grad(f)(x).square().sum()


TRANSFORMS = {
    "jvp": lambda f, x, v: pushed(f, x, v),
    "dual tensors": of_dual,
    "jacfwd": lambda f, x, v: jacfwd(f)(x),
    "jacrev": lambda f, x, v: jacrev(f)(x),
    "vjp": lambda f, x, v: vjp(f, x)[1](f(x))[0],
    "jvp of jacrev": lambda f, x, v: pushed(jacrev(f), x, v),
    "jvp of grad": lambda f, x, v: pushed(grad(scalar(f)), x, v),
    "grad of jvp": lambda f, x, v: grad(lambda x: pushed(scalar(f), x, v))(x),
    "jvp of jvp": lambda f, x, v: pushed(lambda x: pushed(f, x, v), x, v),
    "hessian": lambda f, x, v: hessian(scalar(f))(x),
    "jacrev of jacrev": lambda f, x, v: jacrev(jacrev(scalar(f)))(x),
    "jacrev of jacfwd": lambda f, x, v: jacrev(jacfwd(scalar(f)))(x),
    "dual of gradient": dual_of_gradient,
    "gradient of dual": gradient_of_dual,
    "third: jvp of grad of a penalty": lambda f, x, v: pushed(grad(penalty(scalar(f))), x, v),
    "third: jvp of jvp of grad": lambda f, x, v: pushed(lambda x: pushed(grad(scalar(f)), x, v), x, v),
    "third: grad of grad of a penalty": lambda f, x, v: grad(lambda x: (grad(penalty(scalar(f)))(x) * v).sum())(x),
    "vmap of grad": lambda f, x, v: vmap(grad(scalar(f)))(torch.stack([x, x + 1e-3 * v])),
    "vmap of jvp": lambda f, x, v: vmap(lambda t: pushed(f, x, t))(torch.stack([v, 2 * v])),
    "grad of vmap": lambda f, x, v: grad(lambda x: vmap(scalar(f))(torch.stack([x, 2 * x])).sum())(x),
}
# What kernels are called for; the rest is made of the same calls, which the interpreter takes seconds for.
if INTERPRETED:
    TRANSFORMS = {name: TRANSFORMS[name] for name in ("jvp", "dual tensors", "jvp of grad", "vmap of jvp")}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms(backend, name, transform):
    ours, plain, shape = FUNCTIONS[name]
    x, direction = point(shape)
    expected = TRANSFORMS[transform](plain, x, direction)
    found = TRANSFORMS[transform](ours, x, direction)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 2)])
def test_tangents_of_some_arguments(backend, given):
    tensors = [point((2, 1, 4, 2))[0] + 0.1 * index for index in range(3)]
    tangents = [point((2, 1, 4, 2))[1] for _ in given]

    def of(attention):
        def function(*some):
            arguments = list(tensors)
            for index, x in zip(given, some, strict=True):
                arguments[index] = x
            return attention(*arguments, key_padding_mask=MASK)

        return jvp(function, tuple(tensors[index] for index in given), tuple(tangents))[1]

    torch.testing.assert_close(of(rf.linear_attention), of(rf.reference.linear_attention), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("turn", [lambda x: x.transpose(0, 1), lambda x: x.transpose(1, 2), lambda x: x.mT])
def test_views(turn):
    """Results are laid out as their arguments, some are views: tangents have to be laid out alike."""
    x, direction = point((2, 3, 4, 5))
    x, direction = turn(x.contiguous()), turn(direction)
    functions = {
        "linear_attention": (lambda x: rf.linear_attention(x, x, x), lambda x: rf.reference.linear_attention(x, x, x)),
        "sparsify": (
            lambda x: rf.sparsify(x, 0.7, 0.2, levels=None),
            lambda x: rf.reference.sparsify(x, 0.7, 0.2, levels=None),
        ),
        "soft_topk": (lambda x: rf.soft_topk(x, 2, 0.3), lambda x: plain_soft_topk(x, 2, 0.3)),
    }
    for ours, plain in functions.values():
        for transform in ("jvp", "dual tensors", "jvp of grad", "dual of gradient"):
            function = TRANSFORMS[transform]
            expected = function(plain, x, direction)
            torch.testing.assert_close(function(ours, x, direction), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_tangents_have_the_dtype_of_the_result(name, dtype):
    ours, _, shape = FUNCTIONS[name]
    x, direction = (t.to(dtype) for t in point(shape))
    value, tangent = jvp(ours, (x,), (direction,))
    exact = pushed(ours, x.double(), direction.double())
    assert tangent.dtype == value.dtype
    # The tangents of soft_topk at T = 0.3 are the largest: some ten roundings of a few units each.
    scale = float(exact.abs().max()) + 1
    torch.testing.assert_close(tangent.double(), exact, rtol=0, atol=30 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("levels", [1, 15])
def test_rounded_maps_are_constant_in_every_mode(levels):
    """As a rounding has it: zero in reverse, zero in forward mode; nothing else that hangs on x is lost."""
    x, direction = point((2, 6))

    def function(x):
        return rf.sparsify(x, 0.5, 0.2, levels=levels) * x

    h = rf.sparsify(x, 0.5, 0.2, levels=levels)
    torch.testing.assert_close(pushed(function, x, direction), h * direction)
    torch.testing.assert_close(of_dual(function, x, direction), h * direction)
    torch.testing.assert_close(grad(lambda x: function(x).sum())(x), h)
    alone = pushed(lambda x: rf.sparsify(x, 0.5, 0.2, levels=levels), x, direction)
    assert not alone.any()
    operator = torch.ops.robattr_fast.sparsify
    assert not pushed(lambda x: operator(x, 0.5, 0.2, levels), x, direction).any()
    assert not grad(lambda x: operator(x, 0.5, 0.2, levels).sum())(x).any()


def test_operators_on_integers_and_counts_run_inside_of_transforms():
    x, direction = point((1, 1, 40))
    seen = {}

    def function(x):
        counts = torch.zeros(1, 40, 1, dtype=torch.int32)
        invalid = rf.count_sparsified_(counts, x, 0.2)
        seen["lower"] = rf.betting_bounds(counts, 1, 0.1)[0]
        return (x**2).sum() + counts.sum() + invalid.sum()

    for found in (pushed(function, x, direction), of_dual(function, x, direction)):
        torch.testing.assert_close(found, (2 * x * direction).sum())
    torch.testing.assert_close(grad(function)(x), 2 * x)
    assert seen["lower"].count_nonzero() == 8


@pytest.mark.parametrize("kernel", ["elu", "relu", "gaussian"])
def test_kernelized_encoder(kernel):
    """Gauss-Newton and Hessian products of parameters and inputs, as curvature libraries take them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True, dtype=D)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)).eval()
    kernelize(model, kernel=kernel)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    x = torch.rand(2, 4, 8, dtype=D)

    def loss(parameters):
        return functional_call(model, parameters, (x,)).square().sum()

    (_, forward), (_, backward) = jvp(loss, (parameters,), (direction,)), vjp(loss, parameters)
    gradient = backward(torch.ones((), dtype=D))[0]
    product = sum((gradient[name] * direction[name]).sum() for name in parameters)
    torch.testing.assert_close(forward, product, rtol=1e-9, atol=1e-9)
    curved = jvp(grad(loss), (parameters,), (direction,))[1]
    reversed_twice = grad(lambda p: sum((grad(loss)(p)[name] * direction[name]).sum() for name in p))(parameters)
    for name in parameters:
        torch.testing.assert_close(curved[name], reversed_twice[name], rtol=1e-7, atol=1e-8)


def test_gaussian_attention():
    x, direction = point((1, 1, 4, 2))
    function = scalar(lambda x: kernel_attention(x, x + 1, x.sin(), kernel="gaussian"))
    product = (grad(function)(x) * direction).sum()
    torch.testing.assert_close(of_dual(function, x, direction), product)
    curved = pushed(grad(function), x, direction)
    torch.testing.assert_close(curved, grad(lambda x: (grad(function)(x) * direction).sum())(x), rtol=1e-7, atol=1e-9)


# --- vmap over each argument

IDS, OFFSET = torch.tensor([[4, 9], [2, 2], [0, 7]]), torch.tensor([[3, 5], [0, 1], [8, 8]])
PACKED = torch.randint(0, 256, (3, 4, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def rand(*shape):
    return torch.rand(*shape, dtype=D, generator=torch.Generator().manual_seed(len(shape)))


# A function of tensors, and its arguments with a batch of three in front.
BATCHED = {
    "topk_threshold": (lambda s: rf.topk_threshold(s, 2), [rand(3, 2, 6)]),
    "topk_threshold of rows": (lambda s: rf.topk_threshold(s, 2), [rand(3, 6)]),
    "sparsify": (lambda s: rf.sparsify(s, 0.6, 0.2, levels=None), [rand(3, 2, 6)]),
    "sparsify to levels": (lambda s: rf.sparsify(s, 0.6, 0.2, levels=15), [rand(3, 6)]),
    "soft_topk": (lambda s: rf.soft_topk(s, 2, 0.3), [rand(3, 2, 6)]),
    "noisy_samples": (lambda x: rf.noisy_samples(x, 0.1, 2, first_sample=1), [rand(3, 2, 5)]),
    "channels_last": (lambda x: rf.noisy_samples(x, 0.1, 2, channels_last=True), [rand(3, 2, 2, 3, 4)]),
    "ids and offsets": (
        lambda x, ids, offset: rf.noisy_samples(x, 0.1, 2, image_ids=ids, sample_offset=offset),
        [rand(3, 2, 5), IDS, OFFSET],
    ),
    "one offset": (lambda x, offset: rf.noisy_samples(x, 0.1, 2, sample_offset=offset), [rand(3, 2, 5), OFFSET[:, :1]]),
    "linear_attention": (
        lambda q, k, v, mask: rf.linear_attention(q, k, v, key_padding_mask=mask),
        [rand(3, 2, 1, 4, 2), rand(3, 2, 1, 4, 2) + 1, rand(3, 2, 1, 4, 3), torch.rand(3, 2, 4) < 0.7],
    ),
    "betting_bounds": (
        lambda counts, samples: rf.betting_bounds(counts, samples, 0.01),
        [(9 * rand(3, 2, 5, 2)).to(torch.int32), torch.tensor([[20, 30], [25, 40], [50, 60]])],
    ),
    "packed_gram": (
        lambda rows, other, mask: rf.packed_gram(rows, 15, other, mask),
        [PACKED, PACKED.flip(0)[:, :2], 255 * (PACKED[:, 0] % 2)],
    ),
}


@pytest.mark.parametrize("name", BATCHED)
def test_vmap_over_each_argument(backend, name, recwarn):
    function, arguments = BATCHED[name]
    for batched in itertools.product([False, True], repeat=len(arguments)):
        if not any(batched) or (INTERPRETED and not all(batched)):
            continue
        for dim in (0, -1):
            given = [x.movedim(0, dim) if b else x[0] for x, b in zip(arguments, batched, strict=True)]
            found = vmap(function, in_dims=tuple(dim if b else None for b in batched))(*given)
            one_by_one = [
                function(*(x[i] if b else x[0] for x, b in zip(arguments, batched, strict=True))) for i in range(3)
            ]
            if isinstance(found, torch.Tensor):
                found, one_by_one = (found,), [(one,) for one in one_by_one]
            for got, *expected in zip(found, *one_by_one, strict=True):
                torch.testing.assert_close(got, torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert not [str(w.message) for w in recwarn if "performance drop" in str(w.message)]


def test_vmap_is_refused_where_an_argument_is_written_into():
    counts, scores = torch.zeros(3, 1, 6, 1, dtype=torch.int32), rand(3, 1, 2, 6)
    with pytest.raises(NotImplementedError, match=r"count_sparsified_: got a batch of torch\.vmap"):
        vmap(lambda c, s: rf.count_sparsified_(c, s, 0.5))(counts, scores)
    weight, bias = torch.rand(2, 6), torch.rand(2)
    with pytest.raises(NotImplementedError, match="mlp_smoothgrad: got a batch"):
        vmap(lambda c, x: rf.mlp_smoothgrad(c, x, [weight], [bias], 0.1, 2, 0.5))(counts, torch.rand(3, 1, 6))


@pytest.mark.once
@pytest.mark.skipif(INTERPRETED, reason="what is traced is the operator, not its backend")
@pytest.mark.parametrize("name", [*COMPILED, *larger(*(name for name in FUNCTIONS if name not in COMPILED))])
def test_forward_over_reverse_under_compile(name):
    # torch's own product of two memory formats has no tangent while sizes are symbols.
    dynamic = name != "noisy_samples, channels last"
    ours, _, shape = FUNCTIONS[name]
    x, direction = point(shape)
    function = TRANSFORMS["jvp of grad"]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, v: function(ours, x, v), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(compiled(x, direction), function(ours, x, direction))

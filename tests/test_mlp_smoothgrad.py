"""`mlp_smoothgrad` on every backend, and `certify` through it."""

import logging
from itertools import pairwise

import pytest
import torch
from _larger import larger
from _operators import INTERPRETED, ON_GPU, backend_of, larger_interpreted, moved
from torch import nn

import robattr_fast as rf
from robattr_fast import backends
from robattr_fast.certificates.engine import run as engine_run
from robattr_fast.certificates.engine import state
from robattr_fast.certificates.verify.replay import replay
from robattr_fast.model import perceptron
from robattr_fast.reference._pack_levels import packed_row_bytes
from robattr_fast.reference.mlp_smoothgrad import ACTIVATIONS, gradient_sizes

backend = backend_of("reference")

MODULES = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
}
SIGMA = 0.4


def network(sizes, activation="relu", seed=0):
    """Flatten, Linear, activation, ..., Linear."""
    torch.manual_seed(seed)
    modules = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), MODULES[activation]()]
    return nn.Sequential(*modules[:-1]).eval().requires_grad_(False)


def integer_network(sizes, seed=0):
    """Its gradients are small integers: every backend computes them exactly, and many are equal."""
    model = network(sizes, seed=seed)
    for module in model:
        if isinstance(module, nn.Linear):
            module.weight.copy_(torch.randint(-2, 3, module.weight.shape))
    return model


def layers_of(model):
    return [m.weight for m in model if isinstance(m, nn.Linear)], [m.bias for m in model if isinstance(m, nn.Linear)]


def images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


def scored(model, x, samples, *, target=None, first_sample=0, image_ids=None, seed=0, dtype=torch.float32):
    """Sizes of gradients [B, q, n] and logits [B, q, classes], by autograd through the model, sample by sample."""
    noise = {"seed": seed, "first_sample": first_sample, "image_ids": image_ids}
    z = rf.reference.noisy_samples(x.flatten(1), SIGMA, samples, **noise).to(dtype).requires_grad_()
    logits = torch.stack([model.to(dtype)(rows) for rows in z])
    chosen = logits.argmax(2) if target is None else target[:, None].expand(logits.shape[:2])
    (gradient,) = torch.autograd.grad(logits.gather(2, chosen[..., None]).sum(), z)
    model.float()
    return gradient.abs(), logits.detach()


def expected(model, x, samples, tau, gamma, levels, **noise):
    """(counts, packed, classes), one sample at a time."""
    scores, logits = scored(model, x, samples, **noise)
    valid = scores.isfinite().all(2) & logits.isfinite().all(2)
    scores[~valid] = torch.nan
    counts, packed = empty(scores, levels)
    rf.reference.count_sparsified_(counts, scores, tau, gamma, packed=packed)
    return counts, packed, torch.where(valid, logits.argmax(2), -1)


def empty(scores, levels):
    batch, samples, n = scores.shape
    rows = torch.full((batch, samples, packed_row_bytes(n, levels)), 255, dtype=torch.uint8)
    return torch.zeros(batch, n, levels, dtype=torch.int32), rows


def run(model, x, samples, tau, gamma, levels, *, activation="relu", **noise):
    counts, packed = empty(x.flatten(1)[:, None].expand(-1, samples, -1), levels)
    weights, biases = layers_of(model)
    classes = rf.mlp_smoothgrad(
        counts, x, weights, biases, SIGMA, samples, tau, gamma, activation=activation, packed=packed, **noise
    )
    return counts, packed, classes


def check(got, wanted):
    for result, right in zip(got, wanted, strict=True):
        assert torch.equal(result, right)


@pytest.mark.parametrize("levels", [*larger(1, when=INTERPRETED), 15])
@pytest.mark.parametrize(
    "sizes", [[30, 4], [130, 33, 17, 3], *larger([70, 20, 5], [1, 1, 1, 1], [64, 16, 256], when=INTERPRETED)]
)
def test_against_torch(backend, sizes, levels):
    model, x = integer_network(sizes), images(2, sizes[0])
    check(run(model, x, 37, 0.3, 0.1, levels), expected(model, x, 37, 0.3, 0.1, levels))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("sizes", [[50, 20, 5], *larger([50, 20, 30, 5], when=INTERPRETED)])
def test_activations(backend, sizes, activation):
    # None of these scores is so near to a threshold that rounding decides.
    model, x = network(sizes, activation), images(1, sizes[0])
    check(run(model, x, 20, 0.3, 0.1, 3, activation=activation), expected(model, x, 20, 0.3, 0.1, 3))


@pytest.mark.parametrize("target", [*larger(None, when=INTERPRETED), torch.tensor([2, 0])])
def test_which_samples_of_which_image(backend, target):
    model, x = integer_network((2 * 5 * 7, 24, 3)), images(2, 2, 5, 7)
    ids, first = torch.tensor([2**32 - 1, 6]), 2**31 - 20
    noise = {"seed": 2**64 - 3, "first_sample": first, "image_ids": ids, "target": target}
    wanted = expected(model, x, 40, 0.2, None, 1, **noise)
    check(run(model, x, 40, 0.2, None, 1, **noise), wanted)
    offset = noise | {"first_sample": first - 7, "sample_offset": torch.tensor([7])}
    check(run(model, x, 40, 0.2, None, 1, **offset), wanted)
    offset["sample_offset"] = torch.tensor([7, 7])
    check(run(model, x, 40, 0.2, None, 1, **offset), wanted)
    offset["sample_offset"] = torch.tensor([0, 7])
    found = run(model, x, 40, 0.2, None, 1, **offset)
    assert not torch.equal(found[0][0], wanted[0][0])
    assert torch.equal(found[0][1], wanted[0][1])
    parts = ((first, 33), (first + 33, 7))
    split = [run(model, x, count, 0.2, None, 1, **noise | {"first_sample": start}) for start, count in parts]
    assert torch.equal(split[0][0] + split[1][0], wanted[0])
    assert torch.equal(torch.cat([part[2] for part in split], 1), wanted[2])


def test_ids_and_targets_of_any_stride(backend):
    model, x = integer_network((40, 10, 3)), images(3, 40)
    ids, targets = torch.arange(6)[::2], torch.tensor([2]).expand(3)
    strided = run(model, x, 9, 0.2, None, 1, image_ids=ids, target=targets)
    check(strided, run(model, x, 9, 0.2, None, 1, image_ids=ids.clone(), target=targets.clone()))
    check(strided, expected(model, x, 9, 0.2, None, 1, image_ids=ids.clone(), target=targets.clone()))


@larger_interpreted
def test_target_does_not_change_the_classes(backend):
    model, x = integer_network((40, 10, 3)), images(2, 40)
    free, told = (run(model, x, 33, 0.2, None, 1, target=t) for t in (None, torch.tensor([1, 1])))
    assert torch.equal(free[2], told[2])
    assert free[2].unique().numel() > 1
    assert not torch.equal(free[0], told[0])


def test_adds_to_counts(backend):
    model, x = integer_network((20, 3)), images(1, 20)
    counts = torch.full((1, 20, 1), 5, dtype=torch.int32)
    for _ in range(2):
        rf.mlp_smoothgrad(counts, x, *layers_of(model), SIGMA, 6, 0.3)
    assert torch.equal(counts, 2 * expected(model, x, 6, 0.3, None, 1)[0] + 5)


def test_dead_units_give_the_zero_map(backend):
    model, x = integer_network((40, 20, 3)), images(1, 40)
    model[1].bias.fill_(-1e6)
    counts, packed, classes = run(model, x, 9, 0.3, None, 1)
    assert not counts.any()
    assert not packed.any()
    assert classes.unique().numel() == 1
    assert classes[0, 0] == model[3].bias.argmax()


def test_ties_that_do_not_fit_are_left_out(backend):
    weight = torch.tensor([[1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    counts = torch.zeros(1, 4, 1, dtype=torch.int32)
    for tau, kept in ((0.5, [0, 8, 8, 0]), (0.25, [0, 0, 0, 0]), (1.0, [8, 8, 8, 0])):
        counts.zero_()
        rf.mlp_smoothgrad(counts, images(1, 4), [weight], [torch.zeros(2)], 1.0, 8, tau, target=torch.tensor([0]))
        assert counts[0, :, 0].tolist() == kept


@pytest.mark.parametrize("value", [torch.nan, *larger(torch.inf, -torch.inf, 3e38, when=INTERPRETED)])
@pytest.mark.parametrize("layer", [0, *larger(1, when=INTERPRETED), 2])
def test_samples_that_are_not_finite(backend, layer, value):
    model, x = integer_network((40, 20, 10, 3)), images(1, 40)
    model[2 * layer + 1].weight[1, 4] = value
    wanted = expected(model, x, 40, 0.3, 0.1, 2)
    check(run(model, x, 40, 0.3, 0.1, 2), wanted)
    if value != value:
        assert wanted[2].eq(-1).all()


def test_a_bias_that_is_not_finite(backend):
    model, x = integer_network((40, 3)), images(1, 40)
    model[1].bias[1] = -torch.inf
    check(run(model, x, 5, 0.3, None, 1), expected(model, x, 5, 0.3, None, 1))
    assert run(model, x, 5, 0.3, None, 1)[2].eq(-1).all()


def test_views(backend):
    x, weight = images(2, 3, 8).transpose(1, 2), images(8, 24, 2)[..., 0]
    counts = [torch.zeros(2, 24, 1, dtype=torch.int32) for _ in range(2)]
    last = torch.randint(-2, 3, (3, 8)).float()
    for into, views in zip(counts, (lambda t: t, torch.Tensor.contiguous), strict=True):
        biases = [torch.zeros(16)[::2], torch.zeros(3)]
        rf.mlp_smoothgrad(into, views(x), [views(weight), last], biases, SIGMA, 5, 0.3)
    assert torch.equal(*counts)


def test_is_detached(backend):
    model, x = integer_network((20, 3)).requires_grad_(), images(1, 20).requires_grad_()
    counts = torch.zeros(1, 20, 1, dtype=torch.int32)
    assert not rf.mlp_smoothgrad(counts, x, *layers_of(model), SIGMA, 6, 0.3).requires_grad


def test_overflow_is_an_error(backend):
    counts = torch.full((1, 3, 1), 2**31 - 2, dtype=torch.int32)
    given = images(1, 3), [torch.tensor([[1.0, 2.0, 3.0]])], [torch.zeros(1)], 1.0, 2, 1.0
    if backend in ON_GPU:  # nobody waits for the device to see it
        rf.mlp_smoothgrad(counts, *given)
        assert int(counts.max()) < 0
        return
    with pytest.raises(ValueError, match="passes 2147483647"):
        rf.mlp_smoothgrad(counts, *given)


def sizes(backend, x, weights, biases, activation, samples):
    """Scores [B, q, n] of a backend, which the operator keeps to itself."""
    if backend == "reference":
        z = rf.reference.noisy_samples(x, SIGMA, samples)
        return gradient_sizes(z, weights, biases, activation)[0]
    from robattr_fast.kernels import mlp_smoothgrad as kernels

    run = moved(kernels.gradient_sizes, "cuda") if backend in ON_GPU else kernels.gradient_sizes
    ids = torch.zeros(len(x), dtype=torch.int64)
    return run(x, weights, biases, activation, SIGMA, samples, 0, 0, ids, None, None)[0]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_scores_are_as_near_as_those_of_torch(backend, activation):
    model, x = network((200, 64, 48, 10), activation), images(1, 200)
    scores = sizes(backend, x, *layers_of(model), activation, 40)
    exact, _ = scored(model, x, 40, dtype=torch.float64)
    theirs, _ = scored(model, x, 40)
    ulp = torch.finfo(torch.float32).eps * exact.max()
    assert (scores - exact).abs().max() <= 2 * (theirs - exact).abs().max() + ulp


def arguments():
    model = network((9, 5, 3))
    weights, biases = layers_of(model)
    counts = torch.zeros(2, 9, 1, dtype=torch.int32)
    layers = {"weights": weights, "biases": biases}
    return {"counts": counts, "x": images(2, 9), **layers, "sigma": 0.5, "num_samples": 4, "tau": 0.5}


def test_opcheck():
    given = arguments()
    packed = torch.zeros(2, 4, packed_row_bytes(9, 1), dtype=torch.uint8)
    order = given["counts"], given["x"], given["weights"], given["biases"], 0.5, 4, 0.5, 0.2, "gelu"
    for rest in (
        (None, 0, 0, None, None, None),
        (torch.tensor([1, 2]), -3, 7, torch.tensor([4, 0]), torch.tensor([5]), packed),
    ):
        torch.library.opcheck(torch.ops.robattr_fast.mlp_smoothgrad.default, (*order, *rest))


def test_compile():
    given = arguments()

    def step(counts, x):
        return rf.mlp_smoothgrad(counts, x * 2, given["weights"], given["biases"], 0.5, 4, 0.5) + 1

    counts = given["counts"].clone()
    expected_classes = step(counts, given["x"])
    assert torch.equal(
        torch.compile(step, fullgraph=True, backend="aot_eager")(given["counts"], given["x"]), expected_classes
    )
    assert torch.equal(counts, given["counts"])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": images(2, 9).double()}, TypeError, "x: got dtype torch.float64, takes float32"),
        ({"x": images(2, 9).bfloat16()}, TypeError, "x: got dtype torch.bfloat16, takes float32"),
        ({"x": images(9)}, ValueError, "x: got shape"),
        ({"x": images(2, 16385)}, ValueError, "elements of an image of x: got 16385"),
        ({"counts": torch.zeros(2, 9, dtype=torch.int32)}, ValueError, r"takes \[2, 9, L\]"),
        ({"counts": torch.zeros(2, 9, 16, dtype=torch.int32)}, ValueError, "got 16"),
        ({"packed": torch.zeros(2, 4, 2, dtype=torch.uint8)}, ValueError, r"packed: got shape .* takes \(2, 4, 64\)"),
        ({"weights": []}, ValueError, "weights: got 0 layers, takes 1 to 3"),
        ({"weights": [torch.zeros(9, 9)] * 4}, ValueError, "weights: got 4 layers"),
        ({"biases": [torch.zeros(5)]}, ValueError, "biases: got 1, takes one for each of 2 layers"),
        ({"weights": [torch.zeros(5, 8), torch.zeros(3, 5)]}, ValueError, r"weights\[0\]: got shape \(5, 8\)"),
        ({"weights": [torch.zeros(5, 9), torch.zeros(3, 4)]}, ValueError, r"takes \[outputs, 5\]"),
        ({"weights": [torch.zeros(5, 9).double(), torch.zeros(3, 5)]}, TypeError, r"weights\[0\]: got dtype"),
        ({"weights": [3, torch.zeros(3, 5)]}, TypeError, r"weights\[0\]: got int"),
        ({"biases": [torch.zeros(5), torch.zeros(4)]}, ValueError, r"biases\[1\]: got shape \(4,\), takes \(3,\)"),
        ({"biases": [torch.zeros(5), torch.zeros(3, device="meta")]}, ValueError, r"biases\[1\]: got device meta"),
        (
            {"weights": [torch.zeros(257, 9), torch.zeros(3, 257)], "biases": [torch.zeros(257), torch.zeros(3)]},
            ValueError,
            r"weights\[0\].shape\[0\]: got 257",
        ),
        ({"activation": "swish"}, ValueError, "activation: got 'swish', takes one of relu"),
        ({"target": torch.tensor([1, 3])}, ValueError, r"target: got \[1, 3\], takes classes in \[0, 3\)"),
        ({"target": torch.tensor([1])}, ValueError, "target: got"),
        ({"image_ids": torch.tensor([1, -1])}, ValueError, "image_ids: got"),
        ({"image_ids": torch.tensor([1])}, ValueError, "image_ids: got"),
        ({"sample_offset": torch.tensor(1)}, ValueError, "sample_offset: got"),
        ({"sample_offset": torch.tensor([2**32])}, ValueError, "sample_offset: got 4294967296"),
        ({"first_sample": 2**32 - 3}, ValueError, "first_sample: got"),
        ({"num_samples": 0}, ValueError, "num_samples: got 0"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"sigma": 0.0}, ValueError, "sigma: got 0.0"),
        ({"tau": 1.5}, ValueError, "tau: got 1.5"),
    ],
)
def test_errors(changed, error, message):
    with pytest.raises(error, match=message):
        rf.mlp_smoothgrad(**(arguments() | changed))


def test_recognizes_perceptrons():
    x = images(2, 3, 4, 5)
    inner = nn.Sequential(nn.Linear(60, 8, bias=False), nn.GELU(), nn.Dropout(0.5))
    model = nn.Sequential(nn.Identity(), nn.Flatten(), inner, nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4)).eval()
    layers, reason = perceptron.recognized(model, x)
    assert reason == ""
    assert layers.activation == "gelu"
    assert [tuple(weight.shape) for weight in layers.weights] == [(8, 60), (6, 8), (4, 6)]
    assert torch.equal(layers.biases[0], torch.zeros(8))
    assert layers.weights[1].data_ptr() == model[3].weight.data_ptr()
    assert perceptron.recognized(nn.Linear(60, 3), x.flatten(1))[0].activation == "relu"
    for name in ACTIVATIONS:
        assert perceptron.recognized(network((60, 5, 3), name), x)[0].activation == name
    assert perceptron.recognized(nn.Sequential(nn.Flatten(), nn.Linear(60, 2), nn.ReLU(True), nn.Linear(2, 2)), x)[0]


class _Other(nn.Linear):
    pass


def _hooked():
    model = network((60, 5, 3))
    model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def _overridden():
    model = network((60, 5, 3))
    model[1].forward = lambda z: 2 * z[:, :5]
    return model


FLAT = nn.Flatten()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 2, 3), FLAT, nn.Linear(12, 3)), "it has Conv2d"),
        (nn.Sequential(nn.Linear(60, 3)), "a Linear comes before Flatten"),
        (nn.Sequential(nn.Flatten(0), nn.Linear(60, 3)), "it has Flatten"),
        (nn.Sequential(FLAT, nn.Linear(60, 5), nn.Linear(5, 3)), "two Linear have no activation between them"),
        (nn.Sequential(FLAT, nn.ReLU(), nn.Linear(60, 3)), "does not follow a Linear"),
        (nn.Sequential(FLAT, nn.Linear(60, 5), nn.ReLU(), nn.ReLU(), nn.Linear(5, 3)), "does not follow a Linear"),
        (nn.Sequential(FLAT, nn.Linear(60, 5), nn.ReLU()), "it ends with an activation"),
        (network((60, 5, 5, 5, 3)), "it has 4 Linear"),
        (nn.Sequential(FLAT), "it has 0 Linear"),
        (network((60, 257, 3)), "257 outputs, over 256"),
        (network((60, 5, 3)).double(), "torch.float64, not float32"),
        (nn.Sequential(*network((60, 5, 4)), nn.Tanh(), nn.Linear(4, 3)), "its activations differ: relu, tanh"),
        (nn.Sequential(FLAT, nn.Linear(60, 5), nn.GELU("tanh"), nn.Linear(5, 3)), "it has GELU"),
        (nn.Sequential(FLAT, nn.Linear(60, 5), nn.ELU(2.0), nn.Linear(5, 3)), "it has ELU"),
        (nn.Sequential(FLAT, _Other(60, 3)), "it has _Other"),
        (_hooked(), "Linear has hooks"),
        (_overridden(), "Linear has hooks or a forward of its own"),
    ],
)
def test_refuses_other_models(model, reason):
    layers, why = perceptron.recognized(model, images(2, 3, 4, 5))
    assert layers is None
    assert reason in why


def test_refuses_other_inputs():
    model = network((60, 5, 3))
    assert "x is torch.float64" in perceptron.recognized(model, images(2, 60).double())[1]
    assert "x has 16385 elements" in perceptron.recognized(model, images(2, 16385))[1]


def test_runs_fused_where_its_kernel_is_chosen(monkeypatch):
    cuda = torch.device("cuda")
    table = {name: backends.Implementation(None, lambda device, dtype: (True, "")) for name in ("triton", "reference")}
    monkeypatch.setitem(backends._registry, "mlp_smoothgrad", table)
    assert perceptron.runs_fused(cuda)
    with backends.use("reference"):
        assert not perceptron.runs_fused(cuda)
    with backends.use("cuda", strict=True):
        assert not perceptron.runs_fused(cuda)
    if not INTERPRETED:
        assert not perceptron.runs_fused(torch.device("cpu"))


# `certify` on a CPU as it is where the kernel runs: the reference takes its place.

CERTIFY = {"sigma": SIGMA, "tau": 0.2, "samples": 130, "retain": 40, "batch_size": 50}


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(perceptron, "runs_fused", lambda device: True)


def same(one, other):
    for name in ("counts", "class_counts", "samples", "invalid", "gram_summary"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def with_and_without(model, x, **arguments):
    """The certificates by one operator, and by noise, model and counting one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perceptron, "runs_fused", lambda device: True)
        one = rf.certify(model, x, **CERTIFY | arguments)
    assert one.settings.backends["mlp_smoothgrad"] == "triton"
    other = rf.certify(model, x, **CERTIFY | arguments)
    assert "mlp_smoothgrad" not in other.settings.backends
    return one, other


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("target", [None, [1, 0]])
@pytest.mark.parametrize("levels", [1, 15])
def test_certify_gives_what_it_gives_otherwise(monkeypatch, levels, target, waits):
    monkeypatch.setattr(state, "_waits", lambda tensor: waits)
    model, x = integer_network((2 * 3 * 4, 10, 3)), images(2, 2, 3, 4)
    same(*with_and_without(model, x, levels=levels, target=target, first_sample=7, image_ids=[5, 9], keep_samples=True))


def test_certify_says_so_once(fused, caplog):
    with caplog.at_level(logging.INFO, logger="robattr_fast"):
        certificate = rf.certify(integer_network((24, 10, 3)), images(2, 24), **CERTIFY | {"batch_size": "auto"})
    said = [record.getMessage() for record in caplog.records if "mlp_smoothgrad" in record.getMessage()]
    assert said == ["samples are taken by mlp_smoothgrad: the model is a perceptron 24-10-3, relu"]
    assert certificate.settings.batch_size == 260


def test_certify_folds_first(fused):
    torch.manual_seed(0)
    linear, norm = nn.Linear(24, 10), nn.BatchNorm1d(10)
    norm(torch.randn(50, 10))
    model = nn.Sequential(nn.Flatten(), linear, norm, nn.ReLU(), nn.Linear(10, 3)).eval()
    settings = rf.certify(model, images(1, 24), **CERTIFY).settings
    assert settings.folded
    assert "mlp_smoothgrad" in settings.backends


@pytest.mark.parametrize("samples", [None, 60])
def test_replay_takes_the_samples_by_the_model(samples):
    model, x = integer_network((24, 10, 3)), images(1, 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perceptron, "runs_fused", lambda device: True)
        certificate = rf.certify(model, x, **CERTIFY)
    found = replay(certificate, model, x[0], samples=samples)
    assert found.faults == ()
    assert found.differences == ("mlp_smoothgrad triton, here unknown",)


@pytest.mark.parametrize(
    "arguments",
    [
        {"explain": "input_x_gradient"},
        {"explain": lambda model, batch, target: batch.abs()},
        {"channel_sum": True},
        {"autocast": torch.bfloat16},
        {"levels": None},
    ],
    ids=["input_x_gradient", "callable", "channel_sum", "autocast", "relaxed"],
)
def test_certify_takes_the_usual_path_for(fused, arguments):
    certificate = rf.certify(network((24, 10, 3)), images(1, 2, 3, 4), **CERTIFY | arguments)
    assert "mlp_smoothgrad" not in certificate.settings.backends


def test_certify_stops_early_and_resumes(fused, tmp_path, monkeypatch):
    model, x = integer_network((24, 10, 3)), images(2, 24)
    stop = rf.StopWhen(k=4, radius=0.02, overlap=0.25)
    arguments = CERTIFY | {"samples": 2000, "stop": stop}
    whole = rf.certify(model, x, **arguments)
    path = tmp_path / "run.safetensors"

    def once(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rf.certify(model, x, **arguments, checkpoint=path, progress=once)
    monkeypatch.setattr(engine_run.Run, "_report", lambda self, image: None)
    same(rf.certify(model, x, **arguments, checkpoint=path), whole)


@pytest.mark.parametrize("on_nonfinite", ["zero", "abstain"])
def test_certify_with_invalid_samples(on_nonfinite):
    one, other = with_and_without(half_finite(), images(2, 24), on_nonfinite=on_nonfinite)
    assert 0 < int(one.invalid.sum()) < 260
    same(one, other)


def half_finite():
    """Its hidden units overflow where the first element is above a half."""
    model = integer_network((24, 10, 3))
    model[1].weight[0] = 0
    model[1].weight[0, 0] = 3e38
    model[1].bias[0] = -1.5e38
    model[3].weight[:, 0] = 3
    return model


@pytest.mark.parametrize("waits", [False, True])
def test_certify_names_the_first_invalid_sample(fused, monkeypatch, waits):
    model, x = half_finite(), images(2, 24)
    finite = [result.isfinite().all(2)[0] for result in scored(model, x, 130)]
    first = int((finite[0] & finite[1]).to(torch.int8).argmin())
    monkeypatch.setattr(state, "_waits", lambda tensor: waits)
    with pytest.raises(rf.NonFiniteError, match=f"sample {first} of image 0 gave NaN"):
        rf.certify(model, x, **CERTIFY)


def test_certify_halves_the_batch_where_memory_ends(monkeypatch, fused):
    model, x = integer_network((24, 10, 3)), images(2, 24)
    wanted = rf.certify(model, x, **CERTIFY)
    table = backends._registry["mlp_smoothgrad"]
    call = table["reference"].call

    def small(*args, out):
        if out.shape[1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        call(*args, out=out)

    monkeypatch.setitem(table, "reference", backends.Implementation(small, table["reference"].can_run))
    certificate = rf.certify(model, x, **CERTIFY)
    assert certificate.settings.batch_size is None
    same(certificate, wanted)

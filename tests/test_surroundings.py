"""Every public operator and module under what a caller may have set for process or thread: the same result."""

import contextlib
import threading
import warnings

import pytest
import torch
from _operators import INTERPRETED, needs_extension
from torch import nn

import robattr_fast as rf
from robattr_fast import backends, ops, reference
from robattr_fast import nn as rf_nn

pytestmark = pytest.mark.skipif(INTERPRETED, reason="of Triton kernels the launchers alone could differ, on a GPU")

CPU = "cpu"


def rand(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator(device=CPU).manual_seed(seed)
    return torch.rand(*shape, dtype=dtype, generator=generator, device=CPU)


def counted(levels):
    counts = torch.zeros(2, 40, levels, dtype=torch.int32, device=CPU)
    packed = torch.zeros(2, 6, 64, dtype=torch.uint8, device=CPU)
    invalid = rf.count_sparsified_(counts, rand(2, 6, 40), 0.3, 0.1, packed=packed)
    return counts, packed, invalid


def bounds():
    counts = (10 * rand(2, 9, 3)).to(torch.int32)
    several = torch.full((2,), 40, dtype=torch.int64, device=CPU)
    return *rf.betting_bounds(counts, 40, 0.01), *rf.betting_bounds(counts[:, :, :1].contiguous(), several, 1e-3)


def perceptron():
    counts = torch.zeros(2, 12, 3, dtype=torch.int32, device=CPU)
    weights, biases = [rand(5, 12, seed=1) - 0.5, rand(3, 5, seed=2) - 0.5], [rand(5, seed=3), rand(3, seed=4)]
    target = torch.tensor([0, 2], device=CPU)
    arguments = rand(2, 12), weights, biases, 0.2, 7, 0.4, 0.2
    classes = rf.mlp_smoothgrad(counts, *arguments, activation="gelu", target=target)
    return counts, classes, rf.mlp_smoothgrad(counts, *arguments, image_ids=target)


def noise():
    x, offset = rand(2, 3, 4, 5), torch.tensor([3, 9], device=CPU)
    drawn = [rf.noisy_samples(x, 0.3, 2, channels_last=True), rf.noisy_samples(x, 0.3, 2, sample_offset=offset)]
    return *drawn, *(rf.noisy_samples(x, 0.3, 2, dtype=dtype) for dtype in (torch.float64, torch.bfloat16))


def gram():
    rows = reference.pack_levels((16 * rand(3, 50)).to(torch.uint8), 15)
    return rows, reference.unpack_levels(rows, 15, 50), rf.packed_gram(rows, 15), rf.packed_gram(rows, 15, rows[:1])


def attended(**settings):
    q, k, v = (rand(2, 2, 5, 4, seed=seed) for seed in range(3))
    keep = torch.tensor([[True] * 5, [True, True, False, True, False]], device=CPU)
    return rf.linear_attention(q, k, v, key_padding_mask=keep, **settings)


def gaussian():
    q, k, v = (rand(2, 2, 5, 4, seed=seed) for seed in range(3))
    keep = torch.tensor([[True] * 5, [True, True, False, True, False]], device=CPU)
    arguments = {"kernel": "gaussian", "causal": True, "key_padding_mask": keep}
    linear = rf_nn.kernel_weights(q, k, causal=True)
    return rf_nn.kernel_attention(q, k, v, **arguments), rf_nn.kernel_weights(q, k, **arguments), linear


def filled(module):
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(rand(*parameter.shape, seed=seed) - 0.5)
    return module.eval()


def modules():
    x = rand(2, 5, 8)
    ignored = torch.tensor([[False] * 5, [False, False, True, True, True]], device=CPU)
    attention = filled(rf_nn.KernelAttention(8, 2, batch_first=True, device=CPU, dtype=torch.float32))
    timm = filled(rf_nn.KernelSelfAttention(8, 2, device=CPU, dtype=torch.float32))
    return *attention(x, x, x, key_padding_mask=ignored), timm(x), timm.weights(x)


def maps_and_entropy():
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, device=CPU, dtype=torch.float32)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ignored = torch.tensor([[True, False, False], [False, False, True]], device=CPU)
    arguments = {"mask": torch.ones(3, 3, device=CPU).triu(1).bool(), "src_key_padding_mask": ignored}
    found = list(rf_nn.attention_maps(filled(model), rand(2, 3, 8), **arguments).values())
    entropy = rf_nn.attention_entropy(found[0])
    rf_nn.kernelize(model, kernel="gaussian")
    kernel = rf_nn.attention_maps(model, rand(2, 3, 8), src_key_padding_mask=ignored)
    return *found, *entropy, *kernel.values()


VALUES = {
    "betting_bounds": bounds,
    "count_sparsified_": lambda: (*counted(1), *counted(15)),
    "mlp_smoothgrad": perceptron,
    "noisy_samples": noise,
    "packed_gram": gram,
    "soft_topk": lambda: (rf.soft_topk(rand(3, 20), 4, 0.1),),
    "sparsify": lambda: tuple(rf.sparsify(rand(3, 20), 0.3, 0.1, levels=levels) for levels in (None, 1, 15)),
    "topk_threshold": lambda: (rf.topk_threshold(rand(3, 20), 4),),
    "linear_attention": lambda: (attended(), attended(causal=True, normalize=False, feature_map="relu")),
    "kernel_attention": gaussian,
    "modules": modules,
    "maps": maps_and_entropy,
    "overlap": lambda: (rf.overlap(rand(2, 30), rand(2, 30, seed=1), 7),),
}

FUNCTIONS = {
    "noisy_samples": (lambda x: rf.noisy_samples(x, 0.3, 2), (2, 12)),
    "soft_topk": (lambda x: rf.soft_topk(x, 3, 0.1), (2, 12)),
    "sparsify": (lambda x: rf.sparsify(x, 0.5, 0.1, levels=None), (2, 12)),
    "topk_threshold": (lambda x: rf.topk_threshold(x, 3), (2, 12)),
    "linear_attention": (lambda x: rf.linear_attention(x, 2 * x, x.sin(), causal=True), (1, 2, 5, 3)),
    "gaussian": (lambda x: rf_nn.kernel_attention(x, 2 * x, x.sin(), kernel="gaussian"), (1, 2, 5, 3)),
}


def derivatives(name):
    """Value, the gradient of its square, and two derivatives of that in a direction."""
    function, shape = FUNCTIONS[name]
    x, direction = rand(*shape).requires_grad_(), rand(*shape, seed=1)
    value = function(x)
    (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), x, create_graph=True)
    if not second.requires_grad:
        return value, first, second
    return value, first, second, *torch.autograd.grad((second * direction).sum(), x)


def test_every_operator_is_here():
    assert set(ops.__all__) <= set(VALUES)
    assert {name for name in ops.__all__ if _is_differentiable(name)} == set(FUNCTIONS) & set(ops.__all__)


def _is_differentiable(name):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"robattr_fast::{name}", "Autograd")


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic(fill):
    torch.use_deterministic_algorithms(True, warn_only=False)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(True, warn_only=True)


@contextlib.contextmanager
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SURROUNDINGS = {
    "default device": default_device,
    "device as a context": lambda: torch.device("meta"),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": lambda: deterministic(True),
    "deterministic, memory not filled": lambda: deterministic(False),
    "warnings are errors": warnings_are_errors,
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True, check_nan=True),
    "tensors saved elsewhere": torch.autograd.graph.save_on_cpu,
    "gradients enabled": torch.enable_grad,
    "two threads": two_threads,
}
WITHOUT_GRADIENTS = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "inference mode off inside of it": lambda: _nested(torch.inference_mode(), torch.inference_mode(False)),
}


@contextlib.contextmanager
def _nested(*contexts):
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    if request.param == "cpu":
        needs_extension()
    with backends.use(request.param):
        yield


def same(got, expected, name=""):
    # What torch's own projections give may depend on threads and modes; all numbers of these cases are below 4.
    atol = 2e-6 if name in ("modules", "maps") else 0
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one.device.type == "cpu", index
        torch.testing.assert_close(one, other, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("surrounding", [*SURROUNDINGS, *WITHOUT_GRADIENTS])
@pytest.mark.parametrize("name", VALUES)
def test_values(backend, name, surrounding):
    expected = VALUES[name]()
    with (SURROUNDINGS | WITHOUT_GRADIENTS)[surrounding]():
        found = VALUES[name]()
    same(found, expected, name)


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(backend, name, surrounding):
    expected = derivatives(name)
    with SURROUNDINGS[surrounding]():
        found = derivatives(name)
    same(found, expected)


# What torch casts under autocast is cast here; all else computes as it does without.
CAST = {"linear_attention", "kernel_attention", "modules", "maps"}


@pytest.mark.parametrize("name", sorted(set(VALUES) - CAST))
def test_values_under_autocast(backend, name):
    expected = VALUES[name]()
    with torch.autocast("cpu", torch.bfloat16):
        found = VALUES[name]()
    same(found, expected)


def test_definitions_called_by_themselves_under_autocast():
    weights, biases = [rand(5, 12, seed=1), rand(3, 5, seed=2)], [rand(5, seed=3), rand(3, seed=4)]
    tensors = [rand(2, 2, 5, 4, seed=seed) for seed in range(3)]
    rows = reference.pack_levels((16 * rand(3, 5000)).to(torch.uint8), 15)

    def results():
        counts = torch.zeros(2, 12, 3, dtype=torch.int32)
        classes = reference.mlp_smoothgrad(counts, rand(2, 12), weights, biases, 0.2, 7, 0.4)
        return counts, classes, reference.packed_gram(rows, 15), reference.linear_attention(*tensors)

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    same(found, expected)


@pytest.mark.parametrize("name", VALUES)
def test_values_in_another_thread(backend, name):
    expected, found = VALUES[name](), []
    chosen = backends.preference()

    def run():
        with backends.preferring(chosen):
            found.append(VALUES[name]())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    same(found[0], expected, name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_of_inference_mode_can_be_taken_out_of_it(backend, name):
    """What an operator keeps for later calls must not be an inference tensor."""
    function, shape = FUNCTIONS[name]
    with torch.inference_mode():
        function(rand(*shape))
    derivatives(name)

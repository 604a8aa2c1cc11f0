"""torch.compile(dynamic=True, fullgraph=True) of operators and modules: sizes and numbers that vary are symbols."""

import pytest
import torch
from _larger import larger
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import robattr_fast as rf
from robattr_fast.nn import KernelAttention, KernelSelfAttention, kernel_attention, kernelize

pytestmark = pytest.mark.once


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    kernelize(model)
    return lambda n, _: (model, (torch.rand(2, n, 16),))


def heads(function):
    return lambda n, _: (function, tuple(torch.rand(2, 2, n, 4) for _ in range(3)))


def rows(function):
    """Of rows of n elements, a whole number and a fraction."""
    return lambda n, fraction: (function, (torch.rand(3, n), n // 2, fraction))


def count(scores, k, tau):
    counts = torch.zeros(1, scores.shape[1], 3, dtype=torch.int32)
    return counts, rf.count_sparsified_(counts, scores[None], tau)


def perceptron(x, samples, sigma):
    counts = torch.zeros(3, x.shape[1], 1, dtype=torch.int32)
    weight, bias = torch.ones(2, x.shape[1]), torch.zeros(2)
    return counts, rf.mlp_smoothgrad(counts, x, [weight], [bias], sigma, samples, 0.4)


def bounds(scores, samples, delta):
    counts = (scores * samples).to(torch.int32)[..., None]
    return rf.betting_bounds(counts, samples, delta)


def module(made):
    made = made.eval()
    if isinstance(made, KernelAttention):
        return lambda n, _: (lambda x: made(x, x, x, key_padding_mask=x[..., 0] > 0.9)[0], (torch.rand(2, n, 16),))
    return lambda n, _: (made, (torch.rand(2, n, 16),))


# Functions and arguments, of a size and a number.
CASES = {
    "linear_attention": heads(rf.linear_attention),
    "linear_attention, eps": lambda n, f: (
        lambda q, k, v, eps: rf.linear_attention(q, k, v, causal=True, eps=eps),
        (*(torch.rand(2, 2, n, 4) for _ in range(3)), f),
    ),
    "gaussian attention": heads(lambda q, k, v: kernel_attention(q, k, v, kernel="gaussian", causal=True)),
    "kernelized encoder": encoder(),
    "KernelAttention": module(KernelAttention(16, 2, batch_first=True)),
    "KernelSelfAttention": module(KernelSelfAttention(16, 2)),
    "noisy_samples": rows(lambda x, samples, sigma: rf.noisy_samples(x, sigma, samples, first_sample=samples)),
    "topk_threshold": rows(lambda x, k, _: rf.topk_threshold(x, k)),
    "sparsify": rows(lambda x, _, tau: rf.sparsify(x, tau, tau / 2, levels=None)),
    "sparsify to levels": rows(lambda x, _, tau: rf.sparsify(x, tau, levels=15)),
    "soft_topk": rows(lambda x, k, temperature: rf.soft_topk(x, k, temperature)),
    "count_sparsified_": rows(count),
    "mlp_smoothgrad": rows(perceptron),
    "betting_bounds": rows(bounds),
}

FRACTIONS = {"linear_attention, eps", "noisy_samples", "sparsify", "soft_topk", "count_sparsified_", "betting_bounds"}

QUICK = [
    "linear_attention",
    "kernelized encoder",
    "noisy_samples",
    "topk_threshold",
    "sparsify to levels",
    "betting_bounds",
]


@pytest.mark.parametrize("name", [*QUICK, *larger(*(name for name in CASES if name not in QUICK))])
def test_sizes_vary_in_one_graph(name):
    """Values and gradients, through AOTAutograd; a fraction that varies may take another graph, but no other value."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    function, _ = CASES[name](9, 0.25)
    compiled = torch.compile(function, backend=backend, dynamic=True, fullgraph=True)
    made = []
    for n, fraction in ((9, 0.25), (14, 0.25), *([(33, 0.35)] if name in FRACTIONS else [])):
        _, arguments = CASES[name](n, fraction)
        leaves = [x.requires_grad_() for x in arguments if isinstance(x, torch.Tensor)]
        found, expected = compiled(*arguments), function(*arguments)
        torch.testing.assert_close(found, expected)
        if isinstance(expected, torch.Tensor) and expected.requires_grad:
            gradients = (torch.autograd.grad(out.square().sum(), leaves) for out in (found, expected))
            torch.testing.assert_close(*gradients)
        made.append(len(graphs))
    assert made[1] == made[0], "a size was taken for a constant"

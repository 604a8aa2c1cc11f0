"""Metrics of two maps: equal to their peers, NaN where a map says nothing."""

import pytest
import torch
from torch.nn import functional as F

from robattr_fast import metrics

PAIRS = {"cosine": metrics.cosine}
SHAPES = [(40,), (6, 7), (3, 8, 9), (2, 2, 8, 8)]


def maps(*shape, dtype=torch.float32, seed=0):
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_cosine_is_that_of_torch(shape):
    a, b = maps(*shape), maps(*shape, seed=1)
    expected = F.cosine_similarity(a.double().flatten(1), b.double().flatten(1))
    torch.testing.assert_close(metrics.cosine(a, b), expected)
    torch.testing.assert_close(metrics.cosine(a * 1e-30, b * 1e30), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_maps_that_say_nothing_give_nan(name):
    a = maps(8, 8)
    a[0], a[1, 3, 2], a[2, 1, 1] = 0.5, torch.nan, torch.inf
    for value in (PAIRS[name](a, maps(8, 8, seed=1)), PAIRS[name](maps(8, 8, seed=1), a), PAIRS[name](a, a)):
        assert value.dtype == torch.float64
        assert value.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PAIRS)
def test_every_float_type(name, dtype):
    a, b = maps(8, 8, dtype=dtype), maps(8, 8, dtype=dtype, seed=1)
    torch.testing.assert_close(PAIRS[name](a, b), PAIRS[name](a.double(), b.double()), rtol=0, atol=0)


def test_cosine_is_differentiable():
    a, b = maps(5, dtype=torch.float64).requires_grad_(), maps(5, dtype=torch.float64, seed=1).requires_grad_()
    torch.autograd.gradcheck(metrics.cosine, (a, b))


@pytest.mark.parametrize("name", PAIRS)
def test_refusals(name):
    with pytest.raises(ValueError, match=r"a, b: got shapes \(4, 8, 8\) and \(4, 64\), expected two equal shapes"):
        PAIRS[name](maps(8, 8), maps(64))
    with pytest.raises(TypeError, match=r"a: got dtype torch\.int64"):
        PAIRS[name](maps(8, 8).long(), maps(8, 8))
    with pytest.raises(ValueError, match=r"b: got shape \(4,\)"):
        PAIRS[name](maps(1), maps())

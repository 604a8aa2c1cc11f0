"""Membership radii: sound and tight against brute force over everything that the bounds allow."""

import itertools
import math

import pytest
import torch
from torch.special import ndtr, ndtri

from robattr_fast.certificates.theorems.membership import membership

pytestmark = pytest.mark.once


def extreme_maps(lower, upper, radius, sigma):
    """Every map whose values stand at an end of what the bounds allow within a radius."""
    low, high = ndtr(ndtri(lower) - radius / sigma), ndtr(ndtri(upper) + radius / sigma)
    for ends in itertools.product((False, True), repeat=len(lower)):
        yield torch.where(torch.tensor(ends), high, low)


def always(lower, upper, k, element, radius, sigma):
    """(in the top-k of every extreme map, out of it in every one); ties count against both."""
    inside = outside = True
    for values in extreme_maps(lower, upper, radius, sigma):
        others = torch.cat([values[:element], values[element + 1 :]])
        inside &= int((others >= values[element]).sum()) < k
        outside &= int((others > values[element]).sum()) >= k
    return inside, outside


@pytest.mark.parametrize("seed", range(4))
def test_radii_are_exact(seed):
    generator = torch.Generator().manual_seed(seed)
    n, k, sigma = 6, 2, 0.3
    middle = torch.rand(n, generator=generator, dtype=torch.float64)
    width = 0.1 * torch.rand(n, generator=generator, dtype=torch.float64)
    lower, upper = (middle - width).clamp_min(1e-3), (middle + width).clamp_max(1 - 1e-3)
    stays_in, stays_out = membership(lower, upper, k, sigma)
    assert stays_in.max() > 0
    assert stays_out.max() > 0
    for element in range(n):
        for kind, radius in enumerate((float(stays_in[element]), float(stays_out[element]))):
            if radius > 0:
                assert always(lower, upper, k, element, 0.999 * radius, sigma)[kind]
            assert not always(lower, upper, k, element, 1.001 * radius + 1e-6, sigma)[kind]


def test_values_of_0_and_1():
    lower = torch.tensor([[1.0, 1.0, 0.2, 0.0, 0.0]], dtype=torch.float64)
    upper = torch.tensor([[1.0, 1.0, 0.3, 0.0, 0.0]], dtype=torch.float64)
    stays_in, stays_out = membership(lower, upper, 2, 0.5)
    # What is exactly 0 or 1 does not move at all.
    assert stays_in.tolist() == [[math.inf, math.inf, 0, 0, 0]]
    assert stays_out.tolist() == [[0, 0, math.inf, math.inf, math.inf]]
    # Three ones cannot be told apart by the top-1.
    assert membership(torch.ones(3), torch.ones(3), 1, 0.5).stays_in.tolist() == [0, 0, 0]


def test_vacuous_bounds_certify_nothing():
    stays_in, stays_out = membership(torch.zeros(2, 9), torch.ones(2, 9), 3, 0.5)
    assert stays_in.eq(0).all()
    assert stays_out.eq(0).all()


@pytest.mark.parametrize("k", [0, 9])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match="k"):
        membership(torch.zeros(9), torch.ones(9), k, 0.5)

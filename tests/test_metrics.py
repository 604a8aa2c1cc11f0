"""Metrics of two maps: equal to their peers, NaN where a map says nothing."""

import functools
import math
import time

import pytest
import scipy.stats
import torch
from torch.nn import functional as F

from robattr_fast import metrics

PAIRS = {
    "centre_shift": metrics.centre_shift,
    "cosine": metrics.cosine,
    "kendall": metrics.kendall,
    "overlap": functools.partial(metrics.overlap, k=10),
    "sensitivity": metrics.sensitivity,
    "spearman": metrics.spearman,
    "ssim": metrics.ssim,
}
SHAPES = [(40,), (6, 7), (3, 8, 9), (2, 2, 8, 8)]


def maps(*shape, dtype=torch.float32, seed=0):
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_ties(*shape, seed=0):
    """Of few values, half of them 0."""
    values = maps(*shape, seed=seed)
    return torch.where(values > 0, (values * 3).round(), 0)


def each(function, a, b):
    """A peer's function of two flat numpy arrays, pair by pair."""
    return torch.tensor(
        [function(x.flatten().numpy(), y.flatten().numpy()) for x, y in zip(a, b, strict=True)]
    ).double()


@pytest.mark.parametrize("shape", SHAPES)
def test_cosine_is_that_of_torch(shape):
    a, b = maps(*shape), maps(*shape, seed=1)
    expected = F.cosine_similarity(a.double().flatten(1), b.double().flatten(1))
    torch.testing.assert_close(metrics.cosine(a, b), expected)
    torch.testing.assert_close(metrics.cosine(a * 1e-30, b * 1e30), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_overlap_by_its_definition(shape):
    a, b = with_ties(*shape), with_ties(*shape, seed=1)
    for k in (1, 7, 30):
        for x, y, value in zip(a.flatten(1), b.flatten(1), metrics.overlap(a, b, k).tolist(), strict=True):
            first, second = ({*sorted(range(len(v)), key=lambda i, v=v: (-v[i], i))[:k]} for v in (x, y))
            assert value == len(first & second) / k


@pytest.mark.parametrize("window", [1, 2])
def test_near_misses_are_hits_within_a_window(window):
    a, b, k = maps(2, 6, 9), maps(2, 6, 9, seed=1), 12
    tops = [value.flatten(1).topk(k, dim=1).indices for value in (a, b)]
    for first, second, value in zip(*tops, metrics.overlap(a, b, k, window=window).tolist(), strict=True):
        places = [[(i // 54, i // 9 % 6, i % 9) for i in found.tolist()] for found in (first, second)]
        hits = [
            any(c == d and abs(row - y) <= window and abs(column - x) <= window for d, y, x in places[1])
            for c, row, column in places[0]
        ]
        assert value == sum(hits) / k


def test_a_shift_by_one_is_a_near_miss():
    a = F.pad(maps(4, 5).abs() + 1, (2, 2, 2, 2))
    b = a.roll(1, dims=-1)
    assert (metrics.overlap(a, b, 10) < 1).all()
    assert metrics.overlap(a, b, 10, window=1).tolist() == [1.0] * 4
    flat = maps(40)
    assert metrics.overlap(flat, flat.roll(1, dims=1), 5, window=1).min() >= 0.8  # one may roll over the end


@pytest.mark.parametrize("make", [maps, with_ties])
@pytest.mark.parametrize("shape", SHAPES)
def test_rank_correlations_are_those_of_scipy(shape, make):
    a, b = make(*shape), make(*shape, seed=1)
    spearman = each(lambda x, y: scipy.stats.spearmanr(x, y).statistic, a, b)
    torch.testing.assert_close(metrics.spearman(a, b), spearman, rtol=1e-12, atol=1e-14)
    kendall = each(lambda x, y: scipy.stats.kendalltau(x, y, variant="b").statistic, a, b)
    torch.testing.assert_close(metrics.kendall(a, b), kendall, rtol=1e-12, atol=1e-14)


def test_tau_b_by_its_definition():
    a, b = with_ties(30), with_ties(30, seed=1)
    for x, y, value in zip(a, b, metrics.kendall(a, b).tolist(), strict=True):
        signs_x, signs_y = ((v[:, None] - v[None]).sign() for v in (x, y))
        scale = signs_x.abs().sum() * signs_y.abs().sum()
        assert value == pytest.approx(float((signs_x * signs_y).sum() / scale.sqrt()), rel=1e-6)


def test_ranks_are_those_of_scipy():
    values = with_ties(50).view(2, 2, 50)
    expected = torch.from_numpy(scipy.stats.rankdata(values.numpy(), axis=-1))
    torch.testing.assert_close(metrics.average_ranks(values), expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", [maps, with_ties])
@pytest.mark.parametrize(("shape", "window"), [((9, 12), 7), ((3, 8, 7), 7), ((20, 15), 5)])
def test_ssim_is_that_of_scikit_image(shape, window, make):
    skimage = pytest.importorskip("skimage.metrics", reason="scikit-image is what ssim is compared with")
    a, b = make(*shape), make(*shape, seed=1) * 0.3
    channel_axis = 0 if len(shape) == 3 else None
    for data_range in (None, 2.5):
        expected = [
            skimage.structural_similarity(
                x.numpy(),
                y.numpy(),
                win_size=window,
                data_range=data_range or float(torch.maximum(x.max(), y.max()) - torch.minimum(x.min(), y.min())),
                channel_axis=channel_axis,
            )
            for x, y in zip(a.double(), b.double(), strict=True)
        ]
        got = metrics.ssim(a, b, window=window, data_range=data_range)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_sensitivity_is_that_of_captum():
    captum = pytest.importorskip("captum.metrics", reason="Captum is what sensitivity is compared with")
    x, shifts = maps(5, 6), torch.stack([maps(5, 6, seed=seed) * 0.1 for seed in (1, 2, 3)])

    def explain(inputs):
        return inputs.square() + inputs.roll(1, 1)

    expected = captum.sensitivity_max(
        lambda inputs: tuple(map(explain, inputs)) if isinstance(inputs, tuple) else explain(inputs),
        x,
        lambda inputs: inputs + shifts.transpose(0, 1).flatten(0, 1),
        n_perturb_samples=3,
    )
    got = metrics.sensitivity(explain(x), torch.stack([explain(x + shift) for shift in shifts]))
    torch.testing.assert_close(got, expected.double(), rtol=1e-5, atol=0)
    one = metrics.sensitivity(explain(x), explain(x + shifts[0]))
    expected = (explain(x + shifts[0]) - explain(x)).flatten(1).norm(dim=1) / explain(x).flatten(1).norm(dim=1)
    torch.testing.assert_close(one, expected.double(), rtol=1e-5, atol=0)


def test_centre_of_known_maps():
    image = torch.zeros(1, 2, 5, 7)
    image[0, 0, 1, 2], image[0, 1, 3, 2] = -2.0, 2.0
    assert metrics.centre(image).tolist() == [[2.0, 2.0]]
    other = torch.zeros(1, 2, 5, 7)
    other[0, 1, 4, 5], other[0, 1, 0, 0] = 1e-40, 0.0
    assert metrics.centre(other).tolist() == [[4.0, 5.0]]
    assert metrics.centre_shift(image, other).tolist() == [math.hypot(2, 3)]
    assert metrics.centre(torch.tensor([[0.0, 1.0, 0.0, 3.0]])).tolist() == [[2.5]]


def test_moving_a_map_moves_its_centre_as_far():
    inside = F.pad(maps(3, 6, 5).abs(), (3, 3, 3, 3))
    shift = metrics.centre_shift(inside, inside.roll((2, -3), dims=(-2, -1)))
    torch.testing.assert_close(shift, torch.full((4,), math.hypot(2, 3), dtype=torch.float64))


@pytest.mark.parametrize("name", PAIRS)
def test_maps_that_say_nothing_give_nan(name):
    a = maps(8, 8)
    a[0], a[1, 3, 2], a[2, 1, 1] = 0.5, torch.nan, torch.inf
    for value in (PAIRS[name](a, maps(8, 8, seed=1)), PAIRS[name](maps(8, 8, seed=1), a), PAIRS[name](a, a)):
        assert value.dtype == torch.float64
        assert value[1:].isnan().tolist() == [True, True, False]
    assert PAIRS[name](a, maps(8, 8, seed=1))[0].isnan()
    # How far a map moves is known where it moves to a constant one.
    assert PAIRS[name](maps(8, 8), a)[0].isnan() == (name != "sensitivity")
    zeros = torch.zeros(4, 8, 8)
    assert PAIRS[name](zeros, zeros).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PAIRS)
def test_every_float_type(name, dtype):
    a, b = maps(8, 8, dtype=dtype), maps(8, 8, dtype=dtype, seed=1)
    torch.testing.assert_close(PAIRS[name](a, b), PAIRS[name](a.double(), b.double()), rtol=0, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_each_image_by_itself_in_any_layout(name):
    a, b = maps(3, 8, 9), maps(3, 8, 9, seed=1)
    together = PAIRS[name](a, b)
    strided = PAIRS[name](a.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), b)
    torch.testing.assert_close(strided, together, rtol=1e-12, atol=0)
    for image in range(4):
        torch.testing.assert_close(PAIRS[name](a[image : image + 1], b[image : image + 1])[0], together[image])


@pytest.mark.parametrize("name", ["cosine", "ssim", "centre_shift", "sensitivity"])
def test_differentiable(name):
    a, b = (maps(7, 8, dtype=torch.float64, seed=seed)[:2].requires_grad_() for seed in (0, 1))
    settings = {"data_range": 5.0} if name == "ssim" else {}
    torch.autograd.gradcheck(lambda a, b: PAIRS[name](a, b, **settings), (a, b), fast_mode=True)


@pytest.mark.parametrize("name", ["cosine", "ssim", "centre_shift", "sensitivity"])
def test_a_map_that_says_nothing_has_no_gradient_and_spoils_none(name):
    shared = torch.ones((), requires_grad=True)
    a, b = maps(8, 8), maps(8, 8, seed=1)
    a[0], b[1, 0, 0] = 0.0, torch.nan
    a, b = a.requires_grad_(), b.requires_grad_()
    PAIRS[name](a * shared, b + shared).nansum().backward()
    assert shared.grad.isfinite()
    for map_grad in (a.grad, b.grad):
        assert map_grad.isfinite().all()
        assert (map_grad[:2] == 0).all()
        assert (map_grad[2:] != 0).any()


@pytest.mark.parametrize("name", PAIRS)
def test_refusals(name):
    with pytest.raises(ValueError, match=r"got shape.* \(4, 64\)"):
        PAIRS[name](maps(8, 8), maps(64))
    with pytest.raises(TypeError, match=r"(a|before): got dtype torch\.int64"):
        PAIRS[name](maps(8, 8).long(), maps(8, 8))
    with pytest.raises(ValueError, match=r"(b|after): got shape \(4,\)"):
        PAIRS[name](maps(1), maps())


def test_ssim_refuses_what_has_no_windows():
    with pytest.raises(ValueError, match=r"window: got 7, takes an integer in \[3, 6\]"):
        metrics.ssim(maps(6, 9), maps(6, 9))
    with pytest.raises(ValueError, match="window: got 4, expected an odd number"):
        metrics.ssim(maps(6, 9), maps(6, 9), window=4)
    with pytest.raises(ValueError, match="expected"):
        metrics.ssim(maps(40), maps(40))


def test_summary_averages_and_counts():
    a, b = maps(8, 8), maps(8, 8, seed=1)
    a[1] = 0.0
    found = metrics.summary(a, b, 10)
    assert set(found) == set(PAIRS)
    for name, function in PAIRS.items():
        known = [value for value in function(a, b).tolist() if not math.isnan(value)]
        assert (found[name].images, found[name].nan) == (3, 1)
        assert found[name].mean == pytest.approx(sum(known) / 3)
        low, high = scipy.stats.t.interval(0.95, 2, loc=found[name].mean, scale=scipy.stats.sem(known))
        assert found[name].interval == pytest.approx((high - low) / 2)
    assert "ssim" not in metrics.summary(maps(40), maps(40, seed=1), 10)
    assert str(metrics.statistic(torch.tensor([1.0, 1.0, torch.nan]))) == "1.000 ± 0.000 (2 images, 1 NaN)"
    assert metrics.statistic(torch.tensor([torch.nan])).images == 0


def test_kendall_is_fast_enough_for_photographs():
    a, b = maps(150528)[:1], maps(150528, seed=1)[:1]
    metrics.kendall(a, b)
    start = time.process_time()
    metrics.kendall(a, a + b)
    assert time.process_time() - start < 0.2

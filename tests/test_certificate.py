"""The class `Certificate`: what it says, what it refuses, and that its answers fit together."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from robattr_fast.certificates.certificate.certificate import Certificate
from robattr_fast.certificates.ledger import AlphaLedger
from robattr_fast.certificates.moments.second_moment import TopKCost
from robattr_fast.certificates.settings import Settings
from robattr_fast.certificates.theorems.bounds import marginal_bounds
from robattr_fast.errors import MergeError

SHAPE = (2, 5, 4)
N = math.prod(SHAPE)


def level_samples(images: int = 3, samples: int = 600, levels: int = 1, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    means = np.linspace(0.03, 0.95, N)[rng.permuted(np.tile(np.arange(N), (images, 1)), axis=1)]
    return torch.from_numpy(rng.binomial(levels, means[:, None], size=(images, samples, N)).astype(np.uint8))


def certificate(levels: int = 1, **options) -> Certificate:
    options = {"second_moment": False, "slack": 0} | options
    return Certificate.from_samples(level_samples(levels=levels), num_levels=levels, sigma=0.5, shape=SHAPE, **options)


MOMENTS = certificate(second_moment=True, retain=200)


def shard(first: int, end: int, **changes) -> Certificate:
    """The certificate of the samples first..end-1 of a run of 600."""
    fields = {
        "sigma": 0.5,
        "shape": SHAPE,
        "seed": 7,
        "image_ids": (0, 1, 2),
        "input_hashes": ("a", "b", "c"),
        "intervals": (((first, end),),) * 3,
        "model_fingerprint": "m",
        **changes,
    }
    counts = (level_samples()[:, first:end] == 1).sum(1, dtype=torch.int32)[:, :, None]
    votes = torch.tensor([[end - first, 0]] * 3, dtype=torch.int32)
    return Certificate(
        counts=counts, samples=torch.full((3,), end - first), class_counts=votes, settings=Settings(**fields)
    )


@pytest.mark.parametrize("levels", [1, 3])
def test_shapes_and_dtypes(levels):
    cert = certificate(levels)
    for values in (cert.map, cert.lower, cert.upper):
        assert values.shape == (3, *SHAPE)
        assert values.dtype == torch.float64
    assert (cert.lower <= cert.map).all()
    assert (cert.map <= cert.upper).all()
    torch.testing.assert_close(cert.map.flatten(1), level_samples(levels=levels).double().mean(1) / levels)
    assert cert.counts.shape == (3, N, levels)
    assert cert.counts.dtype == torch.int32
    assert (cert.samples.dtype, cert.invalid.dtype) == (torch.int64, torch.int32)
    one, many = cert.overlap(4, 0.1), cert.overlap(4, [0.1, 0.2])
    assert one.share.shape == one.method.shape == (3,)
    assert many.share.shape == many.method.shape == (2, 3)
    assert many.share.dtype == torch.float64
    assert torch.equal(one.share, many.share[0])
    assert set(many.method.flat) == {"marginal"}
    assert "levels" in repr(cert)
    assert len(cert) == 3


@pytest.mark.parametrize("bound", ["betting", "kl", "hoeffding", "clopper-pearson"])
@pytest.mark.parametrize("slack", [0, 2, None])
def test_radius_is_the_inverse_of_overlap(bound, slack):
    cert = certificate(bound=bound, slack=slack)
    for k in (1, 3, 10, N // 2):
        for target in (0.01, 1 / 3, 0.5, 0.7, 1.0):
            radius = cert.radius(k, target)
            assert radius.dtype == torch.float64
            for image in range(3):
                at = radius[image].item()
                beyond = np.nextafter(at, np.inf)
                assert cert.overlap(k, beyond).share[image] < target
                if at > 0:
                    assert cert.overlap(k, at).share[image] >= target


def test_overlap_falls_with_the_radius_and_slack_helps():
    radii = torch.linspace(0, 1, 40)
    fixed, best = certificate(slack=0).overlap(10, radii).share, certificate(slack=None).overlap(10, radii).share
    assert (fixed.diff(dim=0) <= 0).all()
    assert (best >= fixed).all()
    assert fixed[0].min() > 0
    assert (fixed[-1] == 0).all()


def test_a_share_is_compared_as_it_is_written():
    cert = certificate()
    for k in range(1, N // 2 + 1):
        for count in range(1, k + 1):
            assert torch.equal(cert.radius(k, count / k), cert.radius(k, (count - 0.5) / k))
            if count < k:
                assert torch.equal(cert.radius(k, np.nextafter(count / k, 1)), cert.radius(k, (count + 0.5) / k))


@pytest.mark.parametrize(
    ("k", "error"), [(0, ValueError), (N // 2 + 1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_k_out_of_range(k, error):
    with pytest.raises(error, match="k: got"):
        certificate().overlap(k, 0.1)
    with pytest.raises(error, match="k: got"):
        certificate().radius(k, 0.5)


@pytest.mark.parametrize("radius", [-0.1, math.nan, math.inf, [0.1, -1.0], [[0.1]]])
def test_radius_out_of_range(radius):
    with pytest.raises(ValueError, match="radius"):
        certificate().overlap(2, radius)
    with pytest.raises(ValueError, match="radius"):
        certificate().pixels(radius)


@pytest.mark.parametrize("overlap", [0.0, -1.0, 1.1, math.nan])
def test_overlap_out_of_range(overlap):
    with pytest.raises(ValueError, match="overlap"):
        certificate().radius(2, overlap)


def test_methods():
    with pytest.raises(ValueError, match="has no second moments: no part of alpha"):
        certificate().overlap(2, 0.1, method="second-moment")
    with pytest.raises(ValueError, match="one of best"):
        certificate().radius(2, 0.1, method="moment")


def test_pixels():
    cert = certificate()
    signs = cert.pixels([0.0, 0.3])
    assert signs.shape == (2, 3, *SHAPE)
    assert signs.dtype == torch.int8
    assert torch.equal(signs[1], cert.pixels(0.3))
    assert torch.equal(signs[0], (cert.lower > 0.5).to(torch.int8) - (cert.upper < 0.5).to(torch.int8))
    assert signs[1].abs().sum() < signs[0].abs().sum()
    with pytest.raises(ValueError, match="levels=1"):
        certificate(levels=3).pixels(0.1)


def test_prediction():
    votes = torch.tensor([[590, 10], [300, 300], [0, 600]], dtype=torch.int32)
    prediction = certificate(class_counts=votes).prediction()
    assert prediction.label.tolist() == [0, -1, 1]
    assert prediction.radius[1] == 0
    assert prediction.radius[2] > prediction.radius[0] > 0
    with pytest.raises(ValueError, match="class_counts"):
        certificate().prediction()
    with pytest.raises(ValueError, match="all of alpha"):
        certificate(class_counts=votes, bound="hoeffding").prediction()


@pytest.mark.parametrize(
    ("bound", "slack", "second_moment", "shares"),
    [
        ("betting", None, True, (0.005, 0.0225, 0.0225)),
        ("betting", 0, False, (0.005, 0.045, 0.0)),
        ("hoeffding", 0, False, (0.0, 0.05, 0.0)),
        ("hoeffding", None, False, (0.0, 0.05, 0.0)),
        ("hoeffding", 1, False, (0.005, 0.045, 0.0)),
        ("hoeffding", 0, True, (0.005, 0.0225, 0.0225)),
    ],
)
def test_ledger(bound, slack, second_moment, shares):
    ledger = certificate(bound=bound, slack=slack, second_moment=second_moment).settings.ledger
    assert (ledger.label, ledger.marginal, ledger.moment) == pytest.approx(shares)
    assert ledger.label + ledger.marginal + ledger.moment <= ledger.alpha * (1 + 1e-15)
    with pytest.raises(ValueError, match="alpha"):
        AlphaLedger.allot(1.0, bound=bound, slack=0, second_moment=second_moment)


def test_with_bounds_explores():
    cert = certificate(slack=None)
    other = cert.with_bounds(bound="kl", alpha=0.01)
    assert other.exploratory
    assert "exploratory" in repr(other)
    assert other.evaluated_bound == "kl"
    assert not torch.equal(other.lower, cert.lower)
    assert torch.equal(other.lower, certificate(bound="kl", alpha=0.01).lower)
    back = other.with_bounds(bound="betting", alpha=0.05)
    assert not back.exploratory
    assert back.settings == cert.settings
    with pytest.raises(ValueError, match="bound"):
        cert.with_bounds(bound="student")
    with pytest.raises(ValueError, match="alpha"):
        cert.with_bounds(alpha=0)
    with pytest.raises(ValueError, match="slack"):
        cert.with_bounds(slack=-1)


@pytest.mark.parametrize("plan", [600, 601])
def test_off_plan_means_betting(plan):
    cert = shard(0, 600, bound="kl", planned_samples=(plan,) * 3)
    expected = certificate(bound="kl" if plan == 600 else "betting")
    torch.testing.assert_close(cert.upper, expected.upper)
    assert cert.evaluated_bound == ("kl" if plan == 600 else "betting")
    assert (cert.reason is None) == (plan == 600)
    if plan != 600:
        assert "601" in cert.reason
        assert "600" in cert.reason


def test_sums_off_plan_have_no_bound():
    settings = Settings(sigma=1.0, shape=(4,), levels=None, bound="kl", planned_samples=(20,))
    sums = torch.tensor([[1.0, 2.0, 3.0, 9.5]], dtype=torch.float64)
    cert = Certificate(sums=sums, samples=torch.tensor([10]), settings=settings)
    assert cert.map.tolist() == [[0.1, 0.2, 0.3, 0.95]]
    with pytest.raises(ValueError, match="level counts"):
        cert.overlap(1, 0.1)


@pytest.mark.parametrize("bound", ["betting", "kl"])
def test_invalid_samples(bound):
    counts = torch.full((1, 4, 1), 30, dtype=torch.int32)
    invalid = torch.tensor([10], dtype=torch.int32)
    settings = Settings(sigma=1.0, shape=(4,), bound=bound, on_nonfinite="abstain")
    valid = Certificate.from_counts(counts, 100, sigma=1.0, bound=bound)
    zero = Certificate.from_counts(counts, 100, sigma=1.0, bound=bound, invalid=invalid)
    abstain = Certificate(counts=counts, samples=torch.tensor([100]), invalid=invalid, settings=settings)
    assert torch.equal(zero.upper, valid.upper)
    assert torch.equal(abstain.lower, valid.lower)
    assert torch.equal(abstain.upper, Certificate.from_counts(counts + 10, 100, sigma=1.0, bound=bound).upper)
    assert "invalid" in repr(abstain)
    with pytest.raises(ValueError, match="on_nonfinite"):
        Certificate(
            counts=counts,
            samples=torch.tensor([100]),
            invalid=invalid,
            settings=dataclasses.replace(settings, on_nonfinite="raise"),
        )


def test_images_are_independent():
    cert = certificate(slack=None)
    for image in range(3):
        alone = cert[image]
        assert len(alone) == 1
        torch.testing.assert_close(alone.overlap(9, 0.05).share[0], cert.overlap(9, 0.05).share[image])
        assert torch.equal(alone.map[0], cert.map[image])
    assert len(cert[1:]) == 2
    assert shard(0, 600)[-1].settings.image_ids == (2,)
    assert len(list(cert)) == 3
    with pytest.raises(IndexError):
        cert[3]


def test_merge_is_the_whole():
    whole = shard(0, 600)
    merged = shard(400, 600).merge(shard(0, 100)).merge(shard(100, 400))
    assert torch.equal(merged.counts, whole.counts)
    assert torch.equal(merged.class_counts, whole.class_counts)
    assert merged.settings == dataclasses.replace(whole.settings, merged=True)
    gap = shard(0, 100).merge(shard(400, 600))
    assert gap.settings.intervals == (((0, 100), (400, 600)),) * 3
    assert gap.samples.tolist() == [300] * 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sigma": 0.25}, "sigma"),
        ({"tau": 0.2}, "tau"),
        ({"gamma": 0.2}, "gamma"),
        ({"shape": (N,)}, "shape"),
        ({"channel_sum": True}, "channel_sum"),
        ({"explain": "input_x_gradient"}, "explain"),
        ({"target": (1, 1, 1)}, "target"),
        ({"model_fingerprint": "other"}, "model_fingerprint"),
        ({"input_hashes": ("a", "b", "x")}, "input_hashes"),
        ({"seed": 8}, "seed"),
        ({"image_ids": (0, 1, 3)}, "image_ids"),
        ({"alpha": 0.01}, "alpha"),
        ({"bound": "kl"}, "bound"),
        ({"intervals": None}, "intervals"),
    ],
)
def test_merge_of_different_maps(changes, words):
    with pytest.raises(MergeError, match=words):
        shard(0, 300).merge(shard(300, 600, **changes))


def test_merge_of_overlapping_samples():
    with pytest.raises(MergeError, match=r"samples 299\.\.299"):
        shard(0, 300).merge(shard(299, 600))
    with pytest.raises(MergeError, match=r"image 0.*100\.\.199"):
        shard(0, 600).merge(shard(100, 200))
    with pytest.raises(MergeError, match="intervals"):
        certificate().merge(certificate())


def test_a_union_is_evaluated_by_betting():
    first, second = (shard(*ends, bound="kl", planned_samples=(300,) * 3) for ends in ((0, 300), (300, 600)))
    assert first.evaluated_bound == "kl"
    assert first.merge(second).evaluated_bound == "betting"
    # A union that has the planned size by chance: what either had when it ended may have depended on what it saw.
    halves = (shard(*ends, bound="kl", planned_samples=(600,) * 3) for ends in ((0, 200), (200, 600)))
    assert next(halves).merge(next(halves)).evaluated_bound == "betting"


def test_merge_keeps_what_both_machines_were():
    first = shard(0, 300, device="cpu", batch_size=4, backends={"sparsify": "cpu"}, versions={"torch": "1"})
    second = shard(300, 600, device="cuda", batch_size=8, backends={"sparsify": "cuda"}, versions={"torch": "1"})
    settings = first.merge(second).settings
    assert settings.device == "cpu + cuda"
    assert settings.batch_size is None
    assert settings.backends == {"sparsify": "cpu + cuda"}
    assert settings.versions == {"torch": "1"}


def counts_of(*values: int) -> torch.Tensor:
    return torch.tensor([[[value] for value in values]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"counts": counts_of(1, 2).long()}, TypeError, "counts"),
        ({"counts": counts_of(-1, 2)}, ValueError, "counts"),
        ({"counts": counts_of(1, 11)}, ValueError, "counts"),
        ({"counts": counts_of(1, 2, 3)}, ValueError, "counts"),
        (
            {"counts": torch.zeros(0, 2, 1, dtype=torch.int32), "samples": torch.zeros(0, dtype=torch.int64)},
            ValueError,
            "one image",
        ),
        ({"samples": torch.tensor([10, 10])}, ValueError, "invalid|counts"),
        ({"samples": torch.tensor([10.0])}, TypeError, "samples"),
        ({"invalid": torch.tensor([11], dtype=torch.int32)}, ValueError, "invalid"),
        ({"class_counts": torch.tensor([[6, 5]], dtype=torch.int32)}, ValueError, "class_counts"),
        ({"class_counts": torch.tensor([6, 4], dtype=torch.int32)}, ValueError, "class_counts"),
        ({"sums": torch.zeros(1, 2, dtype=torch.float64)}, ValueError, "counts alone"),
        ({"counts": None}, ValueError, "counts alone"),
    ],
)
def test_contradictions(changes, error, words):
    tensors = {"counts": counts_of(1, 2), "samples": torch.tensor([10]), **changes}
    with pytest.raises(error, match=words):
        Certificate(**tensors, settings=Settings(sigma=1.0, shape=(2,)))


@pytest.mark.parametrize("value", [-0.5, 10.5, math.nan])
def test_sums_out_of_range(value):
    settings = Settings(sigma=1.0, shape=(2,), levels=None, bound="kl")
    with pytest.raises(ValueError, match="sums"):
        Certificate(
            sums=torch.tensor([[1.0, value]], dtype=torch.float64), samples=torch.tensor([10]), settings=settings
        )


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"sigma": 0.0}, ValueError, "sigma"),
        ({"sigma": math.nan}, ValueError, "sigma"),
        ({"sigma": "1"}, TypeError, "sigma"),
        ({"shape": ()}, ValueError, "shape"),
        ({"shape": (2, 0)}, ValueError, "shape"),
        ({"levels": 0}, ValueError, "levels"),
        ({"levels": None}, ValueError, "hoeffding or kl"),
        ({"bound": "clopper-pearson", "levels": 15}, ValueError, "levels=1"),
        ({"alpha": 0.0}, ValueError, "alpha"),
        ({"slack": 2}, ValueError, "slack"),
        ({"retain": 3}, ValueError, "retain"),
        ({"retain": 8193}, ValueError, "retain"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite"),
        ({"intervals": (((3, 3),),)}, ValueError, "intervals"),
        ({"intervals": (((0, 3), (2, 5)),)}, ValueError, "intervals"),
        ({"intervals": (((-1, 3),),)}, ValueError, "intervals"),
        ({"image_ids": (1, 2), "intervals": (((0, 3),),)}, ValueError, "per image"),
    ],
)
def test_settings_refuse(changes, error, words):
    with pytest.raises(error, match=words):
        Settings(**{"sigma": 1.0, "shape": (2,), **changes})


@pytest.mark.parametrize(
    ("levels", "num_levels", "error"),
    [
        (torch.zeros(1, 2, 3), 1, TypeError),
        (torch.zeros(2, 3, dtype=torch.uint8), 1, ValueError),
        (torch.full((1, 2, 3), 2, dtype=torch.uint8), 1, ValueError),
        (torch.zeros(1, 2, 3, dtype=torch.uint8), 0, ValueError),
    ],
)
def test_from_samples_refuses(levels, num_levels, error):
    with pytest.raises(error, match="levels"):
        Certificate.from_samples(levels, num_levels=num_levels, sigma=1.0)


@pytest.mark.parametrize(
    ("bound", "slack", "events"), [("kl", 0, 1), ("kl", 3, 2), ("betting", 3, 1), ("betting", None, 1)]
)
def test_a_fixed_size_bound_with_slack_pays_for_two_events(bound, slack, events):
    """The overlap needs "at most m wrong", lower and upper "none wrong": one martingale has both, kl does not."""
    counts = torch.randint(0, 300, (1, 40, 1), dtype=torch.int32)
    cert = Certificate.from_counts(counts, 400, sigma=0.5, bound=bound, slack=slack)
    share = 0.9 * 0.05 / events
    lower, upper = marginal_bounds(bound, share / 80, counts, torch.tensor([400]))
    assert torch.equal(cert.lower, lower)
    assert torch.equal(cert.upper, upper)


def test_each_image_is_evaluated_by_its_own_bound():
    counts = torch.randint(0, 300, (2, 40, 1), dtype=torch.int32)
    samples = torch.tensor([400, 390])
    settings = Settings(sigma=0.5, shape=(40,), bound="kl", slack=0, planned_samples=(400, 400))
    cert = Certificate(counts=counts, samples=samples, settings=settings)
    assert cert.evaluated_bound == "kl + betting"
    for image in (0, 1):
        assert torch.equal(cert.lower[image], cert[image].lower[0])
        assert cert[image].evaluated_bound == ("kl", "betting")[image]


def dependent(held):
    held["directions"][0, 1] = held["directions"][0, 0]


def without_directions(held):
    del held["directions"]


def from_the_pilots(held):
    held["gram_summary"][0, 8] += 150  # as many rows as there are, pilots and all


def one_square(held):
    held["gram_summary"][0, -2] = 0.0


def no_shrinking(held):
    held["gram_summary"][0, -2] = 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dependent, "directions of image 0 must be linearly independent"),
        (without_directions, "which takes its directions"),
        (from_the_pilots, "must be deflated from the samples after its pilots"),
        (one_square, "all squares of a deflation"),
        (no_shrinking, "all squares of a deflation"),
    ],
)
def test_a_deflation_that_no_samples_give_is_refused(change, message):
    held = {name: tensor.clone() for name, tensor in MOMENTS.tensors.items()}
    Certificate(**held, settings=MOMENTS.settings)
    change(held)
    with pytest.raises(ValueError, match=message):
        Certificate(**held, settings=MOMENTS.settings)


def test_deflation_certifies_what_one_ball_does_not():
    """Maps that mostly turn all elements up or down together: a direction that moves the map but not its order."""
    rng = np.random.default_rng(0)
    together = rng.random((1, 2000, 1)) < 0.3
    alone = np.where(np.arange(N) < 10, 0.9, 0.02)
    levels = torch.from_numpy((rng.random((1, 2000, N)) < alone) | together).to(torch.uint8)
    cert = Certificate.from_samples(levels, num_levels=1, sigma=0.5, slack=None, retain=500)
    (proved,) = cert.second_moments
    assert proved.deflated < proved.spectral / 3
    radii = [0.05, 0.1, 0.2]
    ball = [TopKCost(cert.map.flatten(), 10).overlap(proved.distance(radius)) / 10 for radius in radii]
    shares = cert.overlap(10, radii, "second-moment").share[:, 0].tolist()
    assert all(share >= least for share, least in zip(shares, ball, strict=True))
    assert sum(shares) > sum(ball) + 0.2
    for share, radius in zip(shares, radii, strict=True):
        if share:
            assert float(cert.radius(10, share, "second-moment")[0]) >= radius


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="planned samples must be at least 1, got 0"):
        Certificate.from_samples(torch.zeros(1, 0, 10, dtype=torch.uint8), num_levels=1, sigma=0.2)

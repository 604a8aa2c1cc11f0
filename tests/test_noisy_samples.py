"""The noise stream: its bits, equal on every backend, and its statistics."""

import numpy as np
import pytest
import scipy.stats
import torch
from _operators import DTYPES, FEWER_DTYPES, INTERPRETED, backend, examples
from hypothesis import given
from hypothesis import strategies as st

import robattr_fast as rf
from robattr_fast import reference
from robattr_fast.reference.noisy_samples import normals, philox4x32

pytestmark = pytest.mark.wheel

__all__ = ["backend"]


def assert_same_bits(a: torch.Tensor, b: torch.Tensor):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def words(block: int, sample: int, image: int, zero: int, seed: int) -> list[str]:
    counter = tuple(torch.tensor([value]) for value in (block, sample, image, zero))
    return [f"{int(word):08x}" for word in philox4x32(counter, seed)]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors that Random123 ships for philox4x32 with ten rounds."""
    assert words(*counter, key) == expected.split()


# Elements 0, 1, 16, 33, 63, 64, 150527: two lanes, each word, the next tile, the end of an image.
_ELEMENTS = (0, 1, 16, 33, 63, 64, 150_527)
_PINNED = {
    (0, 0, 0): "3d408868 3c9d7ce1 bfad6600 3f3a4cf0 bf099a3a be406af4 bc8570ad",
    (42, 2, 5): "3f8494ab bf17f57c bf85921b bdff3e1e bf30b8d5 bf9173ad 3e2f73f0",
    (2**64 - 1, 2**32 - 1, 2**32 - 1): "3ef9b10c bfa2e96f be6709ab bf5f2fac 3f59d332 bfcc57e7 3fc1316e",
}


def test_pinned_words():
    """Version 1 of the stream never changes."""
    assert words(17, 5, 2, 0, 42) == ["b3f35b3e", "a91f5574", "c625b16b", "7b704933"]
    end = 2**32 - 1
    assert words(end, end, end, 0, 2**64 - 1) == ["eec03824", "e4c1e0f1", "3d16e5ca", "a00e8336"]


@pytest.mark.parametrize(("seed", "image", "sample"), sorted(_PINNED))
def test_pinned_normals(backend, seed, image, sample):
    z = rf.noisy_samples(
        torch.zeros(1, 150_528), 1.0, 1, seed=seed, first_sample=sample, image_ids=torch.tensor([image])
    )
    bits = z[0, 0, list(_ELEMENTS)].view(torch.int32).tolist()
    assert [f"{value % 2**32:08x}" for value in bits] == _PINNED[seed, image, sample].split()


SHAPES = ((1,), (2,), (63,), (64,), (65,), (129,), (3, 5, 7), (3, 28, 28), (8191,), (8193,))
if INTERPRETED:  # a thousand times slower
    SHAPES = ((1,), (65,), (3, 5, 7))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", FEWER_DTYPES)
def test_backends_match_the_reference_over_dtypes(backend, dtype, out_dtype):
    for shape in SHAPES:
        x = torch.randn(2, *shape).to(dtype)
        arguments = {
            "seed": 2**64 - 3,
            "first_sample": 7,
            "image_ids": torch.tensor([2**32 - 1, 5]),
            "dtype": out_dtype,
        }
        actual = rf.noisy_samples(x, 0.3, 3, **arguments)
        assert_same_bits(actual, reference.noisy_samples(x, 0.3, 3, **arguments))


@given(
    n=st.integers(1, 400),
    samples=st.integers(1, 5),
    sigma=st.floats(1e-30, 1e30),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**32 - 5),
    images=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
)
@examples(100)
def test_backends_match_the_reference(backend, n, samples, sigma, seed, first, images, dtype):
    x = torch.randn(len(images), n).to(dtype)
    arguments = {"seed": seed, "first_sample": first, "image_ids": torch.tensor(images)}
    actual = rf.noisy_samples(x, sigma, samples, **arguments)
    assert_same_bits(actual, reference.noisy_samples(x, sigma, samples, **arguments))


def test_image_ids_may_have_any_stride(backend):
    x = torch.randn(3, 65)
    for ids in (torch.tensor([7, 0, 2**32 - 1, 1, 5])[::2], torch.tensor([9]).expand(3)):
        actual = rf.noisy_samples(x, 0.3, 2, image_ids=ids)
        assert_same_bits(actual, reference.noisy_samples(x, 0.3, 2, image_ids=ids.clone()))


@pytest.mark.parametrize("dtype", FEWER_DTYPES)
def test_any_split_gives_the_same_bits(backend, dtype):
    x = torch.randn(3, 2, 9, 11).to(dtype)
    whole = rf.noisy_samples(x, 0.5, 6, seed=9, first_sample=100)
    by_sample = [rf.noisy_samples(x, 0.5, 2, seed=9, first_sample=first) for first in (100, 102, 104)]
    assert_same_bits(torch.cat(by_sample, dim=1), whole)
    by_offset = [rf.noisy_samples(x, 0.5, 3, seed=9, sample_offset=torch.tensor([first])) for first in (100, 103)]
    assert_same_bits(torch.cat(by_offset, dim=1), whole)
    of_each = rf.noisy_samples(x, 0.5, 2, seed=9, first_sample=100, sample_offset=torch.tensor([4, 0, 2]))
    assert_same_bits(of_each, torch.stack([whole[0, 4:], whole[1, :2], whole[2, 2:4]]))
    by_image = [
        rf.noisy_samples(x[b : b + 1], 0.5, 6, seed=9, first_sample=100, image_ids=torch.tensor([b])) for b in range(3)
    ]
    assert_same_bits(torch.cat(by_image), whole)


def test_passes_of_the_reference_give_the_same_bits(monkeypatch):
    x = torch.randn(2, 100)
    whole = reference.noisy_samples(x, 0.5, 7, seed=3)
    monkeypatch.setitem(normals.__globals__, "_BLOCKS_PER_PASS", 64)  # for 256 elements: two samples
    assert_same_bits(reference.noisy_samples(x, 0.5, 7, seed=3), whole)


# Fewer channels than a tile has elements, and more; planes shorter than a task of the CPU kernel, and longer.
IMAGES = ((3, 17, 5), (1, 7, 9)) if INTERPRETED else ((3, 17, 5), (1, 7, 9), (3, 40, 40), (5, 31, 29), (70, 9, 9))


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("dtype", FEWER_DTYPES)
def test_memory_format_changes_strides_only(backend, dtype, shape):
    x = torch.randn(2, *shape).to(dtype)
    plain = rf.noisy_samples(x, 0.5, 4)
    last = rf.noisy_samples(x, 0.5, 4, channels_last=True)
    assert_same_bits(last, plain)
    assert plain.is_contiguous()
    assert all(last[b].is_contiguous(memory_format=torch.channels_last) for b in range(2))
    assert_same_bits(rf.noisy_samples(x.to(memory_format=torch.channels_last), 0.5, 4), plain)
    assert_same_bits(rf.noisy_samples(x.transpose(2, 3).contiguous().transpose(2, 3), 0.5, 4), plain)


def test_fast_noise_is_nearly_the_stream(backend):
    x = torch.zeros(2, 2000 if INTERPRETED else 200_000)
    exact, fast = (rf.noisy_samples(x, 1.0, 2, seed=5, fast=fast) for fast in (False, True))
    if backend in ("reference", "cpu"):
        assert_same_bits(fast, exact)
    # A phase is off by less than 1e-6, which a radius of 7 multiplies; an error e of the logarithm moves a radius r by
    # e / r, and e is less than 1e-6 too.
    error = (fast - exact).abs()
    assert float((error * exact.abs()).max()) < 1e-4
    assert float(error.mean()) < 1e-6
    assert float(exact.abs().max()) > 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_is_x_plus_sigma_z(backend, dtype):
    x = torch.randn(1, 1000).to(dtype)
    z = normals(1000, seed=3, image_id=0, first_sample=0, num_samples=1)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (x.to(compute) + torch.tensor(0.1, dtype=compute) * z.to(compute)).to(dtype)
    assert_same_bits(rf.noisy_samples(x, 0.1, 1, seed=3)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(backend, dtype):
    """Every NaN, also the one of which all other bits are set: rounded as an integer it would be a zero."""
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    x = torch.cat([nans, torch.tensor([torch.inf, -torch.inf, 1.0])])[None]
    z = rf.noisy_samples(x, 0.5, 3, dtype=dtype)[0]
    assert bool(z[:, :4].isnan().all())
    assert bool((z[:, 4:6] == torch.tensor([torch.inf, -torch.inf])).all())
    assert bool(z[:, 6].isfinite().all())


def test_opcheck():
    op = torch.ops.robattr_fast.noisy_samples.default
    x = torch.randn(2, 3, 4, 5)
    torch.library.opcheck(op, (x, 0.5, 3, -1, 2, None, None, None, False))
    torch.library.opcheck(op, (x.requires_grad_(), 0.5, 3, 1, 2, torch.tensor([4, 7]), torch.tensor([9]), None, True))
    torch.library.opcheck(op, (x, 0.5, 3, 1, 2, None, None, torch.bfloat16, False))
    torch.library.opcheck(op, (x.requires_grad_(), 0.5, 3, 1, 2, None, None, None, False, True))


def test_compile():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)

    def loss(x, offset):
        return rf.noisy_samples(x, 0.5, 3, seed=2**64 - 1, sample_offset=offset).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for offset in (torch.tensor([0]), torch.tensor([5])):
        torch.testing.assert_close(compiled(x, offset), loss(x, offset))
        actual, expected = (torch.autograd.grad(f(x, offset), x)[0] for f in (compiled, loss))
        torch.testing.assert_close(actual, expected)


def test_twice_against_differences(backend):
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: rf.noisy_samples(x, 0.5, 3), x, fast_mode=INTERPRETED)
    torch.autograd.gradgradcheck(lambda x: rf.noisy_samples(x, 0.5, 3) ** 3, x, fast_mode=INTERPRETED)


def test_gradient_has_the_dtype_of_x():
    x = torch.randn(2, 7, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(rf.noisy_samples(x, 0.5, 4, dtype=torch.float32).sum(), x)
    assert grad.dtype == torch.bfloat16
    assert (grad == 4).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, "x: got shape"),
        ({"x": torch.zeros(0, 3)}, ValueError, "x: got the empty shape"),
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "x: got dtype torch.int32"),
        ({"x": [[1.0]]}, TypeError, "x: got list"),
        ({"sigma": 0.0}, ValueError, "sigma: got 0.0"),
        ({"sigma": "0.2"}, TypeError, "sigma: got str"),
        ({"sigma": -1.0}, ValueError, "sigma: got -1.0"),
        ({"sigma": float("nan")}, ValueError, "sigma: got nan"),
        ({"sigma": float("inf")}, ValueError, "sigma: got inf"),
        ({"num_samples": 0}, ValueError, "num_samples: got 0"),
        ({"num_samples": 1.0}, TypeError, "num_samples: got float"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"seed": 2**64}, ValueError, "seed: got 18446744073709551616"),
        ({"first_sample": -1}, ValueError, "first_sample: got -1"),
        ({"first_sample": 2**32 - 1}, ValueError, "first_sample: got 4294967295"),
        ({"sample_offset": torch.tensor([2**32])}, ValueError, r"first_sample \+ sample_offset: got 4294967296"),
        ({"sample_offset": torch.tensor([0, 2**32])}, ValueError, r"first_sample \+ sample_offset: got 4294967296"),
        ({"sample_offset": torch.tensor([1.0])}, ValueError, "sample_offset: got torch.float32"),
        ({"sample_offset": torch.tensor([1, 2, 3])}, ValueError, r"sample_offset: got .* takes int64 \(1,\) or \(2,\)"),
        ({"image_ids": torch.tensor([0])}, ValueError, r"image_ids: got torch.int64 \(1,\)"),
        ({"image_ids": torch.tensor([0, 1], dtype=torch.int32)}, ValueError, "image_ids: got torch.int32"),
        ({"image_ids": torch.tensor([0, 2**32])}, ValueError, r"image_ids: got \[0, 4294967296\]"),
        ({"image_ids": torch.tensor([-1, 0])}, ValueError, r"image_ids: got \[-1, 0\]"),
        ({"dtype": torch.int32}, TypeError, "dtype: got torch.int32"),
        ({"channels_last": True}, ValueError, "channels_last: got x of shape"),
    ],
)
def test_errors(arguments, error, message):
    valid = {"x": torch.zeros(2, 3), "sigma": 1.0, "num_samples": 2}
    with pytest.raises(error, match=message):
        rf.noisy_samples(**(valid | arguments))


# Statistics of the stream. Seeds are fixed, so a test passes or fails for good; a z-score of 5 leaves a perfect
# generator six chances in ten million to fail a comparison.
_Z = 5.0


@pytest.fixture(scope="module")
def stream():
    """float64 [images=4, samples=16, 65536] normals of one seed: 4 million."""
    return draw(torch.arange(4), 16, 1 << 16, seed=20_240_229)


def draw(images, samples, n, *, seed):
    zeros = torch.zeros(len(images), n)
    return rf.noisy_samples(zeros, 1.0, samples, seed=seed, image_ids=torch.as_tensor(images)).double().numpy()


def z_score(products: np.ndarray, mean: float, variance: float) -> float:
    """How many standard errors the mean of independent products of known moments is off."""
    return float((products.mean() - mean) / np.sqrt(variance / products.size))


def double_factorial(m: int) -> int:
    return int(np.prod(np.arange(m, 0, -2)))


@pytest.mark.parametrize("order", range(1, 7))
def test_moments(stream, order):
    mean = double_factorial(order - 1) if order % 2 == 0 else 0
    assert abs(z_score(stream**order, mean, double_factorial(2 * order - 1) - mean**2)) < _Z


@pytest.mark.parametrize("threshold", [0.5, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("sign", [-1, 1])
def test_tails(stream, threshold, sign):
    beyond = int((sign * stream > threshold).sum())
    test = scipy.stats.binomtest(beyond, stream.size, scipy.stats.norm.sf(threshold))
    assert test.pvalue > 2 * scipy.stats.norm.sf(_Z)


def test_largest_value(stream):
    # The smallest uniform is 2^-32. Of 4 million normals the largest is below 4.5 with probability 1e-12.
    assert 4.5 < np.abs(stream).max() < np.sqrt(64 * np.log(2))


def test_kolmogorov_smirnov(stream):
    assert scipy.stats.kstest(stream.ravel(), "norm").pvalue > 2 * scipy.stats.norm.sf(_Z)


@pytest.mark.parametrize("word", range(4))
def test_each_word_and_quadrant(stream, word):
    z = stream.reshape(-1, 4, 16)[:, word]
    assert scipy.stats.kstest(z.ravel(), "norm").pvalue > 2 * scipy.stats.norm.sf(_Z)
    assert abs(z_score(np.sign(z), 0, 1)) < _Z


def assert_uncorrelated(a: np.ndarray, b: np.ndarray):
    """Values, magnitudes and their mixtures: the mean products of independent normals, each with its known variance."""
    a, b = a.ravel(), b.ravel()
    assert a.size == b.size >= 1 << 16
    a2, b2 = a * a - 1, b * b - 1  # mean 0, variance 2
    for products, variance in ((a * b, 1), (a2 * b2, 4), (a * b2, 2), (a2 * b, 2)):
        assert abs(z_score(products, 0, variance)) < _Z


@pytest.mark.parametrize("lag", [1, 2, 15, 16, 17, 32, 48, 63, 64, 128, 224])
def test_elements_are_independent(stream, lag):
    assert_uncorrelated(stream[..., :-lag], stream[..., lag:])


def test_words_of_a_block_are_independent(stream):
    word = stream.reshape(-1, 4, 16)
    for a in range(4):
        for b in range(a):
            assert_uncorrelated(word[:, a], word[:, b])


def test_samples_and_images_are_independent(stream):
    assert_uncorrelated(stream[:, :-1], stream[:, 1:])
    assert_uncorrelated(stream[:-1], stream[1:])
    # counter words exchanged: sample 1 of image 0 and sample 0 of image 1
    assert_uncorrelated(stream[0, 1], stream[1, 0])


@pytest.mark.parametrize(("seed", "other"), [(0, 1), (0, 2**32), (1, 2**32), (2**63, 0), (2**64 - 1, 0)])
def test_seeds_are_independent(seed, other):
    assert_uncorrelated(draw([0], 4, 1 << 16, seed=seed), draw([0], 4, 1 << 16, seed=other))


def test_distant_indices_are_independent():
    x = torch.zeros(1, 1 << 18)
    first = rf.noisy_samples(x, 1.0, 1, first_sample=0).double().numpy()
    last = rf.noisy_samples(x, 1.0, 1, first_sample=2**32 - 1).double().numpy()
    image = rf.noisy_samples(x, 1.0, 1, image_ids=torch.tensor([2**32 - 1])).double().numpy()
    assert_uncorrelated(first, last)
    assert_uncorrelated(first, image)
    assert_uncorrelated(last, image)

"""`noisy_samples`: checks, public function, kernels, derivatives. Definition: reference/."""

from __future__ import annotations

import torch

from robattr_fast import backends
from robattr_fast.ops import _check, _vmap
from robattr_fast.ops._register import register
from robattr_fast.reference.noisy_samples import noisy_samples as definition


def noisy_samples(
    x: torch.Tensor,
    sigma: float,
    num_samples: int,
    *,
    seed: int = 0,
    first_sample: int = 0,
    image_ids: torch.Tensor | None = None,
    sample_offset: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    fast: bool = False,
) -> torch.Tensor:
    """x + sigma * z for ``num_samples`` draws of Gaussian noise that depends only on (seed, image, sample, element).

    Args:
        x: [B, *S], float32, float64, bfloat16 or float16.
        sigma: standard deviation of the noise, in the units of x, > 0.
        num_samples: draws per image; first_sample + num_samples <= 2^32.
        seed: 0 <= seed < 2^64.
        first_sample: index of the first draw.
        image_ids: int64 [B] in [0, 2^32); default arange(B).
        sample_offset: int64 [1], or [B] for an offset of each image, on x's device, added to first_sample. Kernels of a
            CUDA device read it there, so that a captured graph can be replayed for other samples; nobody checks the sum
            then: it wraps at 2^32.
        dtype: of the result; default x.dtype.
        channels_last: each [num_samples, C, H, W] slice becomes channels-last contiguous; x must be [B, C, H, W].
        fast: z may be nearly the stream's, where that is faster: the triton backend then takes the GPU's own logarithm,
            square root, sine and cosine, the others give the stream itself. Nobody promises the bits, so what `certify`
            and `smoothgrad` draw is never this.

    Returns:
        [B, num_samples, *S]. The same bits from every backend, batch size and split of the samples, unless fast.
        Differentiable in x (to every order, in reverse and forward mode; the gradient is the sum over samples), not in
        sigma. Under torch.vmap every entry of the batch has the noise that it would have by itself.

    Raises:
        TypeError, ValueError: an argument outside of what is named above.
    """
    _check.float_tensor("x", x, min_dim=2)
    _check.positive("sigma", sigma)
    num_samples = _check.integer("num_samples", num_samples, 1, _check.INDEX_END)
    first_sample = _check.integer("first_sample", first_sample, 0, _check.INDEX_END - num_samples)
    if dtype is not None and dtype not in _check.FLOAT_DTYPES:
        raise TypeError(f"dtype: got {dtype}, takes float32, float64, bfloat16, float16 or None")
    if channels_last and x.dim() != 4:
        raise ValueError(f"channels_last: got x of shape {tuple(x.shape)}, takes [B, C, H, W]")
    _check.image_ids(image_ids, x.shape[0])
    _check.sample_offset(sample_offset, x)
    return _operator(
        x,
        float(sigma),
        num_samples,
        _check.seed(seed),
        first_sample,
        image_ids,
        sample_offset,
        dtype,
        channels_last,
        fast,
    )


def _fake(x, sigma, num_samples, seed, first_sample, image_ids, sample_offset, dtype, channels_last, fast):
    if not channels_last:
        return x.new_empty((x.shape[0], num_samples, *x.shape[1:]), dtype=dtype or x.dtype)
    batch, channels, height, width = x.shape
    return x.new_empty((batch, num_samples, height, width, channels), dtype=dtype or x.dtype).permute(0, 1, 4, 2, 3)


def _prepare(x, sigma, num_samples, seed, first_sample, image_ids, sample_offset, *rest):
    _check.sample_indices(first_sample, sample_offset, num_samples)
    return x, sigma, num_samples, seed, first_sample, _check.given_image_ids(image_ids, x), sample_offset, *rest


def fill(
    out: torch.Tensor,
    x: torch.Tensor,
    sigma: float,
    *,
    seed: int,
    first_sample: int,
    image_ids: torch.Tensor,
    sample_offset: torch.Tensor | None = None,
    fast: bool = False,
) -> None:
    """Write the noisy samples of x into ``out`` [B, num_samples, *S], whose strides are those of a result.

    For loops that reuse one buffer and must not wait for the device: nothing is checked. ``seed`` in two's complement;
    image_ids int64 [B] in [0, 2^32), on x's device.
    """
    noise = sigma, out.shape[1], seed, first_sample, image_ids, sample_offset
    backends.call("noisy_samples", x, *noise, out.dtype, False, fast, out=out)


def by_first_sample(first_sample: int, sample_offset: torch.Tensor | None) -> list[tuple[slice, int]]:
    """Images that share their first sample, and that sample: all of them, or each by itself. Reads the offset."""
    if sample_offset is None:
        return [(slice(None), first_sample)]
    firsts = [first_sample + offset for offset in sample_offset.tolist()]
    if len(firsts) == 1:
        return [(slice(None), firsts[0])]
    return [(slice(image, image + 1), first) for image, first in enumerate(firsts)]


def _define(x, sigma, num_samples, seed, first_sample, image_ids, sample_offset, dtype, channels_last, fast):
    drawn = [
        definition(
            x[images],
            sigma,
            num_samples,
            seed=seed % 2**64,
            first_sample=first,
            image_ids=image_ids[images],
            dtype=dtype,
        )
        for images, first in by_first_sample(first_sample, sample_offset)
    ]
    return torch.cat(drawn)


def _cpu(x, sigma, num_samples, seed, first_sample, image_ids, sample_offset, dtype, channels_last, fast, *, out):
    x = x.contiguous()
    for images, first in by_first_sample(first_sample, sample_offset):
        torch.ops.robattr_fast_C.noisy_samples(out[images], x[images], sigma, seed, first, image_ids[images])


def _triton(x, sigma, num_samples, seed, first_sample, image_ids, sample_offset, dtype, channels_last, fast, *, out):
    from robattr_fast.kernels.noisy_samples import noisy_samples as launch

    launch(x, out, sigma, seed, first_sample, image_ids, sample_offset, fast)


def _setup(ctx, inputs, output):
    ctx.x_dtype, ctx.dtype, ctx.num_samples = inputs[0].dtype, output.dtype, inputs[2]


def _backward(ctx, grad):
    return grad.sum(dim=1).to(ctx.x_dtype)


def _jvp(ctx, tangent, *_):
    return tangent.to(ctx.dtype)[:, None].expand(-1, ctx.num_samples, *tangent.shape[1:])


def _of_each(info, in_dims, x, sigma, num_samples, seed, first_sample, image_ids, sample_offset, *rest):
    """The ids of images and offsets of samples that an entry of the batch would have by itself."""
    batch = x.shape[0 if in_dims[0] is None or in_dims[0] > 0 else 1]
    dims = list(in_dims)
    if image_ids is None:
        image_ids = torch.arange(batch, device=x.device)
    if sample_offset is not None:
        offset = sample_offset if dims[6] is None else sample_offset.movedim(dims[6], 0)
        sample_offset, dims[6] = offset.expand(*offset.shape[:-1], batch), None if dims[6] is None else 0
    return (x, sigma, num_samples, seed, first_sample, image_ids, sample_offset, *rest), dims


_operator = register(
    "noisy_samples",
    _define,
    fake=_fake,
    prepare=_prepare,
    cpu=_cpu,
    triton=_triton,
    setup=_setup,
    backward=_backward,
    jvp=_jvp,
    vmap=_vmap.folded("noisy_samples", _of_each),
)

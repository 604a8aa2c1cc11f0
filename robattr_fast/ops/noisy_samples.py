"""`noisy_samples`: checks, public function, fake kernel, autograd, choice of backend. Definition: reference/."""

from __future__ import annotations

import torch

from robattr_fast import _extension, backends
from robattr_fast.ops import _check, _schema
from robattr_fast.reference.noisy_samples import noisy_samples as _reference


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
        Differentiable in x (to every order; the gradient is the sum over samples), not in sigma.

    Raises:
        TypeError, ValueError: an argument outside of what is named above.
    """
    _check.float_tensor("x", x, min_dim=2)
    _check.positive("sigma", sigma)
    _check.integer("num_samples", num_samples, 1, _check.INDEX_END)
    _check.integer("first_sample", first_sample, 0, _check.INDEX_END - num_samples)
    if dtype is not None and dtype not in _check.FLOAT_DTYPES:
        raise TypeError(f"dtype: got {dtype}, takes float32, float64, bfloat16, float16 or None")
    if channels_last and x.dim() != 4:
        raise ValueError(f"channels_last: got x of shape {tuple(x.shape)}, takes [B, C, H, W]")
    _check.image_ids(image_ids, x.shape[0])
    _check.sample_offset(sample_offset, x)
    return torch.ops.robattr_fast.noisy_samples(
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


def _empty_result(x, num_samples, dtype, channels_last):
    if not channels_last:
        return x.new_empty((x.shape[0], num_samples, *x.shape[1:]), dtype=dtype or x.dtype)
    batch, channels, height, width = x.shape
    return x.new_empty((batch, num_samples, height, width, channels), dtype=dtype or x.dtype).permute(0, 1, 4, 2, 3)


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
    """Write the noisy samples of x into ``out`` [B, num_samples, *S], whose strides are those of `_empty_result`.

    For loops that reuse one buffer and must not wait for the device: nothing is checked. ``seed`` in two's complement;
    image_ids int64 [B] in [0, 2^32), on x's device.
    """
    backends.call("noisy_samples", x, out, sigma, seed, first_sample, image_ids, sample_offset, fast)


def _run(x, sigma, num_samples, seed, first_sample, image_ids, sample_offset, dtype, channels_last, fast=False):
    image_ids = _check.given_image_ids(image_ids, x)
    _check.sample_indices(first_sample, sample_offset, num_samples)
    out = _empty_result(x, num_samples, dtype, channels_last)
    fill(
        out,
        x,
        sigma,
        seed=seed,
        first_sample=first_sample,
        image_ids=image_ids,
        sample_offset=sample_offset,
        fast=fast,
    )
    return out


def by_first_sample(first_sample: int, sample_offset: torch.Tensor | None) -> list[tuple[slice, int]]:
    """Images that share their first sample, and that sample: all of them, or each by itself. Reads the offset."""
    if sample_offset is None:
        return [(slice(None), first_sample)]
    firsts = [first_sample + offset for offset in sample_offset.tolist()]
    if len(firsts) == 1:
        return [(slice(None), firsts[0])]
    return [(slice(image, image + 1), first) for image, first in enumerate(firsts)]


def _run_reference(x, out, sigma, seed, first_sample, image_ids, sample_offset, fast):
    for images, first in by_first_sample(first_sample, sample_offset):
        out[images] = _reference(
            x[images],
            sigma,
            out.shape[1],
            seed=seed % 2**64,
            first_sample=first,
            image_ids=image_ids[images],
            dtype=out.dtype,
        )


def _run_cpu(x, out, sigma, seed, first_sample, image_ids, sample_offset, fast):
    x = x.contiguous()
    for images, first in by_first_sample(first_sample, sample_offset):
        torch.ops.robattr_fast_C.noisy_samples(out[images], x[images], sigma, seed, first, image_ids[images])


def _run_triton(x, out, sigma, seed, first_sample, image_ids, sample_offset, fast):
    from robattr_fast.kernels.noisy_samples import noisy_samples as launch

    launch(x, out, sigma, seed, first_sample, image_ids, sample_offset, fast)


backends.register("noisy_samples", "triton", _run_triton, _extension.can_run_triton)
backends.register("noisy_samples", "reference", _run_reference, _extension.can_run_anywhere)
backends.register("noisy_samples", "cpu", _run_cpu, _extension.can_run_cpu)
_schema.PUBLIC.impl("noisy_samples", _run, "CPU")
_schema.PUBLIC.impl("noisy_samples", _run, "CUDA")


@torch.library.register_fake("robattr_fast::noisy_samples", lib=_schema.PUBLIC)
def _fake(x, sigma, num_samples, seed, first_sample, image_ids, sample_offset, dtype, channels_last, fast=False):
    return _empty_result(x, num_samples, dtype, channels_last)


def _setup_context(ctx, inputs, output):
    ctx.x_dtype = inputs[0].dtype


def _backward(ctx, grad):
    return grad.sum(dim=1).to(ctx.x_dtype), *[None] * 9


torch.library.register_autograd(
    "robattr_fast::noisy_samples", _backward, setup_context=_setup_context, lib=_schema.PUBLIC
)

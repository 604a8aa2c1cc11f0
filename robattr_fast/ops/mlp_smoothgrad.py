"""`mlp_smoothgrad`: checks, public function, kernels. Definition: reference/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from robattr_fast import backends
from robattr_fast.ops import _check, _vmap
from robattr_fast.ops._register import register
from robattr_fast.ops.count_sparsified import check_overflow
from robattr_fast.ops.noisy_samples import by_first_sample
from robattr_fast.reference._select import selected
from robattr_fast.reference.mlp_smoothgrad import ACTIVATIONS
from robattr_fast.reference.mlp_smoothgrad import mlp_smoothgrad as definition

MAX_LAYERS = 3
MAX_WIDTH = 256  # outputs of a layer
MAX_INPUTS = 16384  # what selection holds in the registers of one program


class Layers(NamedTuple):
    """Linear, activation, ..., Linear: contiguous float32 [outputs, inputs] and [outputs]."""

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    activation: str


class Noise(NamedTuple):
    """Which noise, as for `noisy_samples`; ``seed`` in two's complement, ``image_ids`` on x's device."""

    sigma: float
    num_samples: int
    seed: int
    first_sample: int
    image_ids: torch.Tensor
    sample_offset: torch.Tensor | None = None


def mlp_smoothgrad(
    counts: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    sigma: float,
    num_samples: int,
    tau: float,
    gamma: float | None = None,
    *,
    activation: str = "relu",
    target: torch.Tensor | None = None,
    seed: int = 0,
    first_sample: int = 0,
    image_ids: torch.Tensor | None = None,
    sample_offset: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add the sparsified input gradients of noisy copies of ``x`` under a small perceptron to ``counts``.

    The same as `noisy_samples`, the sizes |d f_c / d z| of the gradients of Linear, activation, ..., Linear, and
    `count_sparsified_`; noisy copies and what the layers give stay on the chip. Products and sums are of float32.
    Detached.

    Args:
        counts: int32 [B, n, L], contiguous, changed in place, as for `count_sparsified_`.
        x: float32 [B, *S], n <= 16384 elements each.
        weights, biases: float32 [outputs, inputs] and [outputs] of one to three layers of at most 256 outputs; the
            first has n inputs, the last gives the logits.
        sigma, num_samples, seed, first_sample, image_ids, sample_offset: which noise, as for `noisy_samples`.
        tau, gamma: as for `sparsify`.
        activation: between layers: "relu", "tanh", "gelu" (exact), "silu", "softplus" or "elu", as torch.nn has them
            by default, with the derivatives of torch.
        target: int64 [B], the class c to explain; None: the largest logit of each noisy sample.
        packed: uint8 [B, num_samples, row_bytes], as for `count_sparsified_`.

    Returns:
        int64 [B, num_samples]: the class of the largest logit of each sample, whatever the target; -1 for an invalid
        sample (a logit or a gradient that is NaN or infinite), which changes no count.

    Raises:
        TypeError, ValueError: an argument outside of what is named above. NotImplementedError: under torch.vmap.
    """
    _check.float_tensor("x", x, min_dim=2)
    _check_float32("x", x, x.device)
    batch, n = x.shape[0], x[0].numel()
    _check.integer("elements of an image of x", n, 1, MAX_INPUTS)
    sigma = _check.positive("sigma", sigma)
    num_samples = _check.integer("num_samples", num_samples, 1, 2**31 - 1)
    first_sample = _check.integer("first_sample", first_sample, 0, _check.INDEX_END - num_samples)
    tau, gamma = _check.fractions(tau, gamma)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, takes one of {', '.join(ACTIVATIONS)}")
    _check_layers(weights, biases, n, x.device)
    _check.image_ids(image_ids, batch)
    _check.sample_offset(sample_offset, x)
    if target is not None and (target.dtype != torch.int64 or target.shape != (batch,)):
        raise ValueError(f"target: got {target.dtype} {tuple(target.shape)}, takes int64 {(batch,)}")
    _check.counts(counts, packed, batch, num_samples, n, x.device)
    return _operator(
        counts,
        x.detach(),
        [weight.detach() for weight in weights],
        [bias.detach() for bias in biases],
        sigma,
        num_samples,
        tau,
        gamma,
        activation,
        target,
        _check.seed(seed),
        first_sample,
        image_ids,
        sample_offset,
        packed,
    )


def _check_float32(name, tensor, device):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, takes a tensor")
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, takes float32: its kernels compute in nothing else")
    if tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}, takes that of x, {device}")


def _check_layers(weights, biases, n, device):
    if not 1 <= len(weights) <= MAX_LAYERS:
        raise ValueError(f"weights: got {len(weights)} layers, takes 1 to {MAX_LAYERS}")
    if len(biases) != len(weights):
        raise ValueError(f"biases: got {len(biases)}, takes one for each of {len(weights)} layers")
    inputs = n
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        _check_float32(f"weights[{index}]", weight, device)
        _check_float32(f"biases[{index}]", bias, device)
        if weight.dim() != 2 or weight.shape[1] != inputs:
            raise ValueError(f"weights[{index}]: got shape {tuple(weight.shape)}, takes [outputs, {inputs}]")
        _check.integer(f"weights[{index}].shape[0]", weight.shape[0], 1, MAX_WIDTH)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"biases[{index}]: got shape {tuple(bias.shape)}, takes {tuple(weight.shape[:1])}")
        inputs = weight.shape[0]


def add(
    counts: torch.Tensor,
    x: torch.Tensor,
    layers: Layers,
    noise: Noise,
    target: torch.Tensor | None,
    tau: float,
    gamma: float,
    packed: torch.Tensor | None,
) -> torch.Tensor:
    """`mlp_smoothgrad` for loops that must not wait for the device: nothing is checked. x [B, n], contiguous."""
    sigma, num_samples, *stream = noise
    classes = x.new_empty((x.shape[0], num_samples), dtype=torch.int64)
    of_layers = layers.weights, layers.biases
    rest = sigma, num_samples, tau, gamma, layers.activation, target, *stream, packed
    backends.call("mlp_smoothgrad", counts, x, *of_layers, *rest, out=classes)
    return classes


def _fake(counts, x, weights, biases, sigma, num_samples, *_):
    return x.new_empty((x.shape[0], num_samples), dtype=torch.int64)


def _prepare(
    counts, x, weights, biases, sigma, num_samples, tau, gamma, activation, target, seed, first, ids, offset, packed
):
    classes = weights[-1].shape[0]
    if target is not None:
        if not bool(((target >= 0) & (target < classes)).all()):
            raise ValueError(f"target: got {target.tolist()}, takes classes in [0, {classes})")
        target = target.to(x.device).contiguous()
    _check.sample_indices(first, offset, num_samples)
    weights, biases = [weight.contiguous() for weight in weights], [bias.contiguous() for bias in biases]
    ids, rows = _check.given_image_ids(ids, x), x.flatten(1).contiguous()
    rest = sigma, num_samples, tau, gamma, activation, target, seed, first, ids, offset, packed
    return counts, rows, weights, biases, *rest


def _define(
    counts,
    x,
    weights,
    biases,
    sigma,
    num_samples,
    tau,
    gamma,
    activation,
    target,
    seed,
    first_sample,
    image_ids,
    sample_offset,
    packed,
):
    classes = []
    for images, first in by_first_sample(first_sample, sample_offset):
        classes.append(
            definition(
                counts[images],
                x[images],
                weights,
                biases,
                sigma,
                num_samples,
                tau,
                gamma,
                activation=activation,
                target=None if target is None else target[images],
                seed=seed % 2**64,
                first_sample=first,
                image_ids=image_ids[images],
                packed=None if packed is None else packed[images],
            )
        )
    check_overflow(bool((counts < 0).any()))
    return torch.cat(classes)


def _triton(
    counts,
    x,
    weights,
    biases,
    sigma,
    num_samples,
    tau,
    gamma,
    activation,
    target,
    *rest,
    out,
):
    from robattr_fast.kernels.count_sparsified import count_sparsified as count
    from robattr_fast.kernels.mlp_smoothgrad import gradient_sizes

    seed, first, ids, offset, packed = rest
    scores, classes = gradient_sizes(
        x, weights, biases, activation, sigma, num_samples, seed, first, ids, offset, target
    )
    n = x.shape[1]
    nonfinite = count(counts, scores, selected(tau, n), selected(gamma, n), packed)
    out.copy_(classes.masked_fill_(nonfinite, -1))
    # Elsewhere the host would have to wait for the device.
    check_overflow(counts.device.type == "cpu" and bool((counts < 0).any()))


_operator = register(
    "mlp_smoothgrad", _define, fake=_fake, prepare=_prepare, triton=_triton, vmap=_vmap.refused("mlp_smoothgrad")
)

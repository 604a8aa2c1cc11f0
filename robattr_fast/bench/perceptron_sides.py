"""Sides and gate of small perceptrons: noise, gradients, selection and counts of one batch; a unit is one sample.

spec: model (a name of `job_sides`), device, samples per batch.

This file is run beside any commit of the package: it takes public names alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import robattr_fast as rf

# Of this folder, and not of the package that is measured.
from .job_sides import model_and_image, published_batch
from .operator_sides import SIGMA, TAU, Side, Spec, timed


def _layers(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [one.weight.detach() for one in linear], [one.bias.detach() for one in linear]


def _ours(spec: Spec) -> Side:
    model, x = model_and_image(spec)
    weights, biases = _layers(model)
    samples, calls = spec["samples"], 0
    counts = torch.zeros(1, x.numel(), 1, dtype=torch.int32, device=x.device)

    def add() -> None:
        rf.mlp_smoothgrad(counts, x, weights, biases, SIGMA, samples, TAU, first_sample=calls * samples)

    def round() -> dict[str, Any]:
        nonlocal calls
        calls += 1
        return timed(add, samples, x.device)

    round()
    return round


def _repeated(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """``work`` as a CUDA graph where the device has such: eager PyTorch without its launches."""
    work()
    if device.type != "cuda":
        return work
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _captured(spec: Spec) -> Side:
    """A batch of the published code."""
    model, x = model_and_image(spec)
    model.requires_grad_(False)
    sums = torch.zeros(x.numel(), device=x.device)
    work = partial(published_batch, model, x, spec["samples"], int(TAU * x.numel()), sums)
    replay = _repeated(work, x.device)
    return lambda: timed(replay, spec["samples"], x.device)


def _gate(spec: Spec) -> str:
    """Weights of small integers: gradients are exact whatever the rounding, and so are counts."""
    model, x = model_and_image(spec)
    weights, biases = _layers(model)
    generator = torch.Generator().manual_seed(17)
    for weight in weights:
        weight.copy_(torch.randint(-2, 3, weight.shape, generator=generator))
    ours, known = (torch.zeros(1, x.numel(), 1, dtype=torch.int32, device=x.device) for _ in range(2))
    for count, counts in ((rf.mlp_smoothgrad, ours), (rf.reference.mlp_smoothgrad, known)):
        count(counts, x, weights, biases, SIGMA, 70, TAU, seed=5)
    wrong = int((ours != known).sum())
    return f"mlp_smoothgrad: {wrong} of {x.numel()} counters are not the definition's" if wrong else ""


SIDES: dict[str, Callable[[Spec], Side]] = {"mlp.ours": _ours, "mlp.captured": _captured}

GATES: dict[str, Callable[[Spec], str]] = {"mlp": _gate}

"""What a step of an attack costs: against the passes it cannot do without, and against a published loop.

    OMP_NUM_THREADS=1 python benchmarks/attack_steps.py

CPU seconds per step: the difference between a long and a short attack, so that nothing of the preparation counts. The
published loop (Levine, Singla, Feizi 2019, EnhancedGhorbaniSingleSampleL2Attacker) is
written out below, on a CPU and without its prints: fresh torch.randn noise, one graph of all samples, parameters that
require gradients, one label check per step. Both attack one image of a network with softplus.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from robattr_fast import attacks


class Block(nn.Module):
    """A residual block of ResNet-18 for 32 x 32 images."""

    def __init__(self, width: int, out: int, stride: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = stride == 1 and width == out
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(width, out, 1, stride), nn.BatchNorm2d(out))
        self.act1, self.act2 = act(), act()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(z + self.short(x))


def resnet(width: int, act: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), act()]
    before = width
    for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Block(before, out, stride, act), Block(out, out, 1, act)]
        before = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)).eval()


def double_backward(model: nn.Module, x: torch.Tensor, target: torch.Tensor, k: int) -> None:
    """One pass that gives the map, and the derivative of its top's share."""
    leaf = x.detach().requires_grad_()
    score = model(leaf).gather(1, target[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, leaf, create_graph=True)
    size = gradient.abs().flatten(1)
    torch.autograd.grad((size[:, :k].sum(1) / size.sum(1)).sum(), leaf)


def published(model: nn.Module, x: torch.Tensor, sigma: float, q: int, eps: float, k: int, steps: int) -> None:
    """The inner loop of one restart for one image x [1, *S]."""

    def explain(point: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(q, *point.shape[1:]) * sigma
        top, _ = model(noise + point[0]).max(1)
        return torch.autograd.grad(top.sum(), point, create_graph=True)[0] / q

    label = model(x).argmax(1)
    mask = torch.zeros(1, x[0].numel())
    mask[:, :k] = 1
    current, best, step = x.clone(), torch.inf, None
    for _ in range(steps):
        leaf = current.detach().requires_grad_()
        size = explain(leaf).abs().reshape(1, -1)
        value = (size / size.sum() * mask).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
        best = min(best, float(value.detach()))
        step = eps / gradient.norm() if step is None else step
        delta = current - step * gradient - x
        current = (x + delta * (eps / delta.norm()).clamp(max=1)).clamp(0, 1)
        while model(current).argmax(1) != label:
            step = step / 2
            delta = current - step * gradient - x
            current = (x + delta * (eps / delta.norm()).clamp(max=1)).clamp(0, 1)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def ratios(name: str, ours: Callable[[int], object], theirs: Callable[[int], object], steps: int, rounds: int) -> None:
    """Median and quartiles of theirs / ours per step, each round by itself."""
    found = []
    for _ in range(rounds):
        mine, other = (seconds(lambda w=work: w(steps + 1)) - seconds(lambda w=work: w(1)) for work in (ours, theirs))
        found.append((mine / steps, other / steps))
    low, middle, high = statistics.quantiles([other / mine for mine, other in found], n=4)
    mine, other = (statistics.median(part) for part in zip(*found, strict=True))
    print(f"{name}: ours {1e3 * mine:.1f} ms, theirs {1e3 * other:.1f} ms")
    print(f"    theirs / ours: {middle:.3f}, quartiles {low:.3f} to {high:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16, help="of the first stage of ResNet-18; published: 64")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args()
    k = 768
    x = torch.rand(options.rows, 3, 32, 32)

    smooth = resnet(options.width, nn.Softplus)
    frozen = resnet(options.width, nn.Softplus).requires_grad_(False)
    target = frozen(x).argmax(1)

    def attack(steps: int) -> None:
        attacks.AttributionPGD(
            smooth, "gradient", attacks.TopK(k), eps=0.5, steps=steps, restarts=1, batch_size=options.rows
        ).run(x)

    ratios(
        "gradient map: step of the attack against its double-backward pass",
        attack,
        lambda steps: [double_backward(frozen, x, target, k) for _ in range(steps)],
        options.steps,
        options.rounds,
    )
    noise = {"sigma": 0.2, "samples": options.samples}

    def smoothed(steps: int) -> None:
        attacks.AttributionPGD(
            smooth, "smoothgrad", attacks.TopK(k), explain_options=noise, eps=0.5, steps=steps, restarts=1
        ).run(x[:1])

    ratios(
        f"SmoothGrad map, q = {options.samples}: step against the published loop",
        smoothed,
        lambda steps: published(smooth, x[:1], 0.2, options.samples, 0.5, k, steps),
        options.steps,
        options.rounds,
    )


if __name__ == "__main__":
    main()

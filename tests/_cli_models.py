"""Models that the tests of the command line name by spec."""

import os
import signal

import torch
from torch import nn


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


def other():
    model = tiny()
    with torch.no_grad():
        model[0].bias.add_(0.01)
    return model


class _Counting(nn.Module):
    """Does something at a given forward pass of the process."""

    passes = 0

    def __init__(self, at, act):
        super().__init__()
        self.model, self.at, self.act = tiny(), at, act

    def forward(self, x):
        _Counting.passes += 1
        if _Counting.passes == self.at:
            self.act()
        return self.model(x)

    def extra_repr(self):
        return "counting"


def _signals(number):
    _Counting.passes = 0
    return _Counting(10, lambda: os.kill(os.getpid(), number)).eval()


def terminated():
    return _signals(signal.SIGTERM)


def interrupted():
    return _signals(signal.SIGINT)


def counting():
    """Like `terminated`, but nothing happens."""
    _Counting.passes = 0
    return _Counting(10, lambda: None).eval()


def passes():
    return _Counting.passes


def fixed_size():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 10, 5)).eval()


class _Roughness(nn.Module):
    """Class 1 where neighbours differ."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 120).view(10, 12))

    def forward(self, x):
        rough = (self.weight[:, 1:] * (x[:, 0, :, 1:] - x[:, 0, :, :-1]).abs()).mean((1, 2))
        return torch.stack([0.05 + 0 * rough, rough], 1)


def roughness():
    return _Roughness().eval()

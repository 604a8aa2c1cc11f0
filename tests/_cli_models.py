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


class _Surrounded(nn.Module):
    """Does something else by what is around the process: nothing that it is made of tells."""

    def __init__(self):
        super().__init__()
        self.model = tiny()

    def forward(self, x):
        return self.model(x) * float(os.environ.get("ROBATTR_FAST_TEST_FACTOR", "1"))


def surrounded():
    return _Surrounded().eval()


_SIGNAL = "ROBATTR_FAST_TEST_SIGNAL"
"""Environment variable: the model is the same one with and without a signal."""


class _Counting(nn.Module):
    """Sends a signal to its process at a given forward pass."""

    passes = 0

    def __init__(self):
        super().__init__()
        self.model = tiny()

    def forward(self, x):
        _Counting.passes += 1
        if _Counting.passes == 12 and (number := os.environ.get("ROBATTR_FAST_TEST_SIGNAL")):
            os.kill(os.getpid(), int(number))
        return self.model(x)


def _signals(number):
    _Counting.passes = 0
    os.environ[_SIGNAL] = str(int(number))
    return _Counting().eval()


def terminated():
    return _signals(signal.SIGTERM)


def interrupted():
    return _signals(signal.SIGINT)


def counting():
    """Like `terminated`, but nothing happens."""
    _Counting.passes = 0
    os.environ.pop(_SIGNAL, None)
    return _Counting().eval()


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

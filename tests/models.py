"""Small models that tests explain."""

import torch
from torch import nn


class Elementwise(nn.Module):
    """Two logits whose gradients are made element by element: the same bits at every batch size.

    d f_0 / d z = w (1 - tanh(z)^2), d f_1 / d z = -2 w z.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.1, 1.0, torch.Size(shape).numel()).reshape(shape))

    def forward(self, z):
        features = torch.stack([self.weight * z.tanh(), self.weight * (0.3 - z**2)], dim=1)
        return features.flatten(2).sum(dim=2)


def small_cnn(channels: int = 1, size: int = 12, classes: int = 4) -> nn.Module:
    """A convolution, a nonlinearity, a linear layer; seeded."""
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(6 * (size - 2) ** 2, classes),
    ).eval()


def cnn_of_photographs() -> nn.Module:
    """Photographs of any size to four classes: a convolution, an average, a linear layer; seeded."""
    torch.manual_seed(7)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    return nn.Sequential(*layers).eval()

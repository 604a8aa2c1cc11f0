"""BatchNorm folding: where it applies, where it must not, and that the user's model stays as it is."""

import logging

import pytest
import torch
from models import small_cnn
from torch import nn

from robattr_fast.model import input_gradient, private_copy
from robattr_fast.model.folding import fold_batchnorm

pytestmark = pytest.mark.once


def with_statistics(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            for parameter in module.parameters():
                nn.init.normal_(parameter)
    return model.eval()


class SelfPadding(nn.Conv2d):
    def forward(self, z):
        return self._conv_forward(nn.functional.pad(z, (1, 1, 1, 1)), self.weight, self.bias)


class TwoConsumers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(300, 2)

    def forward(self, z):
        features = self.conv(z)
        return self.head((self.norm(features) + features).flatten(1))


class Branches(nn.Module):
    """Control flow on values: fx cannot trace it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(300, 2)

    def forward(self, z):
        features = self.norm(self.conv(z))
        return self.head(features.flatten(1) * (2 if features.sum() > 0 else 3))


FOLDABLE = [
    small_cnn(),
    nn.Sequential(SelfPadding(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU6(), nn.Flatten(), nn.Linear(432, 2)),
    nn.Sequential(nn.Flatten(), nn.Linear(144, 9, bias=False), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 2)),
    nn.Sequential(
        nn.Conv2d(1, 4, 3, groups=1, bias=False), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(400, 2)
    ),
]


@pytest.mark.parametrize("model", FOLDABLE)
def test_folding_keeps_the_function(model):
    model = with_statistics(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = private_copy(model)
    z = torch.randn(8, 1, 12, 12)
    folded, done = fold_batchnorm(copy, z)
    assert done
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    for ours, theirs in zip(input_gradient(folded, z, None), input_gradient(model, z, None), strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in folded.parameters())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (TwoConsumers(), "none is the only consumer"),
        (Branches(), "cannot be traced"),
        (nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(144, 2)), "none is the only consumer"),
    ],
)
def test_what_cannot_be_folded_says_why(model, reason, caplog):
    copy = private_copy(with_statistics(model))
    with caplog.at_level(logging.INFO, logger="robattr_fast"):
        same, done = fold_batchnorm(copy, torch.randn(4, 1, 12, 12))
    assert same is copy
    assert not done
    assert reason in caplog.text


def test_a_fold_that_changes_the_result_is_undone(caplog):
    class ReadsItsWeight(nn.Module):
        """Uses the convolution's weight a second time, behind the tracer's back."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(300, 2)

        def forward(self, z):
            return self.head(self.norm(self.conv(z)).flatten(1)) * self.conv.weight.sum()

    copy = private_copy(with_statistics(ReadsItsWeight()))
    with caplog.at_level(logging.WARNING, logger="robattr_fast"):
        same, done = fold_batchnorm(copy, torch.randn(4, 1, 12, 12))
    assert same is copy
    assert not done
    assert "it changes the result by" in caplog.text


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(
            nn.Flatten(),
            nn.Unflatten(1, (3, 48)),
            nn.Linear(48, 9),
            nn.BatchNorm1d(3),
            nn.Flatten(),
            nn.Linear(27, 2),
        ),
        nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 3, 3)),
            nn.BatchNorm2d(3),
            nn.Flatten(),
            nn.Linear(300, 2),
        ),
    ],
)
def test_layers_that_cannot_be_fused_are_left_alone(model):
    """A norm over another dimension than the layer's output, and a weight that is computed."""
    copy = private_copy(with_statistics(model))
    same, done = fold_batchnorm(copy, torch.randn(4, 1, 12, 12))
    assert same is copy
    assert not done

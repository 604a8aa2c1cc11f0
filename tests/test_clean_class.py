"""Whose class a certificate is about: the image's own, as the model says, or that of its noisy copies."""

import logging

import pytest
import torch
from torch import nn

import robattr_fast as rf
from robattr_fast.errors import ModelError
from robattr_fast.metrics.overlap import set_size


class Rough(nn.Module):
    """Class 0 for smooth images, class 1 where neighbours differ: any noise makes it 1."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, 64).view(8, 8))

    def forward(self, x):
        rough = (self.w[:, 1:] * (x[:, 0, :, 1:] - x[:, 0, :, :-1]).abs()).mean((1, 2))
        flat = 0.05 + 0.001 * (self.w * x[:, 0]).mean((1, 2))
        return torch.stack([flat, rough], 1)


SMOOTH = torch.full((1, 1, 8, 8), 0.5)
RUGGED = (torch.arange(8) % 2).float().expand(1, 1, 8, 8).contiguous()
BOTH = torch.cat([SMOOTH, RUGGED])
OPTIONS = {"sigma": 0.2, "samples": 64, "batch_size": 32}


def test_the_class_of_the_image_is_recorded_and_a_difference_is_logged(caplog, tmp_path):
    model = Rough().eval()
    with caplog.at_level(logging.WARNING, "robattr_fast"):
        cert = rf.certify(model, BOTH, **OPTIONS)
    assert cert.clean_class.tolist() == model(BOTH).argmax(1).tolist() == [0, 1]
    torch.testing.assert_close(cert.clean_score, model(BOTH).double().softmax(1).amax(1))
    assert cert.agreement.tolist() == (cert.class_counts[[0, 1], [0, 1]] / 64).tolist()
    assert cert.agreement[0] < 0.5 < cert.agreement[1]
    first, second = cert.disagreements(["flat", "rough"])
    assert "the model says class 0 (flat), most noisy copies class 1 (rough)" in first
    assert second is None
    assert caplog.text.count("the model says class 0") == 1
    assert "agreement" in repr(cert)
    assert "agreement" not in repr(cert[1])
    cert.save(tmp_path / "c")
    again = rf.Certificate.load(tmp_path / "c")
    assert again.settings == cert.settings
    assert cert[1].clean_class.tolist() == [1]


def test_nothing_is_logged_where_they_agree(caplog):
    with caplog.at_level(logging.WARNING, "robattr_fast"):
        rf.certify(Rough().eval(), RUGGED, **OPTIONS)
    assert not caplog.records


def test_the_predicted_class_is_a_target():
    model = Rough().eval()
    told = rf.certify(model, BOTH, target="predicted", **OPTIONS)
    assert told.settings.target == (0, 1)
    assert torch.equal(told.counts, rf.certify(model, BOTH, target=[0, 1], **OPTIONS).counts)
    assert not torch.equal(told.counts[0], rf.certify(model, BOTH, **OPTIONS).counts[0])
    with pytest.raises(ValueError, match="predicted"):
        rf.certify(model, BOTH, target="best", **OPTIONS)


def test_no_class():
    class Nan(Rough):
        def forward(self, x):
            return super().forward(x) / (x[:, :1, 0, 0] != 0.5)  # infinite for the image itself

    cert = rf.certify(Nan().eval(), SMOOTH, **OPTIONS)
    assert cert.clean_class.tolist() == [-1]
    assert cert.agreement.tolist() == [0]
    assert "no finite logits" in cert.disagreements()[0]
    with pytest.raises(ModelError, match="not finite"):
        rf.certify(Nan().eval(), SMOOTH, target="predicted", **OPTIONS)


def test_parts_merge_and_keep_the_class():
    model = Rough().eval()
    parts = [rf.certify(model, RUGGED, first_sample=first, **OPTIONS) for first in (0, 64)]
    assert parts[0].merge(parts[1]).clean_class.tolist() == [1]


def test_a_checkpoint_without_the_class_goes_on(tmp_path):
    """As an older version wrote it."""
    from robattr_fast.certificates.certificate import files

    model, path = Rough().eval(), tmp_path / "run"
    whole = rf.certify(model, RUGGED, checkpoint=path, **OPTIONS)
    tensors, manifest = files.load(path)
    files.save(path, tensors, {key: value for key, value in manifest.items() if not key.startswith("clean")})
    again = rf.certify(model, RUGGED, checkpoint=path, **OPTIONS)
    assert torch.equal(again.counts, whole.counts)
    assert again.clean_class.tolist() == [1]


def test_suggest_weighs_agreement():
    model = Rough().eval()
    options = {"sigma": 0.2, "samples": 128, "pilot": 16, "taus": (0.1, 0.2), "gammas": (None,), "batch_size": 16}
    found = rf.suggest(model, BOTH, 0.2, 0.01, **options)
    assert found.k == 12
    candidate = found.candidates[0]
    assert candidate.agreement[0] < 0.5 < candidate.agreement[1]
    assert candidate.score[0] == pytest.approx(
        sum(a * o for a, o in zip(candidate.agreement, candidate.overlap, strict=True)) / sum(candidate.agreement)
    )
    assert "noisy copies have the class" in repr(rf.suggest(model, SMOOTH, 12, 0.01, **options))
    assert rf.suggest(model, BOTH, 12, 0.01, target=1, **options).candidates[0].agreement == (1.0, 1.0)
    assert rf.suggest(model, SMOOTH, 12, 0.01, target="predicted", **options).settings["target"] == "predicted"


def test_k_is_a_count_or_a_share():
    cert = rf.certify(Rough().eval(), RUGGED, stop=rf.StopWhen(0.2, 1e-6, 0.01), **OPTIONS)
    assert torch.equal(cert.overlap(0.2, [0.0, 0.05]).share, cert.overlap(12, [0.0, 0.05]).share)
    assert torch.equal(cert.radius(0.5, 0.5), cert.radius(32, 0.5))
    a, b = torch.rand(2, 1, 50)
    assert torch.equal(rf.overlap(a, b, 0.2), rf.overlap(a, b, 10))
    with pytest.raises(ValueError, match=r"stop\.k"):
        rf.certify(Rough().eval(), RUGGED, stop=rf.StopWhen(0.6, 0.1, 0.5), **OPTIONS)


@pytest.mark.parametrize(
    ("k", "size"), [(1, 1), (0.001, 1), (0.29, 29), (0.5, 50), (50, 50), (torch.tensor(0.2).numpy()[()], 20)]
)
def test_sizes(k, size):
    assert set_size(k, 100, 50) == size


@pytest.mark.parametrize(
    ("k", "error"),
    [
        (0, ValueError),
        (51, ValueError),
        (0.51, ValueError),
        (0.0, ValueError),
        (-0.2, ValueError),
        (float("nan"), ValueError),
        (1.0, TypeError),
        (20.0, TypeError),
        (True, TypeError),
        ("1", TypeError),
        (None, TypeError),
    ],
)
def test_no_sizes(k, error):
    with pytest.raises(error, match="k: got"):
        set_size(k, 100, 50)

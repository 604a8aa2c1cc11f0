"""`certify(autocast=)`: the model alone runs in the lower precision, by nothing around the call."""

import json
import signal

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import robattr_fast as rf
from robattr_fast.certificates.engine import run
from robattr_fast.certificates.verify.replay import replay
from robattr_fast.cli.app import app
from robattr_fast.model import perceptron
from robattr_fast.sampling import sampler as sampling

X = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
RUN = {"sigma": 0.3, "samples": 64, "batch_size": 8, "retain": 32}


class Witness(nn.Module):
    """A small network that notes the dtype of its first layer's output."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 5)
        self.seen = set()

    def __deepcopy__(self, memo):  # the private copy reports to the same set
        copy = Witness().requires_grad_(False).eval()
        copy.load_state_dict(self.state_dict())
        copy.seen = self.seen
        return copy

    def forward(self, x):
        h = self.first(x.flatten(1))
        self.seen.add(h.dtype)
        return self.last(torch.tanh(h))


def test_a_dtype_by_its_name_and_in_the_representation():
    model = Witness().eval()
    certificate = rf.certify(model, X, **RUN, autocast="bfloat16")
    assert model.seen == {torch.bfloat16}
    assert "autocast='bfloat16'" in repr(certificate)
    assert "autocast" not in repr(rf.certify(model, X, **RUN))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_model_runs_in_the_dtype_asked_for(dtype):
    model = Witness().eval()
    certificate = rf.certify(model, X, **RUN, autocast=dtype)
    assert model.seen == {dtype}
    assert certificate.settings.autocast == str(dtype).removeprefix("torch.")


def test_autocast_around_the_call_changes_nothing():
    model = Witness().eval()
    plain = rf.certify(model, X, **RUN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rf.certify(model, X, **RUN)
    assert model.seen == {torch.float32}
    assert torch.equal(inside.counts, plain.counts)
    assert inside.settings == plain.settings


def test_certificates_of_different_precision_are_of_different_maps(tmp_path):
    model = Witness().eval()
    half = rf.certify(model, X, **RUN, autocast=torch.bfloat16)
    half.save(tmp_path / "half.safetensors")
    half = rf.Certificate.load(tmp_path / "half.safetensors")
    other = rf.certify(model, X, **RUN, first_sample=64)
    with pytest.raises(rf.MergeError, match="autocast"):
        half.merge(other)
    assert replay(half, model, X[0]).faults == ()
    half.save(tmp_path / "run.checkpoint")
    with pytest.raises(ValueError, match=r"differs in.*autocast"):
        rf.certify(model, X, **RUN, checkpoint=tmp_path / "run.checkpoint")


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (X, torch.float32),
        (X, "fastest"),
        (X.double(), torch.bfloat16),
        (X.bfloat16(), torch.bfloat16),
        (X.double(), "auto"),
    ],
)
def test_other_dtypes_are_refused(x, dtype):
    with pytest.raises(ValueError, match=r"autocast: got .* for x of torch\.\w+, takes"):
        rf.certify(Witness().eval().to(x.dtype), x, **RUN, autocast=dtype)


@pytest.mark.parametrize("batch_size", [8, "auto"])
@pytest.mark.parametrize(("factor", "expected"), [(0.5, "bfloat16"), (0.95, None), (2.0, None)])
def test_a_measured_choice(monkeypatch, tmp_path, factor, expected, batch_size):
    monkeypatch.setattr(
        sampling.Sampler, "_seconds", lambda self, size, way: (5 + size) * (factor if way.autocast else 1)
    )
    arguments = RUN | {"batch_size": batch_size}
    certificate = rf.certify(Witness().eval(), X, **arguments, autocast="auto")
    assert certificate.settings.autocast == expected
    dtype = None if expected is None else torch.bfloat16
    arguments["batch_size"] = certificate.settings.batch_size
    same = rf.certify(Witness().eval(), X, **arguments, autocast=dtype)
    assert torch.equal(certificate.counts, same.counts)
    assert replay(certificate, Witness().eval(), X[0]).faults == ()
    # A run goes on with what it has chosen, whatever would be faster now.
    arguments |= {"samples": 64, "autocast": "auto", "checkpoint": tmp_path / "checkpoint"}
    with monkeypatch.context() as patch:
        patch.setattr(run, "REPORT_SECONDS", 0)
        with pytest.raises(rf.CertifyInterrupted):
            rf.certify(Witness().eval(), X, **arguments, progress=lambda event: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sampling.Sampler, "_seconds", lambda self, size, way: 1 / factor if way.autocast else 1)
    resumed = rf.certify(Witness().eval(), X, **arguments)
    assert resumed.settings.autocast == expected
    assert torch.equal(resumed.counts, same.counts)


def test_a_run_begun_in_bfloat16_is_not_continued_by_a_kernel_of_float32(monkeypatch, tmp_path):
    monkeypatch.setattr(sampling.Sampler, "_seconds", lambda self, size, way: 1 if way.autocast else 2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 5)).eval()
    arguments = RUN | {"autocast": "auto"}
    expected = rf.certify(model, X, **arguments)
    assert expected.settings.autocast == "bfloat16"
    arguments["checkpoint"] = tmp_path / "checkpoint"
    monkeypatch.setattr(run, "REPORT_SECONDS", 0)
    with pytest.raises(rf.CertifyInterrupted):
        rf.certify(model, X, **arguments, progress=lambda event: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(perceptron, "runs_fused", lambda device: True)
    resumed = rf.certify(model, X, **arguments)
    assert torch.equal(resumed.counts, expected.counts)
    # Begun now, it is the kernel's from the start, and in float32.
    assert rf.certify(model, X, **RUN, autocast="auto").settings.autocast is None


def test_a_run_begun_in_float16_is_another(tmp_path):
    model, path = Witness().eval(), tmp_path / "checkpoint"
    rf.certify(model, X, **RUN, autocast=torch.float16, checkpoint=path)
    with pytest.raises(ValueError, match=r"differs in.*autocast"):
        rf.certify(model, X, **RUN, autocast="auto", checkpoint=path)


class Coarse(Witness):
    """Of bfloat16 it makes something else."""

    def forward(self, x):
        h = self.first(x.flatten(1))
        return self.last(h if h.dtype == torch.float32 else 3 * h)


def test_a_model_that_bfloat16_changes_keeps_float32(monkeypatch, caplog):
    monkeypatch.setattr(sampling.Sampler, "_seconds", lambda self, size, way: 1 / size if way.autocast else 1)
    model = Coarse().eval()
    monkeypatch.setattr(Witness, "__deepcopy__", lambda self, memo: self)
    certificate = rf.certify(model, X, **RUN, autocast="auto")
    assert certificate.settings.autocast is None
    assert "batches are not contiguous in bfloat16: the model gives other logits" in caplog.text


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "witness.py").write_text("import torch\nfrom torch import nn\n\n\ndef make():\n"
        "    torch.manual_seed(0)\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval()\n")  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    np.save("x.npy", X[0].numpy())
    arguments = ["certify", "x.npy", "--model", "witness:make", "--samples", "64", "--out", "out", "--autocast"]
    done = CliRunner().invoke(app, [*arguments, "bfloat16"])
    assert done.exit_code == 0, done.output
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert rf.Certificate.load(file).settings.autocast == "bfloat16"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["autocast"] == "bfloat16"
    wrong = CliRunner().invoke(app, [*arguments, "int8"])
    assert wrong.exit_code == 2
    assert "autocast" in wrong.output

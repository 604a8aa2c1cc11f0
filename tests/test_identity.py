"""No model or method is taken for another one, and none is refused that has not changed."""

import copy
import dataclasses
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import small_cnn
from torch import nn
from torch.nn import functional

import robattr_fast as rf
from robattr_fast import model as rf_model
from robattr_fast.certificates.verify.replay import replay

X = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
COMMON = {"sigma": 0.2, "samples": 32, "batch_size": 8}
SOURCE = """
import torch
from torch import nn
from types import SimpleNamespace
import numpy as np
SCALE = 1.0
def helper(z):
    return z * SCALE
class Base:
    factor = 2.0
    def mixed(self, z):
        return helper(z) * self.factor
class Net(Base, nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(36, 8), nn.Linear(8, 3)
        self.array = np.linspace(0.5, 1.0, 8, dtype=np.float32)
        self.config = SimpleNamespace(slope=1.5, names={"b", "a", "c"})
        self.several = [torch.ones(8), {"bias": torch.zeros(8)}]
        self.activation = torch.tanh
        self.inner = (nn.Linear(3, 3),)
        self.register_buffer("mask", torch.eye(3).to_sparse())
        self.last_features = None
        self.calls = 0
        self.seen = []
        self.first.register_forward_hook(lambda module, inputs, output: output * 1.25)
    def forward(self, z):
        self.calls += 1
        z = self.activation(self.mixed(self.first(z.flatten(1))) * self.config.slope)
        z = (z + self.several[1]["bias"]) * self.several[0] * torch.from_numpy(self.array)
        self.last_features = z
        self.seen.append(z)
        return self.inner[0](self.last(z)) + (self.last(z) @ self.mask.to_dense())
def mine(model, batch, target, power=2):
    z = batch.detach().requires_grad_()
    (g,) = torch.autograd.grad(model(z).gather(1, target[:, None]).sum(), z)
    return g.abs() ** power
"""


def made(source=SOURCE, name="Net"):
    space = {"__name__": "notebook"}
    exec(source, space)
    return space[name]


def net(source=SOURCE):
    return made(source)().eval()


Z = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))

SOURCE_EDITS = [
    ("SCALE = 1.0", "SCALE = {}"),
    ("factor = 2.0", "factor = {}"),
    ("return z * SCALE", "return z * SCALE + {}"),
    ("* self.config.slope)", "* self.config.slope * {})"),
    ("slope=1.5", "slope={}"),
    ("output * 1.25", "output * {}"),
    ("self.activation = torch.tanh", "self.activation = torch.sin if {} else torch.tanh"),
    ("linspace(0.5, 1.0", "linspace({}, 1.0"),
    ("[torch.ones(8)", "[torch.full((8,), {})"),
    ("torch.eye(3)", "({} * torch.eye(3))"),
]


def changed(model, chance):
    """Change one thing that the forward uses, at random."""
    size = chance.choice([-1, 1]) * 10 ** chance.uniform(-2, 1)
    where = chance.randrange(6)
    with torch.no_grad():
        if where == 0:
            parameter = chance.choice(list(model.parameters()))
            parameter.view(-1)[chance.randrange(parameter.numel())] += size
        elif where == 1:
            model.array[chance.randrange(8)] += size
        elif where == 2:
            model.config.slope += size
        elif where == 3:
            model.several[1]["bias"][chance.randrange(8)] += size
        elif where == 4:
            model.inner[0].bias[chance.randrange(3)] += size
        else:
            model.last.register_forward_pre_hook(lambda module, inputs: (inputs[0] + size,))
    return model


@pytest.mark.parametrize("edits", [60, pytest.param(2400, marks=pytest.mark.slow)])
def test_no_edited_model_is_taken_for_the_old_one(edits):
    chance = random.Random(edits)
    known = rf_model.fingerprint(net())
    for _ in range(edits):
        if chance.random() < 0.5:
            model = changed(net(), chance)
        else:
            old, new = chance.choice(SOURCE_EDITS)
            assert old in SOURCE
            model = net(SOURCE.replace(old, new.format(round(chance.uniform(3, 9), 3))))
        assert rf_model.fingerprint(model) != known


def test_behaviour_alone_tells_most_edits():
    """Where no hash can be compared, as between versions of Python."""
    chance = random.Random(7)
    known = rf_model.behaviour(rf_model.private_copy(net()), Z)
    assert rf_model.behaviour(rf_model.private_copy(net()), Z) == known
    told = 0
    for _ in range(40):
        here = rf_model.behaviour(rf_model.private_copy(changed(net(), chance)), Z)
        told += rf_model.other_behaviour(known, here) is not None
    assert told >= 36


def test_a_history_is_no_edit():
    model = net()
    before = rf_model.fingerprint(model)
    for _ in range(3):
        model(Z)
    assert model.calls == 3
    assert rf_model.fingerprint(model) == before
    assert rf_model.fingerprint(copy.deepcopy(net())) == before


def test_other_processes_find_the_same():
    """Another hash seed, other threads, other kernels, another folder."""
    program = textwrap.dedent("""
        import sys, torch
        torch.set_num_threads(int(sys.argv[1]))
        import robattr_fast as rf
        from robattr_fast import model
        space = {"__name__": "notebook"}
        exec(sys.stdin.read(), space)
        print(model.fingerprint(space["Net"]().eval()), model.callable_fingerprint(space["mine"]))
        """)
    found = {f"{rf_model.fingerprint(net())} {rf_model.callable_fingerprint(made(name='mine'))}"}
    root = str(Path(rf.__file__).parent.parent)
    for seed, threads, isa in (("1", "1", "avx2"), ("2", "2", "generic")):
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": root,
            "ROBATTR_FAST_CPU_ISA": isa,
        }
        done = subprocess.run(
            [sys.executable, "-c", program, threads],
            input=SOURCE,
            cwd="/",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.strip())
    assert len(found) == 1


@pytest.mark.parametrize(("old", "new"), [("g.abs() **", "g.abs() + 1 **"), ("power=2", "power=3"), ("g.abs()", "g")])
def test_an_edited_explanation_is_another_one(tmp_path, old, new):
    model = net()
    first, second = made(name="mine"), made(SOURCE.replace(old, new), "mine")
    assert old in SOURCE
    rf.certify(model, Z, **COMMON, explain=first, checkpoint=tmp_path / "c")
    rf.certify(model, Z, **COMMON, explain=made(name="mine"), checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="differs in model_fingerprint, model_identity"):
        rf.certify(model, Z, **COMMON, explain=second, checkpoint=tmp_path / "c")


def test_merge_resume_and_replay_refuse_an_edited_model(tmp_path):
    one = rf.certify(net(), Z, **COMMON, checkpoint=tmp_path / "c")
    edited = net(SOURCE.replace("SCALE = 1.0", "SCALE = 1.5"))
    with pytest.raises(ValueError, match="holds another run"):
        rf.certify(edited, Z, **COMMON, checkpoint=tmp_path / "c")
    with pytest.raises(rf.MergeError, match="model_fingerprint"):
        one.merge(rf.certify(edited, Z, **COMMON, first_sample=32))
    assert one.merge(rf.certify(net(), Z, **COMMON, first_sample=32)).samples.tolist() == [64]
    assert "another one" in replay(one, edited, Z[0], samples=8).faults[0]
    assert not replay(one, net(), Z[0], samples=8).faults


def test_certificates_of_the_first_kind_of_fingerprint(tmp_path):
    """Those have nothing else: they merge with each other and with new ones, and are replayed."""
    model = small_cnn()

    def old(certificate, fingerprint):
        settings = dataclasses.replace(certificate.settings, model_fingerprint=fingerprint, model_identity=None)
        return rf.Certificate(**certificate.tensors, settings=settings)

    first = rf_model.first_fingerprint(model)
    one = old(rf.certify(model, X, **COMMON), first)
    one.save(tmp_path / "old.safetensors")
    one = rf.Certificate.load(tmp_path / "old.safetensors")
    new = rf.certify(model, X, **COMMON, first_sample=32)
    assert one.merge(new).samples.tolist() == [64]
    assert new.merge(one).merge(old(rf.certify(model, X, **COMMON, first_sample=64), first)).samples.tolist() == [96]
    assert not replay(one, model, X[0], samples=8).faults
    with pytest.raises(rf.MergeError, match="fingerprint"):
        old(one, "0" * 64).merge(new)


def test_behaviour_decides_between_versions_of_python():
    settings = rf.certify(net(), Z, **COMMON).settings
    elsewhere = dataclasses.replace(
        settings, model_fingerprint=settings.model_fingerprint.replace("cpython3", "cpython4")[:-1] + "x"
    )
    assert settings.other_model(elsewhere) is None
    other = rf.certify(net(SOURCE.replace("slope=1.5", "slope=1.6")), Z, **COMMON).settings
    moved = dataclasses.replace(
        elsewhere, model_identity={**other.model_identity, "first": settings.model_identity["first"]}
    )
    assert "differ" in settings.other_model(moved)


class Drifts(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.inner, self.by = small_cnn(), by
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z):
        self.calls += 1
        return self.inner(z) * (1 + self.by * self.calls)


def test_a_model_that_drifts_is_an_error():
    with pytest.raises(rf.ModelError, match="changes while it is called"):
        rf.certify(Drifts(1e-4).eval(), X, sigma=0.2, samples=512, batch_size=8)
    rf.certify(Drifts(0.0).eval(), X, sigma=0.2, samples=512, batch_size=8)


class Masked(nn.Module):
    def __init__(self, kind, value, add):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.kind, self.value, self.add = nn.Linear(12, 4), kind, value, add

    def forward(self, z):
        if self.kind == "dropout":
            z = functional.dropout(z, 0.5)
        elif self.kind == "statistics":
            z = (z - z.mean(0)) / (z.std(0) + 0.1)
        mask = torch.tensor([0.0, 0.0, self.value, 0.0])
        logits = self.net(z)
        return logits + mask if self.add else logits.masked_fill(mask != 0, self.value)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("value", [-1e4, -1e9, float("-inf"), 1e9])
@pytest.mark.parametrize("kind", ["none", "dropout", "statistics"])
def test_a_mask_hides_nothing(kind, value, add):
    model, x = Masked(kind, value, add).eval(), torch.rand(1, 12, generator=torch.Generator().manual_seed(1))
    if kind != "none" and value < 0:
        with pytest.raises(rf.ModelError, match=r"equal rows|other rows"):
            rf.certify(model, x, **COMMON)
    elif value < 0:
        same = rf.certify(Masked(kind, -1e4, False).eval(), x, **COMMON)
        assert int((rf.certify(model, x, **COMMON).counts - same.counts).abs().max()) <= 3  # ties by rounding


class Returns(nn.Module):
    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.form = nn.Linear(12, 3), form

    def forward(self, z):
        logits = self.inner(z)
        return {
            "tensor": logits,
            "object": SimpleNamespace(logits=logits),
            "mapping": {"loss": None, "logits": logits},
            "tuple": (logits,),
            "two": (logits, z),
            "other": {"scores": logits, "features": z},
            "one": logits[:, :1],
            "column": logits[:, 0],
            "nothing": None,
        }[self.form]


@pytest.mark.parametrize(
    ("form", "where"), [("object", ".logits"), ("mapping", "['logits']"), ("tuple", "[0]"), ("tensor", "")]
)
def test_logits_are_found(form, where):
    x = torch.rand(1, 12)
    certificate = rf.certify(Returns(form).eval(), x, **COMMON)
    assert certificate.settings.model_identity["behaviour"]["output"] == where
    assert torch.equal(certificate.counts, rf.certify(Returns("tensor").eval(), x, **COMMON).counts)


@pytest.mark.parametrize(
    ("form", "line"),
    [
        ("two", r"self\.net\(x\)\[0\]"),
        ("other", r"self\.net\(x\)\['scores'\]"),
        ("one", r"torch\.cat\(\[-z, z\], 1\) / 2"),
        ("column", r"torch\.cat"),
        ("nothing", "NoneType"),
    ],
)
def test_other_outputs_are_refused_with_the_line_that_fits(form, line):
    with pytest.raises(rf.ModelError, match=line):
        rf.certify(Returns(form).eval(), torch.rand(1, 12), **COMMON)


def _compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [_compiled, nn.DataParallel, lambda m: nn.Sequential(nn.DataParallel(m))])
def test_wrappers_are_left_out(wrap):
    x = torch.rand(1, 12)
    model = Returns("tensor").eval()
    assert torch.equal(rf.certify(wrap(model).eval(), x, **COMMON).counts, rf.certify(model, x, **COMMON).counts)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_frozen_script_is_known():
    def frozen(by):
        model = Returns("tensor").eval()
        with torch.no_grad():
            model.inner.weight.add_(by)
        return torch.jit.freeze(torch.jit.trace(model, torch.rand(2, 12)))

    assert rf_model.fingerprint(frozen(0)) == rf_model.fingerprint(frozen(0))
    assert rf_model.fingerprint(frozen(0)) != rf_model.fingerprint(frozen(1e-3))


def test_a_first_operation_in_place():
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(36, 3)]
    model, same = nn.Sequential(nn.ReLU(inplace=True), *layers).eval(), nn.Sequential(nn.ReLU(), *layers).eval()
    assert torch.equal(rf.certify(model, Z, **COMMON).counts, rf.certify(same, Z, **COMMON).counts)


class Tagged(nn.Parameter):
    pass


def test_classes_of_parameters_are_kept():
    model = nn.Linear(12, 3)
    model.weight = Tagged(model.weight.detach())
    model.weight.note = "kept"
    private = rf_model.private_copy(model.eval())
    assert type(private.weight) is Tagged
    assert private.weight.note == "kept"
    assert private.weight.data_ptr() == model.weight.data_ptr()


def test_hooks_work_and_collect_nothing():
    model, seen, counts = small_cnn(), [], {"calls": 0}

    def hook(module, inputs, output):
        seen.append(output)
        counts["calls"] += 1
        return output * -1

    plain = rf.certify(model, X, **COMMON)
    model[4].register_forward_hook(hook)
    hooked = rf.certify(model, X, **COMMON)
    assert not seen
    assert counts == {"calls": 0}
    assert not torch.equal(hooked.class_counts, plain.class_counts)


def test_a_hook_may_hand_something_to_the_forward():
    """A hook and a forward that share a list by their closures: copies of the hook alone would break that."""
    inner, features = small_cnn(), []
    inner[2].register_forward_hook(lambda module, inputs, output: features.append(output))

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, z):
            logits = self.inner(z)
            return logits + features.pop().mean((1, 2, 3))[:, None] * torch.arange(4)

    certificate = rf.certify(Uses().eval(), X, **COMMON)
    assert not features
    assert not torch.equal(certificate.counts, rf.certify(small_cnn(), X, **COMMON).counts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_defaults_of_the_process_do_not_matter(dtype):
    wanted = rf.certify(small_cnn(), X, **COMMON)
    model = small_cnn()
    torch.set_default_dtype(dtype)
    try:
        with torch.inference_mode(), torch.device("meta"):
            got = rf.certify(model, X, **COMMON)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.counts, wanted.counts)
    assert np.array_equal(got.prediction().label, wanted.prediction().label)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = small_cnn()
        got = rf.certify(model, X, **COMMON)
    assert torch.equal(got.counts, rf.certify(small_cnn(), X, **COMMON).counts)

"""The private copy, and every way in which a model can be unfit to be explained."""

import contextlib
import copy
import itertools

import pytest
import torch
from models import Elementwise, small_cnn
from torch import nn
from torch.nn import functional

import robattr_fast as rf
from robattr_fast import model as rf_model


def test_private_copy_shares_parameters_and_nothing_else():
    model = small_cnn()
    private = rf_model.private_copy(model)
    for ours, theirs in zip(private.parameters(), model.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
        assert not ours.requires_grad
        assert theirs.requires_grad
    for ours, theirs in zip(private.buffers(), model.buffers(), strict=True):
        assert ours.data_ptr() != theirs.data_ptr()


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[1].weight = model[0].weight
    private = rf_model.private_copy(model)
    assert private[0].weight is private[1].weight


def test_the_users_model_is_never_mutated():
    model = small_cnn()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rf.certify(model, torch.rand(1, 1, 12, 12), sigma=0.2, samples=20, batch_size=4)
    rf.smoothgrad(model, torch.rand(1, 1, 12, 12), sigma=0.2, samples=20, batch_size=4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


class FailsAt(nn.Module):
    """Passes its input on; the call with this number raises ``error``."""

    def __init__(self, call, error):
        super().__init__()
        self.calls, self.error = itertools.count(1), error
        self.call = call

    def __deepcopy__(self, memo):
        return self

    def forward(self, z):
        if next(self.calls) == self.call:
            raise self.error
        return z


@pytest.mark.parametrize("call", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), torch.OutOfMemoryError("full")])
@pytest.mark.parametrize("method", [rf.certify, rf.smoothgrad])
def test_the_users_model_is_the_same_after_an_error(method, error, call):
    """At the first look at the model, while it is folded, in the run."""
    failing = FailsAt(call, error).eval()
    model = nn.Sequential(*small_cnn(), failing).eval()
    before = copy.deepcopy(model.state_dict())
    modules = list(model.modules())
    x = torch.rand(1, 1, 12, 12)
    kept = x.clone()
    # Memory that ends is not always fatal, and folding does without what it cannot trace.
    with contextlib.suppress(rf.ModelError, KeyboardInterrupt):
        method(model, x, sigma=0.2, samples=20, batch_size=4)
    assert next(failing.calls) > call
    assert list(model.modules()) == modules
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None and p.is_leaf for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert torch.equal(x, kept)
    assert x.grad is None


def test_fingerprint_sees_weights_and_architecture():
    model = small_cnn()
    same = small_cnn()
    assert rf_model.fingerprint(model) == rf_model.fingerprint(same)
    with torch.no_grad():
        same[0].bias[0] += 1e-3
    assert rf_model.fingerprint(model) != rf_model.fingerprint(same)
    relu = small_cnn()
    relu[2] = nn.ReLU()
    assert rf_model.fingerprint(model) != rf_model.fingerprint(relu)
    scaled = small_cnn()
    scaled[0].scale = torch.ones(3)
    assert rf_model.fingerprint(model) != rf_model.fingerprint(scaled)
    buffered = small_cnn()
    buffered[0].register_buffer("scale", torch.ones(3), persistent=False)
    assert rf_model.fingerprint(model) != rf_model.fingerprint(buffered)


@pytest.mark.parametrize(
    "value", [2.0, 1, True, None, "tanh", torch.float16, (1, (2, 3)), [0.5], {"scale": [1, 2]}, {3: None}]
)
def test_fingerprint_sees_plain_attributes(value):
    """A forward may read them: samples of such models must not be merged."""
    model, other = small_cnn(), small_cnn()
    model[2].setting, other[2].setting = value, (value, 0)
    assert rf_model.fingerprint(model) != rf_model.fingerprint(other)
    other[2].setting = value
    assert rf_model.fingerprint(model) == rf_model.fingerprint(other)
    other[3].setting = value
    assert rf_model.fingerprint(model) != rf_model.fingerprint(other)


def test_fingerprint_does_not_see_addresses():
    model = small_cnn()
    model.helper = object()  # printed, it would show its address
    model.later = lambda x: x
    model.deep = [object()]
    same = small_cnn()
    same.helper, same.later, same.deep = object(), (lambda x: x), [object()]
    assert rf_model.fingerprint(model) == rf_model.fingerprint(same)


def _returning(result):
    class Model(nn.Module):
        def forward(self, z):
            return result(z)

    return Model().eval()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (small_cnn().train(), "it is in training mode"),
        (nn.Sequential(nn.Flatten(), nn.Dropout(0.5).train(), nn.Linear(144, 3).eval()).eval().requires_grad_(), None),
        (_returning(lambda z: (z.flatten(1), z)), "returned tuple"),
        (_returning(lambda z: z), r"returned shape \(2, 1, 12, 12\)"),
        (_returning(lambda z: z.sum()[None, None].expand(3, 3)), "returned shape"),
        (_returning(lambda z: z.flatten(1).long()), "dtype torch.int64"),
        (_returning(lambda z: torch.zeros(z.shape[0], 3)), "does not depend on its input"),
        (_returning(lambda z: z.detach().flatten(1)), "does not depend on its input"),
        (_returning(lambda z: torch.ones(z.shape[0], 3, requires_grad=True)), "does not depend on its input"),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 3)).eval(), "its forward failed"),
        (_returning(lambda z: z.flatten(1) / 0.0), "NaN or infinite"),
        (_returning(lambda z: functional.dropout(z.flatten(1), 0.2)), "equal rows of one batch .* dropout"),
        (_returning(lambda z: functional.dropout(z.flatten(1).half(), 0.2)), "equal rows of one batch .* dropout"),
        (_returning(lambda z: z.flatten(1) + torch.randn(1, 144)), "with the other rows of the batch, or from call"),
        (_returning(lambda z: functional.batch_norm(z.flatten(1), None, None, training=True)), "statistics of the"),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(144, track_running_stats=False)).eval(), "statistics of the batch"),
    ],
)
def test_unfit_models_are_refused(model, message):
    if message is None:
        model[1].train()
        message = "its submodule '1' .Dropout. is in training mode"
    error = rf.NonFiniteError if "NaN" in message else rf.ModelError
    with pytest.raises(error, match=message):
        rf.certify(model, torch.rand(1, 1, 12, 12), sigma=0.2, samples=4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", [small_cnn(), nn.Sequential(*small_cnn(), nn.Dropout()).eval()])
def test_rounding_is_not_taken_for_randomness(model, dtype):
    x = 100 * torch.rand(1, 1, 12, 12, dtype=dtype)
    assert rf.smoothgrad(copy.deepcopy(model).to(dtype), x, sigma=30.0, samples=4).isfinite().all()


def test_a_function_is_not_a_model():
    with pytest.raises(TypeError, match="model: got function"):
        rf.smoothgrad(lambda z: z, torch.rand(1, 1, 12, 12), sigma=0.2, samples=4)


def test_scores_match_the_formula():
    model = Elementwise(2, 3)
    z = torch.randn(5, 2, 3)
    target = torch.tensor([0, 1, 0, 1, 0])
    gradient, logits = rf_model.scores(model, z, target, "gradient")
    zeroth = model.weight * (1 - z.tanh() ** 2)
    first = -2 * model.weight * z
    expected = torch.where((target == 0)[:, None, None], zeroth, first)
    torch.testing.assert_close(gradient, expected.detach())
    torch.testing.assert_close(logits, model(z).detach())
    product, _ = rf_model.scores(model, z, target, "input_x_gradient")
    assert torch.equal(product, gradient * z)
    largest, _ = rf_model.scores(model, z, None, "gradient")
    by_label, _ = rf_model.scores(model, z, model(z).argmax(1), "gradient")
    assert torch.equal(largest, by_label)

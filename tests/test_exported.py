"""Models that torch.export made: the mode from the graph, the batch size from the graph, the same certificate."""

import pytest
import torch
from models import small_cnn
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import robattr_fast as rf
from robattr_fast import model as rf_model
from robattr_fast.inputs import images, specs
from robattr_fast.model import exported

X = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(3))
COMMON = {"sigma": 0.3, "tau": 0.2, "samples": 20}


def export(model: nn.Module, rows: int = 4, dynamic=None) -> nn.Module:
    shapes = None if dynamic is None else ({0: dynamic},)
    return torch.export.export(model, (torch.rand(rows, 1, 12, 12),), dynamic_shapes=shapes).module()


class Layers(nn.Module):
    """Whatever ``middle`` does between two linear layers."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(144, 32), middle, nn.Linear(32, 3)

    def forward(self, z):
        return self.last(self.middle(self.first(z.flatten(1))))


class Function(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, z):
        return self.f(z)


class NoGradient(nn.Module):
    """Dropout in a nested graph: torch.export makes one of the block."""

    def forward(self, z):
        with torch.no_grad():
            mask = F.dropout(torch.ones_like(z), 0.5, self.training)
        return z * mask


def attention(p):
    return Function(lambda z: F.scaled_dot_product_attention(*[z.view(-1, 1, 4, 8)] * 3, dropout_p=p).flatten(1))


@pytest.mark.parametrize(
    ("middle", "train"),
    [
        (nn.Dropout(0.5), False),
        (nn.BatchNorm1d(32), False),
        (nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(32), nn.RReLU()), False),
        (NoGradient(), False),
        (attention(0.0), False),
        (Function(lambda z: F.instance_norm(z.view(-1, 4, 8)).flatten(1)), False),
        (nn.Identity(), True),
    ],
)
def test_fixed_functions_are_taken(middle, train):
    model = export(Layers(middle).train(train))
    assert model.training
    assert rf_model.private_copy(model)(torch.rand(4, 1, 12, 12)).shape == (4, 3)


@pytest.mark.parametrize(
    ("middle", "train", "message"),
    [
        (nn.Dropout(0.5), True, r"training mode \(aten.dropout"),
        (nn.BatchNorm1d(32), True, r"training mode \(aten.batch_norm"),
        (nn.RReLU(), True, r"training mode \(aten.rrelu"),
        (NoGradient(), True, r"training mode \(aten.dropout"),
        (Function(lambda z: F.dropout(z, 0.5, True)), False, r"training mode \(aten.dropout"),
        (attention(0.5), False, r"random \(aten.scaled_dot_product_attention"),
        (Function(lambda z: z + torch.randn_like(z)), False, r"random \(aten.randn_like"),
    ],
)
def test_training_mode_and_randomness_are_refused(middle, train, message):
    model = export(Layers(middle).train(train))
    with pytest.raises(rf.ModelError, match=message):
        rf.certify(model, X, **COMMON)
    part = nn.Sequential(model, nn.Identity())
    for module in (part, part[1]):
        module.training = False
    with pytest.raises(rf.ModelError, match=f"its part '0' .*{message}"):
        rf.certify(part, X, **COMMON)


@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [
        (None, (4, 4)),
        (Dim("batch", min=3, max=64), (3, 64)),
        (2 * Dim("half", min=1, max=50), (4, 100)),
        (Dim.AUTO, (2, None)),
    ],
)
def test_batch_sizes(dynamic, expected):
    assert exported.batch_sizes(export(small_cnn(), 4, dynamic)) == expected
    assert rf_model.batch_sizes(nn.Sequential(export(small_cnn(), 4, dynamic), nn.Identity())) == expected
    assert rf_model.batch_sizes(small_cnn()) == (1, None)


@pytest.mark.parametrize("dynamic", [None, Dim("batch", min=3, max=5), 2 * Dim("half", min=1, max=50), Dim.AUTO])
@pytest.mark.parametrize("batch_size", ["auto", 4])
def test_certificates_are_those_of_the_module(dynamic, batch_size):
    ours = rf.certify(export(small_cnn(), 4, dynamic), X, **COMMON, batch_size=batch_size)
    theirs = rf.certify(small_cnn(), X, **COMMON, batch_size=4)
    # Another batch size or unfolded BatchNorm rounds differently: an element at the threshold may change sides.
    assert int((ours.counts - theirs.counts).abs().sum()) <= 4
    assert int(ours.counts.sum()) == int(theirs.counts.sum())
    if dynamic is None or batch_size == 4:
        assert ours.settings.batch_size == 4


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_a_static_batch_larger_or_smaller_than_the_run(rows):
    certificate = rf.certify(export(small_cnn(), rows), X, **(COMMON | {"samples": 5}))
    assert certificate.settings.batch_size == rows
    assert certificate.samples.tolist() == [5, 5]
    assert rf.smoothgrad(export(small_cnn(), rows), X, sigma=0.3, samples=5).shape == X.shape


@pytest.mark.parametrize(
    ("dynamic", "takes"), [(None, "4 to 4"), (Dim("batch", min=3, max=9), "3 to 9"), (Dim.AUTO, "at least 2")]
)
def test_other_batch_sizes_are_refused(dynamic, takes):
    with pytest.raises(ValueError, match=f"batch_size: got 1, but the model was exported for batches of {takes} rows"):
        rf.certify(export(small_cnn(), 4, dynamic), X, **COMMON, batch_size=1)


def test_fingerprint_sees_the_graph_and_its_constants():
    torch.manual_seed(0)
    weights = Layers(nn.Identity()).state_dict()

    def made(f):
        model = Layers(Function(f)).eval()
        model.load_state_dict(weights)
        return rf_model.fingerprint(export(model))

    assert made(torch.tanh) == made(torch.tanh)
    assert made(torch.tanh) != made(torch.sigmoid)
    assert made(lambda z: z * torch.tensor([1.0, 2.0] * 16)) != made(lambda z: z * torch.tensor([1.0, 3.0] * 16))


def saved(path, model, *, size=(12, 12), dynamic=None):
    program = torch.export.export(model, (torch.rand(2, 1, *size),), dynamic_shapes=dynamic)
    torch.export.save(program, path)
    return str(path)


def test_a_file_is_its_module(tmp_path):
    spec = saved(tmp_path / "model.pt2", small_cnn())
    loaded = specs.load(spec)
    certificate = rf.certify(loaded.module, X, **COMMON)
    assert certificate.settings.batch_size == 2
    assert torch.equal(certificate.counts, rf.certify(specs.load(spec).module, X, **COMMON).counts)
    here = rf.certify(export(small_cnn(), 2), X, **COMMON)
    assert torch.equal(certificate.counts, here.counts)
    assert (
        certificate.settings.model_fingerprint
        == rf.certify(specs.load(spec).module, X, **COMMON).settings.model_fingerprint
    )


def test_images_are_cropped_to_the_size_that_the_graph_takes(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is optional").new("RGB", (40, 30))
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    square = specs.load(saved(tmp_path / "square.pt2", convolution))
    assert square.preprocess(image).shape == (3, 12, 12)
    assert specs.load(saved(tmp_path / "wide.pt2", convolution, size=(12, 14))).preprocess is images.to_tensor
    any_size = saved(tmp_path / "any.pt2", convolution, dynamic=({2: Dim.AUTO, 3: Dim.AUTO},))
    assert specs.load(any_size).preprocess is images.to_tensor


def test_files_that_are_no_exported_module(tmp_path):
    with pytest.raises(rf.ModelError, match="no such file"):
        specs.load(str(tmp_path / "missing.pt2"))
    (tmp_path / "text.pt2").write_text("not a program")
    with pytest.raises(rf.ModelError, match=r"not a file written by torch\.export\.save"):
        specs.load(str(tmp_path / "text.pt2"))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt2")
    with pytest.raises(rf.ModelError, match=r"torch\.export\.load failed"):
        specs.load(str(tmp_path / "weights.pt2"))


def test_traced_modules_keep_their_flag():
    """A graph of layers, by torch.fx: here the flag decides."""
    assert exported.graphs(torch.fx.symbolic_trace(small_cnn())) == {}
    with pytest.raises(rf.ModelError, match="training mode"):
        rf_model.private_copy(torch.fx.symbolic_trace(small_cnn()).train())

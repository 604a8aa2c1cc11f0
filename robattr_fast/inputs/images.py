"""Image files to float32 tensors in [0, 1]. Needs Pillow, which is imported on use."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from robattr_fast.inputs.names import listed
from robattr_fast.model import values_hash

if TYPE_CHECKING:
    from PIL.Image import Image

# Formats that Pillow decodes itself: no external program is started (as it would be for EPS).
_FORMATS = {
    ".bmp": "BMP",
    ".gif": "GIF",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".png": "PNG",
    ".ppm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
_ARRAYS = (".npy", ".npz")
EXTENSIONS = (*_FORMATS, *_ARRAYS)

MAX_ELEMENTS = 2**28
"""Of one array; an image file may have as many pixels as Pillow thinks sane (PIL.Image.MAX_IMAGE_PIXELS)."""

PACKAGED = "skimage:"
"""Prefix of the photographs that come with scikit-image: ``skimage:chelsea``."""

DRAWN = "robattr-fast certificate picture"
"""What the pictures of `certify` say of their software."""

# A file name has at most 255 bytes; results add a suffix, and while they are written a dot and 13 bytes more.
_LONGEST_STEM = 255 - len(".safetensors") - 14

Preprocess = Callable[["Image"], torch.Tensor]
"""An RGB image to a float tensor [C, H, W] in [0, 1]."""


class ImageError(ValueError):
    """A file is not an image that can be used; the message names it."""


@dataclass(frozen=True)
class Source:
    """One image to read, and the name that its results bear: unique within one run."""

    path: Path
    name: str


def find(paths: Iterable[str], told: Callable[[str], None] | None = None) -> list[Source]:
    """The images that the paths name, in their order.

    A path is an image or array file, or a folder, which stands for its files with one of `EXTENSIONS`, sorted by name.
    Of a folder, subfolders, hidden files, other files and pictures that `certify` has drawn are passed over.
    ``skimage:chelsea``, or ``chelsea`` where no such file exists, is a photograph that comes with scikit-image. A file
    named twice is taken once; a second file of the same stem is called ``stem-2``; a stem that leaves no room for the
    suffixes of the results is cut, and told apart by a hash.

    Args:
        told: is told what was passed over, in one line for each folder.

    Raises:
        ImageError: no such file, no image in a folder, or nothing at all.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        for file in _expand(path, told or (lambda line: None)):
            files.setdefault(file.resolve(), file)
    if not files:
        raise ImageError("no image was named")
    taken: dict[str, int] = {}
    sources = []
    for file in files.values():
        stem = _short(file.stem)
        name, copy = stem, taken.get(stem, 1)
        while name in taken:
            copy += 1
            name = f"{stem}-{copy}"
        taken[stem] = copy
        taken.setdefault(name, 1)
        sources.append(Source(file, name))
    return sources


def _short(stem: str) -> str:
    data = os.fsencode(stem)
    if len(data) <= _LONGEST_STEM:
        return stem
    mark = hashlib.sha256(data).hexdigest()[:8]
    return f"{data[: _LONGEST_STEM - 9].decode(errors='ignore')}-{mark}"


def _expand(path: str, told: Callable[[str], None]) -> list[Path]:
    file = Path(path)
    if file.is_dir():
        found, passed_over = _in_folder(file)
        if not found:
            raise ImageError(f"{path}: no image in this folder; expected one of {' '.join(EXTENSIONS)}")
        if passed_over:
            parts = [f"{kind} {listed(names)}" for kind, names in passed_over.items()]
            told(f"{path}: passed over {'; '.join(parts)}")
        return found
    if file.exists():
        return [file]
    name = path.removeprefix(PACKAGED)
    packaged = _packaged(name) if name.isidentifier() else None
    if packaged is not None:
        return [packaged]
    if path.startswith(PACKAGED):
        raise ImageError(f"{path}: scikit-image brings no photograph of this name (pip install scikit-image)")
    raise ImageError(f"{path}: no such file or folder")


def _in_folder(folder: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """Its images, and by kind the names of everything else."""
    found: list[Path] = []
    passed_over: dict[str, list[str]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            kind = "hidden"
        elif entry.is_dir():
            kind = "the folder"
        elif entry.suffix.lower() not in EXTENSIONS or not entry.is_file():
            kind = "no image"
        elif drawn_by_us(entry):
            kind = "drawn by certify"
        else:
            found.append(entry)
            continue
        passed_over.setdefault(kind, []).append(entry.name)
    return found, passed_over


def drawn_by_us(path: Path) -> bool:
    """Whether a file is a picture that `certify` drew of a certificate, which says so in its first bytes."""
    if path.suffix.lower() != ".png":
        return False
    try:
        with open(path, "rb") as file:
            return DRAWN.encode() in file.read(4096)
    except OSError:
        return False


def _packaged(name: str) -> Path | None:
    """The file of a photograph inside the scikit-image wheel. Found by path: importing skimage.data could download."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "data"
    return next((file for suffix in (".png", ".jpg") if (file := folder / f"{name}{suffix}").is_file()), None)


def read(path: Path, preprocess: Preprocess) -> torch.Tensor:
    """The model's input: float32 [C, H, W] in [0, 1].

    Photographs (image files, and uint8 [H, W] or [H, W, C] arrays) go through ``preprocess``. A float array [C, H, W]
    in [0, 1] is taken as it is. Of an ``.npz`` file, which must hold one array, that array.

    Raises:
        ImageError: unreadable, damaged or gigantic file; wrong shape, values outside [0, 1], NaN.
    """
    if path.suffix.lower() not in _ARRAYS:
        return _checked(preprocess(open_rgb(path)), f"{path}: preprocess")
    array = _read_array(path)
    if array.dtype == np.uint8:
        return _checked(preprocess(_rgb_from_array(path, array)), f"{path}: preprocess")
    if array.dtype.kind != "f":
        raise ImageError(f"{path}: array of {array.dtype}; takes uint8 [H, W, C], or floats [C, H, W] in [0, 1]")
    return _checked(torch.from_numpy(array.astype(np.float32)), str(path))


def open_rgb(path: Path) -> Image:
    """The image in RGB and upright (EXIF orientation); of several frames or pages the first.

    Transparent parts are shown on white, as a browser shows them: what colour they have in the file does not count.
    Raises `ImageError`.
    """
    from PIL import Image, ImageOps

    try:
        # Pillow warns of an image above MAX_IMAGE_PIXELS and refuses one twice as large: refuse both.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=sorted(set(_FORMATS.values()))) as image:
                if image.mode[0] in "IF" or _deep(image):
                    raise ImageError(
                        f"{path}: more than 8 bits per channel, expected 8 (or a float .npy file): "
                        "they would be clipped or cut off"
                    )
                return _on_white(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{path}: gigantic image, more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except Image.UnidentifiedImageError as error:
        if Path(path).suffix.lower() in EXTENSIONS:
            raise ImageError(f"{path}: not an image that can be read: damaged, or not what its suffix says") from error
        raise ImageError(f"{path}: not an image; expected one of {' '.join(EXTENSIONS)}") from error
    except ImageError:
        raise
    except Exception as error:  # OSError, SyntaxError, EOFError, struct.error, ValueError: each format has its own
        raise ImageError(f"{path}: cannot be read: {error}") from error


def _deep(image: Image) -> bool:
    """Whether Pillow would cut 16 bits of a channel to 8, which it does for some modes without a word."""
    for codec, _, _, arguments in getattr(image, "tile", ()):
        parts = arguments if isinstance(arguments, tuple) else (arguments,)
        if any(isinstance(part, str) and ";16" in part for part in parts):
            return True
        if codec.startswith("ppm") and parts[-1] > 255:  # the largest value
            return True
    return False


def _on_white(image: Image) -> Image:
    """In RGB."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")


def to_tensor(image: Image) -> torch.Tensor:
    """An RGB image as float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)


def centre_crop(size: int, *, fraction: float = 1.0, interpolation: str = "bicubic") -> Preprocess:
    """A preprocess: the central square, `fraction` of the shorter side wide, resized to size x size.

    interpolation: the name of one of Pillow's (PIL.Image.Resampling), in small letters.
    """
    if size < 1:
        raise ValueError(f"size: got {size}, takes an integer >= 1")

    def preprocess(image: Image) -> torch.Tensor:
        from PIL import Image

        side = min(image.size) * fraction
        left, top = ((length - side) / 2 for length in image.size)
        box = (left, top, left + side, top + side)
        return to_tensor(image.resize((size, size), Image.Resampling[interpolation.upper()], box=box))

    return preprocess


def image_id(tensor: torch.Tensor) -> int:
    """The image's number in the noise stream: the first 32 bits of `values_hash`, so it depends on nothing else."""
    return int(values_hash(tensor)[:8], 16)


def _read_array(path: Path) -> np.ndarray:
    try:
        if path.suffix.lower() == ".npy":
            # Mapped first: the header of a small file can promise any size.
            return _not_gigantic(path, np.load(path, mmap_mode="r", allow_pickle=False))
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) != 1:
                raise ImageError(f"{path}: holds {len(entries)} arrays, takes exactly one")
            if entries[0].file_size > 8 * MAX_ELEMENTS:
                raise ImageError(f"{path}: gigantic array, more than {MAX_ELEMENTS} elements")
        with np.load(path, allow_pickle=False) as arrays:
            return _not_gigantic(path, arrays[arrays.files[0]])
    except ImageError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        raise ImageError(f"{path}: cannot be read: {error}") from error


def _not_gigantic(path: Path, array: np.ndarray) -> np.ndarray:
    if array.size > MAX_ELEMENTS:
        raise ImageError(f"{path}: gigantic array, more than {MAX_ELEMENTS} elements")
    return np.array(array)


def _rgb_from_array(path: Path, array: np.ndarray) -> Image:
    from PIL import Image

    if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"{path}: uint8 array of shape {array.shape}, takes [H, W] or [H, W, C] with C of 1, 3 or 4")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _on_white(Image.fromarray(np.ascontiguousarray(array)))


def _checked(tensor: object, what: str) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.dim() != 3:
        got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ImageError(f"{what}: got {got}, takes a float tensor [C, H, W]")
    tensor = tensor.detach().to("cpu", torch.float32).contiguous()
    if tensor.numel() == 0:
        raise ImageError(f"{what}: got the empty shape {tuple(tensor.shape)}")
    low, high = (float(end) for end in tensor.aminmax())
    if not (low >= 0 and high <= 1):  # written so that NaN fails
        raise ImageError(
            f"{what}: got values in [{low:g}, {high:g}], takes [0, 1]: mean and std belong inside the model"
        )
    return tensor

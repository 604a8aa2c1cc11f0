"""Image files to float32 tensors in [0, 1]. Needs Pillow, which is imported on use."""

from __future__ import annotations

import importlib.util
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

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

Preprocess = Callable[["Image"], torch.Tensor]
"""An RGB image to a float tensor [C, H, W] in [0, 1]."""


class ImageError(ValueError):
    """A file is not an image that can be used; the message names it."""


@dataclass(frozen=True)
class Source:
    """One image to read, and the name that its results bear: unique within one run."""

    path: Path
    name: str


def find(paths: Iterable[str]) -> list[Source]:
    """The images that the paths name, in their order.

    A path is an image or array file, or a folder, which stands for its files with one of `EXTENSIONS`, sorted by name
    (subfolders are left alone). ``skimage:chelsea``, or ``chelsea`` where no such file exists, is a photograph that
    comes with scikit-image. A file named twice is taken once; a second file of the same stem is called ``stem-2``.

    Raises:
        ImageError: no such file, no image in a folder, or nothing at all.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        for file in _expand(path):
            files.setdefault(file.resolve(), file)
    if not files:
        raise ImageError("no image was named")
    taken: set[str] = set()
    sources = []
    for file in files.values():
        name, copy = file.stem, 2
        while name in taken:
            name, copy = f"{file.stem}-{copy}", copy + 1
        taken.add(name)
        sources.append(Source(file, name))
    return sources


def _expand(path: str) -> list[Path]:
    file = Path(path)
    if file.is_dir():
        found = sorted(entry for entry in file.iterdir() if entry.suffix.lower() in EXTENSIONS and entry.is_file())
        if not found:
            raise ImageError(f"{path}: no image in this folder; takes {' '.join(EXTENSIONS)}")
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
    """The image in RGB and upright (EXIF orientation); of several frames the first. Raises `ImageError`."""
    from PIL import Image, ImageOps

    try:
        # Pillow warns of an image above MAX_IMAGE_PIXELS and refuses one twice as large: refuse both.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=sorted(set(_FORMATS.values()))) as image:
                if image.mode[0] in "IF":
                    raise ImageError(f"{path}: {image.mode} pixels, takes 8 bits per channel (or a float .npy file)")
                return ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{path}: gigantic image, more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{path}: not an image; takes {' '.join(EXTENSIONS)}") from error
    except ImageError:
        raise
    except Exception as error:  # OSError, SyntaxError, EOFError, struct.error, ValueError: each format has its own
        raise ImageError(f"{path}: cannot be read: {error}") from error


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
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


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

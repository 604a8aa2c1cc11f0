"""Image files: what is read, how it becomes a tensor, and which files are refused by name."""

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from robattr_fast.inputs import images

pytestmark = pytest.mark.once


@pytest.fixture
def picture():
    """uint8 [6, 9, 3], no two pixels alike."""
    return np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm"])
def test_lossless_formats_give_the_pixels(tmp_path, picture, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(picture).save(path)
    x = images.read(path, images.to_tensor)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert torch.equal(x, torch.from_numpy(picture).permute(2, 0, 1).float() / 255)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, picture, mode):
    path = tmp_path / "a.tif"
    Image.fromarray(picture).convert(mode).save(path)
    assert images.read(path, images.to_tensor).shape == (3, 6, 9)


def test_exif_orientation_is_applied(tmp_path, picture):
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees counter-clockwise to display
    Image.fromarray(picture).save(path, exif=exif)
    upright = np.rot90(picture, -1)
    assert torch.equal(images.read(path, images.to_tensor), images.to_tensor(Image.fromarray(upright)))


def test_16_bit_images_are_refused_rather_than_clipped(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(path)
    with pytest.raises(images.ImageError, match=r"deep\.png.*8 bits"):
        images.read(path, images.to_tensor)


def test_centre_crop(picture):
    # A fraction of 1/3 of the side 6 leaves a 2 x 2 square in the middle, at columns 3.5 to 5.5.
    x = images.centre_crop(2, fraction=1 / 3)(Image.fromarray(picture))
    assert x.shape == (3, 2, 2)
    assert x.mean() == pytest.approx(picture[2:4, 3:6].mean() / 255, abs=0.02)
    with pytest.raises(ValueError, match="size"):
        images.centre_crop(0)


def test_arrays(tmp_path, picture):
    floats = np.random.default_rng(0).random((1, 5, 5))
    np.save(tmp_path / "floats.npy", floats)
    np.savez(tmp_path / "one.npz", floats.astype(np.float32))
    np.save(tmp_path / "bytes.npy", picture)
    np.save(tmp_path / "grey.npy", picture[:, :, 0])
    never = pytest.fail  # a float array is the model's input already
    assert torch.equal(images.read(tmp_path / "floats.npy", never), torch.from_numpy(floats.astype(np.float32)))
    assert torch.equal(images.read(tmp_path / "one.npz", never), torch.from_numpy(floats.astype(np.float32)))
    assert torch.equal(
        images.read(tmp_path / "bytes.npy", images.to_tensor), images.to_tensor(Image.fromarray(picture))
    )
    assert images.read(tmp_path / "grey.npy", images.to_tensor).shape == (3, 6, 9)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4, 4), dtype=np.int64), "int64"),
        (np.zeros((4, 4)), r"\(4, 4\)"),
        (np.full((1, 2, 2), np.nan), r"\[0, 1\]"),
        (np.full((1, 2, 2), 1.5), r"mean and std belong inside the model"),
        (np.full((1, 2, 2), -0.1), r"\[0, 1\]"),
        (np.zeros((1, 0, 2)), "empty"),
        (np.zeros((2, 2, 5), dtype=np.uint8), r"\(2, 2, 5\)"),
        (np.array([object()]), "pickle|object"),
    ],
)
def test_bad_arrays(tmp_path, array, message):
    path = tmp_path / "bad.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(images.ImageError, match=message) as error:
        images.read(path, images.to_tensor)
    assert "bad.npy" in str(error.value)


def test_an_npz_of_two_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(images.ImageError, match="holds 2 arrays"):
        images.read(tmp_path / "two.npz", images.to_tensor)


def test_arrays_that_promise_gigantic_sizes_are_refused_unread(tmp_path, monkeypatch):
    np.save(tmp_path / "big.npy", np.zeros((1, 30, 30), dtype=np.float32))
    np.savez_compressed(tmp_path / "big.npz", np.zeros((1, 300, 300)))
    monkeypatch.setattr(images, "MAX_ELEMENTS", 800)
    for name in ("big.npy", "big.npz"):
        with pytest.raises(images.ImageError, match=f"{name}: gigantic"):
            images.read(tmp_path / name, images.to_tensor)


def damaged(picture, kind):
    file = io.BytesIO()
    if kind == "npz":
        np.savez(file, picture)
    else:
        Image.fromarray(np.tile(picture, (20, 20, 1))).save(file, format={"jpg": "JPEG"}.get(kind, kind))
    return file.getvalue()[: len(file.getvalue()) // 2]


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "tiff", "webp", "bmp", "npz"])
def test_truncated_files(tmp_path, picture, kind):
    path = tmp_path / f"half.{kind}"
    path.write_bytes(damaged(picture, kind))
    with pytest.raises(images.ImageError, match=rf"half\.{kind}"):
        images.read(path, images.to_tensor)


@pytest.mark.parametrize("name", ["a.png", "a.npy", "a.npz", "noext"])
@pytest.mark.parametrize("content", [b"", b"not an image at all"])
def test_unreadable_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(images.ImageError, match=name):
        images.read(tmp_path / name, images.to_tensor)


def test_postscript_is_not_run(tmp_path):
    # Pillow would start Ghostscript for it.
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(images.ImageError, match="not an image"):
        images.read(tmp_path / "a.eps", images.to_tensor)


@pytest.mark.parametrize("limit", [40, 20])  # of 54 pixels: where Pillow only warns, and where it refuses
def test_gigantic_images(tmp_path, picture, monkeypatch, limit):
    Image.fromarray(picture).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(images.ImageError, match=r"big\.png: gigantic"):
        images.read(tmp_path / "big.png", images.to_tensor)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "NoneType"),
        (torch.zeros(2, 2), r"\(2, 2\)"),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), "uint8"),
        (torch.full((3, 2, 2), -1.0), r"mean and std"),
    ],
)
def test_preprocess_must_give_unit_floats(tmp_path, picture, result, message):
    Image.fromarray(picture).save(tmp_path / "a.png")
    with pytest.raises(images.ImageError, match=message):
        images.read(tmp_path / "a.png", lambda image: result)


def test_find(tmp_path, picture):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("one/b.png", "one/a.PNG", "two/a.png", "two/a.bmp"):
        Image.fromarray(picture).save(tmp_path / name)
    (tmp_path / "one" / "notes.txt").write_text("no image")
    found = images.find([str(tmp_path / "two" / "a.png"), str(tmp_path / "one"), str(tmp_path / "two")])
    # In order, once each, under names of their own.
    assert [(source.path.relative_to(tmp_path).as_posix(), source.name) for source in found] == [
        ("two/a.png", "a"),
        ("one/a.PNG", "a-2"),
        ("one/b.png", "b"),
        ("two/a.bmp", "a-3"),
    ]


@pytest.mark.parametrize("name", ["nothing.png", "skimage:nothing", "skimage:../data/chelsea"])
def test_find_names_what_is_missing(name):
    with pytest.raises(images.ImageError, match=name):
        images.find([name])


def test_find_refuses_folders_without_images(tmp_path):
    with pytest.raises(images.ImageError, match="no image in this folder"):
        images.find([str(tmp_path)])
    with pytest.raises(images.ImageError, match="no image was named"):
        images.find([])


def test_photographs_of_scikit_image(tmp_path, picture, monkeypatch):
    data = pytest.importorskip("skimage.data", reason="scikit-image is optional")
    monkeypatch.chdir(tmp_path)
    for name in ("skimage:chelsea", "chelsea"):
        (source,) = images.find([name])
        assert source.name == "chelsea"
        assert torch.equal(
            images.read(source.path, images.to_tensor), images.to_tensor(Image.fromarray(data.chelsea()))
        )
    Image.fromarray(picture).save(tmp_path / "chelsea", format="PNG")
    (own,) = images.find(["chelsea"])
    assert images.read(own.path, images.to_tensor).shape == (3, 6, 9)


def test_image_id_is_a_function_of_the_values():
    x = torch.rand(3, 5, 7)
    expected = hashlib.sha256(x.numpy().tobytes()).digest()[:4]
    assert images.image_id(x) == int.from_bytes(expected, "big")
    assert images.image_id(x.transpose(1, 2).contiguous().transpose(1, 2)) == images.image_id(x)
    x[0, 0, 0] += 1e-3
    assert images.image_id(x) != int.from_bytes(expected, "big")


def rgba(hidden):
    """uint8 [6, 9, 4], whose left third cannot be seen and has that colour."""
    pixels = np.arange(6 * 9 * 4, dtype=np.uint8).reshape(6, 9, 4)
    pixels[..., 3] = 255
    pixels[:, :3] = (*hidden, 0)
    return pixels


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB key", "L key", "array", "half"])
def test_transparent_parts_are_white_whatever_colour_they_hide(tmp_path, kind):
    found = []
    for index, hidden in enumerate([(0, 0, 0), (200, 10, 90)]):
        path, pixels = tmp_path / f"{index}.png", rgba(hidden)
        image = Image.fromarray(pixels)
        if kind == "LA":
            image.convert("LA").save(path)
        elif kind == "P":
            image = Image.fromarray(pixels[..., :3]).quantize(64)
            image.save(path, transparency=image.getpixel((0, 0)))
        elif kind == "RGB key":
            image.convert("RGB").save(path, transparency=hidden)
        elif kind == "L key":
            image = image.convert("L")
            image.save(path, transparency=image.getpixel((0, 0)))
        elif kind == "array":
            path = path.with_suffix(".npy")
            np.save(path, pixels)
        else:
            if kind == "half":
                pixels[:, :3] = (0, 0, 0, 128)
            Image.fromarray(pixels).save(path)
        found.append(images.read(path, images.to_tensor))
    seen = found[0][:, :, :3]
    if kind == "half":
        assert seen.unique().tolist() == pytest.approx([127 / 255])
    else:
        assert torch.equal(seen, torch.ones_like(seen))
    if kind != "L key":  # there the visible part holds the hidden grey too
        assert torch.equal(found[0][:, :, :3], found[1][:, :, :3])
    if kind in ("RGBA", "array"):
        visible = torch.from_numpy(rgba((0, 0, 0))[:, 3:, :3].copy()).permute(2, 0, 1).float() / 255
        assert torch.equal(found[0][:, :, 3:], visible)


def png16(colour, channels):
    """A PNG of 4 x 4 pixels with 16 bits per channel, which Pillow cannot write."""
    rows = b"".join(b"\0" + np.arange(4 * channels, dtype=">u2").tobytes() for _ in range(4))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("grey.png", png16(0, 1)),
        ("rgb.png", png16(2, 3)),
        ("grey_alpha.png", png16(4, 2)),
        ("rgba.png", png16(6, 4)),
        ("rgb.ppm", b"P6 2 2 65535\n" + bytes(24)),
        ("grey.ppm", b"P5 2 2 65535\n" + bytes(8)),
    ],
)
def test_16_bits_are_refused_in_every_mode(tmp_path, name, content):
    """Pillow cuts some of them to 8 without a word."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(images.ImageError, match=rf"{name}: more than 8 bits"):
        images.read(tmp_path / name, images.to_tensor)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, kind):
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"a.{kind}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "webp" else {}))
    x = images.read(path, images.to_tensor)
    assert torch.equal(x, torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 4, 5))


def test_many_files_of_one_stem_are_told_apart_in_linear_time(tmp_path):
    for index in range(300):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "a.png").write_bytes(b"x")
    (tmp_path / "a-2.png").write_bytes(b"x")
    found = images.find([str(tmp_path / "a-2.png"), *(str(tmp_path / str(index)) for index in range(300))])
    names = [source.name for source in found]
    assert names[:4] == ["a-2", "a", "a-3", "a-4"]
    assert len(set(names)) == 301

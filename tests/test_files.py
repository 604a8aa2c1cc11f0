"""Certificate files: what is written is read back, and nothing else is."""

import dataclasses
import json
import os

import pytest
import torch

from robattr_fast.certificates.certificate import files
from robattr_fast.certificates.certificate.certificate import Certificate
from robattr_fast.certificates.settings import Evaluation, Settings
from robattr_fast.errors import CertificateFileError

pytestmark = pytest.mark.once

SETTINGS = Settings(
    sigma=0.25,
    shape=(1, 2, 2),
    levels=3,
    tau=0.1,
    gamma=0.05,
    explain="gradient",
    seed=2**64 - 1,
    stream_version=1,
    image_ids=(5, 2**32 - 1),
    intervals=(((0, 3), (7, 14)), ((0, 12),)),
    planned_samples=(10, 12),
    input_hashes=("aa", "bb"),
    model_fingerprint="cc",
    on_nonfinite="abstain",
    device="cpu",
    batch_size=4,
    backends={"sparsify": "reference"},
    versions={"torch": "2"},
)


def example(settings: Settings = SETTINGS) -> Certificate:
    counts = torch.arange(24, dtype=torch.int32).view(2, 4, 3) % 4
    return Certificate(
        counts=counts,
        samples=torch.tensor([10, 12]),
        invalid=torch.tensor([0, 2], dtype=torch.int32),
        class_counts=torch.tensor([[9, 1], [4, 6]], dtype=torch.int32),
        settings=settings,
    )


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "a.safetensors"
    example().save(path)
    return path


@pytest.mark.parametrize("exploration", [None, Evaluation(0.01, "kl", 1, False)])
def test_round_trip(tmp_path, exploration):
    first = example(dataclasses.replace(SETTINGS, exploration=exploration))
    first.save(tmp_path / "a")
    second = Certificate.load(tmp_path / "a")
    assert second.settings == first.settings
    for name in ("counts", "samples", "invalid", "class_counts", "map", "lower", "upper"):
        assert torch.equal(getattr(second, name), getattr(first, name))
    second.save(tmp_path / "b")
    assert Certificate.load(tmp_path / "b").settings == first.settings
    assert second.exploratory == (exploration is not None)


def test_sums_round_trip(tmp_path):
    settings = Settings(sigma=1.0, shape=(2,), levels=None, bound="kl")
    first = Certificate(
        sums=torch.tensor([[0.5, 3.25]], dtype=torch.float64), samples=torch.tensor([4]), settings=settings
    )
    first.save(tmp_path / "a")
    assert torch.equal(Certificate.load(tmp_path / "a").sums, first.sums)


def test_manifest_is_plain_json(saved):
    data = saved.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    manifest = json.loads(header["__metadata__"]["manifest"])
    assert manifest["seed"] == 2**64 - 1
    assert manifest["intervals"] == [[[0, 3], [7, 14]], [[0, 12]]]
    assert manifest["ledger"]["marginal"] == pytest.approx(0.045)
    assert header["counts"]["dtype"] == "I32"


@pytest.mark.parametrize("flip", [0x01, 0x20])
def test_any_changed_byte_is_noticed(saved, flip):
    data = bytearray(saved.read_bytes())
    for position in range(len(data)):
        data[position] ^= flip
        saved.write_bytes(data)
        with pytest.raises(CertificateFileError, match=r"a\.safetensors"):
            Certificate.load(saved)
        data[position] ^= flip


def test_any_truncation_and_any_addition_is_noticed(saved):
    data = saved.read_bytes()
    for length in range(0, len(data), 7):
        saved.write_bytes(data[:length])
        with pytest.raises(CertificateFileError, match=r"a\.safetensors"):
            Certificate.load(saved)
    saved.write_bytes(data + b"\0")
    with pytest.raises(CertificateFileError, match="damaged"):
        Certificate.load(saved)


@pytest.mark.parametrize("size", [files.MAX_HEADER + 1, 2**40, 2**64 - 1])
def test_header_bomb(saved, size):
    saved.write_bytes(size.to_bytes(8, "little") + b"{" * 100)
    with pytest.raises(CertificateFileError, match="header of"):
        Certificate.load(saved)


@pytest.mark.parametrize("header", [b"[" * 200_000, b"{}", b"[]", b'{"__metadata__": 3}', b"\xff\xfe"])
def test_header_that_is_no_manifest(saved, header):
    saved.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CertificateFileError, match="not a certificate"):
        Certificate.load(saved)


def test_manifest_too_long_for_a_header(tmp_path):
    manifest = {"x": "y" * files.MAX_HEADER}
    files.save(tmp_path / "a", {"samples": torch.tensor([1])}, manifest)
    assert files.load(tmp_path / "a") == ({"samples": torch.tensor([1])}, manifest)


def rewrite(path, tensors=None, manifest=None, *, drop=()) -> None:
    """Writes other contents with a checksum that is right."""
    old_tensors, old_manifest = files.load(path)
    new = {name: tensor for name, tensor in {**old_tensors, **(tensors or {})}.items() if name not in drop}
    files.save(path, new, {k: v for k, v in {**old_manifest, **(manifest or {})}.items() if k not in drop})


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"counts": torch.zeros(2, 4, 2, dtype=torch.int32)}, "counts must have shape"),
        ({"counts": torch.zeros(2, 5, 3, dtype=torch.int32)}, "counts must have shape"),
        ({"counts": torch.zeros(2, 4, 3, dtype=torch.int64)}, "counts must be"),
        ({"counts": torch.full((2, 4, 3), 4, dtype=torch.int32)}, "exceed"),
        ({"counts": torch.full((2, 4, 3), -1, dtype=torch.int32)}, "negative"),
        ({"samples": torch.tensor([10, 13])}, "intervals"),
        ({"samples": torch.tensor([10])}, "shape"),
        ({"invalid": torch.tensor([0, -1], dtype=torch.int32)}, "invalid"),
        ({"class_counts": torch.tensor([[9, 2], [4, 6]], dtype=torch.int32)}, "class_counts"),
        ({"sums": torch.zeros(2, 4, dtype=torch.float64)}, "counts alone"),
        ({"stowaway": torch.zeros(1)}, "stowaway"),
    ],
)
def test_tensors_that_contradict(saved, tensors, words):
    rewrite(saved, tensors)
    with pytest.raises(CertificateFileError, match=rf"a\.safetensors.*{words}"):
        Certificate.load(saved)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ({"shape": [1, 2, 3]}, "counts must have shape"),
        ({"shape": "flat"}, "wrong type"),
        ({"levels": 15}, "counts must have shape"),
        ({"sigma": -1.0}, "sigma"),
        ({"sigma": "wide"}, "sigma"),
        ({"alpha": 2.0}, "alpha"),
        ({"alpha": 0.01}, "ledger"),
        ({"bound": "none"}, "bound"),
        ({"second_moment": True}, "ledger"),
        ({"intervals": [[[0, 3], [2, 9]], [[0, 12]]]}, "intervals"),
        ({"intervals": 3}, "wrong type"),
        ({"image_ids": [1]}, "per image"),
        ({"ledger": None}, "ledger"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_manifests_that_contradict(saved, manifest, words):
    rewrite(saved, manifest=manifest)
    with pytest.raises(CertificateFileError, match=rf"a\.safetensors.*{words}"):
        Certificate.load(saved)


@pytest.mark.parametrize("name", ["samples", "counts", "sigma", "shape", "ledger"])
def test_parts_that_are_missing(saved, name):
    rewrite(saved, drop=(name,))
    with pytest.raises(CertificateFileError, match=r"a\.safetensors"):
        Certificate.load(saved)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(saved, monkeypatch, step):
    before = saved.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"):
        example().save(saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        Certificate.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        example().save(tmp_path / "no folder" / "a")
